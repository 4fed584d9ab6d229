"""Weights & Biases: a run of the project `membench`, with its files in OUT/wandb; WANDB_MODE=offline needs no network.

A run that is made again is another run with the same name there.
"""

import json
from pathlib import Path
from typing import Any

import wandb

from membench.config.run import Run
from membench.runs.trackers import PROJECT, settings_of


class _Log:
    def __init__(self, run: Any):
        self._run = run

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def end(self, record: dict[str, Any], values: dict[str, float]) -> None:
        self._run.summary.update({**values, "record": json.dumps(record)})
        self._run.finish(exit_code=int(record["status"] != "ok"))

    def interrupt(self) -> None:
        self._run.finish(exit_code=1)


def begin(run: Run, out: Path) -> _Log:
    """A run beside those that are being logged now."""
    config = {"run_id": run.run_id, **settings_of(run)}
    return _Log(wandb.init(project=PROJECT, name=run.run_id, config=config, dir=out, reinit="create_new"))
