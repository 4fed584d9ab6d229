"""The little arithmetic behind the tables."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from scipy.special import stdtrit
from scipy.stats import studentized_range, ttest_ind_from_stats

SIGNIFICANCE = 0.05
TEST = "Games-Howell test over seeds, which is Welch's t-test where there are two methods"
POWER = 0.8
Z = statistics.NormalDist().inv_cdf(1 - SIGNIFICANCE / 2)
SAME_POINTS = 2.0  # scores that are shown to differ by less are equal: what `check` tolerates, too


class Sample(NamedTuple):
    """A mean over runs; the sample standard deviation (n - 1 below the line) is None for a single run."""

    mean: float
    deviation: float | None
    n: int


def summarise(values: Sequence[float]) -> Sample:
    return Sample(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


def paired_ratio(values: Mapping[Any, float], reference: Mapping[Any, float]) -> float | None:
    """Geometric mean of value / reference over the keys where both are known and not 0; None if there is none."""
    shared = [key for key in values if values[key] and reference.get(key)]
    return statistics.geometric_mean([values[key] / reference[key] for key in shared]) if shared else None


def tied_with_best(samples: Mapping[str, Sequence[float]], *, higher_is_better: bool = True) -> set[str]:
    """The names not significantly different from the one with the best mean, and that one itself.

    Games and Howell's test, p >= 0.05: of rows that are all equal some is left out in 2 to 8 % of cases, whatever their
    number. That isn't to be equal: see `equivalent`. A single run can't be tested: it is never among them, and if the
    best mean is that of a single run, the set is empty.
    """
    if not samples:
        return set()
    choose = max if higher_is_better else min
    best = choose(samples, key=lambda name: statistics.fmean(samples[name]))
    if len(samples[best]) < 2:
        return set()
    tested = {name: values for name, values in samples.items() if len(values) > 1}
    return {name for name, values in tested.items() if _alike(values, samples[best], len(tested))}


def _alike(values: Sequence[float], best: Sequence[float], rows: int) -> bool:
    if len(set(values)) == len(set(best)) == 1:  # no spread at all: nothing to test, equal or not
        return values[0] == best[0]
    error, freedom = _welch([statistics.stdev(one) for one in (values, best)], (len(values), len(best)))
    apart = statistics.fmean(values) - statistics.fmean(best)
    return abs(apart) <= error * errors_of_rows(freedom, rows)


def errors_of_rows(freedom: float, rows: int) -> float:
    """The standard errors by which in one case of twenty two of as many equal rows lie apart (Games & Howell 1976).

    Of two rows they are Student's. The best of more was chosen for its luck, too, and leads the others by more: by the
    studentized range, which takes long to compute, and is interpolated between whole degrees of freedom.
    """
    if rows < 3:
        return -float(stdtrit(freedom, SIGNIFICANCE / 2))
    below = max(1, math.floor(freedom))
    share = (1 / below - 1 / freedom) / (1 / below - 1 / (below + 1))
    return _of_range(below, rows) ** (1 - share) * _of_range(below + 1, rows) ** share


@lru_cache(maxsize=1024)
def _of_range(freedom: int, rows: int) -> float:
    return float(studentized_range.ppf(1 - SIGNIFICANCE, rows, freedom)) / math.sqrt(2)


def point(scores: Iterable[float]) -> float:
    """The size of a point: 0.01 of the scale, which is the least of 1, 10 and 100 that all of the scores are within."""
    largest = max(map(abs, scores))
    return 0.01 if largest <= 1 else 0.1 if largest <= 10 else 1.0


def equivalent(values: Sequence[float], best: Sequence[float], *, higher_is_better: bool = True, rows: int = 2) -> bool:
    """Whether two samples are shown to differ by less than `SAME_POINTS`: two one-sided tests of Welch's (TOST).

    A point is 0.01 of the scores' scale, and 1 % of the best of which less is better. Of several `rows` each is held
    against the best: the level is divided by their number (Bonferroni).
    """
    if min(len(values), len(best)) < 2:
        return False
    one, other = summarise(values), summarise(best)
    unit = point([*values, *best]) if higher_is_better else 0.01 * abs(other.mean)
    margin = SAME_POINTS * unit
    if not one.deviation and not other.deviation:
        return abs(one.mean - other.mean) < margin
    above, below = (
        ttest_ind_from_stats(one.mean + shift, *one[1:], *other, equal_var=False, alternative=side).pvalue
        for shift, side in ((margin, "greater"), (-margin, "less"))
    )
    return bool(max(above, below) * max(1, rows - 1) < SIGNIFICANCE)


class Sight(NamedTuple):
    """What seeds can see, judged by their scatter.

    Attributes:
        seeds: how many there are of each row, the fewest first.
        least: the test finds no smaller difference.
        more: a larger number of seeds.
        then: the difference that these would see in four cases of five.
    """

    seeds: tuple[int, ...]
    least: float
    more: int
    then: float

    @property
    def words(self) -> str:
        """`2 seeds can't see less than 0.25; 6 would see 0.05`."""
        return sight_words({"": self})


def sight_words(sights: Mapping[str, Sight]) -> str:
    """The same of sights of as many seeds, each with where it is: `less than 0.25 on cb, 0.05 on rte`."""
    first = next(iter(sights.values()))
    least = ", ".join(f"{_brief(seen.least)} {where}".strip() for where, seen in sights.items())
    then = ", ".join(_brief(seen.then) for seen in sights.values())
    seeds = " and ".join(map(str, first.seeds))
    return f"{seeds} seeds can't see less than {least}; {first.more} would see {then}"


def _brief(value: float) -> str:
    """Two digits that count."""
    return f"{float(f'{value:.2g}'):g}"


def sight(one: Sequence[float], other: Sequence[float], rows: int = 2) -> Sight | None:
    """What the seeds of two of so many rows can see; None if one has a single seed, or if nothing scatters."""
    if min(len(one), len(other)) < 2:
        return None
    deviations = [statistics.stdev(values) for values in (one, other)]
    if not any(deviations):
        return None
    counts = (len(one), len(other))
    more = max(6, 2 * max(counts))  # fewer would see no smaller difference in four cases of five
    now, later = (_welch(deviations, n) for n in (counts, (more, more)))
    then = errors_of_rows(later.freedom, rows) + float(stdtrit(later.freedom, POWER))
    return Sight(tuple(sorted(set(counts))), now.error * errors_of_rows(now.freedom, rows), more, later.error * then)


class _Welch(NamedTuple):
    """The standard error of a difference of means, and its degrees of freedom."""

    error: float
    freedom: float


def _welch(deviations: Sequence[float], counts: Sequence[int]) -> _Welch:
    unit = max(deviations)  # whose square may be too large for a number, or too small
    parts = [(deviation / unit) ** 2 / n for deviation, n in zip(deviations, counts, strict=True)]
    freedom = sum(parts) ** 2 / sum(part**2 / (n - 1) for part, n in zip(parts, counts, strict=True))
    return _Welch(unit * math.sqrt(sum(parts)), freedom)


def wilson(share: float, n: int) -> tuple[float, float]:
    """The 95 % interval of a share of n examples (Wilson, 1927)."""
    centre, spread = share + Z**2 / (2 * n), Z * math.sqrt(share * (1 - share) / n + (Z / (2 * n)) ** 2)
    return (centre - spread) / (1 + Z**2 / n), (centre + spread) / (1 + Z**2 / n)
