"""What a user sees while runs are made: bars on a terminal, and always one line per run."""

import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from membench.config.run import Run
from reports.names import printable
from reports.record import REFUSAL
from reports.setups import score
from reports.table import mib, score_text


class Display(Protocol):
    """Where a comparison reports its progress; a context manager around all its runs."""

    def __enter__(self) -> "Display": ...
    def __exit__(self, *exception: object) -> None: ...
    def begin(self, run: Run) -> None: ...
    def step(self, run: Run, step: int, loss: float) -> None: ...
    def stage(self, run: Run, name: str) -> None: ...
    def entry(self, run: Run, entry: dict[str, Any]) -> None:
        """Of the run's history."""

    def end(self, run: Run, record: dict[str, Any], seconds: float) -> None: ...


def create_display(runs: Sequence[Run], total: int, *, quiet: bool) -> Display:
    """Bars on a terminal, else lines. `runs` are those still to make, out of `total`."""
    console = Console(stderr=True)
    return Lines(len(runs), total) if quiet or not console.is_terminal else Bars(console, runs, total)


def waiting(text: str, *, quiet: bool) -> AbstractContextManager[Any]:
    """On a terminal, show what we are waiting for."""
    console = Console(stderr=True)
    return nullcontext() if quiet or not console.is_terminal else console.status(text)


class Lines:
    """One line per run, for logs."""

    def __init__(self, to_do: int, total: int):
        self._number, self._total = total - to_do, total

    def __enter__(self) -> "Lines":
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def begin(self, run: Run) -> None:
        pass

    def step(self, run: Run, step: int, loss: float) -> None:
        pass

    def stage(self, run: Run, name: str) -> None:
        pass

    def entry(self, run: Run, entry: dict[str, Any]) -> None:
        pass

    def end(self, run: Run, record: dict[str, Any], seconds: float) -> None:
        self._number += 1
        print(f"[{self._number}/{self._total}] {summarize(record)}, {seconds:.0f} s", flush=True)


@dataclass
class _Bar:
    """Of a run: its number among the bars, and where and when its first step in this process was."""

    task: TaskID
    steps: int
    done: int = 0
    first_step: int = 0
    start: float = 0.0

    @property
    def made(self) -> int:
        """Steps that this process has seen: not those of a checkpoint from which the run goes on."""
        return self.done - self.first_step + 1 if self.first_step else 0


class Bars:
    """Bars with the remaining time: one for each run that is being made, with its loss, and one for all runs."""

    def __init__(self, console: Console, runs: Sequence[Run], total: int):
        self._lines = Lines(len(runs), total)
        columns = [TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn()]
        columns += [TextColumn("{task.fields[left]}"), TextColumn("{task.fields[note]}")]
        # one line per run goes above the bars, unless stdout is a file
        self._progress = Progress(*columns, console=console, redirect_stdout=sys.stdout.isatty())
        self._steps = sum(map(_steps, runs))
        self._all = self._progress.add_task("all runs", total=self._steps, left="", note="")
        self._bars: dict[str, _Bar] = {}  # by run
        self._before = 0  # steps of finished runs
        self._made = 0  # those of them that took time here
        self._start = time.monotonic()

    def __enter__(self) -> "Bars":
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def begin(self, run: Run) -> None:
        title = f"{run.task} {run.method} seed {run.seed}"
        task = self._progress.add_task(title, total=_steps(run), left="", note="starting")
        self._bars[run.run_id] = _Bar(task, _steps(run))

    def step(self, run: Run, step: int, loss: float) -> None:
        bar = self._bars[run.run_id]
        if not bar.first_step:
            bar.first_step, bar.start = step, time.monotonic()
        bar.done = step
        left = _time_left(bar.start, step - bar.first_step, bar.steps - step)
        self._progress.update(bar.task, completed=step, left=left, note=f"loss {loss:.3f}")
        self._show_all()

    def stage(self, run: Run, name: str) -> None:
        self._progress.update(self._bars[run.run_id].task, left="", note=name)

    def entry(self, run: Run, entry: dict[str, Any]) -> None:
        pass

    def end(self, run: Run, record: dict[str, Any], seconds: float) -> None:
        bar = self._bars.pop(run.run_id)
        self._before += bar.steps
        whole = record["status"] == "ok"  # else it was refused, or ended early
        self._made += bar.steps - max(0, bar.first_step - 1) if whole else bar.made
        self._progress.remove_task(bar.task)
        self._show_all()
        self._lines.end(run, record, seconds)

    def _show_all(self) -> None:
        done = self._before + sum(bar.done for bar in self._bars.values())
        made = self._made + sum(bar.made for bar in self._bars.values())
        self._progress.update(self._all, completed=done, left=_time_left(self._start, made, self._steps - done))


def _time_left(start: float, done: int, to_do: int) -> str:
    """Estimated from the whole time taken so far, including what happens between steps."""
    if not done or not to_do:
        return ""
    minutes, seconds = divmod(round((time.monotonic() - start) / done * to_do), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02} left"


def _steps(run: Run) -> int:
    return run.training.steps


def summarize(record: dict[str, Any]) -> str:
    """A run and its outcome on one line."""
    name = f"{record['task']} {record['method']} seed {record['seed']}"
    if record["status"] != "ok":
        error = printable(" ".join(record["error"].splitlines()))
        return (
            f"{name}: {error}"
            if error.startswith(REFUSAL)
            else f"{name}: {record['status'].replace('_', ' ')}: {error}"
        )
    peak = mib(record["memory"]["peak_allocated_bytes"])
    return f"{name}: ok, {record['headline']} {score_text(score(record))}, peak {peak} MiB"
