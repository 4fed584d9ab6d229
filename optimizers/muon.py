"""Muon: orthogonalised momentum (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from optimizers.base import MemoryEfficientOptimizer, check_choice, check_count, check_positive, check_share
from optimizers.registry import register
from optimizers.shared.arithmetic import decayed, expected_adam_state
from optimizers.shared.matrices import adamw_on_the_rest, computed_at_once, layer_matrices, with_rate_of_the_rest
from optimizers.shared.values import holds

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
ADJUSTMENTS = ("original", "match_rms_adamw")
EPS = 1e-7  # the smallest norm an update is divided by, as in torch


@register("muon")
class Muon(MemoryEfficientOptimizer):
    """Muon on the matrices of the layers: in fp32 identical to `torch.optim.Muon` to the last bit; AdamW on the rest.

    For a matrix W (m, n) with gradient G, in torch's form:

        M = mu M + (1 - mu) G
        X = (1 - mu) G + mu M      (without `nesterov`, X = M)
        X = X / norm(X), then `ns_steps` times X = a X + (b A + c A^2) X with A = X X^T, on the shorter side
        W = (1 - lr weight_decay) W - lr s X

    The iteration (Newton-Schulz) brings all singular values near 1. s adapts the step to the shape: "original" is
    sqrt(max(1, m / n)); "match_rms_adamw", 0.2 sqrt(max(m, n)), gives steps the size of AdamW's, so that a rate and
    weight decay tuned for AdamW work here (Liu et al., 2025, arXiv 2502.16982).

    Trains everything. Embeddings, head, vectors and tensors of three or more dimensions, but for experts' (each has its
    matrix), get AdamW at a rate of their own, in separate groups. Keeps one momentum of the weights' size and dtype for
    a matrix of the layers, two moments and a step count (4 bytes) for any other tensor: pure low precision for a
    low-precision model. Unlike torch's, it holds no second copy of the update during the iteration, and without
    `nesterov` the momentum of a bf16 model stays as it is (torch normalises it in place).

    Args:
        model: the model to train; its layers are in `nn.ModuleList`s.
        lr: learning rate of the matrices in the layers, in units of the spectral norm ("original").
        weight_decay: decoupled; for tensors of two or more dimensions, biases excepted.
        momentum: mu.
        nesterov: look ahead by one step of the momentum.
        ns_coefficients: a, b, c.
        ns_steps: number of iterations.
        ns_dtype: dtype of the iteration: "bfloat16", or "float32", tens of times faster on a CPU without native bf16
            arithmetic.
        adjust_lr_fn: "original" or "match_rms_adamw".
        adamw_lr: learning rate of all other tensors.
        betas, eps: as in AdamW.
        in_backward: update inside the backward pass, so that only one gradient exists at a time.

    Raises:
        ValueError: a value is out of range, or the model has no list of layers.
    """

    summary = "momentum with all singular values brought near 1, on the matrices of the layers; AdamW on the rest"
    paper = "Jordan et al., 2024, kellerjordan.github.io/posts/muon; Liu et al., 2025, arXiv 2502.16982"
    trains = "everything"
    keeps = "one value per weight of the layers' matrices, in the weights' dtype; two per weight of the rest"
    excludes = "in_backward: accumulation, loop clipping, fp16 scaling"
    example = {"lr": 0.02, "adamw_lr": 1e-2}

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        *,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315),
        ns_steps: int = 5,
        ns_dtype: str = "bfloat16",
        adjust_lr_fn: str = "original",
        adamw_lr: float = 3e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        in_backward: bool = False,
    ):
        check_share("momentum", momentum)
        if not holds(lambda numbers: len(numbers) == len([*map(float, numbers)]) == 3, ns_coefficients):
            raise ValueError(f"ns_coefficients must be three numbers, not {ns_coefficients!r}")
        check_count("ns_steps", ns_steps)
        check_choice("ns_dtype", ns_dtype, tuple(DTYPES))
        check_choice("adjust_lr_fn", adjust_lr_fn, ADJUSTMENTS)
        check_positive("adamw_lr", adamw_lr)
        self.nesterov, self.coefficients, self.ns_steps = nesterov, tuple(ns_coefficients), ns_steps
        self.dtype = DTYPES[ns_dtype]
        self.adjust_lr_fn, self.adamw_lr = adjust_lr_fn, adamw_lr
        self._matrices = layer_matrices(model)
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "betas": betas, "eps": eps}
        super().__init__(model, defaults, in_backward=in_backward)

    def group_parameters(self, model: nn.Module, defaults: dict[str, Any]) -> list[dict[str, Any]]:
        """The matrices of the layers, then the rest at its own rate: matrices, vectors."""
        return with_rate_of_the_rest(super().group_parameters(model, defaults), self._matrices, self.adamw_lr)

    def update(self, params: list[Tensor], grads: list[Tensor], group: dict[str, Any]) -> None:
        for p, g in adamw_on_the_rest(self, self._matrices, params, grads, group):
            state = self.state[p]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(p)
            for some in computed_at_once(p):
                self._update_matrices(p[some], g[some].to(p.dtype), state["momentum_buffer"][some], group)

    def expected_state(self, p: nn.Parameter, saved: dict[str, Any]) -> dict[str, Any]:
        if p in self._matrices:
            return {"momentum_buffer": torch.empty(p.shape, dtype=p.dtype, device="meta")}
        return expected_adam_state(p, master_weights=False)

    def _update_matrices(self, p: Tensor, g: Tensor, buffer: Tensor, group: dict[str, Any]) -> None:
        """Update a matrix (m, n), or those of some experts (experts, m, n)."""
        momentum = group["momentum"]
        buffer.lerp_(g, 1 - momentum)
        x = (g.lerp(buffer, momentum) if self.nesterov else buffer).to(self.dtype, copy=not self.nesterov)
        x = orthogonalize_(x, self.coefficients, self.ns_steps)
        for weights, place in decayed(p, group):
            weights.add_(x[place], alpha=-group["lr"] * self._scale(*p.shape[-2:]))

    def _scale(self, rows: int, columns: int) -> float:
        if self.adjust_lr_fn == "match_rms_adamw":
            return 0.2 * math.sqrt(max(rows, columns))
        return math.sqrt(max(1, rows / columns))


def orthogonalize_(x: Tensor, coefficients: tuple[float, ...], steps: int) -> Tensor:
    """A matrix (m, n) near U V^T, where `x` = U S V^T, by Newton-Schulz iteration; `x` is overwritten.

    Of (experts, m, n) each matrix, with the same bits.
    """
    a, b, c = coefficients
    add_product = torch.addmm if x.dim() == 2 else torch.baddbmm
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x  # (short, long)
    x.div_(torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=EPS))
    for _ in range(steps):
        gram = x @ x.mT  # (short, short)
        polynomial = add_product(gram, gram, gram, beta=b, alpha=c)
        del gram
        x = add_product(x, polynomial, x, beta=a)
    return x.mT if tall else x
