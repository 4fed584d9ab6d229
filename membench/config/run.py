"""A run, and the training shared by all runs of a comparison: plain data, cheap to import."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from membench.config.declare import declared, shared
from membench.config.options import TrainingOptions


@dataclass(frozen=True, kw_only=True)
class Training(TrainingOptions):
    """What all methods of a comparison share, resolved."""

    steps: int  # 0: unknown, since the task can't be built
    weights: str = "random"

    @classmethod
    def of(cls, settings: TrainingOptions, *, steps: int, weights: str) -> Training:
        """The training that settings ask for."""
        return cls(**shared(TrainingOptions, settings), steps=steps, weights=weights)

    def on(self, processes: int) -> Training:
        """The same on so many processes; the strategy of a single one is the default."""
        strategy = self.strategy if processes > 1 else declared(self)["strategy"].default
        return replace(self, processes=processes, strategy=strategy)

    @property
    def record(self) -> dict[str, Any]:
        """The record's section `training`."""
        known = {one.option.record_as or name: name for name, one in declared(self).items() if one.option.recorded}
        return {
            "steps": self.steps or None,
            "weights": self.weights,
            **{key: getattr(self, known[key]) for key in known},
        }

    @property
    def identity(self) -> dict[str, Any]:
        """What distinguishes it from other trainings; without later additions that aren't used."""
        values = {"steps": self.steps, "weights": self.weights}
        for name, one in declared(self).items():
            kind, value = one.option.identifies, getattr(self, name)
            if kind == "always" or (kind == "unless default" and value != one.default):
                values[one.option.record_as or name] = value
        return values

    @property
    def micro_batch_size(self) -> int:
        """Examples per micro-batch."""
        return self.batch_size // self.gradient_accumulation_steps


@dataclass(frozen=True, kw_only=True)
class Run:
    """One method on one task with one seed: everything that a process needs to carry it out."""

    run_id: str
    task: str
    method: str
    seed: int
    hyperparameters: dict[str, Any]
    training: Training
    device: str
    threads: int
    environment: dict[str, Any]  # what a record says about where it was made
    begun_as: str | None = None  # the id of the run on other processes from whose checkpoint it goes on
    coverage: str = ""  # what it says of blocks that it doesn't come to
    refused: str | None = None  # why it can't be made, if the method or task can't work with this model


def shards_of(checkpoint: Path) -> Path:
    """The folder beside a checkpoint that has what each rank wrote, if the model was sharded."""
    return checkpoint.with_suffix(".shards")
