"""The plots of a set-up, for a page or as files. Importing this needs matplotlib."""

import re
from dataclasses import dataclass
from pathlib import Path

from reports import files
from reports.figures import bars, curves, pareto, svg
from reports.figures.style import look
from reports.figures.svg import Plot
from reports.record import Record
from reports.setups import Setup, group

MOST_TASKS = 12  # with panels of their own


@dataclass
class Gallery:
    """What is drawn of a set-up; the last three have a plot for each task, up to `MOST_TASKS`."""

    memory: Plot
    step_time: Plot
    coverage: Plot
    pareto: Plot | None
    key: Plot
    pareto_by_task: list[Plot]
    loss_by_step: list[Plot]
    loss_by_time: list[Plot]

    @property
    def plots(self) -> list[Plot]:
        whole = [self.memory, self.step_time, self.coverage, *([self.pareto] if self.pareto else [])]
        return [*whole, *self.pareto_by_task, *self.loss_by_step, *self.loss_by_time]


def draw(setup: Setup, *, keys: bool = False) -> Gallery:
    """Draw a set-up. `keys`: each panel of curves gets a key of its own, to stand alone."""
    tasks = {task: _stem(number, task) for number, task in enumerate(setup.tasks[:MOST_TASKS], 1)}
    several = len(setup.tasks) > 1
    with look():
        by_task = [pareto.by_task(setup, task, f"pareto-{stem}") for task, stem in tasks.items() if several]
        by_step = [
            curves.panel(setup, task, "step", f"loss-step-{stem}", with_key=keys) for task, stem in tasks.items()
        ]
        by_time = [
            curves.panel(setup, task, "seconds", f"loss-time-{stem}", with_key=keys) for task, stem in tasks.items()
        ]
        return Gallery(
            bars.memory(setup),
            bars.step_time(setup),
            bars.coverage(setup),
            pareto.overall(setup),
            curves.key(setup),
            *([plot for plot in plots if plot] for plots in (by_task, by_step, by_time)),
        )


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
        for plot in draw(setup, keys=True).plots:
            paths.append(files.write(place / f"{plot.name}.svg", svg.standalone(plot).encode()))
            paths.append(files.write(place / f"{plot.name}.png", svg.png(plot)))
    return paths


def _stem(number: int, task: str) -> str:
    """A part of a file name that no other task has, whatever the task calls itself."""
    return f"{number}-{re.sub(r'[^A-Za-z0-9_]+', '-', task).strip('-')[-40:] or 'task'}"
