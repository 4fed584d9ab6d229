"""`--log-to`: what a run measures, while it is made, in the form of a tracker. One small file each.

A run is logged under its id: each entry of its history as soon as it is known, and once, the rest from its record. A
run that is continued or made again by another command is logged anew, from its first step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from membench.config.errors import explain
from membench.config.options import ExecutionOptions
from membench.config.run import Run
from membench.runs.progress import Display

Values = dict[str, float]
PROJECT = "membench"


class Tracker(Protocol):
    """A module of this package: begins to log a run, and returns what continues."""

    def __call__(self, run: Run, out: Path) -> Log: ...


class Log(Protocol):
    """A run in a tracker."""

    def log(self, step: int, values: Values) -> None: ...
    def end(self, record: dict[str, Any], values: Values) -> None:
        """With the whole record, and those of its values that aren't in its history."""

    def interrupt(self) -> None:
        """The command ends before the run: what is logged stays, and isn't shown as if it went on."""


def create(display: Display, options: ExecutionOptions) -> Display:
    """A display that also logs to the trackers that are asked for."""
    return Tracked(display, options.log_to, Path(options.out)) if options.log_to else display


@dataclass
class Tracked:
    """A display that also logs. A tracker that fails is left out of that run, and says so."""

    display: Display
    names: Sequence[str]
    out: Path
    _runs: dict[str, _Logs] = field(default_factory=dict)

    def __enter__(self) -> Tracked:
        self.display.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            for logs in self._runs.values():
                logs.interrupt()
        finally:
            self.display.__exit__(*exception)

    def begin(self, run: Run) -> None:
        self.display.begin(run)
        logs = self._runs[run.run_id] = _Logs(run)
        for name in self.names:
            logs.begin(name, self.out)

    def entry(self, run: Run, entry: dict[str, Any]) -> None:
        self.display.entry(run, entry)
        self._runs[run.run_id].add(entry)

    def step(self, run: Run, step: int, loss: float) -> None:
        self.display.step(run, step, loss)

    def stage(self, run: Run, name: str) -> None:
        self.display.stage(run, name)

    def end(self, run: Run, record: dict[str, Any], seconds: float) -> None:
        self._runs.pop(run.run_id).end(record)
        self.display.end(run, record, seconds)


@dataclass
class _Logs:
    """A run in all trackers."""

    run: Run
    logs: dict[str, Log] = field(default_factory=dict)
    history: dict[int, dict[str, Any]] = field(default_factory=dict)  # what is logged of it, by step

    def begin(self, name: str, out: Path) -> None:
        try:
            self.logs[name] = import_module(f"membench.runs.trackers.to_{name}").begin(self.run, out)
        except Exception as error:
            self._say(name, error)

    def add(self, entry: dict[str, Any]) -> None:
        """Log an entry, unless it is: a run that had to go on from its checkpoint tells its history again."""
        step = entry["step"]
        if step in self.history:
            return
        before = max((known for known in self.history if known < step), default=None)
        values = values_of(entry, None if before is None else self.history[before])
        self.history[step] = entry
        self._each(lambda log: log.log(step, values))

    def end(self, record: dict[str, Any]) -> None:
        for entry in record["history"] or []:
            self.add(entry)
        self._each(lambda log: log.end(record, final(record)))

    def interrupt(self) -> None:
        self._each(lambda log: log.interrupt())

    def _each(self, act: Any) -> None:
        for name, log in list(self.logs.items()):
            try:
                act(log)
            except Exception as error:
                del self.logs[name]
                self._say(name, error)

    def _say(self, name: str, error: Exception) -> None:
        print(f"--log-to {name}: {self.run.run_id} isn't logged there any further: {explain(error)}", flush=True)


def settings_of(run: Run) -> dict[str, Any]:
    """What identifies a run to its reader, with the run's seed: a method may have been given another of its own."""
    return {**run.hyperparameters, "task": run.task, "method": run.method, "seed": run.seed}


def values_of(entry: dict[str, Any], before: dict[str, Any] | None) -> Values:
    """The numbers of an entry of the history, with the tokens per second since the entry before."""
    values = {key: value for key, value in entry.items() if key not in ("step", "metrics") and value is not None}
    values |= {f"metrics/{name}": value for name, value in (entry["metrics"] or {}).items()}
    tokens, seconds = (entry[key] - (before[key] if before else 0) for key in ("tokens", "seconds"))
    return values | ({"tokens_per_second": tokens / seconds} if seconds > 0 else {})


def final(record: dict[str, Any]) -> Values:
    """The numbers of a record outside its history: memory by part, times, shares."""
    flat: dict[str, Any] = {}
    for section in ("memory", "time"):
        flat |= _flat(section, record[section] or {})
    flat |= {f"final/{name}": value for name, value in (record["metrics"] or {}).items()}
    flat |= {name: record[name] for name in ("parameters", "trainable_parameters", "trained_fraction")}
    return {name: value for name, value in flat.items() if isinstance(value, int | float)}


def _flat(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        return {name: value}
    return {key: one for below, inside in value.items() for key, one in _flat(f"{name}/{below}", inside).items()}
