"""Training and evaluation mode of a model, and what else training does to the layers that run."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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


def dropping_layers(model: nn.Module) -> list[Any]:
    """The modules that leave out some of their layers, drawn at random at each step, as FlauBERT's do."""
    return [module for module in model.modules() if getattr(module, "layerdrop", None)]


@contextmanager
def all_layers_running(model: nn.Module) -> Iterator[None]:
    """No layer is left out at random within this context: such a step needs the most memory."""
    shares = [(module, module.layerdrop) for module in dropping_layers(model)]
    for module, _ in shares:
        module.layerdrop = 0.0
    try:
        yield
    finally:
        for module, share in shares:
            module.layerdrop = share
