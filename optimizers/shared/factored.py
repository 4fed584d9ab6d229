"""A factored second moment: row and column averages of a gradient's squares instead of one value per weight.

Shazeer & Stern, ICML 2018, arXiv 1804.04235, Section 3.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from optimizers.shared.values import check_positive, holds, is_pair

CHUNK = 2**24  # weights: temporaries have this size, or that of one row if larger; smaller would mean many kernels


def check_factored(decay_rate: float, eps: tuple[float | None, float], clip_threshold: float) -> None:
    """Refuse hyper-parameters of Adafactor's update that are out of range.

    Raises:
        ValueError: names the hyper-parameter and its value.
    """
    check_positive("clip_threshold", clip_threshold)
    if not holds(lambda rate: -math.inf < rate < 0.0, decay_rate):
        raise ValueError(f"decay_rate must be a finite number below 0, not {decay_rate!r}")
    if not is_pair(eps):
        raise ValueError(f"eps must be two numbers, not {eps!r}")


def chunks_of(p: Tensor, g: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Pairs of views of a tensor and its gradient, cut along the first dimension."""
    if p.dim() == 0:
        p, g = p[None], g[None]
    size = max(1, CHUNK * p.shape[0] // p.numel())
    return list(zip(p.split(size), g.split(size), strict=True))


def update_moments(row: Tensor, column: Tensor, grads: list[Tensor], eps: float, decay: float) -> None:
    """Update in place the moving averages of the means of G^2 + eps over the columns and rows of each matrix.

    Args:
        row: R (..., m).
        column: C (..., n).
        grads: the gradient (..., m, n), cut along its first dimension.
        eps: added to the squares.
        decay: weight of the old averages.
    """
    row_sums, column_sums = [], []
    for grad in grads:
        squares = grad.to(row.dtype).square()
        row_sums.append(squares.sum(-1))
        column_sums.append(squares.sum(-2))
        del squares
    columns = torch.stack(column_sums).sum(0) if row.dim() == 1 else torch.cat(column_sums)
    row.lerp_(torch.cat(row_sums).div_(column.shape[-1]).add_(eps), 1.0 - decay)
    column.lerp_(columns.div_(row.shape[-1]).add_(eps), 1.0 - decay)


def rms(chunks: Iterable[Tensor], count: int) -> Tensor:
    """Root mean square over all `count` entries."""
    norms = [torch.linalg.vector_norm(chunk) for chunk in chunks]
    return (norms[0] if len(norms) == 1 else torch.stack(norms).norm()) / math.sqrt(count)


def subtract(weight: Tensor, step: Tensor, shrink: float | Tensor | None) -> None:
    """weight = shrink weight - step, in place and rounded once; `step` is in fp32 or better. None doesn't shrink."""
    exact = weight.to(step.dtype)  # the weight itself, unless it is in low precision
    if shrink is not None:
        exact.mul_(shrink)
    exact.sub_(step)
    if exact is not weight:
        weight.copy_(exact)
