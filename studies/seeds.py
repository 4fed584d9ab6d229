"""Does a study's ranking survive leaving one seed out?"""

import math
import statistics
from collections.abc import Iterable

from scipy.stats import kendalltau

from reports.record import Record

LEAST = 3  # seeds, for the question to mean something


def ranking(runs: Iterable[Record]) -> dict[str, float]:
    """Each method's score, best first: the mean over its tasks of the mean over its seeds; the higher the better.

    A method that lacks a task that another has is left out.
    """
    scores: dict[str, dict[str, list[float]]] = {}
    for run in runs:
        if run["status"] == "ok":
            sign = 1 if run["higher_is_better"] else -1
            by_task = scores.setdefault(run["method"], {})
            by_task.setdefault(run["task"], []).append(sign * run["metrics"][run["headline"]])
    most = max(map(len, scores.values()), default=0)
    means = {
        method: statistics.fmean(map(statistics.fmean, by_task.values()))
        for method, by_task in scores.items()
        if len(by_task) == most
    }
    return dict(sorted(means.items(), key=lambda item: -item[1]))


def _first(scores: dict[str, float]) -> str:
    """Whose score is the best, all of those that have it: `adamw and badam`; "none" where no run is left."""
    best = max(scores.values(), default=None)
    return " and ".join(sorted(method for method, score in scores.items() if score == best)) or "none"


def survival(runs: list[Record]) -> str | None:
    """A sentence; None with fewer than three seeds or two methods."""
    seeds = sorted({run["seed"] for run in runs})
    whole = ranking(runs)
    if len(seeds) < LEAST or len(whole) < 2:
        return None
    if len(set(whole.values())) == 1:
        return "All methods score alike, so none is first."
    first = _first(whole)
    without = {seed: ranking(run for run in runs if run["seed"] != seed) for seed in seeds}
    stays = sum(_first(found) == first for found in without.values())
    others = sorted({_first(found) for found in without.values()} - {first})
    shared = [[method for method in whole if method in found] for found in without.values()]
    taus = [
        kendalltau([whole[m] for m in methods], [found[m] for m in methods]).statistic if len(methods) > 1 else math.nan
        for methods, found in zip(shared, without.values(), strict=True)
    ]
    instead = f" (otherwise {', '.join(others)})" if others else ""
    stay = "stay" if " and " in first else "stays"
    stays_first = f"Leaving one seed out: {first} {stay} first in {stays} of {len(seeds)} cases{instead}"
    if any(map(math.isnan, taus)):  # all methods score alike without some seed
        return f"{stays_first}."
    return (
        f"{stays_first}; Kendall's tau between the ranking of {len(whole)} methods and the whole one is "
        f"{min(taus):.2f} to {max(taus):.2f}."
    )
