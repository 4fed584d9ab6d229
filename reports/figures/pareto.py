"""Memory against quality: error bars over seeds, and the front of what nothing else beats in both."""

import itertools
import statistics
from collections.abc import Iterable
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from reports import rows as raw
from reports.figures import style
from reports.figures.chart import rows_left_out, tasks_left_out
from reports.figures.style import RowStyle
from reports.figures.svg import Plot
from reports.rows import AVERAGE
from reports.setups import Setup, peak_bytes
from reports.table import MIB, Row, score_text
from reports.text import average_words

MOST_POINTS = 60
MOST_NAMES = 14  # beyond them only the front is named
AFAR = 100
MOST_MISSING = 40  # names of rows without a point

Corner = tuple[float, float]
Box = tuple[float, float, float, float]  # left, bottom, right, top, in pixels


class Point(NamedTuple):
    """A row: MiB at its peak, its mean score, the deviation over n seeds (None for one)."""

    label: str
    memory: float
    score: float
    deviation: float | None
    n: int


def overall(setup: Setup) -> Plot | None:
    """The summary's columns against each other; None where it has no score, as where there is no average."""
    task = setup.tasks[0] if len(setup.tasks) == 1 else AVERAGE
    peaks = {row["method"]: row["peak_allocated_bytes"] for row in raw.memory(setup) if row["runs_ok"]}
    return _plot(setup, task, "pareto", "Memory against quality", peaks, style.WIDE)


def by_task(setup: Setup, task: str, stem: str, alone: bool) -> Plot | None:
    """A task's scores against the peak on that task; of a single task that is the whole."""
    if len(setup.tasks) == 1:
        return None
    peaks = {}
    for label in setup.rows:
        sizes = [peak_bytes(run) for (other, _), run in setup.finished(label).items() if other == task]
        if sizes:
            peaks[label] = max(sizes)
    return _plot(setup, task, f"pareto-{stem}", task, peaks, style.SMALL)


def caption(setup: Setup) -> str:
    task = setup.tasks[0] if len(setup.tasks) == 1 else AVERAGE
    missing = left_out(setup, task)
    what = f"The score is {average_words(setup)}. " if task == AVERAGE else ""
    front = "The dashed line is the front: nothing here needs less memory and scores better in the mean. "
    named = f"Of more than {MOST_NAMES} points only the front's are named. " if len(setup.rows) > MOST_NAMES else ""
    gone = f" Without a point: {', '.join(missing[:MOST_MISSING])}." if missing else ""
    return f"{what}{front}{spread_words(setup)} {named}{gone}{rows_left_out(setup, MOST_POINTS)}"


def caption_by_task(setup: Setup) -> str:
    return f"Here the peak is of each task's own runs. {spread_words(setup)}{tasks_left_out(setup)}"


def left_out(setup: Setup, task: str) -> list[str]:
    """The rows without a point."""
    peaks = {label: 1 for label in setup.rows if setup.finished(label)}
    drawn = {point.label for point in _points(setup, _rows(setup, task), peaks)}
    return [label for label in setup.rows if label not in drawn]


def front(points: Iterable[Point], *, higher_is_better: bool) -> list[Point]:
    """Those that no other beats in memory or score without losing in the other, by memory."""
    sign = 1 if higher_is_better else -1
    best: list[Point] = []
    for point in sorted(points, key=lambda point: (point.memory, -sign * point.score)):
        equal = best and (point.memory, point.score) == (best[-1].memory, best[-1].score)
        if not best or sign * point.score > sign * best[-1].score or equal:
            best.append(point)
    return best


def in_sight(points: list[Point], *, higher_is_better: bool) -> list[Point]:
    """Without what lies `AFAR` times as far from the best as half of them: beside it no other could be told from it."""
    best = (max if higher_is_better else min)(point.score for point in points)
    usual = statistics.median([abs(point.score - best) for point in points])
    return [point for point in points if not 0 < AFAR * usual < abs(point.score - best)]


def _rows(setup: Setup, task: str) -> list[Row]:
    return [row for row in raw.quality(setup) if row["task"] == task]


def _points(setup: Setup, scores: list[Row], peaks: dict[str, int]) -> list[Point]:
    """An average over fewer tasks than the others', or of no seed, is no point."""
    complete = [
        row
        for row in scores
        if row["mean"] is not None and (row["task"] != AVERAGE or (row["tasks"] == len(setup.tasks) and row["n"]))
    ]
    return [
        Point(row["method"], peaks[row["method"]] / MIB, row["mean"], row["standard_deviation"], row["n"])
        for row in complete
        if row["method"] in peaks
    ][:MOST_POINTS]


def _plot(setup: Setup, task: str, name: str, title: str, peaks: dict[str, int], width: int) -> Plot | None:
    scores = _rows(setup, task)
    points = _points(setup, scores, peaks)
    if not points:
        return None
    higher = scores[0]["higher_is_better"]
    best = front(points, higher_is_better=higher)
    styles = style.row_styles(setup.rows, setup.reference)
    height = 320 if width == style.WIDE else 270
    figure = Figure(figsize=(width / 72, height / 72), dpi=72)
    figure.subplots_adjust(left=62 / width, right=1 - 12 / width, top=1 - 28 / height, bottom=44 / height)
    axes = figure.subplots()
    plot = Plot(name, title, "", figure)
    metric = f"average over {len(setup.tasks)} tasks" if task == AVERAGE else style.shortened(scores[0]["metric"] or "")
    axes.set_xlabel("MiB at the peak (less is better)")
    axes.set_ylabel(f"{metric} ({'more' if higher else 'less'} is better)")
    axes.tick_params(length=0)
    if width == style.SMALL:  # one of many
        axes.set_title(style.shortened(title), pad=8)
    seen = in_sight(points, higher_is_better=higher)
    _spread(axes, seen)
    staircase = _draw_front(plot, axes, best)
    for point in seen:
        _draw_point(plot, axes, point, styles[point.label])
    _name_beyond(axes, [point for point in points if point not in seen])
    named = seen if len(points) <= MOST_NAMES else [point for point in best if point in seen][:MOST_NAMES]
    _name_points(axes, named, seen, staircase, styles)
    plot.alt = _alt(title, metric, points, best, higher)
    return plot


def _spread(axes: Axes, points: list[Point]) -> None:
    """Limits with room for names and error bars."""
    left, right = min(point.memory for point in points), max(point.memory for point in points)
    low = min(point.score - (point.deviation or 0) for point in points)
    high = max(point.score + (point.deviation or 0) for point in points)
    wide, tall = (right - left) or abs(right) or 1, (high - low) or abs(high) or 1
    axes.set_xlim(max(0, left - 0.12 * wide), right + 0.2 * wide)
    axes.set_ylim(low - 0.12 * tall, high + 0.14 * tall)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))


def _draw_front(plot: Plot, axes: Axes, best: list[Point]) -> list[Corner]:
    """A staircase: what is left of it and beyond it, nothing reached. Gives its corners."""
    bottom, right = axes.get_ylim()[0], axes.get_xlim()[1]
    if best[-1].score < best[0].score:
        bottom = axes.get_ylim()[1]
    xs = [best[0].memory, *(point.memory for point in best), right]
    ys = [bottom, *(point.score for point in best), best[-1].score]
    gid = plot.hint("front", "The front: " + ", ".join(point.label for point in best))
    corners = [(xs[0], ys[0])]
    for x, y in zip(xs[1:], ys[1:], strict=True):
        corners += [(x, corners[-1][1]), (x, y)]
    axes.plot(*zip(*corners, strict=True), color=style.MUTED, lw=1.4, ls=(0, (4, 3)), zorder=1, gid=gid)
    return corners


def _draw_point(plot: Plot, axes: Axes, point: Point, look: RowStyle) -> None:
    gid = plot.hint(f"row-{look.number}-point", f"{point.label}: {_words(point)}")
    if point.deviation:
        ends = [point.score - point.deviation, point.score + point.deviation]
        axes.plot([point.memory] * 2, ends, "_-", color=look.colour, lw=1.3, ms=7, gid=f"row-{look.number}-error")
    axes.plot([point.memory], [point.score], look.marker, color=look.colour, mec=style.PAPER, ms=9, zorder=3, gid=gid)


def _words(point: Point) -> str:
    deviation = "" if point.deviation is None else f" ± {score_text(point.deviation, point.score)}"
    return f"{point.memory:,.1f} MiB, {score_text(point.score)}{deviation}" + (f" ({point.n})" if point.n > 1 else "")


def _name_beyond(axes: Axes, points: list[Point]) -> None:
    if points:
        text = "Beyond: " + "; ".join(f"{style.shortened(point.label, 24)}, {_words(point)}" for point in points[:3])
        place: dict[str, Any] = {"xytext": (-6, -6), "textcoords": "offset points", "ha": "right", "va": "top"}
        more = f"; {len(points) - 3} more" if len(points) > 3 else ""
        axes.annotate(text + more, (1, 1), xycoords="axes fraction", fontsize=10, color=style.MUTED, **place)


def _name_points(
    axes: Axes, named: list[Point], points: list[Point], staircase: list[Corner], styles: dict[str, RowStyle]
) -> None:
    """Each name in the place beside its point where it covers least of the other names and points."""
    to_pixels = axes.transData.transform
    centres = [to_pixels((point.memory, point.score)) for point in points]
    taken = [_around(x, y, 7, 7) for x, y in centres]
    corners = [(float(x), float(y)) for x, y in map(to_pixels, staircase)]
    taken += [_between(*pair) for pair in itertools.pairwise(corners)]
    inside = axes.bbox.extents
    for point in named:
        text = style.shortened(point.label, 24)
        x, y = to_pixels((point.memory, point.score))
        half = 3.2 * len(text)
        places = [(8 + half, 0), (-8 - half, 0), (0, 15), (0, -15)]
        places += [(sx * (6 + half), sy * 12) for sx in (1, -1) for sy in (1, -1)]
        places += [(sx * (6 + half), sy * 24) for sx in (1, 0, -1) for sy in (1, -1)]
        dx, dy = min(places, key=lambda to: _cost(_around(x + to[0], y + to[1], half, 7), taken, inside) + abs(to[1]))
        taken.append(_around(x + dx, y + dy, half, 7))
        offset: dict[str, Any] = {"xytext": (dx, dy), "textcoords": "offset points", "ha": "center", "va": "center"}
        note = axes.annotate(text, (point.memory, point.score), fontsize=10, **offset)
        note.set_gid(f"row-{styles[point.label].number}-name")


def _between(one: tuple[float, float], other: tuple[float, float]) -> Box:
    """A horizontal or vertical line, as thick as it looks."""
    (left, right), (bottom, top) = sorted((one[0], other[0])), sorted((one[1], other[1]))
    return left - 1, bottom - 1, right + 1, top + 1


def _around(x: float, y: float, half_width: float, half_height: float) -> Box:
    return x - half_width, y - half_height, x + half_width, y + half_height


def _cost(box: Box, taken: list[Box], inside: Iterable[float]) -> float:
    left, bottom, right, top = inside
    outside = max(0, left - box[0]) + max(0, box[2] - right) + max(0, bottom - box[1]) + max(0, box[3] - top)
    return sum(_overlap(box, other) for other in taken) + 100 * outside


def _overlap(one: Box, other: Box) -> float:
    wide = min(one[2], other[2]) - max(one[0], other[0])
    tall = min(one[3], other[3]) - max(one[1], other[1])
    return wide * tall if wide > 0 and tall > 0 else 0


def _alt(title: str, metric: str, points: list[Point], best: list[Point], higher: bool) -> str:
    what = f"{title}: peak memory against {metric}, of which {'more' if higher else 'less'} is better. "
    return (
        what
        + "; ".join(f"{point.label} {_words(point)}" for point in points)
        + (f". On the front: {', '.join(point.label for point in best)}.")
    )


def deviations_drawn(setup: Setup) -> bool:
    """Whether any row has the seeds that an error bar needs."""
    return any(row["standard_deviation"] is not None for row in raw.quality(setup))


def spread_words(setup: Setup) -> str:
    """What the bars are, in a sentence."""
    if not deviations_drawn(setup):
        return "One seed a row: no error bars, and nobody knows how much of a difference is chance."
    return f"Error bars: ± one standard deviation over seeds ({len(setup.seeds)} where none is missing)."
