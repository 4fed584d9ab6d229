"""Horizontal bars, one a row with its name above it: memory by component, a step by phase, what was trained."""

from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator

from reports import rows as raw
from reports.figures import style
from reports.figures.chart import rows_left_out
from reports.figures.svg import Plot
from reports.parts import round_parts, shown
from reports.record import had_device_alone
from reports.setups import Setup
from reports.table import MIB, Row
from reports.text import ended

MOST_BARS = 40
_BAR, _TOP, _BOTTOM, _SIDE = 38, 12, 42, 12  # pixels: a bar with its name, and what lies around all of them
_THICK = 0.4  # of it, the bar itself
_LETTER = 6.3  # pixels, about
_GAP = 8  # pixels, at least, between a name and its remark

_PHASES = {"forward": style.SKY, "backward": style.BLUE, "update": style.VERMILION}


class Bar(NamedTuple):
    """A row: its name, a remark at the right, and lengths by part. No lengths: the remark says why."""

    label: str
    remark: str
    lengths: dict[str, float]
    figures: dict[str, str]


def memory(setup: Setup) -> Plot:
    """Peak memory as stacked bars, by component."""
    rows = raw.memory(setup)
    parts = shown(row for row in rows if row["runs_ok"])
    bars = []
    for row in rows:
        if not row["runs_ok"]:
            bars.append(Bar(row["method"], ended(row), {}, {}))
            continue
        sizes = {part.name: part.of(row) for part in parts}
        tenths = round_parts([size * 10 for size in sizes.values()], MIB)  # add up, as in the table
        lengths = {part: size / MIB for part, size in sizes.items()}
        figures = {part: f"{tenth / 10:,.1f}" for part, tenth in zip(sizes, tenths, strict=True)}
        bars.append(Bar(row["method"], _peak(row, sum(tenths) / 10, setup), lengths, figures))
    colours = {part.name: style.NAMED[part.colour] for part in parts}
    return _stacked("memory", "Peak memory by component", "MiB at the peak", bars, colours)


def memory_caption(setup: Setup) -> str:
    return "The parts add up to the peak." + rows_left_out(setup, MOST_BARS)


def step_time(setup: Setup) -> Plot | None:
    """A step's forward, backward and update as stacked bars; None where the times of all runs tell nothing."""
    rows, bars = raw.throughput(setup), []
    if any(row["runs_ok"] for row in rows) and all(row["forward_seconds"] is None for row in rows):
        return None
    for row in rows:
        timed = row["forward_seconds"] is not None
        parts = {phase: row[f"{phase}_seconds"] * 1000 for phase in _PHASES} if timed else {}
        remark = f"{sum(parts.values()):,.1f} ms" if parts else _untimed(setup, row)
        bars.append(Bar(row["method"], remark, parts, {part: f"{length:,.1f}" for part, length in parts.items()}))
    return _stacked("step-time", "Time of a step", "ms a step (medians)", bars, _PHASES)


def _untimed(setup: Setup, row: Row) -> str:
    """Why a row has no times."""
    if not row["runs_ok"]:
        return ended(row)
    alone = all(map(had_device_alone, setup.finished(row["method"]).values()))
    return "continued" if alone else "beside other runs"


def step_time_caption(setup: Setup) -> str:
    return "Medians of a run's steps, averaged over runs." + rows_left_out(setup, MOST_BARS)


def coverage(setup: Setup) -> Plot:
    """The share of weights that changed, as bars, and of blocks that were visited, as diamonds."""
    shown = list(setup.rows)[:MOST_BARS]
    plot, axes = _frame("coverage", "What was trained", _said(setup, shown), legend=24)
    for place, label in enumerate(shown):
        trained, blocks = covered(setup, label)
        if trained is not None:
            gid = plot.hint(f"trained-{place}", f"{label}: {trained:.1%} of the weights changed")
            axes.barh(place, trained * 100, height=_THICK, color=style.BLUE)[0].set_gid(gid)
        if blocks is not None:
            gid = plot.hint(f"blocks-{place}", f"{label}: {blocks:.1%} of the blocks visited")
            axes.plot(
                [blocks * 100], [place], "D", color=style.VERMILION, mec=style.PAPER, ms=8, gid=gid, clip_on=False
            )
    axes.set_xlim(0, 100)
    axes.set_xlabel("% of weights changed, of blocks visited")
    handles = [Patch(color=style.BLUE, label="weights"), *axes.plot([], [], "D", color=style.VERMILION, label="blocks")]
    _legend(plot.figure, handles)
    plot.alt += " " + "; ".join(f"{label} {words}" for label, words in _said(setup, shown)) + "."
    return plot


def coverage_caption(setup: Setup) -> str:
    what = "Weights that differ from their initial values; of methods with blocks, the blocks they came to."
    return what + rows_left_out(setup, MOST_BARS)


def covered(setup: Setup, label: str) -> tuple[float | None, float | None]:
    """Means over a row's runs: the share of weights changed, and of blocks visited (None without blocks)."""
    return raw.mean_known(setup, label, "trained_fraction"), raw.mean_known(setup, label, "block_coverage")


def _coverage_words(setup: Setup, label: str) -> str:
    trained, blocks = covered(setup, label)
    if trained is None:
        return ended(raw.counts(setup, label))
    return f"{trained:.1%}" + ("" if blocks is None else f", blocks {blocks:.0%}")


def _said(setup: Setup, labels: list[str]) -> list[tuple[str, str]]:
    return [(label, _coverage_words(setup, label)) for label in labels]


def _peak(row: Row, size: float, setup: Setup) -> str:
    ratio = row["peak_ratio"]
    return f"{size:,.1f} MiB" + (
        "" if ratio is None else f", {ratio:.2f} × {style.shortened(setup.reference or '', 14)}"
    )


def _stacked(name: str, title: str, unit: str, bars: list[Bar], colours: dict[str, str]) -> Plot:
    shown = bars[:MOST_BARS]
    plot, axes = _frame(name, title, [(bar.label, bar.remark) for bar in shown])
    longest = max((sum(bar.lengths.values()) for bar in shown), default=0) or 1
    axes.set_xlim(0, longest)
    for place, bar in enumerate(shown):
        start = 0.0
        for part, length in bar.lengths.items():
            _segment(plot, axes, place, bar, part, start, length, colours[part], longest)
            start += length
    axes.set_xlabel(unit)
    _legend(plot.figure, [Patch(color=colour, label=_words(part)) for part, colour in colours.items()])
    plot.alt = f"{title}, stacked bars, {unit}. " + "; ".join(map(_sentence, shown)) + "."
    return plot


def _sentence(bar: Bar) -> str:
    parts = ", ".join(f"{_words(part)} {figure}" for part, figure in bar.figures.items())
    return f"{bar.label}: {bar.remark}" + (f" ({parts})" if parts else "")


def _segment(
    plot: Plot, axes: Axes, place: int, bar: Bar, part: str, start: float, length: float, colour: str, longest: float
) -> None:
    share = length / (sum(bar.lengths.values()) or 1)
    text = f"{bar.label}, {_words(part)}: {bar.figures[part]} ({share:.0%})"
    patch = axes.barh(place, length, left=start, height=_THICK, color=colour, ec=style.PAPER, lw=0.8)[0]
    patch.set_gid(plot.hint(f"bar-{place}-{part}", text))
    figure, room = bar.figures[part], (style.WIDE - 2 * _SIDE) * length / longest
    if room > _LETTER * len(figure) + 4:
        letters = style.ON_DARK if colour == style.BLUE else style.ON_LIGHT
        centred: dict[str, Any] = {"ha": "center", "va": "center", "gid": f"row-{place}-figure"}
        axes.text(start + length / 2, place, figure, fontsize=9.5, color=letters, **centred)


def _words(part: str) -> str:
    return part.replace("_", " ")


def _frame(name: str, title: str, labels: list[tuple[str, str]], legend: int = 40) -> tuple[Plot, Axes]:
    """A figure as high as its bars need, with each bar's name and remark on the line above it."""
    height = _TOP + legend + _BAR * len(labels) + _BOTTOM
    figure = Figure(figsize=(style.WIDE / 72, height / 72), dpi=72)
    inner = {"left": _SIDE / style.WIDE, "right": 1 - _SIDE / style.WIDE}
    figure.subplots_adjust(**inner, top=1 - (_TOP + legend) / height, bottom=_BOTTOM / height)
    axes = figure.subplots()
    axes.set_ylim(len(labels) - 0.7, -0.7)
    axes.set_yticks([])
    axes.grid(False, axis="y")
    axes.spines["left"].set_visible(False)
    axes.tick_params(length=0)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    for place, (label, remark) in enumerate(labels):
        room = style.WIDE - 2 * _SIDE - style.width(style.shortened(remark)) - _GAP
        left: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "weight": "bold"}
        axes.text(0, place - 0.29, style.fitted(label, room, "bold"), gid=f"row-{place}-label", **left)
        right: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "ha": "right", "color": style.MUTED}
        axes.text(1, place - 0.29, style.shortened(remark), gid=f"row-{place}-remark", **right)
    return Plot(name, title, title + ".", figure), axes


def _legend(figure: Figure, handles: list) -> None:
    figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(0, 1),
        ncols=3,
        handlelength=1,
        handleheight=1,
        columnspacing=1.2,
        handletextpad=0.5,
    )
