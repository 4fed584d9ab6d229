"""AdamW: the reference that every other method is compared with (Loshchilov & Hutter, 2019, arXiv 1711.05101)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from optimizers.base import MemoryEfficientOptimizer
from optimizers.registry import register
from optimizers.shared.inner import InnerAdamW


@register("adamw")
class AdamW(MemoryEfficientOptimizer):
    """AdamW on all parameters, by torch's fused kernel.

    Trains everything. Keeps two moments per weight and, for low-precision weights, an fp32 master:
    8 bytes per weight in fp32, 12 with a master, and 4 bytes per tensor for its step count.

    Args:
        model: the model to train.
        lr: learning rate.
        betas: decay rates of the two moments.
        eps: added to the square root of the second moment.
        weight_decay: decoupled; for tensors of two or more dimensions, biases excepted.
        in_backward: update inside the backward pass, so that only one gradient exists at a time.
        master_weights: fp32 moments and masters for low-precision weights; False means pure low precision.
        fp32_gradients: fp32 gradients for low-precision weights.
        stochastic_rounding: round bf16 weights up or down at random, instead of keeping masters.
    """

    summary = "Adam with decoupled weight decay, on all parameters: the reference"
    paper = "Loshchilov & Hutter, 2019, arXiv 1711.05101"
    trains = "everything"
    keeps = "8 B per weight (12 B with an fp32 master)"
    excludes = "in_backward: accumulation, loop clipping, fp16 scaling"
    example = {"lr": 1e-2}
    added_later = ("stochastic_rounding",)

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
        stochastic_rounding: bool = False,
    ):
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        self.adamw = InnerAdamW(model, master_weights=master_weights, stochastic_rounding=stochastic_rounding)
        super().__init__(model, defaults, in_backward=in_backward, fp32_gradients=fp32_gradients)

    @property
    def elementwise(self) -> bool:
        return self.adamw.elementwise

    def update(self, params: list[Tensor], grads: list[Tensor], group: dict[str, Any]) -> None:
        self.adamw.update([self.state[p] for p in params], params, grads, group, self.rounding_keys(params))

    def expected_state(self, p: nn.Parameter, saved: dict[str, Any]) -> dict[str, Any]:
        return self.adamw.expected_state(p)
