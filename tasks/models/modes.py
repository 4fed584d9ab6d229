"""Training and evaluation mode of a model."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout) within this context; afterwards the previous mode."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
