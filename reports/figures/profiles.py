"""Performance profiles (Dolan & Moré, 2002), by which AlgoPerf ranks methods (Dahl et al., 2023, arXiv 2306.07179).

On each task the target is the median of what methods end with. A method's cost is what its runs need to be seen there
first, a median over seeds; the profile is the share of tasks on which that is at most so many times the least of any.
"""

import statistics

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

from reports import to_target
from reports.figures import style
from reports.figures.chart import rows_left_out
from reports.figures.curves import MOST_ROWS
from reports.figures.scores import seen
from reports.figures.svg import Plot
from reports.setups import Setup

_FARTHEST = 8  # times the least


def caption(setup: Setup) -> str:
    """How to read it."""
    return (
        "On each task the target is the median of what methods end with; a line is the share of tasks on which a "
        "method is first seen there (median of its seeds) with at most so many times the fewest tokens of any "
        f"(performance profiles, as in AlgoPerf). Higher is better.{rows_left_out(setup, MOST_ROWS)}"
    )


def ratios(setup: Setup) -> dict[str, list[float]]:
    """For each row its tokens to the target on each task over the fewest of any row; infinite if it isn't reached.

    Empty where there is a single task, or one on which nothing was evaluated on the way.
    """
    found: dict[str, list[float]] = {label: [] for label in setup.rows}
    for task in setup.tasks:
        costs = _costs(setup, task)
        least = min(costs.values(), default=float("inf"))
        if least == float("inf"):
            return {}
        for label in found:
            found[label].append(costs.get(label, float("inf")) / least)
    return found if len(setup.tasks) > 1 else {}


def _costs(setup: Setup, task: str) -> dict[str, float]:
    """Tokens to the target; {} where no row was evaluated more than once."""
    lines = {label: seen(setup, label, task) for label in setup.rows}
    if all(len(line.steps) < 2 for line in lines.values()):
        return {}
    ends = [line.scores[-1] for line in lines.values() if line.scores]
    return {label: to_target.tokens_to(setup, label, task, statistics.median(ends)) for label in setup.rows}


def profile(setup: Setup) -> Plot | None:
    """The profiles of all rows; None where nothing can be said."""
    lines = dict(list(ratios(setup).items())[:MOST_ROWS])
    if not lines:
        return None
    width, height = style.WIDE, 320
    figure = Figure(figsize=(width / 72, height / 72), dpi=72)
    figure.subplots_adjust(left=52 / width, right=1 - 14 / width, top=1 - 14 / height, bottom=44 / height)
    axes = figure.subplots()
    plot = Plot("profiles", "Performance profiles over tasks", "", figure)
    styles = style.row_styles(setup.rows, setup.reference)
    for label, values in lines.items():
        look = styles[label]
        inner = sorted(value for value in values if value <= _FARTHEST)
        xs, ys = [1.0, *inner, float(_FARTHEST)], [_share(values, x) for x in [1.0, *inner, float(_FARTHEST)]]
        gid = plot.hint(f"row-{look.number}-profile", f"{label}: {_words(values)}")
        axes.step(xs, ys, where="post", color=look.colour, ls=look.dashes, lw=1.6, gid=gid, clip_on=False)
    axes.set_xscale("log", base=2)
    axes.set_xlim(1, _FARTHEST)
    axes.set_ylim(0, 1.02)
    axes.xaxis.set_major_locator(FixedLocator([1, 2, 4, 8]))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    axes.set_xlabel("tokens to the target, times the fewest of any")
    axes.set_ylabel("share of tasks")
    axes.tick_params(length=0)
    plot.alt = f"{plot.title}. " + "; ".join(f"{label} {_words(values)}" for label, values in lines.items()) + "."
    return plot


def _share(values: list[float], most: float) -> float:
    return sum(value <= most for value in values) / len(values)


def _words(values: list[float]) -> str:
    first, reached = _share(values, 1), _share(values, float("1e300"))
    return f"first on {first:.0%} of {len(values)} tasks, reached the target on {reached:.0%}"
