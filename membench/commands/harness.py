"""Saved models on public benchmarks, with EleutherAI's lm-evaluation-harness (Gao et al., 2024, zenodo.12608602)."""

from __future__ import annotations

import fcntl
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from importlib import metadata, util
from pathlib import Path
from typing import Any

from membench.config.errors import UserError
from membench.config.options import EvaluationOptions
from membench.runs.model_folder import CONFIG
from reports import record
from reports.names import suggestion
from tasks.models.checks import check_complete, check_loaded, check_one_set, of_layers
from tasks.models.damage import is_out_of_memory, reason_of, said_in_a_sentence
from tasks.models.loading import quiet
from tasks.models.source import entries_of, ids_of

GENERATION = "generation_config.json"

# The names that papers use, and the harness's own.
BENCHMARKS: dict[str, tuple[str, ...]] = {
    "mmlu": ("mmlu",),
    "mmlu-pro": ("mmlu_pro",),
    "agieval": ("agieval",),
    "arc": ("arc_easy", "arc_challenge"),
    "boolq": ("boolq",),
    "openbookqa": ("openbookqa",),
    "piqa": ("piqa",),
    "siqa": ("social_iqa",),
    "hellaswag": ("hellaswag",),
    "winogrande": ("winogrande",),
    "gsm8k": ("gsm8k",),
    "math": ("hendrycks_math",),
    "ifeval": ("ifeval",),
    "humaneval": ("humaneval",),
    "mbpp": ("mbpp",),
}
RUN_CODE = ("humaneval", "mbpp")  # prefixes of tasks that execute what the model wrote


def find_models(folder: Path) -> list[Path]:
    """The folder itself if it is a transformers model, else the models in it.

    Raises:
        UserError: there is none.
    """
    if (folder / CONFIG).is_file():
        return [folder.resolve()]
    found = sorted(path.parent.resolve() for path in folder.glob(f"*/{CONFIG}") if not path.parent.name.startswith("."))
    if not found:
        raise UserError(
            f"{folder}: neither a transformers model (with a {CONFIG}) nor a folder of them, as --save writes it"
        )
    return found


def check_request(models: Sequence[Path], request: EvaluationOptions) -> None:
    """Refuse what can't work before anything is scored.

    Raises:
        UserError: the harness isn't installed, a task needs permission to run code, a model isn't causal or whole,
            or what lies in the place of its record isn't one.
    """
    if util.find_spec("lm_eval") is None:
        raise UserError(
            "membench evaluate needs lm-evaluation-harness, which isn't installed: pip install 'membench[eval]'"
        )
    for name in request.tasks:
        if name.startswith(RUN_CODE) and not request.run_code:
            raise UserError(
                f"--tasks {name}: it runs code written by the model on this machine: allow it with --run-code"
            )
    for model in models:
        try:
            _check_model(model)
            if _record_of(model).exists():
                record.load(_record_of(model))
        except ValueError as error:
            raise UserError(str(error)) from error


def _check_model(model: Path) -> None:
    """Refuse a folder whose scores would be another model's: transformers fills in what is missing with random weights,
    and the harness takes that as it is. Nothing but names and shapes is read of the weights.

    Raises:
        ValueError: it isn't a causal model, or a part of it is missing, damaged or another model's.
    """
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    def border(what: str = "model") -> AbstractContextManager[None]:
        return said_in_a_sentence(what, model.name, "the folder as it was saved", folder=str(model))

    check_one_set(model.name, model)
    given: dict[str, Any] = {"trust_remote_code": False}  # as the harness; or transformers would ask
    with border():
        config = transformers.AutoConfig.from_pretrained(model, **given)
        architectures = list(config.architectures or [])
    if not set(architectures) & set(CAUSAL.values()):
        raise ValueError(
            f"{model}: a {', '.join(architectures) or 'model of unknown class'} can't be evaluated: "
            "the benchmarks are for causal language models"
        )
    with border("tokenizer"), quiet():
        tokenizer = transformers.AutoTokenizer.from_pretrained(model, **given)
        if len(tokenizer) <= len(tokenizer.all_special_tokens):  # transformers makes an empty one if files are missing
            raise ValueError("its files are missing")
    if getattr(config, "quantization_config", None):  # the packed weights have names and shapes of their own
        return
    with border(), quiet():
        if (model / GENERATION).exists():  # which transformers leaves out if it can't be read
            transformers.GenerationConfig.from_pretrained(model)
        kind: Any = transformers.AutoModelForCausalLM
        loaded, report = kind.from_pretrained(
            model, device_map="meta", output_loading_info=True, ignore_mismatched_sizes=True, **given
        )
    _check_weights(model.name, loaded, report)
    entries = entries_of(loaded)
    if entries is not None and ids_of(tokenizer) > entries:
        raise ValueError(
            f"{model}: its tokenizer has {ids_of(tokenizer):,} entries, but the model only {entries:,} embeddings: "
            "put the tokenizer that belongs to the model there"
        )


def _check_weights(name: str, loaded: Any, report: Mapping[str, Any]) -> None:
    """Raises ValueError unless a checkpoint has all of a model's weights, and no more layers than it."""
    unexpected = sorted(report["unexpected_keys"])
    check_complete(name, unexpected)
    shapes = {key: shapes for key, *shapes in report["mismatched_keys"]}
    check_loaded(name, loaded, {*report["missing_keys"], *shapes}, shapes, to_train=False)
    beyond = of_layers(loaded, unexpected)
    if beyond:
        raise ValueError(
            f"the weights of {name!r} don't match its config.json: {len(beyond):,} tensors of layers aren't in it "
            f"({beyond[0]}), and would be left out; give the folder as it was saved"
        )


def _record_of(model: Path) -> Path:
    """Where the record of a saved model is, if it has one."""
    return model.with_name(f"{model.name}.json")


def index(request: EvaluationOptions) -> Any:
    """The harness's TaskManager, an index of all its tasks and the user's own. Takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=request.include)


def evaluate(model: Path, names: Sequence[str], request: EvaluationOptions, manager: Any) -> dict[str, Any]:
    """The scores of a model, in the form of a record's `benchmarks`.

    Args:
        model: folder.
        names: the harness's names, see `resolve`.
        request: how to evaluate.
        manager: see `index`.

    Raises:
        UserError: the harness can't carry out a task with the model, or the memory doesn't suffice.
    """
    import lm_eval

    from membench.runs.prepare import find_device

    if request.run_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"  # required by the metric that runs it
    try:
        results = lm_eval.simple_evaluate(
            model="hf",
            model_args={"pretrained": str(model)},
            tasks=list(names),
            num_fewshot=request.fewshot,
            batch_size=request.batch_size,
            device=str(find_device(request.device)),
            limit=request.limit,
            apply_chat_template=request.chat_template,
            log_samples=False,
            task_manager=manager,
            confirm_run_unsafe_code=request.run_code,
        )
    except Exception as error:  # no network, no such data set, a template or a split that the data don't have
        tried = f"{model.name} on {', '.join(names)}"
        if is_out_of_memory(error):
            way_out = f"out of memory with --batch-size {request.batch_size}: give a smaller one, or another --device"
            raise UserError(f"{tried}: {way_out}") from error
        raise UserError(f"{tried}: {reason_of(error)}") from error
    return summarize(results, names, request)


def resolve(tasks: Sequence[str], known: Sequence[str]) -> list[str]:
    """The harness's names for `tasks`. Raises UserError for an unknown one, with the nearest name."""
    names = list(dict.fromkeys(name for task in tasks for name in BENCHMARKS.get(task, (task,))))
    for name in set(names) - set(known):
        hint = suggestion(name, BENCHMARKS, unlisted=known)
        raise UserError(f"--tasks {name}: there is no such benchmark. {hint}, and the harness's own")
    return names


def summarize(results: Mapping[str, Any], names: Sequence[str], request: EvaluationOptions) -> dict[str, Any]:
    """The results that a record keeps: for the requested tasks, and for members of groups that have no score.

    A task has no score, nor has any member of it, if the harness knows none of its metrics: it passes over them.
    """
    return {name: _entry(results, name, request) for asked in names for name in _scored(results, asked) or [asked]}


def _scored(results: Mapping[str, Any], name: str) -> list[str]:
    if _scores(results["results"].get(name, {})):
        return [name]
    return [task for member in results["group_subtasks"].get(name, []) for task in _scored(results, member)]


def _entry(results: Mapping[str, Any], name: str, request: EvaluationOptions) -> dict[str, Any]:
    found = results["results"].get(name, {})
    version = results["versions"].get(name)
    return {
        "scores": _scores(found),
        "standard_errors": _scores(found, errors=True),
        "fewshot": results["n-shot"].get(name),
        "limit": request.limit,
        "chat_template": request.chat_template,
        "version": None if version is None else str(version),
        "harness": metadata.version("lm_eval"),
    }


def _scores(found: Mapping[str, Any], *, errors: bool = False) -> dict[str, float]:
    """The harness writes "METRIC,FILTER" and "METRIC_stderr,FILTER"; "none" means no filter."""
    scores = {}
    for key, value in found.items():
        metric, comma, kind = key.partition(",")
        if comma and isinstance(value, int | float) and metric.endswith("_stderr") == errors:
            scores[metric.removesuffix("_stderr") + ("" if kind == "none" else f",{kind}")] = float(value)
    return scores


def add_to_record(model: Path, benchmarks: Mapping[str, Any]) -> list[str] | None:
    """Put scores into the record beside a saved model; None if it has no record.

    Those on fewer documents replace none: returns the names of which the record has more.

    Raises:
        UserError: the file with the record's name isn't a record.
    """
    path = _record_of(model)
    if not path.exists():
        return None
    try:
        with _alone_in(path.parent):
            made = record.load(path)
            before = made.get("benchmarks") or {}
            fuller = [
                name
                for name, entry in benchmarks.items()
                if name in before and _documents(entry) < _documents(before[name])
            ]
            new = {name: entry for name, entry in benchmarks.items() if name not in fuller}
            record.rewrite({**made, "benchmarks": {**before, **new}}, path)
    except ValueError as error:
        raise UserError(str(error)) from error
    return fuller


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Wait until no other command adds scores there, or one would lose those that another has added meanwhile."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some disks of a network have no locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _documents(entry: Mapping[str, Any]) -> float:
    """Of each task, at most."""
    return math.inf if entry["limit"] is None else entry["limit"]
