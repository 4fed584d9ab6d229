"""Adam-mini: AdamW with one second moment per block of weights (Zhang et al., ICLR 2025, arXiv 2406.16793)."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor, nn

from optimizers.base import LOW_PRECISION, MemoryEfficientOptimizer
from optimizers.registry import register
from optimizers.shared.arithmetic import decayed, update_through_masters
from optimizers.shared.dense_blocks import Partition, partitions
from optimizers.shared.masters import exact_dtype


@register("adam-mini")
class AdamMini(MemoryEfficientOptimizer):
    """Adam-mini (Algorithms 1 to 3): AdamW whose second moment is one number for each dense block of the Hessian.

    m = b1 m + (1 - b1) G;  v = b2 v + (1 - b2) mean(G^2 over the block);  W -= lr m / (sqrt(v) + eps), bias-corrected.

    A block is a head of a query or key matrix; a neuron (an output) of a value, output, MLP or head matrix; a token of
    an embedding; a whole norm. A bias has a second moment for each entry. The size of a head comes from the attention
    module (`head_dim`) or else from the model's configuration; without either, queries and keys are cut by neuron too.

    Trains everything. Keeps, in fp32, a first moment as large as the weights and one number per block: 4 + 4 / n bytes
    per weight of an (m, n) matrix cut by neuron; low-precision weights also have an fp32 master (4 bytes more). No
    temporary is as large as the weights, except the gradient's cast to fp32 when there is a master, and fp32 copies of
    up to 16 MiB of low-precision weights when they decay without one.

    Args:
        model: the model to train.
        lr: learning rate; AdamW's works as it is.
        weight_decay: decoupled; for tensors of two or more dimensions, biases excepted.
        betas: decay rates of the two moments.
        eps: added to the square root of the second moment, after the bias correction.
        in_backward: update inside the backward pass, so that only one gradient exists at a time.
        master_weights: fp32 moments and masters for low-precision weights; False: a low-precision first moment.
        fp32_gradients: fp32 gradients for low-precision weights.
    """

    summary = "AdamW with one second moment per head, neuron, token or norm"
    paper = "Zhang, Chen, Li, Ding, Wu, Kingma, Ye, Luo & Sun, ICLR 2025, arXiv 2406.16793"
    trains = "everything"
    keeps = "4 B per weight (8 B with an fp32 master) and 4 B per block; 8 B per entry of a bias (12 B)"
    excludes = "in_backward: accumulation, loop clipping, fp16 scaling"
    example = {"lr": 1e-2}

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-3,
        weight_decay: float = 0.01,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        in_backward: bool = False,
        master_weights: bool = True,
        fp32_gradients: bool = False,
    ):
        self.master_weights = master_weights
        self._partitions = partitions(model)
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(model, defaults, in_backward=in_backward, fp32_gradients=fp32_gradients)

    def update(self, params: list[Tensor], grads: list[Tensor], group: dict[str, Any]) -> None:
        for p, g in zip(params, grads, strict=True):
            partition = self._partitions[p]  # type: ignore[index]
            state = self.state[p]
            if not state:
                state |= self._initial_state(p, partition)
            update_through_masters(functools.partial(_kernel, partition), [state], [p], [g], group)

    def expected_state(self, p: nn.Parameter, saved: dict[str, Any]) -> dict[str, Any]:
        return self._initial_state(torch.empty(p.shape, dtype=p.dtype, device="meta"), self._partitions[p])

    def _initial_state(self, p: Tensor, partition: Partition) -> dict[str, Any]:
        state: dict[str, Any] = {"step": 0}
        if self.master_weights and p.dtype in LOW_PRECISION:
            state["master"] = p.detach().to(torch.float32, copy=True)
        state["exp_avg"] = torch.zeros_like(state.get("master", p))
        state["exp_avg_sq"] = torch.zeros(partition.blocks, dtype=exact_dtype(p), device=p.device)
        return state


def _kernel(
    partition: Partition,
    states: list[dict[str, Any]],
    weights: list[Tensor],
    grads: list[Tensor],
    group: dict[str, Any],
) -> None:
    for state, weight, g in zip(states, weights, grads, strict=True):
        state["step"] += 1
        beta1, beta2 = group["betas"]
        m, v = state["exp_avg"].lerp_(g, 1.0 - beta1), state["exp_avg_sq"]
        v.lerp_(partition.mean_squares(g), 1.0 - beta2)
        root = v.sqrt().div_(math.sqrt(1.0 - beta2 ** state["step"])).add_(group["eps"])
        rates = root.reciprocal_().mul_(group["lr"] / (1.0 - beta1 ** state["step"]))
        rates = partition.spread(rates, weight.shape).to(weight.dtype).expand_as(weight)
        for piece, place in decayed(weight, group):
            piece.addcmul_(m[place], rates[place], value=-1.0)
