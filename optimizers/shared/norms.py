"""Norms, computed in fp32 or better."""

from __future__ import annotations

import torch
from torch import Tensor

from optimizers.shared.masters import exact_dtype


def norm_of(t: Tensor, dim: int | tuple[int, ...] | None = None, keepdim: bool = False) -> Tensor:
    """||t|| over `dim` (default: all), in fp32, or in fp64 for an fp64 tensor."""
    return torch.linalg.vector_norm(t, dim=dim, keepdim=keepdim, dtype=exact_dtype(t))
