"""For a project's own tests: a limit on memory, and the contract of an optimizer.

from membench.testing import CHECKS, Subject, assert_peak_at_most

def test_training_fits():
    model, optimizer = build()
    assert_peak_at_most(64 * 2**20, model, optimizer, loss_fn, batches)

@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_my_method_keeps_the_contract(check):
    check(Subject(MyMethod, {"lr": 1e-2}))
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from membench.api import MemoryUsage, measure_memory
from optimizers.contract import CHECKS, Subject

__all__ = ["CHECKS", "Subject", "assert_peak_at_most"]


def assert_peak_at_most(
    limit_bytes: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_fn: Callable[[nn.Module, Any], Tensor],
    batches: Sequence[Any],
    *,
    max_grad_norm: float | None = None,
) -> MemoryUsage:
    """Fail if training needs more than `limit_bytes` of tensors at once; returns what it used.

    The figure is exact and the same on every machine (see `membench.measure_memory` for the arguments), so the limit
    can be a measured value, to the byte.

    Raises:
        AssertionError: it needs more; the message says how much, when, and where most of it is.
        ValueError: there are no batches, or the model has no parameters.
    """
    usage = measure_memory(model, optimizer, loss_fn, batches, max_grad_norm=max_grad_norm)
    excess = usage.peak_allocated_bytes - limit_bytes
    if excess > 0:
        raise AssertionError(
            f"training needs {usage.peak_allocated_bytes:,} bytes at its peak, {excess:,} more than {limit_bytes:,}: "
            f"{usage}; most of it in {usage.peak_module or 'the model itself'}"
        )
    return usage
