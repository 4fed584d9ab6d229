"""What may be concluded from differences that are partly noise: of each row, and of all rows together.

A difference is candidate - baseline of one row (a task, a method, a model) and seed, turned so that less than 0 is
worse.

**The noise** of a row comes from its seeds, moderated by the other rows': `noise.py`. With one seed it is what bounds
it as a rule: of a score, the number of examples and what seeds were seen to change; of a speed, what repeated runs were
seen to differ by. Where nothing tells the noise there is no verdict, and it says so.

**A row** is worse if it is so by more than the margin, and significantly less than 0: a one-sided paired t-test over
seeds or, of one seed, a z-test with the bound, corrected by Holm's method for the number of rows. With several seeds
and a bound either test may say so, at .95 and .05 of the level: more seeds never hide what each of them would have
shown. A row is shown not to be inferior if the test against the margin rejects.

**All rows together**, and all rows of each method, are worse if their mean over rows is, seed by seed, by the same
tests without a margin: 35 rows of 35 each slightly worse are a regression. A test over rows would take what they share
(a seed's initial weights, a task's examples) for a change.

**False alarms.** The families - quality by row, of all rows, by method, throughput by row - share the tolerated rate of
false alarms (`SHARES`), which by Bonferroni holds for a suite as a whole; what they leave
is for rows whose noise is very unlike. Memory and savings are exact: no share.
"""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import TypeVar

from reports.regressions.noise import BySeed, Noise, noises

SHARES = {"rows": 0.4, "all": 0.1, "methods": 0.1, "throughput": 0.2}
_SHOWN = 0.05  # level at which a row is shown not to be inferior
_OF_SEEDS, _OF_BOUND = 0.95, 0.05  # shares of the level of a row that has both tests

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class Judgement:
    """What the differences of one row tell.

    Attributes:
        mean: of its differences.
        seeds: how many these are.
        verdict: worse | better | fine | inconclusive.
        p: that a mean this far from 0 is chance, corrected; None where nothing tells the noise.
        level: what p must be below.
        tested: how many rows p is corrected for.
    """

    mean: float
    seeds: int
    verdict: str
    p: float | None
    level: float
    tested: int


@dataclass(frozen=True)
class Row:
    """What a row is judged by: differences by seed, the bound of a difference's noise, the least that it can be."""

    differences: BySeed
    bound: Noise | None = None
    floor: float = 0.0

    @property
    def mean(self) -> float:
        """Of the differences."""
        return fmean(self.differences.values())

    def p_below(self, noise: Noise | None, sign: int = 1, margin: float = 0.0) -> float | None:
        """That differences, times `sign` and less a margin, are so low by chance, if the truth is 0 or more.

        None where nothing tells the noise. Seeds that scatter more than the bound says prove it to be none: then the
        least of their differences counts alone, which each of them would have shown.
        """
        turned = [sign * difference - margin for difference in self.differences.values()]
        mean, n = fmean(turned), len(turned)
        disproved = n > 1 and noise and self.bound and noise.variance > self.bound.variance
        by_bound = (max(turned), 1) if disproved else (mean, n)
        tests = [(noise, (mean, n), _OF_SEEDS), (self.bound, by_bound, _OF_BOUND)]
        known = [(test, told, share) for test, told, share in tests if test]
        found = [test.p_below(*told) / (share if len(known) > 1 else 1) for test, told, share in known]
        return min(1.0, *found) if found else None


def judge(
    rows: Mapping[K, Row], margin: float, level: float, task: Callable[[K], Hashable] = lambda key: key
) -> dict[K, Judgement]:
    """A verdict on each row; without a change, any is worse in a share `level` of the suites.

    `task` is that of a row: rows of one may share more of their noise than others do.
    """
    noise = noises(
        {key: row.differences for key, row in rows.items()}, task, {key: row.floor for key, row in rows.items()}
    )
    worse, better = (_corrected(rows, noise, sign) for sign in (1, -1))
    return {
        key: Judgement(
            row.mean,
            len(row.differences),
            _verdict(row, noise[key], margin, worse.get(key, 1) < level, better.get(key, 1) < level),
            min(worse[key], better[key]) if key in worse else None,
            level,
            len(worse),
        )
        for key, row in rows.items()
    }


def _corrected(rows: Mapping[K, Row], noise: Mapping[K, Noise | None], sign: int) -> dict[K, float]:
    """P-values of the rows whose noise is known."""
    p = {key: row.p_below(noise[key], sign) for key, row in rows.items()}
    return holm({key: value for key, value in p.items() if value is not None})


def _verdict(row: Row, noise: Noise | None, margin: float, surely_worse: bool, surely_better: bool) -> str:
    if row.mean < -margin and surely_worse:
        return "worse"
    if row.mean > margin and surely_better:
        return "better"
    if noise is None and row.bound is None:  # nothing is known: what lies within the margin may pass
        return "fine" if abs(row.mean) <= margin else "inconclusive"
    if len(row.differences) == 1:
        return "fine" if row.mean >= -margin else "inconclusive"
    inferior = row.p_below(noise, -1, margin)
    return "fine" if inferior is not None and inferior < _SHOWN else "inconclusive"


def holm(p: Mapping[K, float]) -> dict[K, float]:
    """P-values corrected for their number, step down (Holm 1979)."""
    corrected: dict[K, float] = {}
    least = 0.0
    for rank, key in enumerate(sorted(p, key=lambda key: p[key])):
        least = max(least, min(1.0, (len(p) - rank) * p[key]))
        corrected[key] = least
    return corrected


def sharing_seeds(rows: list[Row]) -> list[Row]:
    """All rows if there is a seed that all of them have; else those that have the most differences in common seeds."""
    seeds = [frozenset(row.differences) for row in rows]
    if frozenset.intersection(*seeds):
        return rows
    most = max(seeds, key=lambda some: len(some) * sum(some <= other for other in seeds))
    return [row for row, own in zip(rows, seeds, strict=True) if most <= own]


def together(rows: list[Row]) -> Row | None:
    """Rows as one: their means in the seeds that all of them have; None if there is no such seed.

    The bound is that of rows whose noise goes together, as nobody knows what they share: the mean of their deviations.
    """
    seeds = set.intersection(*({*row.differences} for row in rows))
    if not seeds:
        return None
    bounds = [row.bound.variance**0.5 for row in rows if row.bound]
    return Row(
        {seed: fmean(row.differences[seed] for row in rows) for seed in sorted(seeds)},
        Noise(fmean(bounds) ** 2) if len(bounds) == len(rows) else None,
        fmean(row.floor for row in rows) / len(rows),
    )
