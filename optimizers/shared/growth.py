"""Fira's limit on how fast the norm of an update may grow (Chen et al., 2024, arXiv 2410.01623), also in APOLLO."""

from __future__ import annotations

from typing import Any

from torch import Tensor

GROWTH = 1.01  # the most that the norm may grow from one step to the next, as a factor


def limit_growth(state: dict[str, Any], norm: Tensor) -> Tensor | float:
    """The factor that keeps an update of this norm from growing by more than 1 %; keeps the resulting `norm`."""
    limit = 1.0 if "norm" not in state else GROWTH / (norm / (state["norm"] + 1e-8)).clamp(min=GROWTH)
    state["norm"] = norm * limit
    return limit
