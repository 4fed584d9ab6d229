"""What may be concluded from differences that are partly noise: of each row, and of all rows together.

A difference is candidate - baseline of one row (a task, a method, a model) and seed, turned so that less than 0 is
worse.

**The noise.** Differences of one row scatter around its true change with a standard deviation of its own; rows and
seeds are independent. With several seeds a row, the deviation is estimated from the row and, as three seeds tell
little, moderated by those of all rows (Smyth 2004, "Linear models and empirical Bayes methods", the moderated t): rows
alike lend each other degrees of freedom, a row much noisier than the others keeps its own deviation. With one seed a
row, the deviation is taken to be the same in all rows and comes from the differences between rows by Qn (Rousseeuw &
Croux 1993), which a shift of all rows doesn't change and up to half of the rows being regressions hardly does.

**A row** is worse if it is so by more than the margin, and significantly less than 0: a one-sided paired t-test,
corrected by Holm's method for the number of rows. It is shown not to be inferior if the test against the margin
rejects. Where nothing tells the noise (one seed and fewer than `FEWEST` rows) the margin alone decides, and with
several seeds but fewer than `FEWEST` degrees of freedom also a row whose every seed is beyond the margin is worse: more
seeds must not hide what one would have shown.

**All rows together** (and all rows of each method) are worse if the sign test over rows (ties dropped) or the paired
t-test of the rows' means says so; no margin: 35 rows of 35 each slightly worse are a regression. Both tests of
all these groups are corrected by Holm's method.

**False alarms.** The three families - quality by row, quality of groups, throughput by row - share the tolerated rate
of false alarms (`SHARES`), which by Bonferroni holds for a suite as a whole. Memory and savings are exact: no share.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TypeVar

import numpy as np
from scipy.optimize import brentq
from scipy.special import bdtrc, digamma, ndtr, polygamma, stdtr

from reports.statistics import summarise

SHARES = {"quality": 0.4, "groups": 0.4, "throughput": 0.2}
FEWEST = 6  # rows, or degrees of freedom, from which the noise is known well enough to be used
FEWEST_TOGETHER = 5  # rows; of fewer, equal differences may be chance: scores are whole examples
_SHOWN = 0.05  # level at which a row is shown not to be inferior

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class Judgement:
    """What the differences of one row tell."""

    mean: float
    seeds: int
    verdict: str  # worse | better | fine | inconclusive
    p: float | None  # that a mean this far from 0 is chance, corrected; None where the margin alone decides
    noise: float | None  # standard deviation of one difference; None where nothing tells it


@dataclass(frozen=True)
class Noise:
    """A variance (None: nothing tells it), its degrees of freedom, and whether these are enough to rely on."""

    variance: float | None
    freedom: float
    known: bool = True

    @property
    def deviation(self) -> float | None:
        return None if self.variance is None else math.sqrt(self.variance)


def judge(rows: Mapping[K, Sequence[float]], margin: float, alpha: float) -> dict[K, Judgement]:
    """A verdict on each row from its differences by seed; without a change, any is worse in `alpha` of the suites."""
    noise = noises(rows)
    means = {key: fmean(values) for key, values in rows.items()}
    worse = holm({key: _p_below(means[key], len(rows[key]), noise[key]) for key in rows})
    better = holm({key: _p_below(-means[key], len(rows[key]), noise[key]) for key in rows})
    return {
        key: Judgement(
            means[key],
            len(values),
            _verdict(values, means[key], noise[key], margin, worse[key] < alpha, better[key] < alpha),
            None if noise[key].variance is None else min(worse[key], better[key]),
            noise[key].deviation,
        )
        for key, values in rows.items()
    }


def _verdict(
    values: Sequence[float], mean: float, noise: Noise, margin: float, surely_worse: bool, surely_better: bool
) -> str:
    if mean < -margin and (surely_worse or (not noise.known and max(values) < -margin)):
        return "worse"
    if mean > margin and (surely_better or (not noise.known and min(values) > margin)):
        return "better"
    if noise.variance is None or len(values) == 1:
        return "fine" if mean >= -margin else "inconclusive"
    return "fine" if _p_below(-mean - margin, len(values), noise) < _SHOWN else "inconclusive"


def _p_below(mean: float, n: int, noise: Noise) -> float:
    """That a mean of n as low as this is chance, if the truth is 0 or more; 1 where nothing tells the noise."""
    if noise.variance is None:
        return 1.0
    if noise.variance == 0:
        return 0.0 if mean < 0 else 1.0
    ratio = mean / math.sqrt(noise.variance / n)
    return float(ndtr(ratio) if math.isinf(noise.freedom) else stdtr(noise.freedom, ratio))


def holm(p: Mapping[K, float]) -> dict[K, float]:
    """P-values corrected for their number, step down (Holm 1979)."""
    corrected: dict[K, float] = {}
    least = 0.0
    for rank, key in enumerate(sorted(p, key=lambda key: p[key])):
        least = max(least, min(1.0, (len(p) - rank) * p[key]))
        corrected[key] = least
    return corrected


def noises(rows: Mapping[K, Sequence[float]]) -> dict[K, Noise]:
    """The noise of each row's differences, from its own seeds and what the other rows lend."""
    own = {key: summarise(values) for key, values in rows.items()}
    replicated = {
        key: (sample.deviation**2, sample.n - 1) for key, sample in own.items() if sample.deviation is not None
    }
    if len(replicated) >= 3 and sum(freedom for _, freedom in replicated.values()) >= FEWEST:
        common = _moderator(list(replicated.values()))
    elif not replicated and len(rows) >= FEWEST:
        common = Noise(qn([sample.mean for sample in own.values()]) ** 2, 0.82 * (len(rows) - 1))  # Qn's efficiency
    else:
        common = Noise(None, 0, known=False)
    return {key: _moderated(replicated.get(key, (0.0, 0)), common) for key in rows}


def _moderated(own: tuple[float, int], common: Noise) -> Noise:
    variance, freedom = own
    if common.variance is None:
        return Noise(variance if freedom else None, freedom, known=freedom >= FEWEST)
    if math.isinf(common.freedom):
        return common
    total = freedom + common.freedom
    return Noise((freedom * variance + common.freedom * common.variance) / total, total)


def _moderator(samples: Sequence[tuple[float, int]]) -> Noise:
    """The variance that rows have in common and its weight in degrees of freedom (Smyth 2004, section 6.2)."""
    pooled = sum(variance * freedom for variance, freedom in samples) / sum(freedom for _, freedom in samples)
    floor = 1e-5 * sorted(variance for variance, _ in samples)[len(samples) // 2]
    if not floor:  # at least half of the rows repeat exactly: whatever differs isn't noise that they share
        return Noise(None, 0, known=False) if pooled else Noise(0.0, math.inf)
    logs = [math.log(max(variance, floor)) - digamma(f / 2) + math.log(f / 2) for variance, f in samples]
    mean, deviation, n = summarise(logs)
    excess = (deviation or 0.0) ** 2 - sum(polygamma(1, f / 2) for _, f in samples) / n
    if excess <= polygamma(1, 1e4):  # no more scatter than chance: all rows have one variance
        return Noise(pooled, math.inf)
    half = brentq(lambda x: polygamma(1, x) - excess, 1e-6, 2e4)
    return Noise(math.exp(mean + digamma(half) - math.log(half)), 2 * half)


def qn(values: Sequence[float]) -> float:
    """Qn, a standard deviation from the smaller ones of all distances between two values (Rousseeuw & Croux 1993)."""
    n = len(values)
    half = n // 2 + 1
    one, other = np.triu_indices(n, 1)
    distances = np.abs(np.asarray(values)[one] - np.asarray(values)[other])
    rank = half * (half - 1) // 2 - 1
    small_sample = n / (n + 1.4) if n % 2 else n / (n + 3.8)
    return 2.2219 * small_sample * float(np.partition(distances, rank)[rank])


@dataclass(frozen=True)
class Together:
    """What the means of a group of rows tell."""

    rows: int
    worse: int
    better: int
    mean: float
    sign_p: float  # both that it is no worse, corrected
    mean_p: float | None  # None: too few rows
    verdict: str  # worse | better | fine


def judge_together(groups: Mapping[K, Sequence[float]], alpha: float) -> dict[K, Together]:
    """A verdict on each group of rows from their means; without a change, any is worse in a share `alpha` of suites."""
    worse, better = _group_tests(groups, 1), _group_tests(groups, -1)
    return {key: _together(values, key, worse, better, alpha) for key, values in groups.items()}


def _together(
    values: Sequence[float], key: K, worse: dict[tuple[K, str], float], better: dict[tuple[K, str], float], alpha: float
) -> Together:
    def least(tests: dict[tuple[K, str], float]) -> float:
        return min(tests[key, "sign"], tests.get((key, "mean"), 1.0))

    verdict = "worse" if least(worse) < alpha else "better" if least(better) < alpha else "fine"
    return Together(
        len(values),
        sum(value < 0 for value in values),
        sum(value > 0 for value in values),
        fmean(values),
        worse[key, "sign"],
        worse.get((key, "mean")),
        verdict,
    )


def _group_tests(groups: Mapping[K, Sequence[float]], sign: int) -> dict[tuple[K, str], float]:
    tests: dict[tuple[K, str], float] = {}
    for key, values in groups.items():
        turned = [sign * value for value in values]
        below, above = sum(value < 0 for value in turned), sum(value > 0 for value in turned)
        tests[key, "sign"] = float(bdtrc(below - 1, below + above, 0.5)) if below else 1.0
        if len(turned) >= FEWEST_TOGETHER:
            mean, deviation, n = summarise(turned)
            tests[key, "mean"] = _p_below(mean, n, Noise((deviation or 0.0) ** 2, n - 1))
    return holm(tests)
