"""The figures of a set-up that the page's script draws as a reader chooses; all of them are in its tables, too."""

import statistics
from typing import Any

from reports.figures.curves import curves_of
from reports.figures.scores import seen
from reports.record import has_true_times
from reports.rows import AVERAGE, SPEEDS, summary, throughput
from reports.setups import Setup
from reports.table import MIB, Row

MOST_METHODS, MOST_TASKS = 40, 12  # whose curves are kept
ALONG = ("steps", "tokens", "seconds")


def figures(setup: Setup) -> dict[str, Any]:
    """As JSON: the methods, a list of each figure by method, and curves by task, measure and a method's number.

    A point of a curve is [steps, tokens, seconds, value]; without seconds where a run's times tell nothing.
    """
    alone = all(has_true_times(run) for runs in setup.rows.values() for run in runs.values())
    tasks = setup.tasks[:MOST_TASKS]
    return {
        "methods": list(setup.rows),
        "figures": _by_method(setup),
        "along": ALONG if alone else ALONG[:2],
        "curves": {task: _curves(setup, task, alone=alone) for task in tasks},
    }


def _by_method(setup: Setup) -> dict[str, list[float | None]]:
    rows, times = summary(setup), throughput(setup)
    metric = next((row["score_metric"] for row in rows if row["score_metric"]), None) or "score"
    named = {
        "peak MiB": [_over(row, "peak_allocated_bytes", MIB) for row in rows],
        metric: [_score(row, setup) for row in rows],
        "tokens/s": [row["tokens_per_second"] for row in rows],
        "weights trained, %": [_over(row, "trained_fraction", 0.01) for row in rows],
        "training seconds": [_seconds(setup, label) for label in setup.rows],
        **{f"{name.removesuffix('_seconds')} ms": [_over(row, name, 1e-3) for row in times] for name in SPEEDS[2:]},
    }
    return {name: values for name, values in named.items() if any(value is not None for value in values)}


def _score(row: Row, setup: Setup) -> float | None:
    """An average over fewer tasks than the others', or of no seed, is no point, as in the other plots."""
    whole = row["score_task"] != AVERAGE or (row["score_tasks"] == len(setup.tasks) and row["score_n"])
    return row["score_mean"] if whole else None


def _over(row: Row, name: str, unit: float) -> float | None:
    return None if row.get(name) is None else row[name] / unit


def _seconds(setup: Setup, label: str) -> float | None:
    runs = [run for run in setup.finished(label).values() if has_true_times(run)]
    return statistics.fmean(run["time"]["train_seconds"] for run in runs) if runs else None


def _curves(setup: Setup, task: str, *, alone: bool) -> dict[str, dict[int, list[list[float]]]]:
    found: dict[str, dict[int, list[list[float]]]] = {"loss": {}, "score": {}}
    for number, label in enumerate(list(setup.rows)[:MOST_METHODS]):
        for curve in curves_of(setup, label, task)[:1]:
            columns = [curve.steps, curve.tokens, *([curve.seconds] if alone else []), curve.losses]
            found["loss"][number] = [list(point) for point in zip(*columns, strict=True)]
        line = seen(setup, label, task)
        if len(line.steps) > 1:
            columns = [line.steps, line.tokens, *([line.seconds] if alone else []), line.scores]
            found["score"][number] = [list(point) for point in zip(*columns, strict=True)]
    return {measure: rows for measure, rows in found.items() if rows}
