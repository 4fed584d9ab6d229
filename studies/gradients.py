"""How far the full gradient fell, from runs with `--track gradient_norm`."""

import math
import statistics
from collections.abc import Iterable

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator

from reports.figures import style
from reports.figures.svg import Plot
from reports.record import Record
from reports.table import NOTHING, Table

LAST = 0.25  # of the steps: over which a level is a mean


def level(run: Record) -> float:
    """The mean norm over the last quarter of the steps."""
    last = run["history"][-1]["step"]
    points = [(one["step"], one["gradient_norm"]) for one in run["history"] if one.get("gradient_norm") is not None]
    return statistics.fmean(norm for step, norm in points if step > (1 - LAST) * last)


def levels(runs: Iterable[Record]) -> dict[str, dict[int, list[float]]]:
    """By method and batch size, a level for each seed."""
    found: dict[str, dict[int, list[float]]] = {}
    for run in runs:
        if run["status"] == "ok" and run["training"].get("track") == "gradient_norm":
            sizes = found.setdefault(run["method"], {})
            sizes.setdefault(run["training"]["batch_size"], []).append(level(run))
    return found


def answer(found: dict[str, dict[int, list[float]]]) -> list[str]:
    """For each batch size a sentence: who ends lowest and highest, and AdamW; and one that compares the sizes."""
    sizes = sorted({size for by_size in found.values() for size in by_size})
    by_method = {size: {name: levels[size] for name, levels in found.items() if size in levels} for size in sizes}
    return [*(_sentence(size, levels) for size, levels in by_method.items()), *_across(by_method)]


def _across(by_size: dict[int, dict[str, list[float]]]) -> list[str]:
    """What is left of the level at the smallest batch at the largest: noise alone would leave a root of their ratio."""
    few, many = min(by_size), max(by_size)
    both = by_size[few].keys() & by_size[many].keys()
    if few == many or not both:
        return []
    left = {name: statistics.fmean(by_size[many][name]) / statistics.fmean(by_size[few][name]) for name in both}
    least, most = min(left, key=left.__getitem__), max(left, key=left.__getitem__)
    told = f"{left[least]:.2f} ({least})" + (f" to {left[most]:.2f} ({most})" if most != least else "")
    return [
        f"Batch {many} ends at {told} of batch {few}'s level; if the batch's noise alone set it, that would be "
        f"{math.sqrt(few / many):.2f}."
    ]


def _sentence(size: int, by_method: dict[str, list[float]]) -> str:
    ranked = sorted(by_method, key=lambda name: statistics.fmean(by_method[name]))
    named = {ranked[0]: "lowest", ranked[-1]: "highest"}
    named |= {} if "adamw" in named or "adamw" not in by_method else {"adamw": "beside them"}
    told = [f"{word} {name} at {_told(by_method[name])}" for name, word in named.items()]
    return f"Batch {size}: over the last quarter of the steps the norm of the full gradient is {', '.join(told)}."


def table(found: dict[str, dict[int, list[float]]]) -> Table:
    """A row a method, a column a batch size."""
    sizes = sorted({size for by_size in found.values() for size in by_size})
    lines = [[method, *(_told(by_size.get(size, [])) for size in sizes)] for method, by_size in found.items()]
    headers = ["method", *(f"batch {size}" for size in sizes)]
    notes = [
        f"Mean over the last {LAST:.0%} of the steps of the 2-norm of the full gradient, on the same 128 training "
        "examples for all; mean over seeds ± their standard deviation (seeds).",
        "If the batch's noise set the level, it would halve from one batch size to four times as many examples.",
    ]
    return Table("Level that the full gradient fell to", headers, lines, {"method"}, notes)


def _told(values: list[float]) -> str:
    if not values:
        return NOTHING
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{spread} ({len(values)})"


def draw(runs: Iterable[Record]) -> list[Plot]:
    """For each batch size, the norm against steps: a line a method, of its first seed; none where none was tracked."""
    tracked = [run for run in runs if run["status"] == "ok" and run["training"].get("track") == "gradient_norm"]
    sizes = sorted({run["training"]["batch_size"] for run in tracked})
    with style.look():
        return [_panel(size, [run for run in tracked if run["training"]["batch_size"] == size]) for size in sizes]


def _panel(size: int, runs: list[Record]) -> Plot:
    first = {run["method"]: run for run in sorted(runs, key=lambda run: (run["method"], -run["seed"]))}
    figure = Figure(figsize=(style.WIDE / 72, 380 / 72), dpi=72)
    figure.subplots_adjust(left=0.13, right=0.97, top=0.92, bottom=0.38)
    axes = figure.subplots()
    looks = style.row_styles(first, "adamw")
    for method, run in first.items():
        points = [(one["step"], one["gradient_norm"]) for one in run["history"] if one.get("gradient_norm") is not None]
        look = looks[method]
        axes.plot(*zip(*points, strict=True), color=look.colour, ls=look.dashes, lw=1.2, label=method)
    title = f"Norm of the full gradient, batch {size}"
    axes.set(yscale="log", xlabel="step", title=title)
    for set_formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        set_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    figure.legend(loc="lower center", ncols=2, fontsize=10)
    ends = "; ".join(f"{method} {level(run):.3g}" for method, run in first.items())
    return Plot(f"gradient-norm-{size}", title, f"{title}. Over the last quarter: {ends}.", figure)
