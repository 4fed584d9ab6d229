"""AdaLomo: LOMO with a factored second moment (Lv et al., Findings of ACL 2024, arXiv 2310.10195)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from optimizers.base import MemoryEfficientOptimizer
from optimizers.registry import register
from optimizers.shared.factored import check_factored, chunks_of, rms, subtract, update_moments
from optimizers.shared.masters import exact_dtype


@register("adalomo")
class AdaLomo(MemoryEfficientOptimizer):
    """AdaLomo (Algorithm 1): each weight is updated in the backward pass, at its own rate, and its gradient freed.

    For a matrix W (m x n) with gradient G, at its step t, with b = 1 - t^decay_rate:

        R = b R + (1 - b) mean over columns of (G^2 + eps_1)      (m,)
        C = b C + (1 - b) mean over rows of (G^2 + eps_1)         (n,)
        U = G / sqrt(R C / mean(R))
        W -= lr max(eps_2, RMS(W)) U / max(1, RMS(U) / clip_threshold)

    A vector keeps its whole second moment instead of R C / mean(R). A tensor with more dimensions is viewed as the
    matrix whose R and C are smallest. The update doesn't depend on the scale of the loss.

    Trains everything. Keeps, in fp32, m + n values for an m x n matrix and n for a vector of length n; low-precision
    weights are updated in fp32 arithmetic. Only one gradient exists at a time, and no temporary is larger than 64 MiB
    (or one row).

    Args:
        model: the model to train.
        lr: learning rate, in units of the weights' RMS; the schedule applies.
        weight_decay: W -= lr max(eps_2, RMS(W)) weight_decay W, on tensors of two or more dimensions, biases excepted.
        decay_rate: exponent of the second moment's decay rate, below 0.
        eps: (eps_1, eps_2): eps_1 is added to squared gradients, eps_2 is a lower bound on the weights' RMS.
        clip_threshold: updates with a larger RMS are scaled down to it.

    Raises:
        ValueError: a value is out of range.
        RuntimeError: in a second backward pass before `step()`.
    """

    summary = "LOMO with Adafactor's second moment: a separate rate for each weight, almost no state"
    paper = "Lv, Yan, Guo, Lv & Qiu, Findings of ACL 2024, arXiv 2310.10195"
    trains = "everything"
    keeps = "4 (m + n) B per m x n matrix, 4 B per weight of a vector"
    excludes = "accumulation, loop clipping, fp16 scaling"
    example = {"lr": 0.03}

    def __init__(
        self,
        model: nn.Module,
        lr: float = 5e-4,
        weight_decay: float = 0.0,
        *,
        decay_rate: float = -0.8,
        eps: tuple[float, float] = (1e-30, 1e-3),
        clip_threshold: float = 1.0,
    ):
        check_factored(decay_rate, eps, clip_threshold)
        defaults = {"lr": lr, "weight_decay": weight_decay, "decay_rate": decay_rate, "eps": tuple(eps)}
        super().__init__(model, {**defaults, "clip_threshold": clip_threshold}, in_backward=True)

    def update(self, params: list[Tensor], grads: list[Tensor], group: dict[str, Any]) -> None:
        for p, g in zip(params, grads, strict=True):
            state = self.state[p]
            if not state:
                state |= _initial_state(p)
            state["step"] += 1
            _update_one(state, p, g, group)

    def expected_state(self, p: nn.Parameter, saved: dict[str, Any]) -> dict[str, Any]:
        return _initial_state(torch.empty(p.shape, dtype=p.dtype, device="meta"))


def _initial_state(p: Tensor) -> dict[str, Any]:
    rows, columns = _matrix_shape(p)
    row, column = (torch.zeros(size, dtype=exact_dtype(p), device=p.device) for size in (rows, columns))
    return {"step": 0, "row": row, "column": column}


def _matrix_shape(p: Tensor) -> tuple[int, int]:
    """The rows and columns `p` is factored into; a vector is one column, so that R is its whole second moment."""
    if p.dim() < 2:
        return p.numel(), 1
    splits = [(math.prod(p.shape[:k]), math.prod(p.shape[k:])) for k in range(1, p.dim())]
    return min(splits, key=sum)


def _update_one(state: dict[str, Any], p: Tensor, g: Tensor, group: dict[str, Any]) -> None:
    row, column = state["row"], state["column"]  # R (m,), C (n,)
    chunks = chunks_of(p, g)
    decay = 1.0 - state["step"] ** group["decay_rate"]
    update_moments(row, column, [grad.reshape(-1, len(column)) for _, grad in chunks], group["eps"][0], decay)
    r, c = (row / row.mean()).rsqrt_(), column.rsqrt()  # U = r G c
    sizes = [grad.numel() // len(c) for _, grad in chunks]  # rows of each chunk
    pieces = [(weight, grad, part) for (weight, grad), part in zip(chunks, r.split(sizes), strict=True)]
    rate = group["lr"] * rms((weight.to(r.dtype) for weight, _, _ in pieces), p.numel()).clamp(min=group["eps"][1])
    update_rms = rms((_scaled(grad, part, c) for _, grad, part in pieces), p.numel())
    r *= rate / (update_rms / group["clip_threshold"]).clamp(min=1.0)  # the pieces hold views of it
    for weight, grad, part in pieces:
        if group["weight_decay"]:
            subtract(weight, _scaled(grad, part, c), 1.0 - rate * group["weight_decay"])
        else:
            weight.sub_(_scaled(grad, part, c))


def _scaled(grad: Tensor, r: Tensor, c: Tensor) -> Tensor:
    """r G c for one chunk, in its shape."""
    return (grad.reshape(-1, len(c)) * c).mul_(r[:, None]).view(grad.shape)
