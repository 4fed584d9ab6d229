"""The record of a run: one JSON file, its schema as a table, written atomically and checked whenever it is read.

A run that went wrong is a result too, so its record has the same fields. What it could not measure any more is null,
and only there may a measured field be null.
"""

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

from reports import files

Record = dict[str, Any]

VERSION = 1
STATUSES = ("ok", "failed", "out_of_memory", "diverged")
PARTS = ("weights", "gradients", "optimizer_state", "activations", "temporaries")  # of memory; fields are PART_bytes

# When may a field be null?
NEVER = "never"
UNLESS_OK = "unless ok"  # only in a record whose status isn't "ok"
ALWAYS = "always"
OPTIONAL = "optional"  # null or missing


class Field(NamedTuple):
    """One row of the schema. In a path, `[]` stands for every item of a list and `*` for every value of an object."""

    path: str
    types: tuple[type, ...]
    null: str
    comment: str  # the unit, or what it is


def _parts(place: str) -> list[Field]:
    return [Field(f"memory.{place}.{part}_bytes", (int,), UNLESS_OK, "bytes") for part in PARTS]


SCHEMA: tuple[Field, ...] = (
    Field("schema", (int,), NEVER, f"version of this table, {VERSION} today"),
    Field("run_id", (str,), NEVER, "<task>--<method>--<model>--s<seed>--<hash>, also the file's name"),
    Field("status", (str,), NEVER, " | ".join(STATUSES)),
    Field("error", (str,), ALWAYS, "the text of what went wrong; null if and only if the status is ok"),
    Field("task", (str,), NEVER, "superglue/rte, or package.module:Task"),
    Field("method", (str,), NEVER, "a name of the registry of optimizers, or package.module:Class"),
    Field("model", (str,), NEVER, "config:NAME (random weights), an id of the hub, or a folder"),
    Field("seed", (int,), NEVER, "of weights, batches and method"),
    Field("hyperparameters", (dict,), NEVER, "every one of the method's, resolved; later additions where used"),
    Field("training", (dict,), NEVER, "what every method of a comparison shares"),
    Field("training.steps", (int,), UNLESS_OK, "updates (null if the run failed before epochs became steps)"),
    Field("training.batch_size", (int,), NEVER, "examples an update"),
    Field("training.sequence_length", (int,), NEVER, "tokens an example, at most"),
    Field("training.gradient_accumulation_steps", (int,), NEVER, "micro-batches an update"),
    Field("training.dtype", (str,), NEVER, "of the weights"),
    Field("training.autocast", (str, bool), ALWAYS, "dtype of autocast; false or null without"),
    Field("training.schedule", (str,), NEVER, "of the learning rate"),
    Field("training.warmup_fraction", (float,), NEVER, "share of the steps"),
    Field("training.max_grad_norm", (float,), ALWAYS, "clipping by the loop; null without"),
    Field("training.gradient_checkpointing", (bool,), NEVER, "of every layer"),
    Field("training.data", (str,), NEVER, "demo | hub | a folder"),
    Field("training.weights", (str,), NEVER, "random | pretrained"),
    Field("training.profile", (str,), ALWAYS, "demo | paper"),
    Field("training.evaluate_every", (int,), ALWAYS, "steps; null: at the end only"),
    Field("training.final_fraction", (float,), OPTIONAL, "of the learning rate, where the schedule ends; 0 if missing"),
    Field("training.evaluate_before", (bool,), OPTIONAL, "also before the first step"),
    Field("training.options", (dict,), OPTIONAL, "of the task: those that were given"),
    Field("parameters", (int,), UNLESS_OK, "of the model as built, adapters left out"),
    Field("trainable_parameters", (int,), UNLESS_OK, "what the method may ever train"),
    Field("trained_fraction", (float,), UNLESS_OK, "share of the weights that changed at least once, 0..1"),
    Field("block_coverage", (float,), ALWAYS, "share of the blocks visited; null for a method without blocks"),
    Field("metrics", (dict,), UNLESS_OK, "the task's, at the end"),
    Field("metrics.*", (float,), UNLESS_OK, "as the task's own scale has it"),
    Field("initial_metrics", (dict,), OPTIONAL, "the task's, before the first step; null where that wasn't wanted"),
    Field("initial_metrics.*", (float,), UNLESS_OK, "as the task's own scale has it"),
    Field("benchmarks", (dict,), OPTIONAL, "by lm-evaluation-harness after training, by its names of tasks"),
    Field("benchmarks.*", (dict,), NEVER, "a task, or a group of them"),
    Field("benchmarks.*.scores", (dict,), NEVER, "by metric, with the filter of answers where there is one"),
    Field("benchmarks.*.scores.*", (float,), NEVER, "as the benchmark's own scale has it"),
    Field("benchmarks.*.standard_errors", (dict,), NEVER, "by metric, of those that have one"),
    Field("benchmarks.*.standard_errors.*", (float,), NEVER, "on the scale of the score"),
    Field("benchmarks.*.fewshot", (int,), ALWAYS, "examples in the prompt; null where a group's tasks differ"),
    Field("benchmarks.*.limit", (int,), ALWAYS, "documents of each task, at most; null: all"),
    Field("benchmarks.*.chat_template", (bool,), NEVER, "asked as in a chat"),
    Field("benchmarks.*.version", (str,), ALWAYS, "of the harness's task"),
    Field("benchmarks.*.harness", (str,), NEVER, "version of lm-eval"),
    Field("headline", (str,), UNLESS_OK, "the metric that tables rank by"),
    Field("higher_is_better", (bool,), UNLESS_OK, "whether more of the headline is better"),
    Field("history", (list,), NEVER, "in the order of the steps"),
    Field("history[]", (dict,), NEVER, "a step that was reported"),
    Field("history[].step", (int,), NEVER, "updates done, from 1"),
    Field("history[].tokens", (int,), NEVER, "seen since the start, padding left out"),
    Field("history[].seconds", (float,), NEVER, "of training alone, since the start"),
    Field("history[].loss", (float,), UNLESS_OK, "mean of the step; null where it wasn't finite"),
    Field("history[].learning_rate", (float,), NEVER, "of the first group"),
    Field("history[].metrics", (dict,), OPTIONAL, "only where it was evaluated"),
    Field("memory", (dict,), UNLESS_OK, "of training, never of evaluation"),
    Field("memory.peak_allocated_bytes", (int,), UNLESS_OK, "bytes, raw: not rounded as an allocator would"),
    Field("memory.at_peak", (dict,), UNLESS_OK, "what there is at the moment of the peak: adds up to it"),
    *_parts("at_peak"),
    Field("memory.maximum", (dict,), UNLESS_OK, "the same parts, each at its own maximum: don't add up"),
    *_parts("maximum"),
    Field("memory.peak_reserved_bytes", (int,), ALWAYS, "bytes, of the GPU's allocator; null without one"),
    Field("memory.process_peak_bytes", (int,), ALWAYS, "bytes, resident; null where the system doesn't say"),
    Field("memory.peak_phase", (str,), OPTIONAL, "forward | backward | update | switch"),
    Field("memory.peak_selection", (str,), OPTIONAL, "what was trained at the peak, in words"),
    Field("memory.peak_module", (str,), OPTIONAL, "the module that holds most at the peak"),
    Field("memory.components", (dict,), OPTIONAL, "bytes by component of the model (embeddings, attention, ...)"),
    Field("time", (dict,), UNLESS_OK, "of training without metering"),
    Field("time.train_seconds", (float,), UNLESS_OK, "seconds"),
    Field("time.evaluation_seconds", (float,), UNLESS_OK, "seconds"),
    Field("time.tokens_per_second", (float,), UNLESS_OK, "tokens a second of training, padding left out"),
    Field("time.forward_seconds", (float,), UNLESS_OK, "seconds, median of a step"),
    Field("time.backward_seconds", (float,), UNLESS_OK, "seconds, median of a step"),
    Field("time.update_seconds", (float,), UNLESS_OK, "seconds, median of a step"),
    Field("environment", (dict,), NEVER, "versions, device, threads, commit, revisions, created (UTC): any of them"),
)

_MISSING = object()
_WORDS = {int: "an integer", float: "a number", str: "a text", bool: "true or false", dict: "an object", list: "a list"}


def check(record: Record, where: str) -> None:
    """Raise a ValueError of one sentence, starting with `where`, if `record` isn't what the schema says."""
    if not isinstance(record, dict):
        raise ValueError(f"{where}: a record is a JSON object, not {_show(record)}.")
    version = record.get("schema")
    if version != VERSION:
        raise ValueError(f"{where}: schema version {_show(version)} is unknown, this membench reads version {VERSION}.")
    _check_finite(record, where)
    _check_below(record, _TREE, (), record.get("status") == "ok", where)
    _check_sense(record, where)


class _Node(NamedTuple):
    """What the schema says of a place, and of the places below it by key; `[]` is every item, `*` every value."""

    field: Field
    accepted: frozenset[type]
    below: dict[str, "_Node"]


def _tree() -> dict[str, _Node]:
    """The schema by keys, made once: a record's history alone has hundreds of values to check."""
    root: dict[str, _Node] = {}
    for field in SCHEMA:
        *parents, last = re.findall(r"[\w*]+|\[\]", field.path)
        place = root
        for key in parents:
            place = place[key].below
        accepted = field.types + ((int,) if float in field.types else ())  # 1 is as good a number as 1.0
        place[last] = _Node(field, frozenset(accepted), {})
    return root


_TREE = _tree()


def _check_below(value: Any, nodes: dict[str, _Node], path: tuple[Any, ...], ok: bool, where: str) -> None:
    for key, node in nodes.items():
        if key in ("[]", "*"):
            for name, item in enumerate(value) if key == "[]" else value.items():
                _check_value(item, node, (*path, name), ok, where)
        else:
            _check_value(value.get(key, _MISSING), node, (*path, key), ok, where)


def _check_value(value: Any, node: _Node, path: tuple[Any, ...], ok: bool, where: str) -> None:
    if type(value) not in node.accepted:  # true isn't a number: its type is bool
        _refuse_unless_null(node.field, path, value, ok, where)
    if node.below and value is not None and value is not _MISSING:  # what lies below a null is not looked for
        _check_below(value, node.below, path, ok, where)


def _refuse_unless_null(field: Field, path: tuple[Any, ...], value: Any, ok: bool, where: str) -> None:
    if value is _MISSING and field.null != OPTIONAL:
        raise ValueError(f"{where}: field {_place(path)!r} ({field.comment}) is missing.")
    if value is _MISSING or (value is None and field.null in (ALWAYS, OPTIONAL)):
        return
    if value is None and field.null == UNLESS_OK:
        if ok:
            raise ValueError(f"{where}: {_place(path)!r} is null, which it may only be in a run that isn't ok.")
        return
    wanted = " or ".join(_WORDS[kind] for kind in field.types)
    raise ValueError(f"{where}: {_place(path)!r} must be {wanted}, not {_show(value)}.")


def _place(path: tuple[Any, ...]) -> str:
    """`history[3].loss`"""
    words = [f"[{key}]" if isinstance(key, int) else f".{key}" for key in path]
    return "".join(words).removeprefix(".")


def _check_finite(record: Record, where: str) -> None:
    """NaN and infinity aren't JSON, wherever they are: an unknown value is null."""
    try:
        json.dumps(record, allow_nan=False)
    except (TypeError, ValueError):  # only then is it worth the walk to where it is
        _name_what_is_not_finite(record, "", where)


def _name_what_is_not_finite(value: Any, path: str, where: str) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where}: {path!r} is {value}, which JSON can't hold; an unknown value is null.")
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    for key, item in items:
        _name_what_is_not_finite(item, f"{path}.{key}" if path else str(key), where)


def _check_sense(record: Record, where: str) -> None:
    """What no single field can tell."""
    if record["status"] not in STATUSES:
        raise ValueError(f"{where}: 'status' must be one of {', '.join(STATUSES)}, not {_show(record['status'])}.")
    ok = record["status"] == "ok"
    if ok != (record["error"] is None):
        raise ValueError(f"{where}: 'error' is {_show(record['error'])}, but the status is {record['status']!r}.")
    if ok and record["headline"] not in record["metrics"]:
        raise ValueError(
            f"{where}: the headline {record['headline']!r} isn't among 'metrics' ({_list(record['metrics'])})."
        )
    memory = record["memory"]
    if memory is None or memory["at_peak"] is None or memory["peak_allocated_bytes"] is None:
        return
    parts = [memory["at_peak"][f"{part}_bytes"] for part in PARTS]
    if None not in parts and sum(parts) != memory["peak_allocated_bytes"]:
        peak = memory["peak_allocated_bytes"]
        raise ValueError(
            f"{where}: the parts of 'memory.at_peak' add up to {sum(parts)} bytes, but the peak is {peak}."
        )


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _list(names: Any) -> str:
    return ", ".join(sorted(names)) or "none"


def run_id(task: str, method: str, model: str, seed: int, configuration: dict[str, Any]) -> str:
    """Name a run so that the same run has the same name, always, and any other run another one.

    The hash (10 hex digits of a SHA-256) is of everything given here as canonical JSON: keys sorted, no blanks.

    Raises:
        ValueError: `configuration` holds something that isn't JSON (a NaN, an object).
    """
    try:
        whole = [task, method, model, seed, configuration]
        text = json.dumps(whole, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"The configuration of {method} on {task} isn't JSON: {error}.") from error
    digest = hashlib.sha256(text.encode()).hexdigest()[:10]
    return "--".join([*map(_file_name, (task, method, model)), f"s{seed}", digest])


def _file_name(name: str, longest: int = 48) -> str:
    """Letters, digits, _ and single hyphens; of a long name (a path) the end, which tells most."""
    return re.sub(r"[^A-Za-z0-9_]+", "-", name).strip("-")[-longest:].strip("-") or "x"


def write(record: Record, folder: Path | str) -> Path:
    """Check a record and write it to FOLDER/RUN_ID.json, so that at any moment there is all of it there, or nothing.

    Raises:
        ValueError: the record isn't what the schema says.
    """
    path = Path(folder) / f"{record.get('run_id')}.json"
    check(record, str(path))
    return files.write(path, (json.dumps(record, indent=1, allow_nan=False) + "\n").encode())


def load(path: Path | str) -> Record:
    """Read one record.

    Raises:
        ValueError: it can't be read, isn't JSON or isn't what the schema says; one sentence that names the file.
    """
    content = _parse(path)
    check(content, str(path))
    return content


def _parse(path: Path | str) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: can't be read: {error.strerror}.") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: malformed JSON, line {error.lineno} column {error.colno}: {error.msg}.") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text file in UTF-8.") from error
    except RecursionError as error:
        raise ValueError(f"{path}: malformed JSON: nested too deeply.") from error


class Found(NamedTuple):
    """What a folder or a file holds: records by task, model, method and seed; a sentence on each thing that is none."""

    records: list[Record]
    problems: list[str]


def read(place: Path | str) -> Found:
    """Read a folder's records (its *.json, hidden ones left out), or a file that holds one record or a list of them.

    What is no record doesn't keep the others from being read.

    Raises:
        ValueError: there is no such folder or file.
    """
    whole = Path(place)
    if not whole.exists():
        raise ValueError(f"{place}: no such file or folder of records.")
    found = Found([], [])
    for path in [whole] if whole.is_file() else _files(whole):
        _add(path, found, listed=path == whole)
    return Found(sorted(found.records, key=_order), found.problems)


def _add(path: Path, found: Found, *, listed: bool) -> None:
    """Add a file's record to what was `found`, or what is wrong with it; a `listed` one may hold several."""
    try:
        content = _parse(path)
    except ValueError as error:
        found.problems.append(str(error))
        return
    several = listed and isinstance(content, list)
    for number, item in enumerate(content if several else [content], 1):
        try:
            check(item, f"{path}, record {number}" if several else str(path))
            found.records.append(item)
        except ValueError as error:
            found.problems.append(str(error))


def _files(folder: Path | str) -> list[Path]:
    return sorted(path for path in Path(folder).glob("*.json") if not path.name.startswith("."))


def load_folder(folder: Path | str) -> list[Record]:
    """Read every record of a folder, in the order of task, model, method, seed.

    Raises:
        ValueError: there is no such folder, or one of its files is no record.
    """
    if not Path(folder).is_dir():
        raise ValueError(f"{folder}: no such folder of records.")
    return sorted(map(load, _files(folder)), key=_order)


def _order(record: Record) -> tuple[Any, ...]:
    return tuple(record[key] for key in ("task", "model", "method", "seed", "run_id"))
