"""The plots of a set-up, for a page or as files. Importing this needs matplotlib."""

from pathlib import Path

from reports import files
from reports.figures import bars, curves, pareto, profiles, scores, svg
from reports.figures.chart import Chart
from reports.figures.svg import Plot
from reports.record import Record
from reports.setups import Setup, group

# All there are, in the order of the page: a new one is a row here, and a function that draws it.
CHARTS = (
    Chart("memory", "memory", bars.memory_caption, bars.memory),
    Chart("pareto", "memory", pareto.caption, pareto.overall),
    Chart(
        "pareto_by_task",
        "quality",
        pareto.caption_by_task,
        by_task=pareto.by_task,
        title="Memory against quality, task by task",
        behind="pareto",
    ),
    Chart("profiles", "quality", profiles.caption, profiles.profile),
    Chart(
        "score_by_step", "training", scores.caption, by_task=scores.by_step, title="Score against steps", key=curves.key
    ),
    Chart(
        "score_by_tokens",
        "training",
        scores.caption,
        by_task=scores.by_tokens,
        title="Score against tokens",
        key=curves.key,
    ),
    Chart(
        "loss_by_step", "training", curves.caption, by_task=curves.by_step, title="Loss against steps", key=curves.key
    ),
    Chart(
        "loss_by_time", "training", curves.caption, by_task=curves.by_time, title="Loss against time", key=curves.key
    ),
    Chart("step_time", "speed", bars.step_time_caption, bars.step_time),
    Chart("coverage", "speed", bars.coverage_caption, bars.coverage),
)

Gallery = dict[str, list[Plot]]  # by the names of charts


def draw(setup: Setup, *, alone: bool = False) -> Gallery:
    """Draw a set-up. `alone`: plots that share a key on the page get one each."""
    return {chart.name: chart.draw(setup, alone=alone) for chart in CHARTS}


def count(setup: Setup) -> int:
    """How many plots `draw` may make of a set-up."""
    return sum(chart.count(setup) for chart in CHARTS)


def write(records: list[Record], folder: Path | str) -> list[Path]:
    """Write every plot of every set-up as SVG and as PNG; of several set-ups, each into a folder of its own.

    Raises:
        ValueError: there are no records.
    """
    if not records:
        raise ValueError("There are no records to draw.")
    setups = group(records)
    paths = []
    for number, setup in enumerate(setups, 1):
        place = Path(folder) / f"setup-{number}" if len(setups) > 1 else Path(folder)
        for plot in [plot for plots in draw(setup, alone=True).values() for plot in plots]:
            paths.append(files.write(place / f"{plot.name}.svg", svg.standalone(plot).encode()))
            paths.append(files.write(place / f"{plot.name}.png", svg.png(plot)))
    return paths
