"""What a score must exceed to mean something: that of guessing, by more than so few examples leave to chance."""

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from reports.names import counted
from reports.record import Record
from reports.setups import score
from reports.statistics import SIGNIFICANCE, Z, wilson
from reports.table import score_text

GUESSING, BEFORE = "guessing", "before training"


class Floor(NamedTuple):
    """What takes no learning on a task, or on the average over tasks.

    Attributes:
        score: the better of guessing (the best constant answer, or tokens that are all as likely) and, where runs were
            scored before training, of that. None: no record says.
        half_width: how far a score as good lies from it by chance, at most, in 19 of 20 cases; None: nobody can say.
        examples: that scores are taken on; None: no record says.
        higher: whether more is better.
        what: which of the two it is, in words.
    """

    score: float | None = None
    half_width: float | None = None
    examples: int | None = None
    higher: bool = True
    what: str = GUESSING

    def beaten_by(self, mean: float | None) -> bool | None:
        """Whether a score is above it by more than chance; None if it isn't known."""
        if self.score is None or mean is None:
            return None
        return (mean - self.score if self.higher else self.score - mean) > (self.half_width or 0)

    def missed_by(self, score: float) -> bool:
        """Whether a score is below it by more than chance."""
        if self.score is None:
            return False
        return (self.score - score if self.higher else score - self.score) > (self.half_width or 0)

    @property
    def beaten(self) -> str:
        """What a method is that beats it, in words."""
        return "above chance" if self.higher and self.what == GUESSING else f"better than {self.what}"

    @property
    def score_words(self) -> str:
        """`0.527 ± 0.059`; "" if it isn't known."""
        known = [one for one in (self.score, self.half_width) if one is not None]
        return " ± ".join(score_text(one, self.score, thousands=",") for one in known)

    @property
    def words(self) -> str:
        """`0.527 ± 0.059, 277 examples`."""
        return self.score_words + (f", {counted(f'{self.examples:,}', 'example')}" if self.examples else "")


def of(runs: Sequence[Record]) -> Floor:
    """The floor of a task, off its runs that are ok: what one of them knows holds for all."""
    if not runs:
        return Floor()
    higher = runs[0]["higher_is_better"] is not False
    guesses: list[float] = [run["constant_score"] for run in runs if run.get("constant_score") is not None]
    before = before_training(runs)
    known = [(guess, GUESSING) for guess in guesses[:1]] + ([] if before is None else [(before, BEFORE)])
    examples = examples_of(runs)
    if not known:
        return Floor(examples=examples, higher=higher)
    value, what = (max if higher else min)(known, key=lambda one: one[0])
    return Floor(value, _chance(value, what, runs), examples, higher, what)


def of_row(floor: Floor, runs: Sequence[Record]) -> Floor:
    """The floor of a task for the runs of one row: what chance alone changes depends on how much training changes."""
    if floor.score is None or floor.what != BEFORE or _error("loss_change", runs) is None:
        return floor
    return floor._replace(half_width=_chance(floor.score, BEFORE, runs))


def before_training(runs: Sequence[Record]) -> float | None:
    """The headline before the first step, a mean over seeds; None if no run was scored then.

    Of each seed what most of its runs began with, which is the model as it was given: few methods change it first
    (4-bit weights, factors). The better of two that are as frequent.
    """
    by_seed: dict[int, Counter[float]] = {}
    for run in runs:
        if run.get("initial_metrics"):
            by_seed.setdefault(run["seed"], Counter())[run["initial_metrics"][run["headline"]]] += 1
    sense = -1 if runs and runs[0]["higher_is_better"] is False else 1
    given = [max(scores, key=lambda one: (scores[one], sense * one)) for scores in by_seed.values()]
    return statistics.fmean(given) if given else None


def average(floors: Sequence[Floor]) -> Floor:
    """The floor of an unweighted average over tasks, whose examples are independent; unknown where one is."""
    scores = [floor.score for floor in floors if floor.score is not None]
    if not floors or len(scores) < len(floors):
        return Floor()
    whats = {floor.what for floor in floors}
    return Floor(
        statistics.fmean(scores), average_width([floor.half_width for floor in floors]), what=" or ".join(sorted(whats))
    )


def average_width(widths: Sequence[float | None]) -> float | None:
    """The half-width of an average of independent scores; None where one of them isn't known."""
    known = [width for width in widths if width is not None]
    return math.hypot(*known) / len(known) if known and len(known) == len(widths) else None


def examples_of(runs: Sequence[Record]) -> int | None:
    """The fewest validation examples of any run; None if one doesn't say."""
    counts = [run.get("validation_examples") or 0 for run in runs]
    return min(counts, default=0) or None


def half_width(value: float, runs: Sequence[Record], own: Sequence[Record]) -> float | None:
    """Half of the 95 % interval that so few examples leave the score of a task's `own` runs; None if nobody can say.

    Of a share of right answers it is Wilson's, whatever the number of seeds, which all answer the same examples. So it
    is of other scores between 0 and 1: no mean of values between these scatters more, and an F1 about as much. Of a
    perplexity it follows from the standard error of the loss over sequences, of its own runs: one that exploded has
    another.
    """
    if (error := _error("loss", own)) is not None:
        return value * math.sinh(Z * error)
    count = _examples_of_shares(runs)
    if count is None:
        return None
    low, high = wilson(value, count)
    return (high - low) / 2


def _chance(value: float, what: str, runs: Sequence[Record]) -> float | None:
    """How far above the floor a score must be for its 95 % interval to lie above: Wilson's is where this test ends.

    A perplexity is paired by sequence with that before training, where the runs tell. Of shares the level is divided by
    the number of runs without a second seed: one of many that guess would be above. The mean of two hardly is.
    """
    paired = _error("loss_change", runs) if what == BEFORE else None
    error = _error("loss", runs) if paired is None else paired
    if error is not None:
        return value * -math.expm1(-Z * error)
    count = _examples_of_shares(runs)
    if count is None:
        return None
    z = statistics.NormalDist().inv_cdf(1 - SIGNIFICANCE / 2 / max(1, _alone(runs)))
    return z * math.sqrt(value * (1 - value) / count)


def _alone(runs: Sequence[Record]) -> int:
    """How many of these are of a method that has one seed."""
    seeds: dict[str, set[int]] = {}
    for run in runs:
        seeds.setdefault(run["method"], set()).add(run["seed"])
    return sum(len(seeds[run["method"]]) == 1 for run in runs)


def _error(of: str, runs: Sequence[Record]) -> float | None:
    """The mean standard error of the logarithm of a perplexity ("loss"), or of its change ("loss_change")."""
    errors = [run["metrics"].get(f"{of}_standard_error") for run in runs if run["headline"] == "perplexity"]
    known = [error for error in errors if error is not None]
    return statistics.fmean(known) if known else None


def _examples_of_shares(runs: Sequence[Record]) -> int | None:
    """The examples, where more is better and all scores, guessing's and those before training too, lie in 0 to 1."""
    shares = all(run["higher_is_better"] is not False and 0 <= one <= 1 for run in runs for one in _scores(run))
    return examples_of(runs) if shares else None


def _scores(run: Record) -> list[float]:
    """What a run says of its headline's scale."""
    known = [score(run), run.get("constant_score"), (run.get("initial_metrics") or {}).get(run["headline"])]
    return [one for one in known if one is not None]
