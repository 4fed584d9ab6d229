"""What a study will take, before any of its runs is made: bytes, hours, and what can't fit."""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from membench.config.errors import UserError
from membench.config.run import Run
from membench.runs import processes, worker
from membench.runs.processes import Call, Outcome
from reports import formats
from reports.table import NOTHING, Row, lay_out, size_text

_COLUMNS: list[tuple[str, Callable[[Row], str]]] = [
    ("task", lambda row: row["run"].task),
    ("model", lambda row: row["run"].training.model),
    ("method", lambda row: row["run"].method + (", trials" if row["trials"] else "")),
    ("needs", lambda row: NOTHING if row["planned_bytes"] is None else size_text(row["planned_bytes"])),
    ("s / step", lambda row: NOTHING if row["step_seconds"] is None else f"{row['step_seconds']:.3f}"),
    ("runs", lambda row: _range(row["count"], row["count"] + row["more"], "d")),
    ("hours", lambda row: NOTHING if row["step_seconds"] is None else _range(*_hours(row), ".2f")),
]
_UNPLANNED = (
    "Memory isn't planned where plans don't know the step (autocast, a task of your own, a language model that "
    "classifies): only a run tells whether it fits."
)
_NOTES = [
    "needs: planned, at the peak.",
    "s / step: measured now, on the first steps of a run; of several values to try, those that need most.",
    "hours: with evaluations (one was timed of each task, model and data, for a minute at most), tracked norms and "
    "what a reference says before training; of all runs, those already made among them, one after another, without "
    "what each needs to start.",
]


@dataclass(frozen=True)
class Kind:
    """Runs that differ in seeds and values, which take no longer or shorter: one of them, and how many there are.

    `more` are trials that may come on top, where the best value is at the edge of what was tried. `tried` are the
    hyper-parameters that these runs may have, if not the run's own. `trials`: of tuning alone, on data of its own.
    """

    run: Run
    count: int
    more: int = 0
    tried: tuple[Mapping[str, Any], ...] = ()
    trials: bool = False


@dataclass(kw_only=True)
class _Rehearsal(Call):
    kind: Kind


def forecast(kinds: Sequence[Kind]) -> str:
    """The table to print, after each kind was planned and rehearsed in a process of its own.

    Raises:
        UserError: some runs can't fit, or fail at once.
    """
    rows, wrong = [], []
    for rehearsal, outcome in _rehearsed(kinds):
        run, found = rehearsal.kind.run, outcome.value
        if outcome.status != "ok":
            wrong.append(f"{run.task} {run.method}: {outcome.error}")
        elif (found["planned_bytes"] or 0) > found["room_bytes"]:
            needs, room = found["planned_bytes"], found["room_bytes"]
            missing = f"{size_text(room)} ({size_text(needs - room)} missing)"
            wrong.append(f"{run.task} {run.method} needs {size_text(needs)}, and {run.device} has {missing}")
        else:
            kind = rehearsal.kind
            rows.append({**found, "run": run, "count": kind.count, "more": kind.more, "trials": kind.trials})
    _share_evaluations(rows)
    if wrong:
        raise UserError(f"{'; '.join(wrong)}: choose other methods, a smaller batch or a shorter sequence")
    notes = [*_NOTES, *([_UNPLANNED] if any(row["planned_bytes"] is None for row in rows) else [])]
    table = lay_out("What it will take", rows, _COLUMNS, {"task", "model", "method"}, notes)
    return formats.plain([([], [table], [_in_all(rows)])]).strip()


def _in_all(rows: Sequence[Row]) -> str:
    hours = [_hours(row) for row in rows if row["step_seconds"] is not None]
    if not hours:
        return "Runs on several processes aren't timed."
    least, most = map(sum, zip(*hours, strict=True))
    said = _range(least, most, ".2f")
    why = ", the more the more often the best value is at the edge of a grid" if " to " in said else ""
    return f"In all {said} hours{why}."


def _range(least: float, most: float, form: str) -> str:
    """`1.20 to 1.50`; one figure where both are printed alike."""
    texts = [f"{number:{form}}" for number in (least, most)]
    return " to ".join(dict.fromkeys("< 0.01" if text == "0.00" else text for text in texts))


def _rehearsed(kinds: Sequence[Kind]) -> Iterator[tuple[_Rehearsal, Outcome]]:
    """One after another, since times are taken; of each task, model and data the first also evaluates."""
    with tempfile.TemporaryDirectory() as folder:
        seen: set[tuple[str, ...]] = set()
        for number, kind in enumerate(kinds):
            log = Path(folder) / str(number)
            given = kind.run, _evaluated(kind.run) not in seen, kind.tried
            yield from processes.call_all([_Rehearsal(worker.rehearse, given, log, kind=kind)], at_once=1)
            seen.add(_evaluated(kind.run))


def _share_evaluations(rows: list[Row]) -> None:
    """Evaluations take all methods of a task, model and data as long."""
    known = {_evaluated(row["run"]): row["evaluation_seconds"] for row in reversed(rows)}
    for row in rows:
        row["evaluation_seconds"] = known[_evaluated(row["run"])] or 0.0


def _evaluated(run: Run) -> tuple[str, ...]:
    return run.task, run.training.model, run.training.data


def _hours(row: Row) -> tuple[float, float]:
    """Without and with the trials that may come on top."""
    training = row["run"].training
    between = (training.steps - 1) // training.evaluate_every if training.evaluate_every else 0
    evaluations = 1 + training.evaluate_before + between
    seconds = training.steps * row["step_seconds"] + evaluations * row["evaluation_seconds"] + row["other_seconds"]
    return row["count"] * seconds / 3600, (row["count"] + row["more"]) * seconds / 3600
