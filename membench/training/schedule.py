"""The learning rate schedule: one over the whole run, the same for every method."""

import math
from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from membench.config.run import Training

# progress after the warm-up, 0 to 1 -> share of the learning rate
SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
    "constant": lambda done: 1.0,
}


def learning_rate_factor(training: Training) -> Callable[[int], float]:
    """Step (from 0) -> factor: a linear warm-up, then a decay to the value that the step after the last would have."""
    warmup, final = math.ceil(training.warmup_fraction * training.steps), training.final_fraction
    shape = SCHEDULES[training.schedule]

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return final + (1 - final) * shape((step - warmup) / max(1, training.steps - warmup))

    return factor


def scheduler(optimizer: Optimizer, training: Training) -> LambdaLR:
    """The learning rate schedule of a whole run."""
    return LambdaLR(optimizer, learning_rate_factor(training))
