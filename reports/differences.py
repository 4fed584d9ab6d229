"""What differs between rows of one table, and between set-ups, and has to be said before anybody compares them."""

import json
from collections.abc import Iterable
from typing import Any

from reports.record import Record
from reports.schema import training
from reports.setups import Setup

_IGNORED = ("seed", "always_train")  # of a method: the first follows the run's, the second the task's head
_COMMIT = 10  # letters, which tell commits apart
_VERSIONS = {"membench": "versions of membench", "python": "versions of Python", "commit": "commits"}
_WORDS = {"family": "tasks", "gradient_accumulation_steps": "micro-batches"}


def between_rows(setup: Setup) -> list[str]:
    """Sentences on learning rates and other hyper-parameters, on conditions that rows don't share."""
    runs = {label: list(found.values()) for label, found in setup.rows.items()}
    if len(runs) < 2:
        return []
    return [*_rates(runs), *_others(runs), *_training(runs), *_missing(setup)]


def between_setups(setups: list[Setup]) -> str | None:
    """A sentence on why there are several set-ups; None for one."""
    if len(setups) < 2:
        return None
    names = [name for name in setups[0].conditions if len({_text(s.conditions[name]) for s in setups}) > 1]
    values = [f"{_name(name)} ({_values(s.conditions[name] for s in setups)})" for name in names]
    return f"The runs are of {len(setups)} set-ups, which differ in {'; '.join(values)}: compare within one only."


def hyperparameters(setup: Setup) -> dict[str, dict[str, list[str]]]:
    """The values of each hyper-parameter by row, as texts; several where they differ from task to task."""
    table: dict[str, dict[str, list[str]]] = {}
    for label, runs in setup.rows.items():
        for run in runs.values():
            for name, value in run["hyperparameters"].items():
                values = table.setdefault(name, {}).setdefault(label, [])
                if name not in _IGNORED[:1] and _text(value) not in values:
                    values.append(_text(value))
    return {name: rows for name, rows in table.items() if any(rows.values())}


def _rates(runs: dict[str, list[Record]]) -> list[str]:
    """Every method has a rate of its own, as it should; a reader must know that it was chosen, not shared."""
    rates: dict[str, list[str]] = {}
    for label, found in runs.items():
        values = sorted({run["hyperparameters"]["lr"] for run in found if _is_number(run["hyperparameters"].get("lr"))})
        if values:
            span = f"{values[0]:g}" if len(values) == 1 else f"{values[0]:g} to {values[-1]:g}"
            rates.setdefault(span, []).append(label)
    if len(rates) < 2:
        return []
    return [
        "Learning rates differ between rows: " + "; ".join(f"{r} of {_list(who)}" for r, who in rates.items()) + "."
    ]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _others(runs: dict[str, list[Record]]) -> list[str]:
    """Hyper-parameters that several rows have, with different values."""
    seen: dict[str, dict[str, set[str]]] = {}
    for label, found in runs.items():
        for run in found:
            for name, value in run["hyperparameters"].items():
                seen.setdefault(name, {}).setdefault(label, set()).add(_text(value))
    differing = [
        name
        for name, rows in seen.items()
        if name not in ("lr", *_IGNORED) and len({tuple(sorted(values)) for values in rows.values()}) > 1
    ]
    return [f"Rows that share them differ in {_list(differing)}: see Configuration."] if differing else []


def _training(runs: dict[str, list[Record]]) -> list[str]:
    """What runs of one task share where they are compared; from task to task it may differ."""
    sentences = []
    given = [(run["task"], training(run)) for found in runs.values() for run in found]
    for name in dict.fromkeys(name for _, values in given for name in values):
        by_task: dict[str, set[str]] = {}
        for task, values in given:
            if (value := values.get(name)) is not None or name != "steps":
                by_task.setdefault(task, set()).add(_text(value))
        several = sorted({value for seen in by_task.values() if len(seen) > 1 for value in seen})
        if several:
            sentences.append(f"{_name(name).capitalize()} differs between runs of one task: {_list(several)}.")
    return sentences


def in_code(setup: Setup) -> list[str]:
    """Versions of the code that made the runs, which a folder has that was continued with another one."""
    sentences = []
    for name in (*_VERSIONS, "packages"):
        values: dict[str, dict[str, None]] = {}
        for label, runs in setup.rows.items():
            for run in runs.values():
                for value in _versions(run, name):
                    values.setdefault(value, {})[label] = None
        if name == "packages":
            packages = {value.split(" ")[0] for value in values}
            several = sorted(p for p in packages if sum(value.split(" ")[0] == p for value in values) > 1)
            if several:
                told = [value for value in sorted(values) if value.split(" ")[0] in several]
                sentences.append(f"Runs used different versions of packages: {_list(told)}.")
        elif len(values) > 1:
            told = [f"{value} ({_list(list(labels), 4)})" for value, labels in values.items()]
            sentences.append(f"Runs were made by {len(values)} {_VERSIONS[name]}: {_list(told)}.")
    return sentences


def _versions(run: Record, name: str) -> list[str]:
    value = run["environment"].get(name)
    if isinstance(value, dict):
        return [f"{package} {version}" for package, version in value.items()]
    return [] if value is None else [_text(value)[:_COMMIT] if name == "commit" else _text(value)]


def _missing(setup: Setup) -> list[str]:
    whole = len(setup.tasks) * len(setup.seeds)
    short = [f"{label} {len(runs)}" for label, runs in setup.rows.items() if len(runs) < whole]
    return [f"Not every row has all {whole} runs (tasks x seeds): {_list(short)}."] if short else []


def _name(name: str) -> str:
    return _WORDS.get(name, name.replace("_", " "))


def _values(values: Iterable[Any]) -> str:
    return _list(list(dict.fromkeys(map(_text, values))))


def _text(value: Any) -> str:
    return value if isinstance(value, str) else "none" if value is None else json.dumps(value)


def _list(words: list[str], longest: int = 12) -> str:
    more = len(words) - longest
    return ", ".join(words[:longest]) + (f" and {more} more" if more > 0 else "")
