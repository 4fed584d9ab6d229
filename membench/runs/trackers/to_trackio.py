"""Trackio: a run of the project `membench`, in Trackio's own folder, or where its environment variables say."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import trackio
from trackio import context_vars

from membench.config.run import Run
from membench.runs.trackers import PROJECT, settings_of


class _Log:
    def __init__(self, run: Any):
        self._run, self._last = run, 0

    def log(self, step: int, values: dict[str, float]) -> None:
        self._last = step
        self._run.log(values, step=step)

    def end(self, record: dict[str, Any], values: dict[str, float]) -> None:
        self._run.log({**values, "record": json.dumps(record)}, step=self._last)
        self._run.finish()

    def interrupt(self) -> None:
        self._run.finish()


def begin(run: Run, out: Path) -> _Log:
    """Replaces what an earlier attempt has logged."""
    config = settings_of(run)
    quiet = {"embed": False, "auto_log_cpu": False, "auto_log_gpu": False}
    with suppress(ValueError):  # there is no such project yet
        for earlier in trackio.Api().runs(PROJECT):
            if earlier.name == run.run_id:
                earlier.delete()
    made = trackio.init(PROJECT, name=run.run_id, config=config, **quiet)
    context_vars.current_run.set(None)  # or the next run that begins would finish this one
    return _Log(made)
