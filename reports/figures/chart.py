"""What a chart is: a plot of each set-up, or one for each of its tasks, with its place on the page and its caption."""

import re
from collections.abc import Callable
from dataclasses import dataclass

from reports.figures.style import look
from reports.figures.svg import Plot
from reports.setups import Setup

MOST_TASKS = 12  # with plots of their own

Whole = Callable[[Setup], Plot | None]
ByTask = Callable[[Setup, str, str, bool], Plot | None]  # set-up, task, its stem, whether it must stand alone


@dataclass(frozen=True)
class Chart:
    """One kind of plot.

    Attributes:
        name: what a gallery has it under.
        section: of the page: memory, quality, training or speed.
        caption: says how to read it, and what it leaves out.
        whole: draws it of a set-up; None where there is nothing to draw.
        by_task: draws it of a task, in the place of `whole`; the stem makes the plot's name its own.
        title: over the plots of the tasks.
        behind: the chart that shows the same of all tasks: where it has a plot, these are folded.
        key: draws what lines stand for, once for all plots of the section.
    """

    name: str
    section: str
    caption: Callable[[Setup], str]
    whole: Whole | None = None
    by_task: ByTask | None = None
    title: str = ""
    behind: str | None = None
    key: Whole | None = None

    def count(self, setup: Setup) -> int:
        """How many plots there may be."""
        return 1 if self.whole else min(len(setup.tasks), MOST_TASKS)

    def draw(self, setup: Setup, *, alone: bool) -> list[Plot]:
        """All plots of a set-up; `alone`: each with its own key."""
        with look():
            plots = [self.whole(setup)] if self.whole else []
            if self.by_task:
                plots += [self.by_task(setup, task, stem, alone) for task, stem in _stems(setup).items()]
        return [plot for plot in plots if plot]

    def draw_key(self, setup: Setup) -> Plot | None:
        """The key of all its plots, if it has one."""
        with look():
            return self.key(setup) if self.key else None


def _stems(setup: Setup) -> dict[str, str]:
    """For each task a part of a file name that no other has, whatever the task calls itself."""
    tasks = enumerate(setup.tasks[:MOST_TASKS], 1)
    return {task: f"{n}-{re.sub(r'[^A-Za-z0-9_]+', '-', task).strip('-')[-40:] or 'task'}" for n, task in tasks}


def rows_left_out(setup: Setup, most: int) -> str:
    """A sentence where there are more rows than are drawn."""
    count = len(setup.rows)
    return f" Drawn are the first {most} of {count} rows; all are in the table." if count > most else ""


def tasks_left_out(setup: Setup) -> str:
    """A sentence where there are more tasks than are drawn."""
    count = len(setup.tasks)
    return f" Drawn are the first {MOST_TASKS} of {count} tasks." if count > MOST_TASKS else ""
