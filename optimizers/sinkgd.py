"""SinkGD: normalise a gradient's rows and columns, keep no state (Scetbon et al., 2025, arXiv 2502.06742)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from optimizers.base import MemoryEfficientOptimizer, check_count, check_positive
from optimizers.registry import register
from optimizers.shared.arithmetic import decayed, expected_adam_state
from optimizers.shared.matrices import adamw_on_the_rest, computed_at_once, layer_matrices, with_rate_of_the_rest

LEAST = 1e-30  # lower bound on a sum of squares, whose mean is 1
SMALLEST = 1e-20  # lower bound on a gradient's size


@register("sinkgd")
class SinkGD(MemoryEfficientOptimizer):
    """SinkGD (Algorithms 3 and 4): gradient descent along the gradient with all its rows and columns normalised.

    For a matrix of the layers W (m, n) with gradient G: X = G, then `iterations` times every row of X is scaled to the
    norm sqrt(n) and every column to sqrt(m); W -= lr scale X. The step doesn't depend on the size of the gradient.

    X is diag(r) G diag(c), as in Sinkhorn's algorithm, so only r and c are computed, from G^2 by products with vectors.

    Trains everything. Embeddings, head, vectors and tensors of three or more dimensions, but for experts' (each has its
    matrix), get AdamW at a rate of their own, in separate groups. Keeps nothing for a matrix of the layers, two moments
    and a step count (4 bytes) for any other tensor, in the dtype of the weights. Only one fp32 temporary of a matrix's
    size, or of some small experts', exists at a time.

    Args:
        model: the model to train; its layers are in `nn.ModuleList`s.
        lr: learning rate.
        weight_decay: decoupled, not scaled by `scale`; for tensors of two or more dimensions, biases excepted.
        iterations: how many times rows and columns are normalised.
        scale: of the step; the entries of X have a root mean square of 1.
        adamw_lr: learning rate of all other tensors.
        betas, eps: as in AdamW.
        in_backward: update inside the backward pass, so that only one gradient exists at a time.

    Raises:
        ValueError: a value is out of range, or the model has no list of layers.
    """

    summary = "gradient descent with all rows and columns of a gradient normalised; AdamW on the rest"
    paper = "Scetbon, Ma, Gong & Meeds, NeurIPS 2025, arXiv 2502.06742"
    trains = "everything"
    keeps = "nothing for the layers' matrices; two values per weight of the rest, in the weights' dtype"
    excludes = "in_backward: accumulation, loop clipping, fp16 scaling"
    example = {"lr": 0.1, "adamw_lr": 1e-2}

    def __init__(
        self,
        model: nn.Module,
        lr: float = 0.02,
        weight_decay: float = 0.0,
        *,
        iterations: int = 5,
        scale: float = 0.05,
        adamw_lr: float = 3e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        in_backward: bool = False,
    ):
        check_count("iterations", iterations)
        check_positive("scale", scale)
        check_positive("adamw_lr", adamw_lr)
        self.iterations, self.scale, self.adamw_lr = iterations, scale, adamw_lr
        self._matrices = layer_matrices(model)
        defaults = {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps}
        super().__init__(model, defaults, in_backward=in_backward)

    def group_parameters(self, model: nn.Module, defaults: dict[str, Any]) -> list[dict[str, Any]]:
        """The matrices of the layers, then the rest at its own rate: matrices, vectors."""
        return with_rate_of_the_rest(super().group_parameters(model, defaults), self._matrices, self.adamw_lr)

    def update(self, params: list[Tensor], grads: list[Tensor], group: dict[str, Any]) -> None:
        for p, g in adamw_on_the_rest(self, self._matrices, params, grads, group):
            for some in computed_at_once(p):
                self._update_matrices(p[some], g[some], group)

    def _update_matrices(self, p: Tensor, g: Tensor, group: dict[str, Any]) -> None:
        """Update a matrix (m, n), or those of some experts (experts, m, n)."""
        step, factors = normalized(g, self.iterations)
        for weights, place in decayed(p, group):
            weights.addcmul_(step[place], factors[place], value=-group["lr"] * self.scale)

    def expected_state(self, p: nn.Parameter, saved: dict[str, Any]) -> dict[str, Any]:
        return {} if p in self._matrices else expected_adam_state(p, master_weights=False)


def normalized(g: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """G diag(c) (m, n) and r (m, 1), in fp32, whose product is X; a row or column of zeros stays zero.

    Args:
        g: G (m, n); or (experts, m, n), for each of which the same is done.
        iterations: how many times rows, then columns, are normalised.
    """
    rows, columns = g.shape[-2:]
    work = g.to(torch.float32, copy=True)
    size = torch.linalg.vector_norm(work, dim=(-2, -1), keepdim=True)
    size.div_(math.sqrt(rows * columns)).clamp_(min=SMALLEST)
    squares = work.div_(size).square_()  # scaled to size 1, or the squares of a small gradient would underflow
    of_columns = work.new_ones(*g.shape[:-2], columns, 1)  # c^2
    for _ in range(iterations):
        of_rows = (squares @ of_columns).clamp_(min=LEAST).reciprocal_().mul_(columns)  # r^2: rows of norm sqrt(n)
        of_columns = (squares.mT @ of_rows).clamp_(min=LEAST).reciprocal_().mul_(rows)
    return torch.mul(g, of_columns.mT.sqrt_(), out=work), of_rows.sqrt_().div_(size)
