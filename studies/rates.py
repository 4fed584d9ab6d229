"""Are default rates fair? Each method at its default and at other rates, on examples that none was chosen on."""

import statistics
from collections.abc import Iterable

from membench.config.defaults import LEARNING_RATES
from reports.record import Record
from reports.table import Table

FAIR = 0.05  # of a score: so far behind its best rate a method may be at its default

TIE = 0.01  # of a score: rates so close can't be told apart

Scores = dict[float, list[float]]  # by learning rate, a score for each seed


def chosen(trials: Iterable[Record]) -> dict[str, float]:
    """By method, the rate to be its default: that with the best mean over the tasks.

    Of neighbours within `TIE` of it the middle one; of an even number, the larger of the middle two. Rates at which all
    scores are those at another rate taught nothing, and aren't chosen.
    """
    found: dict[str, Scores] = {}
    for run in sorted(trials, key=lambda run: (run["task"], run["seed"])):
        by_rate = found.setdefault(run["method"], {})
        by_rate.setdefault(run["hyperparameters"]["lr"], []).append(run["metrics"][run["headline"]])
    return {
        method: _middle({rate: statistics.fmean(values) for rate, values in _that_teach(by_rate).items()})
        for method, by_rate in found.items()
    }


def _that_teach(by_rate: Scores) -> Scores:
    found = list(by_rate.values())
    return {rate: values for rate, values in by_rate.items() if found.count(values) == 1} or by_rate


def _middle(means: dict[float, float]) -> float:
    rates = sorted(means)
    first = last = rates.index(max(rates, key=lambda rate: means[rate]))
    least = means[rates[first]] - TIE
    while first and means[rates[first - 1]] >= least:
        first -= 1
    while last + 1 < len(rates) and means[rates[last + 1]] >= least:
        last += 1
    return rates[(first + last + 1) // 2]


def scores(runs: Iterable[Record]) -> dict[str, Scores]:
    """By method, in order of name."""
    found: dict[str, Scores] = {}
    for run in sorted(runs, key=lambda run: (run["method"], run["hyperparameters"]["lr"], run["seed"])):
        if run["status"] == "ok":
            by_rate = found.setdefault(run["method"], {})
            by_rate.setdefault(run["hyperparameters"]["lr"], []).append(run["metrics"][run["headline"]])
    return found


def default(method: str) -> float:
    """A method's rate for narrow models; a variant without one of its own has its method's."""
    return LEARNING_RATES.get(method, LEARNING_RATES[method.partition(":")[0]]).narrow


def behind(method: str, found: Scores) -> float:
    """How much less a method scores at its default for narrow models than at its best rate; means over seeds."""
    means = {rate: statistics.fmean(values) for rate, values in found.items()}
    return max(means.values()) - means[default(method)]


def answer(found: dict[str, Scores]) -> str:
    """Which methods are fairly served by their default."""
    gaps = {method: behind(method, by_rate) for method, by_rate in found.items()}
    far = [f"{method} by {100 * gap:.1f}" for method, gap in gaps.items() if gap > FAIR]
    told = f"{len(gaps) - len(far)} of {len(gaps)} methods score within {100 * FAIR:.0f} points of their best rate"
    return f"At their default {told}." + (f" Further behind: {', '.join(far)} points." if far else "")


def table(found: dict[str, Scores]) -> Table:
    """A row a method."""
    lines = []
    for method, by_rate in found.items():
        own = default(method)
        best = max(by_rate, key=lambda rate: statistics.fmean(by_rate[rate]))
        others = [f"{rate:g}: {_told(values)}" for rate, values in by_rate.items() if rate != own]
        gap = f"{100 * behind(method, by_rate):.1f}"
        lines.append([method, f"{own:g}", _told(by_rate[own]), f"{best:g}", gap, ", ".join(others)])
    headers = ["method", "default", "score", "best", "behind", "other rates"]
    notes = ["score: mean ± standard deviation (seeds); behind: by how many points the best rate's mean is higher."]
    return Table("Each method at its default, and at other rates", headers, lines, {"method", "other rates"}, notes)


def _told(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{spread} ({len(values)})"
