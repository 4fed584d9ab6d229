"""SCALE: column-normalised gradients, momentum in the last layer only (Glentis et al., 2025, arXiv 2506.16659)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from optimizers.base import MemoryEfficientOptimizer, check_positive, check_share
from optimizers.registry import register
from optimizers.shared.arithmetic import decayed, expected_adam_state
from optimizers.shared.blocks import outside_layers
from optimizers.shared.construction import is_weight
from optimizers.shared.matrices import adamw_on_the_rest, input_dims, with_rate_of_the_rest
from optimizers.shared.norms import norm_of


@register("scale")
class SCALE(MemoryEfficientOptimizer):
    """SCALE (Algorithm 1): each column of a matrix moves by the learning rate along its gradient's direction.

    G is the gradient of a matrix W whose columns are outputs (for an embedding: the features), or for the last layer
    its moving average: each column of W moves by -lr times G's column divided by its norm. The authors' code divides
    by the root mean square instead: multiply their rate by the square root of a column's length to get ours.

    Trains everything. Vectors get AdamW at a rate of their own, in a separate group. The last layer is all matrices
    after the layers, or the embeddings if they are tied to the head. Keeps one moving average for these, nothing for
    other matrices, two moments and a step count (4 bytes) for a vector, in the dtype of the weights.

    Args:
        model: the model to train; its layers are in `nn.ModuleList`s.
        lr: learning rate, the norm of every column's step.
        weight_decay: decoupled; for tensors of two or more dimensions, biases excepted.
        momentum: decay rate of the last layer's moving average.
        adamw_lr: learning rate of the vectors.
        betas, eps: as in AdamW.
        in_backward: update inside the backward pass, so that only one gradient exists at a time.

    Raises:
        ValueError: a value is out of range, or the model has no list of layers.
    """

    summary = "gradient descent with all columns of a gradient normalised; momentum in the head only"
    paper = "Glentis, Li, Han & Hong, ICML 2026, arXiv 2506.16659"
    trains = "everything"
    keeps = "one value per weight of the head, two per entry of a vector, in the weights' dtype"
    excludes = "in_backward: accumulation, loop clipping, fp16 scaling"
    example = {"lr": 0.03, "adamw_lr": 1e-2}

    def __init__(
        self,
        model: nn.Module,
        lr: float = 0.02,
        weight_decay: float = 0.0,
        *,
        momentum: float = 0.9,
        adamw_lr: float = 3e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        in_backward: bool = False,
    ):
        check_share("momentum", momentum)
        check_positive("adamw_lr", adamw_lr)
        self.adamw_lr = adamw_lr
        self._summed, self._head = columns_and_head(model)
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "betas": betas, "eps": eps}
        super().__init__(model, defaults, in_backward=in_backward)

    def group_parameters(self, model: nn.Module, defaults: dict[str, Any]) -> list[dict[str, Any]]:
        """The matrices, then the vectors at their own rate."""
        return with_rate_of_the_rest(super().group_parameters(model, defaults), self._summed, self.adamw_lr)

    def update(self, params: list[Tensor], grads: list[Tensor], group: dict[str, Any]) -> None:
        for p, g in adamw_on_the_rest(self, self._summed, params, grads, group):
            if p in self._head:
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                g = state["momentum_buffer"].lerp_(g.to(p.dtype), 1.0 - group["momentum"])
            self._update_matrix(p, g, group)

    def _update_matrix(self, p: Tensor, g: Tensor, group: dict[str, Any]) -> None:
        norms = norm_of(g, dim=self._summed[p], keepdim=True)
        factors = norms.clamp_(min=torch.finfo(norms.dtype).tiny).reciprocal_()  # a column of zeros stays zero
        for weights, place in decayed(p, group):
            weights.addcmul_(g[place], factors.expand_as(g)[place], value=-group["lr"])

    def expected_state(self, p: nn.Parameter, saved: dict[str, Any]) -> dict[str, Any]:
        if p not in self._summed:
            return expected_adam_state(p, master_weights=False)
        buffer = torch.empty(p.shape, dtype=p.dtype, device="meta")
        return {"momentum_buffer": buffer} if p in self._head else {}


def columns_and_head(model: nn.Module) -> tuple[dict[Tensor, tuple[int, ...]], set[Tensor]]:
    """For each weight of two or more dimensions, the dimensions a column spans; and the tensors of the last layer.

    Raises:
        ValueError: the model has no list of layers.
    """
    of_embeddings: dict[Tensor, tuple[int, ...]] = {}
    of_others: dict[Tensor, tuple[int, ...]] = {}
    for module in model.modules():
        for p in (p for name, p in module.named_parameters(recurse=False) if is_weight(name, p)):
            if isinstance(module, nn.Embedding):
                of_embeddings[p] = (0,)
            else:
                of_others[p] = input_dims(module, p)
    _, after = outside_layers(model)
    tied, found = of_embeddings.keys() & of_others.keys(), of_embeddings | of_others
    return found, tied | {p for p in after if p in found}
