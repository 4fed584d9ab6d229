"""What a user sees while runs are made: a bar on a terminal, and always one line a run."""

from collections.abc import Sequence
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .run import Run


class Display(Protocol):
    """Where a comparison reports to; a context manager around all of its runs."""

    def __enter__(self) -> "Display": ...
    def __exit__(self, *exception: object) -> None: ...
    def begin(self, run: Run) -> None: ...
    def step(self, step: int, loss: float) -> None: ...
    def end(self, record: dict[str, Any], seconds: float) -> None: ...


def create_display(runs: Sequence[Run], total: int, *, quiet: bool) -> Display:
    """A bar if somebody is looking, else lines. `runs` are those still to make, of `total`."""
    console = Console(stderr=True)
    return Lines(len(runs), total) if quiet or not console.is_terminal else Bar(console, runs, total)


class Lines:
    """One line a run, for logs."""

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

    def end(self, record: dict[str, Any], seconds: float) -> None:
        print(f"[{self._number}/{self._total}] {summarize(record)}, {seconds:.0f} s", flush=True)


class Bar:
    """Two bars: the current run with its loss and the time left, and all runs together."""

    def __init__(self, console: Console, runs: Sequence[Run], total: int):
        self._lines = Lines(len(runs), total)
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[loss]}"),
            TimeRemainingColumn(),
            console=console,
            speed_estimate_period=3600,
        )
        self._all = self._progress.add_task("all runs, in steps", total=sum(map(_steps, runs)), loss="")
        self._current = self._progress.add_task("starting", total=None, loss="")
        self._done = self._finished_steps = 0

    def __enter__(self) -> "Bar":
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def begin(self, run: Run) -> None:
        self._lines.begin(run)
        self._progress.remove_task(self._current)
        title = f"{run.task} {run.method} seed {run.seed}"
        self._current = self._progress.add_task(title, total=_steps(run), loss="")
        self._finished_steps, self._done = self._finished_steps + self._done, 0
        self._run_steps = _steps(run)

    def step(self, step: int, loss: float) -> None:
        self._progress.update(self._current, completed=step, loss=f"loss {loss:.3f}")
        self._progress.update(self._all, completed=self._finished_steps + step)

    def end(self, record: dict[str, Any], seconds: float) -> None:
        self._done = self._run_steps
        self._progress.update(self._all, completed=self._finished_steps + self._done)
        self._progress.update(self._current, completed=self._done)
        self._lines.end(record, seconds)


def _steps(run: Run) -> int:
    return run.training.steps


def summarize(record: dict[str, Any]) -> str:
    """A run and what came of it, in a line."""
    name = f"{record['task']} {record['method']} seed {record['seed']}"
    if record["status"] != "ok":
        return f"{name}: {record['status'].replace('_', ' ')}: {record['error']}"
    peak = record["memory"]["peak_allocated_bytes"] / 1e6
    return f"{name}: ok, {record['headline']} {record['metrics'][record['headline']]:.3f}, peak {peak:.1f} MB"
