"""Which runs may stand in one table: the same family of tasks, model, data, training and machine, side by side."""

import json
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

from reports.names import batch_text, counted
from reports.record import Record
from reports.schema import TRAINING, Field, training

REFERENCE = "adamw"  # the method that ratios compare with

LONGEST_NAME = 44  # letters, of a model or data in a heading

_SIZES = ("steps", "batch_size", "sequence_length")
_SAID_FIRST = (*_SIZES, "weights", "data")  # in a heading
_MACHINE = ("device", "threads")  # of the environment, where a run that crashed may not know them

Key = tuple[str, int]  # task, seed


@dataclass(eq=False)  # hashable, so that what is made of one can be kept
class Setup:
    """Comparable runs.

    `rows` holds the runs of each row of the tables: the reference first, then the others by what they need in memory. A
    row is a method; a method that ran with several values of a hyper-parameter has a row for each, named after it.
    """

    conditions: dict[str, Any]
    rows: dict[str, dict[Key, Record]]
    superseded: int = 0  # older runs of the same task, method and seed, left out
    tasks: list[str] = field(init=False)
    seeds: list[int] = field(init=False)

    def __post_init__(self) -> None:
        keys = [key for runs in self.rows.values() for key in runs]
        self.tasks = sorted({task for task, _ in keys})
        self.seeds = sorted({seed for _, seed in keys})
        self.rows = dict(sorted(self.rows.items(), key=_row_order))

    @property
    def reference(self) -> str | None:
        """The row that ratios compare with, if any."""
        first, runs = next(iter(self.rows.items()))
        return first if next(iter(runs.values()))["method"] == REFERENCE else None

    @property
    def machines(self) -> list[str]:
        """The names of the devices that the runs were on, where they are known."""
        return sorted({name for runs in self.rows.values() for run in runs.values() if (name := machine(run))})

    def finished(self, row: str) -> dict[Key, Record]:
        """The runs of a row that are ok."""
        return {key: run for key, run in self.rows[row].items() if run["status"] == "ok"}


def machine(run: Record) -> str | None:
    return run["environment"].get("device_name")


def score(run: Record) -> float:
    """Its headline, of a run that is ok."""
    return run["metrics"][run["headline"]]


def peak_bytes(run: Record) -> int:
    return run["memory"]["peak_allocated_bytes"]


def _row_order(row: tuple[str, dict[Key, Record]]) -> tuple[bool, float, str]:
    label, runs = row
    peaks = [peak_bytes(run) for run in runs.values() if run["status"] == "ok"]
    method = next(iter(runs.values()))["method"]
    return method != REFERENCE, max(peaks, default=float("inf")), label


def group(records: list[Record]) -> list[Setup]:
    """Sort records into set-ups, in the order in which these first appear."""
    groups: list[tuple[dict[str, Any], list[Record]]] = []
    records = _with_one_name_of_data(records)
    version = _versions(records)
    for record in sorted(records, key=_unknowns):
        conditions = {**_conditions(record), "version": version(record)}
        members = next((members for known, members in groups if _agree(known, conditions)), None)
        if members is None:
            groups.append((conditions, [record]))
        else:
            members.append(record)
    return [_setup(known, part) for known, members in groups for part in _split_by_steps(members)]


def _with_one_name_of_data(records: list[Record]) -> list[Record]:
    """The same data are the same under any name: a folder that was moved or renamed has its latest name in all."""

    def content(run: Record) -> Hashable:
        return run["task"], run["environment"].get("data_sha256") or ("", run["training"]["data"])

    names = {content(run): run["training"]["data"] for run in sorted(records, key=created)}
    return [
        run
        if run["training"]["data"] == (name := names[content(run)])
        else {**run, "training": {**run["training"], "data": name}}
        for run in records
    ]


def _conditions(record: Record) -> dict[str, Any]:
    given, environment = training(record), record["environment"]
    shared = {one.name: _flat(given[one.name]) for one in TRAINING if one.apart}
    first = {name: shared.pop(name) for name in ("weights", "data")}
    return {
        "family": record["task"].split("/")[0],
        "model": record["model"],
        **first,
        "steps": None,  # may differ from task to task, where epochs are given
        **shared,
        **{name: environment.get(name) for name in _MACHINE},
    }


def _versions(records: list[Record]) -> Callable[[Record], str | None]:
    """In words, which of several versions of its data, model, tokenizer, headline or a user's code a run had.

    A name stays the same when a file is edited or a model trained on. None of the only version, or the latest where
    versions have no names; what a record doesn't know is taken for the latest.
    """
    known: dict[Hashable, list[str]] = {}  # the versions of a thing, the latest first
    for run in sorted(records, key=created, reverse=True):
        for _, thing, value in _origins(run):
            if value is not None and value not in known.setdefault(thing, []):
                known[thing].append(value)

    def words(run: Record) -> str | None:
        told = [
            _told(what, value, known[thing]) for what, thing, value in _origins(run) if len(known.get(thing, [])) > 1
        ]
        return ", ".join(filter(None, told)) or None

    return words


def _told(what: str, value: str | None, known: list[str]) -> str:
    """Which of the known versions it is: by its name where it has one that a reader knows."""
    changes = 0 if value is None else known.index(value)
    if what in ("tokenizer", "headline"):
        return f"{what} {_end(known[changes])}"
    return f"{what} before the latest {f'{changes} changes' if changes > 1 else 'change'}" if changes else ""


def _origins(run: Record) -> list[tuple[str, Hashable, str | None]]:
    """What a run was made from, and is judged by: a word for each thing, what it goes by, and its version."""
    known, task, model = run["environment"], run["task"], run["model"]
    data = known.get("data_sha256") or known.get("data_revision")
    less = " (less is better)" if run["higher_is_better"] is False else ""
    return [
        ("data", ("data", task, run["training"]["data"]), data),
        ("model", ("model", model), known.get("model_revision")),
        ("tokenizer", ("tokenizer", task, model, data), known.get("tokenizer")),
        ("task", ("code of task", task), known.get("task_code")),
        ("method", ("code of method", run["method"]), known.get("method_code")),
        ("headline", ("headline", task), f"{run['headline']}{less}" if run["headline"] else None),
    ]


def created(run: Record) -> str:
    """When it was made; what doesn't say is older than what does."""
    return str(run["environment"].get("created") or "")


def _flat(value: Any) -> Any:
    """A table (the task's options) as a text."""
    return ", ".join(f"{name}={item}" for name, item in sorted(value.items())) if isinstance(value, dict) else value


def _unknowns(record: Record) -> int:
    return sum(record["environment"].get(name) is None for name in _MACHINE)


def _agree(known: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(other[name] == value or (name in _MACHINE and other[name] is None) for name, value in known.items())


def _split_by_steps(records: list[Record]) -> list[list[Record]]:
    """Apart only if one task ran with several numbers of steps; a run that doesn't know its own has the others'."""
    pairs = {(run["task"], run["training"]["steps"]) for run in records if run["training"]["steps"] is not None}
    if len(pairs) == len({task for task, _ in pairs}):
        return [records]
    steps = dict.fromkeys(run["training"]["steps"] for run in records)
    return [[run for run in records if run["training"]["steps"] == number] for number in steps]


def _setup(conditions: dict[str, Any], records: list[Record]) -> Setup:
    steps = sorted({run["training"]["steps"] for run in records if run["training"]["steps"] is not None})
    span = steps[0] if len(steps) == 1 else f"{steps[0]} to {steps[-1]}" if steps else None
    varied = varied_hyperparameters(records)
    rows: dict[str, dict[Key, Record]] = {}
    for run in sorted(records, key=created):
        rows.setdefault(row_label(run, varied[run["method"]]), {})[run["task"], run["seed"]] = run
    kept = sum(map(len, rows.values()))
    return Setup({**conditions, "steps": span}, rows, superseded=len(records) - kept)


def varied_hyperparameters(records: list[Record]) -> dict[str, list[str]]:
    """For each method the hyper-parameters with several values on one task. Its own seed follows the run's."""
    values: dict[tuple[str, str, str], set[str]] = {}
    names: dict[str, dict[str, None]] = {}
    for run in records:
        names.setdefault(run["method"], {}).update(dict.fromkeys(run["hyperparameters"]))
    for run in records:
        for name in names[run["method"]]:  # one that a record lacks was added later and isn't in use there
            value = json.dumps(run["hyperparameters"].get(name), sort_keys=True)
            values.setdefault((run["method"], name, run["task"]), set()).add(value)
    varied: dict[str, list[str]] = {run["method"]: [] for run in records}
    for (method, name, _), seen in values.items():
        if len(seen) > 1 and name != "seed" and name not in varied[method]:
            varied[method].append(name)
    return varied


def row_label(run: Record, varied: list[str]) -> str:
    given = [f"{name}={run['hyperparameters'][name]}" for name in varied if name in run["hyperparameters"]]
    return " ".join([run["method"], ", ".join(given)]) if given else run["method"]


def differing(setup: Setup, setups: list[Setup]) -> list[str]:
    """What tells a set-up from others."""
    return [f"{n}={v}" for n, v in setup.conditions.items() if any(other.conditions[n] != v for other in setups)]


def heading(setup: Setup, tasks: Sequence[str] = ()) -> list[str]:
    """What the runs of a set-up have in common, in two lines: what was trained, and how; of these `tasks`, or all."""
    known, tasks = setup.conditions, tasks or setup.tasks
    weights = ", random weights" if known["weights"] == "random" else f", {known['weights']} weights"
    what = tasks[0] if len(tasks) == 1 else f"{known['family']}, {len(tasks)} tasks"
    model, data = (_end(known[name]) for name in ("model", "data"))
    first = " - ".join(filter(None, (what, f"{model}{weights}", f"data: {data}", known["version"])))
    return [first, ", ".join(_how(known, setup.machines))]


def _end(path: str) -> str:
    """Of a long path its end, which tells most."""
    return path if len(path) <= LONGEST_NAME else f"…{path[1 - LONGEST_NAME :]}"


def _how(known: dict[str, Any], machines: list[str]) -> list[str]:
    steps, batch_size, sequence_length = (known[name] for name in _SIZES)
    words = [f"{counted(steps or '?', 'step')} of {batch_text(batch_size, sequence_length, known['family'])}"]
    words += [_said(one, known[one.name]) for one in TRAINING if one.apart and one.name not in _SAID_FIRST]
    name = f" ({machines[0]})" if len(machines) == 1 and machines[0] != known["device"] else ""
    words += [f"{known['device']}{name}"] if known["device"] is not None else []
    words += [counted(known["threads"], "thread")] if known["threads"] is not None else []
    return list(filter(None, words))


_WORDS: dict[str, Callable[[Any], str]] = {  # what reads better than its name and value
    "gradient_accumulation_steps": lambda count: f"{count} micro-batches a step" if count > 1 else "",
    "dtype": str,
    "checkpointing_every": "of one layer in {}".format,
    "loss_chunks": "loss in {} pieces".format,
    "schedule": "{} schedule".format,
    "warmup_fraction": lambda share: f"warm-up {100 * share:g}%",
    "final_fraction": lambda share: f"down to {100 * share:g}%",
    "max_grad_norm": "clipped at {}".format,
    "options": str,
}


def _said(field: Field, value: Any) -> str:
    """A condition in words; "" where there is nothing to say of it."""
    if not value or value == _flat(field.missing):
        return ""
    if field.name in _WORDS:
        return _WORDS[field.name](value)
    words = field.name.replace("_", " ")
    return words if value is True else f"{words} {value}"
