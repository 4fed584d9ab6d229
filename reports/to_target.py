"""The training time, and the tokens, that each method takes to a target quality."""

import statistics
from collections.abc import Callable
from typing import Any

from reports.names import suggestion
from reports.rankings import Ranking, headline, render
from reports.record import Record, has_true_times
from reports.setups import Setup, group, heading
from reports.table import NOTHING, Column, Row, Table, lay_out, score_text
from reports.text import time_notes

# ends of the names of metrics that aren't the headline, whose direction a record says
_LESS_IS_BETTER = ("loss", "perplexity", "error", "mae", "mse", "brier")


def to_target(records: list[Record], metric: str, target: float, format: str = "plain") -> str:
    """Rank methods by training time, and by tokens, until `metric` was first seen to reach `target`.

    Raises:
        ValueError: there are no records, or no run was evaluated by that metric.
    """
    known = sorted({name for run in records for name in run["metrics"] or {}})
    if metric not in known:
        raise ValueError(f"No run has a metric {metric!r}. {suggestion(metric, known)}")
    rankings = [
        _race(setup, task, metric, target)
        for setup in group(records)
        for task in setup.tasks
        if any(metric in (run["metrics"] or {}) for runs in setup.rows.values() for run in _of(runs, task))
    ]
    return render(rankings, "to_target", format)


def tokens_to(setup: Setup, label: str, task: str, target: float) -> float:
    """Tokens until a row's headline was first seen to reach a target, a median over all of its runs on the task.

    A run that never did counts as infinitely many.
    """
    metric, higher = headline([setup], task)
    firsts = [_first(run, metric, target, higher) for run in _of(setup.rows[label], task)]
    return statistics.median([point["tokens"] if point else float("inf") for point in firsts] or [float("inf")])


def _of(runs: dict[tuple[str, int], Record], task: str) -> list[Record]:
    return [run for (name, _), run in runs.items() if name == task]


def _race(setup: Setup, task: str, metric: str, target: float) -> Ranking:
    higher = _is_higher_better(setup, task, metric)
    made = [_row(label, _of(runs, task), metric, target, higher) for label, runs in setup.rows.items()]
    made = [{"task": task, **row} for row in made if row["runs"]]
    for name in ("seconds", "tokens"):
        for row in made:
            before = sum(other[name] is not None and _order(other, name) < _order(row, name) for other in made)
            row[f"rank_by_{name}"] = before + 1 if row[name] is not None else None
    made.sort(key=lambda row: _order(row, "seconds"))
    title = f"{task}: {metric} of {target:g} or {'more' if higher else 'less'}"
    return Ranking(heading(setup), _table(title, made), made, _notes(setup, task))


def _order(row: Row, name: str) -> tuple[float, float]:
    """Who reached it in more of the runs comes first, then who was quicker."""
    return -row["reached"] / row["runs"], row[name] if row[name] is not None else float("inf")


def _is_higher_better(setup: Setup, task: str, metric: str) -> bool:
    ranked_by, higher = headline([setup], task)
    return higher if metric == ranked_by else not metric.endswith(_LESS_IS_BETTER)


def _row(label: str, runs: list[Record], metric: str, target: float, higher: bool) -> Row:
    reached = [point for run in runs if (point := _first(run, metric, target, higher))]
    seen = [value for run in runs for value in _values(run, metric)]
    middle = {name: _median([point[name] for point in reached if point[name] is not None]) for name in _POINT}
    best = (max if higher else min)(seen, default=None)
    return {"method": label, "reached": len(reached), "runs": len(runs), **middle, "best": best}


def _median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None


_POINT = ("seconds", "tokens", "step")


def _first(run: Record, metric: str, target: float, higher: bool) -> dict[str, Any] | None:
    for point in run["history"]:
        value = (point.get("metrics") or {}).get(metric)
        if value is not None and (value >= target if higher else value <= target):
            return point if has_true_times(run) else {**point, "seconds": None}
    return None


def _values(run: Record, metric: str) -> list[float]:
    found = [(point.get("metrics") or {}).get(metric) for point in run["history"]]
    return [value for value in [*found, (run["metrics"] or {}).get(metric)] if value is not None]


def _table(title: str, made: list[Row]) -> Table:
    def figure(name: str, pattern: str) -> Callable[[Row], str]:
        return lambda row: NOTHING if row[name] is None else pattern.format(row[name])

    columns: list[Column] = [
        ("method", lambda row: row["method"]),
        ("reached", lambda row: f"{row['reached']} of {row['runs']}" if row["reached"] else "never"),
        ("seconds", figure("seconds", "{:,.1f}")),
        ("rank", figure("rank_by_seconds", "{}")),
        ("tokens", figure("tokens", "{:,.0f}")),
        ("rank", figure("rank_by_tokens", "{}")),
        ("step", figure("step", "{:,.0f}")),
        ("best seen", lambda row: NOTHING if row["best"] is None else score_text(row["best"])),
    ]
    return lay_out(title, made, columns, {"method", "reached"})


def _notes(setup: Setup, task: str) -> list[str]:
    runs = [run for found in setup.rows.values() for run in _of(found, task)]
    notes = ["seconds of training alone, tokens, step: medians of the runs that reached it, when it was first seen."]
    every = sorted({run["training"]["evaluate_every"] or 0 for run in runs})
    if 0 in every:
        notes.append("Some runs were evaluated at the end only: --evaluate-every says sooner when a target is reached.")
    else:
        notes.append(f"Evaluated every {' or '.join(map(str, every))} steps: no finer than that.")
    if len(setup.machines) > 1:
        notes.append(f"Runs are from {len(setup.machines)} machines: seconds compare on one only.")
    return notes + time_notes({label: _of(found, task) for label, found in setup.rows.items()})
