"""What `--track` puts into a run's history: measured between two steps, without changing the training's bits."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from membench.config.run import Training
from membench.training.seeding import random_state_kept
from optimizers import MemoryEfficientOptimizer
from tasks import HasReader
from tasks.models.modes import evaluation

Batch = dict[str, Tensor]

GRADIENT_NORM = "gradient_norm"
EXAMPLES = 128  # of the training data, on which the gradient is taken: the same for every method and batch size
POINTS = 100  # at most about so many in a run


class GradientNorm:
    """The 2-norm of the gradient of the mean loss on the first `EXAMPLES` examples, with respect to all weights.

    All weights: those of the model as it was built, whether the method trains them now or not; adapters are left out,
    and the gradient is taken where they have moved the weights to. Without dropout.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: MemoryEfficientOptimizer,
        loss_fn: Callable[[nn.Module, Batch], Tensor],
        batches: Sequence[Batch],
        shares: Sequence[float],
    ):
        check(optimizer)
        self.weights = _weights(optimizer)
        self.model, self._loss_fn, self._batches, self._shares = model, loss_fn, batches, shares

    def __call__(self) -> float:
        """The norm now, in the units of the loss."""
        total: list[Tensor | None] = [None] * len(self.weights)
        apart = random_state_kept(next(self.model.parameters()).device)
        with evaluation(self.model), _requiring_gradients(self.weights), torch.enable_grad(), apart:
            for batch, share in zip(self._batches, self._shares, strict=True):
                loss = self._loss_fn(self.model, batch)
                # unlike backward(), this calls no hook of a method that updates inside the backward pass
                found = torch.autograd.grad(loss, self.weights, allow_unused=True)
                total = [_add(one, gradient, share) for one, gradient in zip(total, found, strict=True)]
        norms = [torch.linalg.vector_norm(one) for one in total if one is not None]
        return float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0


def check(optimizer: MemoryEfficientOptimizer) -> None:
    """Raises ValueError if the method has put something else in the place of weights (quantised ones, factors)."""
    here = set(optimizer.model.parameters())
    if any(p not in here for p in _weights(optimizer)):
        raise ValueError(
            f"{type(optimizer).__name__} keeps something else in the place of weights, which so have no gradient: "
            f"leave out --track {GRADIENT_NORM}"
        )


def _weights(optimizer: MemoryEfficientOptimizer) -> list[nn.Parameter]:
    return [p for p in optimizer.weights if p.is_floating_point()]


def interval(training: Training) -> int:
    """Steps between two points."""
    return max(1, training.steps // POINTS)


def points(training: Training) -> int:
    """How many there are in a run; the last step has one."""
    return -(-training.steps // interval(training))


def batches_of(training: Training) -> int:
    """How many micro-batches the gradient is taken on."""
    return max(1, EXAMPLES // training.micro_batch_size)


def first_batches(task: Any, training: Training, device: torch.device) -> list[Batch]:
    """The task's first micro-batches: `EXAMPLES` examples, or one batch. A stream is put back to where it was."""
    position = task.state_dict() if isinstance(task, HasReader) else None
    batches = [task.batch(step) for step in range(batches_of(training))]
    if position is not None:
        task.load_state_dict(position)
    return [{key: value.to(device) for key, value in batch.items()} for batch in batches]


def _add(total: Tensor | None, gradient: Tensor | None, share: float) -> Tensor | None:
    """The sum so far, in fp32."""
    if gradient is None:
        return total
    return gradient.float() * share if total is None else total.add_(gradient, alpha=share)


@contextmanager
def _requiring_gradients(weights: Sequence[nn.Parameter]) -> Iterator[None]:
    before = [p.requires_grad for p in weights]
    try:
        for p in weights:
            p.requires_grad_(True)
        yield
    finally:
        for p, required in zip(weights, before, strict=True):
            p.requires_grad_(required)
