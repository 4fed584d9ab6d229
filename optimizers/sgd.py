"""Stochastic gradient descent: the least that a method can keep."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from optimizers.base import MemoryEfficientOptimizer, check_share
from optimizers.registry import register
from optimizers.shared.inner import InnerSGD


@register("sgd")
class SGD(MemoryEfficientOptimizer):
    """SGD on all parameters, by torch's kernels, in the precision of the weights or of their masters.

    Trains everything. Keeps nothing; with momentum, one buffer of the weights' size; with fp32 masters, 4 bytes per
    weight, or 8 with momentum.

    Args:
        model: the model to train.
        lr: learning rate.
        weight_decay: added to the gradient (torch's SGD), for tensors of two or more dimensions, biases excepted.
        momentum: 0 for none.
        in_backward: update inside the backward pass, so that only one gradient exists at a time.
        master_weights: fp32 masters of low-precision weights (LOMO's Table 1 compares with this).
        stochastic_rounding: round bf16 weights up or down at random, instead of keeping masters.

    Raises:
        ValueError: a value is out of range.
    """

    summary = "stochastic gradient descent, on all parameters"
    paper = "Robbins & Monro, 1951"
    trains = "everything"
    keeps = "nothing (momentum: the size of the weights; fp32 masters: 4 B per weight; both: 8 B)"
    excludes = "in_backward: accumulation, loop clipping, fp16 scaling"
    example = {"lr": 0.1}
    added_later = ("stochastic_rounding",)

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-2,
        weight_decay: float = 0.0,
        *,
        momentum: float = 0.0,
        in_backward: bool = False,
        master_weights: bool = False,
        stochastic_rounding: bool = False,
    ):
        check_share("momentum", momentum)
        self.sgd = InnerSGD(model, master_weights=master_weights, stochastic_rounding=stochastic_rounding)
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum}
        super().__init__(model, defaults, in_backward=in_backward)

    @property
    def elementwise(self) -> bool:
        return self.sgd.elementwise

    def update(self, params: list[Tensor], grads: list[Tensor], group: dict[str, Any]) -> None:
        self.sgd.update([self.state[p] for p in params], params, grads, group, self.rounding_keys(params))

    def expected_state(self, p: nn.Parameter, saved: dict[str, Any]) -> dict[str, Any]:
        return self.sgd.expected_state(p, saved)
