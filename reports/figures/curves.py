"""Training loss against steps and against seconds, a panel a task."""

import math
import statistics
from functools import lru_cache
from typing import Any, Literal, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.lines import Line2D

from reports.figures import style
from reports.figures.chart import rows_left_out, tasks_left_out
from reports.figures.style import RowStyle
from reports.figures.svg import Plot
from reports.record import Record, has_true_times
from reports.setups import Setup

STRETCHES = 20  # that a run is cut into
MOST_ROWS = 18  # in one panel
EXPLODED = 3  # times the largest loss of half of the curves: what others do can't be seen beside it
_MARKED = 6  # points of a curve that show their figures

Axis = Literal["step", "seconds"]
Place = Literal["lower left", "center left"]


class Curve(NamedTuple):
    """Means over stretches of the steps. `ended`: why and at which step it ended, for a run that isn't ok."""

    steps: list[float]
    tokens: list[float]
    seconds: list[float]
    losses: list[float]
    ended: str | None = None


def by_step(setup: Setup, task: str, stem: str, alone: bool) -> Plot | None:
    """A task's losses against steps."""
    return panel(setup, task, "step", f"loss-step-{stem}", with_key=alone)


def by_time(setup: Setup, task: str, stem: str, alone: bool) -> Plot | None:
    """A task's losses against seconds of training; None if those of a run tell nothing."""
    if not all(has_true_times(run) for runs in setup.rows.values() for run in runs.values()):
        return None
    return panel(setup, task, "seconds", f"loss-time-{stem}", with_key=alone)


def caption(setup: Setup) -> str:
    return (
        f"Each line is a mean over seeds and over 1/{STRETCHES} of the steps; a run that isn't ok has its own, ended "
        f"by a cross. The axis ends with what finished runs reached, but those that exploded."
        f"{rows_left_out(setup, MOST_ROWS)}{tasks_left_out(setup)}"
    )


def panel(setup: Setup, task: str, axis: Axis, name: str, *, with_key: bool = False) -> Plot | None:
    """A task's curves; None where no run has a history. With a key of its own, or as one of many that share one."""
    curves = {label: found for label in list(setup.rows)[:MOST_ROWS] if (found := curves_of(setup, label, task))}
    if not curves:
        return None
    below = _key_height(list(curves)) if with_key else 0
    width, height = style.SMALL, 260 + below
    figure = Figure(figsize=(width / 72, height / 72), dpi=72)
    figure.subplots_adjust(left=46 / width, right=1 - 14 / width, top=1 - 30 / height, bottom=(42 + below) / height)
    axes = figure.subplots()
    plot = Plot(name, f"{task}: loss against {'steps' if axis == 'step' else 'time'}", "", figure)
    styles = style.row_styles(setup.rows, setup.reference)
    _limit(axes, [curve for found in curves.values() for curve in found])
    for label, found in curves.items():
        for number, curve in enumerate(found):
            _draw(plot, axes, label, curve, number, axis, styles[label])
    style.along_a_training(axes, task, "step" if axis == "step" else "seconds of training", marks=6)
    if with_key:
        _add_key(figure, list(curves), styles, "lower left")
    plot.alt = _alt(plot.title, curves)
    return plot


def key(setup: Setup) -> Plot:
    """What each colour, dash and marker stands for, for all panels of a set-up."""
    labels = list(setup.rows)[:MOST_ROWS]
    figure = Figure(figsize=(style.WIDE / 72, _key_height(labels) / 72), dpi=72)
    plot = Plot("key", "Key", "What the lines stand for: " + ", ".join(labels) + ".", figure)
    styles = style.row_styles(setup.rows, setup.reference)
    legend = _add_key(figure, labels, styles, "center left")
    for label, line, text in zip(labels, legend.get_lines(), legend.get_texts(), strict=True):
        line.set_gid(plot.hint(f"row-{styles[label].number}-key", label))
        text.set_gid(plot.hint(f"row-{styles[label].number}-label", label))
    return plot


def _key_height(labels: list[str]) -> int:
    return 10 + 19 * math.ceil(len(labels) / _columns(labels))


def _columns(labels: list[str]) -> int:
    return 3 if max(map(len, labels)) < 14 else 1


def _add_key(figure: Figure, labels: list[str], styles: dict[str, RowStyle], place: Place) -> Legend:
    handles = [_handle(label, styles[label]) for label in labels]
    return figure.legend(handles=handles, loc=place, ncols=_columns(labels), handlelength=2.6, fontsize=11)


def _handle(label: str, look: RowStyle) -> Line2D:
    marker: dict[str, Any] = {"marker": look.marker, "ms": 6, "mec": style.PAPER}
    return Line2D([], [], color=look.colour, ls=look.dashes, lw=1.6, label=style.shortened(label), **marker)


@lru_cache(maxsize=1024)
def curves_of(setup: Setup, label: str, task: str) -> list[Curve]:
    """The mean over a row's finished runs, and a curve for each run that isn't ok but got somewhere."""
    runs = [run for seed in setup.seeds if (run := setup.rows[label].get((task, seed)))]
    ok = [run for run in runs if run["status"] == "ok"]
    bad = [[run] for run in runs if run["status"] != "ok"]
    return [curve for group in [ok, *bad] if (curve := _curve(group))]


def _curve(runs: list[Record]) -> Curve | None:
    points = [point for run in runs for point in run["history"] if point["loss"] is not None]
    if not points:
        return None
    last = max(point["step"] for point in points)
    stretches: dict[int, list] = {}
    for point in points:
        stretches.setdefault((point["step"] - 1) * STRETCHES // last, []).append(point)
    groups = [group for _, group in sorted(stretches.items())]
    steps, tokens, seconds, losses = (
        [sum(point[name] for point in group) / len(group) for group in groups]
        for name in ("step", "tokens", "seconds", "loss")
    )
    status = runs[0]["status"]
    ended = None if status == "ok" else f"{status.replace('_', ' ')} after step {last}"
    return Curve(steps, tokens, seconds, losses, ended)


def _draw(plot: Plot, axes: Axes, label: str, curve: Curve, number: int, axis: Axis, look: RowStyle) -> None:
    xs = curve.steps if axis == "step" else curve.seconds
    top = axes.get_ylim()[1]
    spread = {round(index * (len(xs) - 1) / (_MARKED - 1)) for index in range(_MARKED)}
    marked = sorted(index for index in spread if curve.losses[index] <= top)
    gid = f"row-{look.number}-line-{number}"
    plot.hint(gid, f"{label}: loss {curve.losses[-1]:.3g} at the end" + (f", {curve.ended}" if curve.ended else ""))
    axes.plot(xs, curve.losses, color=look.colour, ls=look.dashes, lw=1.5, gid=gid)
    texts = [
        f"{label}, step {curve.steps[i]:,.0f}, {curve.seconds[i]:,.2f} s: loss {curve.losses[i]:.3g}" for i in marked
    ]
    gid = plot.hint(f"row-{look.number}-marks-{number}", *texts)
    marks: dict[str, Any] = {
        "ls": "",
        "color": look.colour,
        "mec": style.PAPER,
        "mew": 0.6,
        "ms": 5.5,
        "clip_on": False,
    }
    axes.plot([xs[i] for i in marked], [curve.losses[i] for i in marked], marker=look.marker, gid=gid, **marks)
    if curve.ended:
        gid = plot.hint(f"row-{look.number}-end-{number}", f"{label}: {curve.ended}")
        axes.plot(xs[-1:], [min(curve.losses[-1], top)], "x", color=look.colour, ms=10, mew=2, gid=gid, clip_on=False)


def _limit(axes: Axes, curves: list[Curve]) -> None:
    """What finished sets the height: a loss that explodes leaves the panel at its top, also of a run that went on."""
    curves = [curve for curve in curves if not curve.ended] or curves
    usual = statistics.median_low([max(curve.losses) for curve in curves])
    losses = [loss for curve in curves if max(curve.losses) <= max(usual, EXPLODED * usual) for loss in curve.losses]
    low, high = min(losses), max(losses)
    room = 0.06 * ((high - low) or abs(high) or 1)
    axes.set_ylim(low - room, high + room)


def _alt(title: str, curves: dict[str, list[Curve]]) -> str:
    ends = [(label, curve) for label, found in curves.items() for curve in found]
    said = [f"{label} {curve.losses[-1]:.3g}" + (f" ({curve.ended})" if curve.ended else "") for label, curve in ends]
    return f"{title}. At the end: {'; '.join(said)}."
