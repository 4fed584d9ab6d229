"""Who is best in each column of the summary, and who isn't significantly different from that."""

import math
from dataclasses import dataclass

from reports import rows as raw
from reports.setups import Setup
from reports.statistics import SIGNIFICANCE, TEST, Sight, errors_of_rows, summarise
from reports.table import Row

SAME_MEMORY = 0.01  # the share by which peaks may differ and still count as the same

HOW = {
    "memory": f"peak: ★ the least, ≈ within {SAME_MEMORY:.0%} of it.",
    "speed": "tokens/s: ★ the most, ≈ not significantly slower by a t-test of the ratio over pairs of task and seed "
    f"(p ≥ {SIGNIFICANCE}, corrected for the number of methods; of one pair nothing can be said).",
    "score": f"score: ★ the best mean, ≈ equal to it or not significantly different ({TEST}, "
    f"p ≥ {SIGNIFICANCE}; of one seed nothing can be said).",
}


@dataclass(frozen=True)
class Winner:
    """The best row of a column, and what makes that less than certain.

    Attributes:
        best: its name.
        tied: the rows that aren't significantly different, the best among them.
        untested: the rows that can't be compared with it, since they or it have one seed.
        caveats: what must be said of the best itself.
        blind: what the seeds of those that are tied can see at best.
    """

    best: str
    tied: frozenset[str] = frozenset()
    untested: tuple[str, ...] = ()
    caveats: tuple[str, ...] = ()
    blind: Sight | None = None

    @property
    def others(self) -> list[str]:
        """Those not significantly different from the best."""
        return sorted(self.tied - {self.best})

    def mark(self, label: str) -> str | None:
        """What a row is: best, tied or neither."""
        return "best" if label == self.best else "tied" if label in self.tied else None


def winners(setup: Setup) -> dict[str, Winner]:
    """Winners of memory, speed and score; a column that nothing can be said of is missing.

    Memory and speed are only of rows that have every run, speed of those whose times all tell something, since tasks
    differ in both; speeds only of one machine. What isn't above the floor wins nothing: to learn nothing takes little
    memory and time.
    """
    rows = [row for row in raw.summary(setup) if raw.is_complete(row) and _learned(setup, row)]
    columns = {"memory": _memory(rows), "speed": _speed(setup, rows), "score": _score(setup)}
    return {name: winner for name, winner in columns.items() if winner}


def _learned(setup: Setup, row: Row) -> bool:
    """Whether it is above the floor, as far as anybody knows: on average or, where there is none, on some task."""
    if row["score_task"]:
        return row["score_above_floor"] is not False
    of_tasks = [one["above_floor"] for one in raw.quality(setup) if one["method"] == row["method"]]
    return any(above is not False for above in of_tasks)


def _memory(rows: list[Row]) -> Winner | None:
    peaks = {row["method"]: row["peak_allocated_bytes"] for row in rows}
    if not peaks:
        return None
    best = min(peaks, key=lambda label: peaks[label])
    limit = peaks[best] * (1 + SAME_MEMORY)
    return Winner(best, frozenset(label for label, peak in peaks.items() if peak <= limit))


def _speed(setup: Setup, rows: list[Row]) -> Winner | None:
    if not rows or len(setup.machines) > 1:
        return None
    timed = [row for row in rows if len(raw.rates(setup.finished(row["method"]))) == row["runs_ok"]]
    speeds = {row["method"]: row["tokens_per_second"] for row in timed if row["tokens_per_second"]}
    if not speeds:
        return None
    best = max(speeds, key=lambda label: speeds[label])
    slowed = [label for label in speeds if raw.was_slowed(setup, label)]
    unknown = [row["method"] for row in rows if row["method"] not in speeds]
    told = {"Slowed by other work": slowed, "Not compared, as some runs have no speed": unknown}
    caveats = tuple(f"{what}: {', '.join(who)}" for what, who in told.items() if who)
    alike = frozenset(label for label in speeds if _as_fast(setup, label, best, len(speeds)))
    return Winner(best, alike, caveats=caveats) if len(speeds) > 1 or not unknown else None


def _as_fast(setup: Setup, label: str, best: str, rows: int) -> bool:
    """Not significantly slower than the best, by the logarithms of the ratios of two pairs of runs at least."""
    one, other = raw.rates(setup.finished(label)), raw.rates(setup.finished(best))
    logs = [math.log(one[key] / other[key]) for key in one if one[key] and other.get(key)]
    if label == best or len(logs) < 2:
        return label == best
    mean, deviation, n = summarise(logs)
    if mean >= 0 or not deviation:  # faster by pairs, though not over all of the time
        return mean >= 0
    return -mean <= deviation / math.sqrt(n) * errors_of_rows(n - 1, rows)


def _score(setup: Setup) -> Winner | None:
    task = setup.tasks[0] if len(setup.tasks) == 1 else raw.AVERAGE
    return scores(setup).get(task)


def scores(setup: Setup) -> dict[str, Winner]:
    """The winner of each task, and of the average; of the average only rows that have all tasks can be."""
    found = {}
    by_task: dict[str, list[Row]] = {}
    for row in raw.quality(setup):
        complete = row["task"] != raw.AVERAGE or (row["tasks"] == len(setup.tasks) and row["n"])
        if row["mean"] is not None and complete and row["above_floor"] is not False:
            by_task.setdefault(row["task"], []).append(row)
    for task, rows in by_task.items():
        choose = max if rows[0]["higher_is_better"] else min
        best = choose(rows, key=lambda row: row["mean"])
        tied = {row["method"] for row in rows if row["tied_with_best"] or row["mean"] == best["mean"]}
        untested = [row["method"] for row in rows if row is not best and min(row["n"], best["n"]) < 2]
        seen = [sight for row in rows if row["method"] in tied and (sight := raw.sight_of(row))]
        blind = max(seen, key=lambda sight: sight.least, default=None)
        caveats = raw.caveats(best)
        found[task] = Winner(best["method"], frozenset(tied), tuple(untested), tuple(caveats), blind)
    return found
