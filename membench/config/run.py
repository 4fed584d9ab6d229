"""A run and the training that all runs of a comparison share: plain data, cheap to import."""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Training:
    """What every method of a comparison shares; goes into the record as it is."""

    steps: int
    batch_size: int  # examples an update
    sequence_length: int
    gradient_accumulation_steps: int = 1  # micro-batches an update
    dtype: str = "float32"
    autocast: str | None = None
    schedule: str = "linear"
    warmup_fraction: float = 0.1
    max_grad_norm: float | None = None
    gradient_checkpointing: bool = False
    evaluate_every: int | None = None
    data: str = "demo"
    weights: str = "random"
    profile: str | None = None
    final_fraction: float = 0.0  # of the learning rate, where the schedule ends
    evaluate_before: bool = False  # also before the first step
    options: dict[str, Any] = field(default_factory=dict)  # of the task

    @property
    def identity(self) -> dict[str, Any]:
        """What makes it another training: without its profile's name, and without later additions that aren't used."""
        added = ("final_fraction", "evaluate_before", "options")
        values = {key: value for key, value in asdict(self).items() if key not in ("profile", "data")}
        return {key: value for key, value in values.items() if value or key not in added}

    @property
    def micro_batch_size(self) -> int:
        return self.batch_size // self.gradient_accumulation_steps


@dataclass(frozen=True)
class Run:
    """One method on one task with one seed: all that a process needs to carry it out."""

    run_id: str
    task: str
    method: str
    model: str
    seed: int
    hyperparameters: dict[str, Any]
    training: Training
    tokenizer: str | None
    device: str
    threads: int
    trust_remote_code: bool
    environment: dict[str, Any]  # what a record says about where it was made
