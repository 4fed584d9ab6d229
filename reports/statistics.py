"""The little arithmetic behind the tables."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from scipy.stats import ttest_ind_from_stats

SIGNIFICANCE = 0.05
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

    Welch's two-sided t-test, p >= 0.05. That isn't to be equal: see `equivalent`. A single run can't be tested: it is
    never among them, and if the best mean is that of a single run, the set is empty.
    """
    if not samples:
        return set()
    choose = max if higher_is_better else min
    best = choose(samples, key=lambda name: statistics.fmean(samples[name]))
    if len(samples[best]) < 2:
        return set()
    return {name for name, values in samples.items() if len(values) > 1 and _alike(values, samples[best])}


def _alike(values: Sequence[float], best: Sequence[float]) -> bool:
    if len(set(values)) == len(set(best)) == 1:  # no spread at all: nothing to test, equal or not
        return values[0] == best[0]
    test = ttest_ind_from_stats(*summarise(values), *summarise(best), equal_var=False)
    return bool(test.pvalue >= SIGNIFICANCE)


def equivalent(values: Sequence[float], best: Sequence[float], *, higher_is_better: bool = True) -> bool:
    """Whether two samples are shown to differ by less than `SAME_POINTS`: two one-sided tests of Welch's (TOST).

    A point is 0.01 of a score between 0 and 1, 1 of a larger one, and 1 % of the best of which less is better.
    """
    if min(len(values), len(best)) < 2:
        return False
    one, other = summarise(values), summarise(best)
    unit = 0.01 * abs(other.mean) if not higher_is_better else 0.01 if max(map(abs, [*values, *best])) <= 1 else 1.0
    margin = SAME_POINTS * unit
    if not one.deviation and not other.deviation:
        return abs(one.mean - other.mean) < margin
    above, below = (
        ttest_ind_from_stats(one.mean + shift, *one[1:], *other, equal_var=False, alternative=side).pvalue
        for shift, side in ((margin, "greater"), (-margin, "less"))
    )
    return bool(max(above, below) < SIGNIFICANCE)


def round_parts(parts: Sequence[int], unit: int) -> list[int]:
    """Round non-negative parts to whole units so that they add up to their rounded sum (largest remainders go up)."""
    whole = [part // unit for part in parts]
    missing = (2 * sum(parts) + unit) // (2 * unit) - sum(whole)
    by_remainder = sorted(range(len(parts)), key=lambda index: -(parts[index] % unit))
    for index in by_remainder[:missing]:
        whole[index] += 1
    return whole


def decimals(value: float) -> int:
    """How many to print of a score: accuracies are told apart by the third, perplexities by the second."""
    return 3 if math.fabs(value) < 10 else 2
