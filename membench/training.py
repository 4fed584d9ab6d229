"""What every method of a comparison shares: the settings of the training, and the schedule of the learning rate."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


@dataclass(frozen=True)
class Training:
    """Goes into the record as it is."""

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

    @property
    def micro_batch_size(self) -> int:
        return self.batch_size // self.gradient_accumulation_steps


# share of the way after the warm-up -> share of the learning rate
SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
    "constant": lambda done: 1.0,
}


def learning_rate_factor(training: Training) -> Callable[[int], float]:
    """Step (from 0) -> factor: a linear warm-up, then down to 0 after the last step. No step is wasted on a factor of 0."""
    warmup = math.ceil(training.warmup_fraction * training.steps)
    shape = SCHEDULES[training.schedule]

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return shape((step - warmup) / max(1, training.steps - warmup))

    return factor


def scheduler(optimizer: Optimizer, training: Training) -> LambdaLR:
    """The schedule of a whole run."""
    return LambdaLR(optimizer, learning_rate_factor(training))
