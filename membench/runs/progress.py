"""What a user sees while runs are made: bars on a terminal, and always one line per run."""

import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from membench.config.run import Run
from reports.record import REFUSAL
from reports.setups import score
from reports.table import mib


class Display(Protocol):
    """Where a comparison reports its progress; a context manager around all its runs."""

    def __enter__(self) -> "Display": ...
    def __exit__(self, *exception: object) -> None: ...
    def begin(self, run: Run) -> None: ...
    def step(self, step: int, loss: float) -> None: ...
    def stage(self, name: str) -> None: ...
    def end(self, record: dict[str, Any], seconds: float) -> None: ...


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
        self._number += 1

    def step(self, step: int, loss: float) -> None:
        pass

    def stage(self, name: str) -> None:
        pass

    def end(self, record: dict[str, Any], seconds: float) -> None:
        print(f"[{self._number}/{self._total}] {summarize(record)}, {seconds:.0f} s", flush=True)


class Bars:
    """Two bars, each with the remaining time: the current run with its loss, and all runs together."""

    def __init__(self, console: Console, runs: Sequence[Run], total: int):
        self._lines = Lines(len(runs), total)
        columns = [TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn()]
        columns += [TextColumn("{task.fields[left]}"), TextColumn("{task.fields[note]}")]
        # one line per run goes above the bars, unless stdout is a file
        self._progress = Progress(*columns, console=console, redirect_stdout=sys.stdout.isatty())
        self._all = self._progress.add_task("all runs", total=sum(map(_steps, runs)), left="", note="")
        self._run = self._progress.add_task("", total=None, left="", note="", visible=False)
        self._before = self._run_steps = 0  # steps of finished runs; of this one
        self._start = self._run_start = time.monotonic()
        self._first_step = 0

    def __enter__(self) -> "Bars":
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def begin(self, run: Run) -> None:
        self._lines.begin(run)
        self._run_steps, self._first_step = _steps(run), 0
        title = f"{run.task} {run.method} seed {run.seed}"
        self._progress.reset(
            self._run, total=self._run_steps, description=title, visible=True, left="", note="starting"
        )

    def step(self, step: int, loss: float) -> None:
        if not self._first_step:
            self._first_step, self._run_start = step, time.monotonic()
        left = _time_left(self._run_start, step - self._first_step, self._run_steps - step)
        self._progress.update(self._run, completed=step, left=left, note=f"loss {loss:.3f}")
        self._show_all(self._before + step)

    def stage(self, name: str) -> None:
        self._progress.update(self._run, left="", note=name)

    def end(self, record: dict[str, Any], seconds: float) -> None:
        self._before += self._run_steps
        self._show_all(self._before)
        self._lines.end(record, seconds)

    def _show_all(self, done: int) -> None:
        total = self._progress.tasks[0].total or 0
        self._progress.update(self._all, completed=done, left=_time_left(self._start, done, int(total) - done))


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
    if (record["error"] or "").startswith(REFUSAL):
        return f"{name}: {record['error']}"
    if record["status"] != "ok":
        return f"{name}: {record['status'].replace('_', ' ')}: {record['error']}"
    peak = mib(record["memory"]["peak_allocated_bytes"])
    return f"{name}: ok, {record['headline']} {score(record):.3f}, peak {peak} MiB"
