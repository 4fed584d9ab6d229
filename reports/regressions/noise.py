"""How much the differences of a row scatter by chance: from its seeds, from other rows, from the number of examples.

Differences of one row by seed scatter around its true change with a standard deviation of its own, which is estimated
from its seeds. Three seeds tell little, so it is moderated by those of the other rows (Smyth 2004, "Linear models and
empirical Bayes methods", the moderated t), with two reserves that hold for suites of a few rows, too:

- Rows may differ in their noise. How much they do is itself uncertain, so standard errors are added to the estimate:
  few rows, or rows unlike each other, lend few degrees of freedom.
- Rows may share their noise: those of a task the examples, all of a seed the initial weights. The agreement of rows'
  deviations from seed to seed, within a task and between tasks, says how many independent rows they are worth
  (Satterthwaite's count), and no more is lent than these have.

One seed alone shows no noise. It is then taken for that of as many examples, see `of_examples`, and what a seed was
seen to change beside them.
"""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, variance
from typing import TypeVar

import numpy as np
from scipy.optimize import brentq
from scipy.special import digamma, ndtr, polygamma, stdtr

K = TypeVar("K", bound=Hashable)
BySeed = Mapping[int, float]  # the differences of a row

_RESERVE = 1.25  # standard errors
_HALF_FREEDOMS = (1e-3, 1e4)  # between which the prior's are looked for


@dataclass(frozen=True)
class Noise:
    """The variance of one difference, and its degrees of freedom (infinite: it is known)."""

    variance: float
    freedom: float = math.inf

    def p_below(self, mean: float, n: int) -> float:
        """That a mean of n differences is as low as this by chance, if the truth is 0 or more."""
        if not self.variance:
            return 0.0 if mean < 0 else 1.0
        ratio = mean / math.sqrt(self.variance / n)
        return float(ndtr(ratio) if math.isinf(self.freedom) else stdtr(self.freedom, ratio))


def of_examples(before: float, after: float, examples: int, *, is_share: bool) -> Noise:
    """The noise of a difference in points between two scores (0 to 1) of one seed each, on as many examples.

    A share of right answers has the variance of a binomial, at most; "at most" because both sides answer the same
    examples. Other means of values between 0 and 1 have no more than 1/4 an example. The share is that of both sides
    with Agresti & Caffo's (2000) two successes and failures, since nothing is sure of a few examples all right.
    """
    share = ((before + after) * examples + 2) / (2 * examples + 4)
    each = share * (1 - share) if is_share else 0.25
    return Noise(1e4 * 2 * each / examples)


def noises(
    rows: Mapping[K, BySeed], task: Callable[[K], Hashable], floors: Mapping[K, float] | None = None
) -> dict[K, Noise | None]:
    """The noise of each row's differences; None where neither its seeds nor other rows tell it.

    Args:
        rows: differences by seed.
        task: of a row: rows of one task may share more than others do.
        floors: the least variance that a row can have, since its scores are counts of examples.
    """
    own = {key: _own(values, (floors or {}).get(key, 0.0)) for key, values in rows.items() if len(values) > 1}
    common = _common(list(own.values()))
    independent = _independent({key: rows[key] for key in own}, task) if own else 0.0
    return {key: _moderated(own.get(key, Noise(0.0, 0)), common, independent) for key in rows}


def _own(values: BySeed, floor: float) -> Noise:
    return Noise(max(variance(values.values()), floor), len(values) - 1)


def _moderated(own: Noise, common: Noise, independent: float) -> Noise | None:
    """A row's own variance together with what the others lend; `independent`: the degrees of freedom of all."""
    lent = max(0.0, min(common.freedom, independent - own.freedom))
    total = own.freedom + lent
    return Noise((own.freedom * own.variance + lent * common.variance) / total, total) if total else None


def _common(samples: Sequence[Noise]) -> Noise:
    """The variance that rows have in common and its weight in degrees of freedom (Smyth 2004, section 6.2)."""
    positive = [sample for sample in samples if sample.variance]
    if len(samples) < 2 or len(positive) < len(samples):  # rows that repeat exactly have no noise in common with others
        return Noise(0.0, 0)
    logs = [math.log(s.variance) - digamma(s.freedom / 2) + math.log(s.freedom / 2) for s in samples]
    expected = fmean(float(polygamma(1, s.freedom / 2)) for s in samples)
    excess = max(0.0, variance(logs) - expected)
    uncertain = excess + _RESERVE * (excess + expected) * math.sqrt(2 / (len(samples) - 1))
    half = _inverse_trigamma(uncertain)
    return Noise(math.exp(fmean(logs) + digamma(half) - math.log(half)), 2 * half)


def _inverse_trigamma(value: float) -> float:
    least, most = (float(polygamma(1, half)) for half in reversed(_HALF_FREEDOMS))
    clipped = min(max(value, least), most)
    return float(brentq(lambda half: polygamma(1, half) - clipped, *_HALF_FREEDOMS))


def _independent(rows: Mapping[K, BySeed], task: Callable[[K], Hashable]) -> float:
    """The degrees of freedom of all rows together, those that rows share counted once.

    Of n rows whose deviations correlate as r_ij there are n² / sum r_ij²; r_ij is the mean over pairs of one task, and
    over pairs of two.
    """
    seeds = sorted({seed for values in rows.values() for seed in values})
    directions = np.array([_direction(values, seeds) for values in rows.values()])
    tasks = np.unique([str(task(key)) for key in rows], return_inverse=True)[1]
    agreement = directions @ directions.T
    same, others = tasks[:, None] == tasks[None, :], ~np.eye(len(rows), dtype=bool)
    squares = sum(np.mean(agreement[kind]) ** 2 * kind.sum() for kind in (same & others, ~same) if kind.any())
    freedoms = sum(len(values) - 1 for values in rows.values())
    return freedoms * len(rows) / (len(rows) + float(squares))


def _direction(values: BySeed, seeds: Sequence[int]) -> np.ndarray:  # (seeds,), of length 1 (0 without noise)
    mean = fmean(values.values())
    deviations = np.array([values[seed] - mean if seed in values else 0.0 for seed in seeds])
    return deviations / (float(np.linalg.norm(deviations)) or 1.0)
