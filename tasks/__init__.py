"""Tasks: each builds a model, makes batches, computes a loss and scores. One family a module, all by name.

    task = tasks.create("superglue/rte", model="config:roberta-tiny", batch_size=16, sequence_length=32)
    model = task.build_model()
    task.loss(model, task.batch(0)).backward()

`available`, `expand` and `create` are all that others need.
"""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from tasks import base, plugins
from tasks.base import Family, HasKind, HasReader, Kind, Task, kind

__all__ = ["FAMILIES", "Family", "HasKind", "HasReader", "Kind", "Task", "available", "create", "expand", "kind"]

# Modules of this package, imported when a task is asked for: their metrics and data need packages that the models,
# the training loop and the planner do without.
FAMILIES = ("superglue", "c4", "instruct", "classify")


def _ours() -> list[Any]:
    return [import_module(f"tasks.{name}") for name in FAMILIES]


def available() -> list[str]:
    """The names of all tasks that can be trained: ["superglue/boolq", ...], those of installed packages at the end."""
    return base.available([*_ours(), *plugins.installed()])


def _families(name: str) -> list[Family]:
    """Ours, and the one of somebody else's that `name` asks for."""
    if ":" in name:
        return [*_ours(), plugins.at(name)]
    return [*_ours(), *plugins.installed(name.partition("/")[0])]


def expand(pattern: str, *, data: str = "demo") -> list[str]:
    """The tasks that `pattern` stands for: a family's name for all its tasks that `data` has, or one task's name.

    `package.module:Task` is a task of the user's plugins.

    Raises:
        ValueError: no task is called so (with the nearest name), or `data` is no known source.
    """
    return base.expand(_families(pattern), pattern, data)


def create(
    name: str,
    *,
    model: str,
    tokenizer: str | None = None,
    data: str = "demo",
    batch_size: int,
    sequence_length: int,
    seed: int = 0,
    dtype: str = "float32",
    trust_remote_code: bool = False,
    options: Mapping[str, Any] | None = None,
) -> Task:
    """Build a task.

    Args:
        name: one of `available()`, or `package.module:Task`.
        model: `config:NAME` (random weights), an id of the hub (`ID` or `ID@REVISION`), or a folder.
        tokenizer: an id of the hub or a folder; by default what belongs to the model.
        data: "demo", "hub" or a folder in the data set's official format.
        batch_size: examples a batch (an example of multiple choice is one sequence a choice).
        sequence_length: tokens of a sequence; longer texts are cut, shorter ones padded.
        seed: of the random weights and of the batches.
        dtype: of the weights, "float32", "bfloat16" or "float16".
        trust_remote_code: run code that comes with a model of the hub.
        options: what only this family knows, such as {"packing": True} of instruction tuning.

    Raises:
        ValueError: an argument is wrong, data or tokenizer is missing, or a line of the data is malformed.
    """
    given: dict[str, Any] = {
        "model": model,
        "tokenizer": tokenizer,
        "data": data,
        "batch_size": batch_size,
        "sequence_length": sequence_length,
        "seed": seed,
        "dtype": dtype,
        "trust_remote_code": trust_remote_code,
    }
    family = base.check_name(_families(name), name)
    return family.create(name.partition("/")[2], **given, **base.options(family, options or {}))
