"""Fira's limit on how fast the norm of an update may grow (Chen et al., 2024, arXiv 2410.01623), also in APOLLO."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

GROWTH = 1.01  # the most that the norm may grow from one step to the next, as a factor


def limit_growth(state: dict[str, Any], norm: Tensor) -> Tensor | float:
    """The factor that keeps an update of this norm from growing by more than 1 %; keeps the resulting `norm`.

    Norms of exactly 0 don't count, from which growth would take a thousand steps: those of a matrix that the loss
    doesn't yet depend on, as below a projection that starts at zero, and of an expert while it has no tokens.
    """
    before = state.get("norm")
    limit: Tensor | float = 1.0
    if before is not None:
        limit = torch.where(before == 0, 1.0, GROWTH / (norm / (before + 1e-8)).clamp(min=GROWTH))
        norm = torch.where(norm == 0, before, norm)
    state["norm"] = norm * limit
    return limit
