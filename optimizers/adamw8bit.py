"""AdamW with its moments in 8 bits (Dettmers, Lewis, Shleifer & Zettlemoyer, ICLR 2022, arXiv 2110.02861)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from optimizers.base import MemoryEfficientOptimizer
from optimizers.registry import register
from optimizers.shared.inner import InnerAdamW


@register("adamw8bit")
class AdamW8bit(MemoryEfficientOptimizer):
    """AdamW on all parameters, m and v kept in 8 bits: with the dynamic maps, in blocks of 256, as bitsandbytes does.

    Trains everything. Keeps two bytes per weight and two fp32 magnitudes for every 256 weights of a tensor: 2.03 bytes
    per weight; 8 for tensors of fewer than 4,096 weights, whose moments stay in fp32. Low-precision weights have no
    fp32 master, as in bitsandbytes, so an update smaller than half the distance to the next bf16 number is lost: use
    stochastic rounding, or pay 4 more bytes for masters.

    Args:
        model: the model to train.
        lr: learning rate.
        weight_decay: decoupled; for tensors of two or more dimensions, biases excepted.
        betas, eps: as in AdamW.
        in_backward: update inside the backward pass, so that only one gradient exists at a time.
        master_weights: fp32 masters for low-precision weights.
        fp32_gradients: fp32 gradients for low-precision weights.
        stochastic_rounding: round bf16 weights up or down at random, instead of keeping masters.
        seed: for the rounding.

    Raises:
        ValueError: a value is out of range.
    """

    summary = "AdamW with its moments in 8 bits"
    paper = "Dettmers, Lewis, Shleifer & Zettlemoyer, ICLR 2022, arXiv 2110.02861"
    trains = "everything"
    keeps = "2.03 B per weight (6.03 B with an fp32 master); 8 B (12 B) in tensors of fewer than 4,096"
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
        master_weights: bool = False,
        fp32_gradients: bool = False,
        stochastic_rounding: bool = False,
        seed: int = 0,
    ):
        self.seed = seed
        self.adamw = InnerAdamW(
            model, master_weights=master_weights, states="8bit", stochastic_rounding=stochastic_rounding
        )
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(model, defaults, in_backward=in_backward, fp32_gradients=fp32_gradients)

    def update(self, params: list[Tensor], grads: list[Tensor], group: dict[str, Any]) -> None:
        self.adamw.update([self.state[p] for p in params], params, grads, group, self.rounding_keys(params))

    def expected_state(self, p: nn.Parameter, saved: dict[str, Any]) -> dict[str, Any]:
        return self.adamw.expected_state(p)
