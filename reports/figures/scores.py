"""Scores during training, against steps and tokens, where runs were evaluated on the way."""

import statistics
from typing import Any, Literal, NamedTuple

from matplotlib.figure import Figure

from reports.figures import style
from reports.figures.chart import rows_left_out, tasks_left_out
from reports.figures.curves import MOST_ROWS
from reports.figures.svg import Plot
from reports.record import Record
from reports.setups import Setup
from reports.table import score_text

Axis = Literal["step", "tokens"]


class Seen(NamedTuple):
    """Where a row was evaluated, and its mean headline there over the seeds."""

    steps: list[float]
    tokens: list[float]
    seconds: list[float]
    scores: list[float]


def by_step(setup: Setup, task: str, stem: str, alone: bool) -> Plot | None:
    """A task's scores against steps."""
    return _panel(setup, task, "step", f"score-step-{stem}")


def by_tokens(setup: Setup, task: str, stem: str, alone: bool) -> Plot | None:
    """A task's scores against the tokens seen."""
    return _panel(setup, task, "tokens", f"score-tokens-{stem}")


def caption(setup: Setup) -> str:
    return (
        "The headline wherever runs were evaluated, the mean over the seeds that are ok."
        f"{rows_left_out(setup, MOST_ROWS)}{tasks_left_out(setup)}"
    )


def seen(setup: Setup, label: str, task: str) -> Seen:
    """What was seen of a row on a task at steps at which all of its seeds were evaluated."""
    runs = [run for (name, _), run in setup.finished(label).items() if name == task]
    found = [_evaluated(run) for run in runs]
    steps = sorted(set.intersection(*map(set, found))) if found else []
    means = [[statistics.fmean(run[step][i] for run in found) for step in steps] for i in range(3)]
    return Seen([float(step) for step in steps], *means)


def _evaluated(run: Record) -> dict[int, tuple[float, float, float]]:
    """Tokens, seconds and headline by step."""
    points = [(point, (point.get("metrics") or {}).get(run["headline"])) for point in run["history"]]
    return {point["step"]: (point["tokens"], point["seconds"], value) for point, value in points if value is not None}


def _panel(setup: Setup, task: str, axis: Axis, name: str) -> Plot | None:
    """None unless some row was evaluated twice."""
    lines = {label: seen(setup, label, task) for label in list(setup.rows)[:MOST_ROWS]}
    if all(len(line.steps) < 2 for line in lines.values()):
        return None
    width, height = style.SMALL, 260
    figure = Figure(figsize=(width / 72, height / 72), dpi=72)
    figure.subplots_adjust(left=52 / width, right=1 - 14 / width, top=1 - 30 / height, bottom=42 / height)
    axes = figure.subplots()
    plot = Plot(name, f"{task}: score against {'steps' if axis == 'step' else 'tokens'}", "", figure)
    styles = style.row_styles(setup.rows, setup.reference)
    for label, line in lines.items():
        look, xs = styles[label], line.steps if axis == "step" else line.tokens
        words = [f"{label}, step {s:,.0f}, {t:,.0f} tokens: {score_text(v)}" for s, t, _, v in zip(*line, strict=True)]
        gid = plot.hint(f"row-{look.number}-marks", *words)
        shape: dict[str, Any] = {"color": look.colour, "clip_on": False}
        axes.plot(xs, line.scores, ls=look.dashes, lw=1.5, gid=plot.hint(f"row-{look.number}-line", label), **shape)
        axes.plot(xs, line.scores, ls="", marker=look.marker, ms=5.5, mec=style.PAPER, mew=0.6, gid=gid, **shape)
    style.along_a_training(axes, task, "step" if axis == "step" else "tokens", marks=4)
    ends = [f"{label} {score_text(line.scores[-1])}" for label, line in lines.items() if line.scores]
    plot.alt = f"{plot.title}. At the end: {'; '.join(ends)}."
    return plot
