"""Tasks: each builds a model, makes batches, computes a loss and scores. One family per package, all found by name.

    task = tasks.create("superglue/rte", model="config:roberta-tiny", batch_size=16, sequence_length=32)
    model = task.build_model()
    task.loss(model, task.batch(0)).backward()

Callers need only `available`, `expand` and `create`.
"""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from tasks import base, plugins
from tasks.base import (
    ComparesScores,
    Family,
    HasIdentity,
    HasKind,
    HasLargestBatch,
    HasLengths,
    HasReader,
    HasReference,
    HasValidation,
    Kind,
    Task,
    is_language_model,
    kind,
)
from tasks.models.arguments import TaskArguments
from tasks.plugins import module_of

__all__ = [
    "FAMILIES",
    "ComparesScores",
    "Family",
    "HasIdentity",
    "HasKind",
    "HasLargestBatch",
    "HasLengths",
    "HasReader",
    "HasReference",
    "HasValidation",
    "Kind",
    "Task",
    "TaskArguments",
    "available",
    "create",
    "expand",
    "is_language_model",
    "kind",
    "module_of",
]

# Modules of this package, imported when a task is requested: their metrics and data need packages that the models,
# the training loop and the planner don't.
FAMILIES = ("superglue", "c4", "instruct", "dpo", "classify")


def _ours() -> list[Any]:
    return [import_module(f"tasks.{name}") for name in FAMILIES]


def available() -> list[str]:
    """The names of all tasks that can be trained: ["superglue/boolq", ...], those of installed packages last."""
    return base.available([*_ours(), *plugins.installed()])


def _families(name: str) -> list[Family]:
    """Our families, and the third-party one that `name` asks for."""
    if ":" in name:
        return [*_ours(), plugins.at(name)]
    return [*_ours(), *plugins.installed(name.partition("/")[0])]


def expand(pattern: str, *, data: str = "demo") -> list[str]:
    """The tasks that `pattern` stands for: a family's name means all its tasks that `data` has; or one task's name.

    `package.module:Task` is a user's own task.

    Raises:
        ValueError: no task has that name (the nearest name is given), or `data` isn't a known source.
    """
    return base.expand(_families(pattern), pattern, data)


def create(name: str, *, options: Mapping[str, Any] | None = None, **given: Any) -> Task:
    """Build a task.

    Args:
        name: one of `available()`, or `package.module:Task`.
        options: options of this family, such as {"packing": True} for instruction tuning.
        given: see `TaskArguments`; `model`, `batch_size` and `sequence_length` have no default.

    Raises:
        ValueError: an argument is wrong, data or tokenizer is missing, or a line of the data is malformed.
        TypeError: an argument is missing or unknown.
    """
    family = base.check_name(_families(name), name)
    arguments = vars(TaskArguments(**given))
    return family.create(name.partition("/")[2], **arguments, **base.options(family, options or {}))
