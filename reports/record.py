"""The record of a run: one JSON file, written atomically and checked against its schema whenever it is read."""

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from reports import files
from reports.names import printable
from reports.parts import PARTS
from reports.schema import ALWAYS, LARGEST, OPTIONAL, SCHEMA, STATUSES, UNLESS_OK, VERSION, Field

Record = dict[str, Any]

MOST_FAULTS = 20  # that are told of a folder
REFUSAL = "can't: "  # how the error of a run begins that can't work with its model, its data or its other settings

_TOLERABLE_WAIT = 0.1
_LONGEST_ID = 230  # bytes: a file's name has 255, and .json and what marks an unfinished one take some

# Metrics that are shares of examples, or means of such, and the tasks of ours; on whose scale another's are, it knows.
_SHARES = ("accuracy", "em", "exact_match", "f1", "f1a", "macro_f1", "token_accuracy")
_TASKS = ("superglue", "classify", "instruct", "dpo", "c4")
_MISSING = object()
_WORDS = {int: "an integer", float: "a number", str: "a text", bool: "true or false", dict: "an object", list: "a list"}


def how_it_ended(run: Record) -> str:
    """Its status; "refused" for a failure before the run began, by a method or a task that can't work so."""
    return "refused" if (run["error"] or "").startswith(REFUSAL) else run["status"]


def had_device_alone(run: Record) -> bool:
    """Was no other run of the comparison made beside it?"""
    return (run["environment"].get("jobs") or 1) == 1


def tokens_per_second(runs: Iterable[Record]) -> float | None:
    """Of runs that have times, all together: all tokens over all training time; None of none."""
    times = [run["time"] for run in runs]
    seconds = sum(time["train_seconds"] for time in times)
    return sum(time["tokens_per_second"] * time["train_seconds"] for time in times) / seconds if seconds else None


def has_true_times(run: Record) -> bool:
    """Whether its times tell something: it had its device alone, and the same processes made all its steps."""
    return had_device_alone(run) and not run.get("made_by")


def undue_waiting(run: Record) -> float:
    """How long its threads waited for processors that were taken, as a share of its training's time; 0 if that is at
    most a tenth, or unknown."""
    time = run["time"] or {}
    waited, trained = time.get("waited_seconds"), time.get("train_seconds")
    share = min(1.0, waited / trained) if waited and trained else 0.0  # several threads wait at once
    return share if share > _TOLERABLE_WAIT else 0.0


def check(record: Record, where: str) -> None:
    """Raise a ValueError of one sentence, starting with `where`, if `record` isn't what the schema says."""
    try:
        _check(record, where)
    except RecursionError as error:
        raise ValueError(f"{where}: nested too deeply.") from error


def _check(record: Record, where: str) -> None:
    if not isinstance(record, dict):
        raise ValueError(f"{where}: a record is a JSON object, not {_show(record)}.")
    version = record.get("schema")
    if version != VERSION:
        raise ValueError(f"{where}: schema version {_show(version)} is unknown, this membench reads version {VERSION}.")
    _check_numbers(record, where)
    _check_below(record, _TREE, (), record.get("status") == "ok", where)
    _check_sense(record, where)


class _Node(NamedTuple):
    """What the schema says of a place, and of the places below it by key; `[]` is every item, `*` every value."""

    field: Field
    accepted: frozenset[type]
    bounds: tuple[float, float] | None  # of a number
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
        bounds = (field.least, field.most) if int in accepted else None
        place[last] = _Node(field, frozenset(accepted), bounds, {})
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
    elif node.bounds and not node.bounds[0] <= value <= node.bounds[1]:
        least, most = node.bounds
        wanted = f"at least {least:g} and at most {most:g}"
        raise ValueError(f"{where}: {_place(path)!r} ({node.field.comment}) must be {wanted}, not {_show(value)}.")
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


def _check_numbers(record: Record, where: str) -> None:
    """NaN and infinity aren't JSON, wherever they are: an unknown value is null. Nor does anybody count beyond 2^63."""
    try:
        json.dumps(record, allow_nan=False)
        walked = {name: value for name, value in record.items() if name != "history"}  # long, and the schema bounds it
    except (TypeError, ValueError):
        walked = record
    _name_what_is_no_number(walked, "", where)


def _name_what_is_no_number(value: Any, path: str, where: str) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where}: {path!r} is {value}, which JSON can't hold; an unknown value is null.")
    if isinstance(value, int) and abs(value) > LARGEST:
        raise ValueError(f"{where}: {path!r} is a whole number beyond 2^63, which nothing here can be.")
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    for key, item in items:
        _name_what_is_no_number(item, f"{path}.{key}" if path else str(key), where)


def _check_sense(record: Record, where: str) -> None:
    """What no single field can tell."""
    if record["status"] not in STATUSES:
        raise ValueError(f"{where}: 'status' must be one of {', '.join(STATUSES)}, not {_show(record['status'])}.")
    if not is_file_name(record["run_id"]):
        raise ValueError(f"{where}: 'run_id' must be the name of a file, not {_show(record['run_id'])}.")
    ok = record["status"] == "ok"
    if ok != (record["error"] is None):
        raise ValueError(f"{where}: 'error' is {_show(record['error'])}, but the status is {record['status']!r}.")
    if ok and record["headline"] not in record["metrics"]:
        raise ValueError(
            f"{where}: the headline {record['headline']!r} isn't among 'metrics' ({_list(record['metrics'])})."
        )
    _check_shares(record, where)
    memory = record["memory"]
    if memory is None or memory["at_peak"] is None or memory["peak_allocated_bytes"] is None:
        return
    parts = [part.of(memory["at_peak"]) for part in PARTS]
    if None not in memory["at_peak"].values() and sum(parts) != memory["peak_allocated_bytes"]:
        peak = memory["peak_allocated_bytes"]
        raise ValueError(
            f"{where}: the parts of 'memory.at_peak' add up to {sum(parts)} bytes, but the peak is {peak}."
        )


def _check_shares(record: Record, where: str) -> None:
    if record["task"].partition("/")[0] not in _TASKS:
        return
    places = {"metrics": record["metrics"], "initial_metrics": record.get("initial_metrics")}
    places |= {f"history[{number}].metrics": row.get("metrics") for number, row in enumerate(record["history"])}
    places["constant_score"] = {record["headline"]: record.get("constant_score")}
    for place, metrics in places.items():
        for name in _SHARES:
            value = (metrics or {}).get(name)
            if isinstance(value, int | float) and not 0 <= value <= 1:
                raise ValueError(f"{where}: {name!r} in {place!r} is a share, between 0 and 1, not {_show(value)}.")


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _list(names: Any) -> str:
    return ", ".join(sorted(names)) or "none"


def is_file_name(run_id: str) -> bool:
    """Whether `RUN_ID.json` lies in the folder it is put into, where readers look for it and every system takes it."""
    length = len(run_id.encode(errors="replace"))
    return 0 < length <= _LONGEST_ID and not run_id.startswith(".") and not {"/", "\0"} & {*run_id}


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
        ValueError: the record isn't what the schema says, or its name is none of a file that readers look for.
    """
    return rewrite(record, Path(folder) / f"{record.get('run_id')}.json")


def rewrite(record: Record, path: Path) -> Path:
    """The same to a given file, such as that which a record was read from: users may have given it another name.

    Raises:
        ValueError: the record isn't what the schema says.
    """
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
    if Path(path).exists() and not (Path(path).is_file() or Path(path).is_dir()):  # reading might never end
        raise ValueError(f"{path}: can't be read: it is a pipe or a device, not a file.")
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        content = json.loads(text, object_pairs_hook=_object)
        return _readable(content) if _ODD.search(text) else content
    except OSError as error:
        raise ValueError(f"{path}: can't be read: {error.strerror}.") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: malformed JSON, line {error.lineno} column {error.colno}: {error.msg}.") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text file in UTF-8.") from error
    except RecursionError as error:
        raise ValueError(f"{path}: malformed JSON: nested too deeply.") from error
    except _TwiceError as error:
        raise ValueError(f"{path}: an object has {printable(str(error))!r} twice.") from error
    except ValueError as error:  # Python reads no number of thousands of digits
        raise ValueError(f"{path}: malformed JSON: a number with too many digits.") from error


_ODD = re.compile(r"\\|[^\t\r\n -~]")  # what may stand for a letter that a terminal doesn't show


class _TwiceError(ValueError):
    """A name that an object has twice: nobody can tell which of the values is meant."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise _TwiceError(next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1))
    return value


def _readable(value: Any, key: str = "") -> Any:
    """The same with texts that can be shown anywhere: no name of a record controls a terminal or breaks a table."""
    if isinstance(value, str):  # an error may have several lines
        return "\n".join(map(printable, value.split("\n"))) if key == "error" else printable(value)
    if isinstance(value, dict):
        return {printable(name): _readable(item, name) for name, item in value.items()}
    return [_readable(item) for item in value] if isinstance(value, list) else value


class Found(NamedTuple):
    """What a place holds: records by task, model, method and seed; and a sentence on each fault of what is none."""

    records: list[Record]
    problems: list[str]


def read(place: Path | str) -> Found:
    """Read a folder's records (its *.json, hidden ones left out), or a file that holds one record or a list of them.

    What is no record doesn't keep the others from being read. A folder that another takes the place of meanwhile, as
    that of a baseline, is read again: nothing found is half of one and half of the other.

    Raises:
        ValueError: there is no such folder or file.
    """
    whole = Path(place)
    while whole.exists():
        before = whole.stat().st_ino
        found = _read(whole)
        if whole.exists() and whole.stat().st_ino == before:
            return found
    raise ValueError(f"{place}: no such file or folder of records.")


def _read(whole: Path) -> Found:
    records: list[Record] = []
    faults: dict[str, list[str]] = {}  # where each of them is
    for path in [whole] if whole.is_file() else _files(whole):
        _add(path, records, faults, listed=path == whole)
    return Found(_without_copies(sorted(records, key=_order)), _told(faults))


def _without_copies(records: list[Record]) -> list[Record]:
    """Each once: a file that was copied beside itself is no other run, nor an older one."""
    kept: dict[str, list[Record]] = {}
    for record in records:
        same_name = kept.setdefault(record["run_id"], [])
        if record not in same_name:
            same_name.append(record)
    return [record for same_name in kept.values() for record in same_name]


def read_trials(place: Path | str) -> Found:
    """Read the trials of a study's tuning: in `tuning/` below its folder, or beside its file in `trials.json`."""
    whole = Path(place)
    beside = whole / "tuning" if whole.is_dir() else whole.with_name("trials.json")
    return read(beside) if beside.exists() and beside != whole else Found([], [])


def _add(path: Path, records: list[Record], faults: dict[str, list[str]], *, listed: bool) -> None:
    """Add a file's record, or what is wrong with it; a `listed` one may hold several."""
    where = str(path)
    try:
        content = _parse(path)
    except ValueError as error:
        _add_fault(faults, where, error)
        return
    several = listed and isinstance(content, list)
    for number, item in enumerate(content if several else [content], 1):
        place = f"{where}, record {number}" if several else where
        try:
            check(item, place)
            records.append(item)
        except ValueError as error:
            _add_fault(faults, place, error)


def _add_fault(faults: dict[str, list[str]], where: str, error: ValueError) -> None:
    faults.setdefault(str(error).removeprefix(f"{where}: "), []).append(printable(where))


def _told(faults: dict[str, list[str]]) -> list[str]:
    """A sentence for all that have the same fault; of many faults the first."""
    told = [f"{places[0]}: {why}{_others(places[1:])}" for why, places in faults.items()]
    left = len(told) - MOST_FAULTS
    return [*told[:MOST_FAULTS], *([f"And {left} faults of other kinds."] if left > 0 else [])]


def _others(places: list[str]) -> str:
    shown = ", ".join(places[:3]) + (", ..." if len(places) > 3 else "")
    return f" The same of {len(places)} more: {shown}" if places else ""


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
