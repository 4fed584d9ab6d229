"""LOMO: SGD inside the backward pass (Lv et al., ACL 2024, arXiv 2306.09782)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from optimizers.base import LOW_PRECISION, MemoryEfficientOptimizer, check_positive
from optimizers.registry import register
from optimizers.shared.masters import exact_dtype
from optimizers.shared.step_checks import check_not_updated


@register("lomo")
class LOMO(MemoryEfficientOptimizer):
    """LOMO (Algorithm 1): SGD that updates each weight as soon as its gradient exists, and frees the gradient.

    Trains everything. Keeps nothing; only one gradient exists at a time. The weights are those of SGD, and with
    clipping those of SGD after torch's `clip_grad_norm_` or `clip_grad_value_`, to the last bit (for low-precision
    weights the norm is computed in fp32, which is more exact than torch's).

    `clip_norm` takes two backward passes, so it needs `backward(loss)`: the first notes the norm of each gradient and
    frees it, the second updates. The graph is retained in between: all activations live through the first pass, in
    addition to what that pass allocates, so the peak is slightly above that of an ordinary backward pass (6 % for a
    small Llama whose activations outweigh its weights). With gradient checkpointing each pass recomputes the segments;
    both see the same dropout masks.

    Args:
        model: the model to train.
        lr: learning rate; SGD's, not Adam's. The paper uses 3e-2 and 5e-2 with `clip_norm=1.0`.
        weight_decay: w -= lr weight_decay w, on tensors of two or more dimensions, biases excepted. Without momentum,
            SGD's form and the decoupled one (the authors' package) are the same.
        clip_norm: scale all gradients by min(1, clip_norm / (norm + 1e-6)), where norm is that of all of them together.
        clip_value: limit each entry of a gradient to [-clip_value, clip_value]; one backward pass.

    Raises:
        ValueError: a value is out of range, or both `clip_norm` and `clip_value` are given.
        RuntimeError: in a second backward pass before `step()`, or in `loss.backward()` with `clip_norm`.
    """

    summary = "SGD inside the backward pass: no state, one gradient at a time"
    paper = "Lv, Yang, Liu, Gao, Guo & Qiu, ACL 2024, arXiv 2306.09782"
    trains = "everything"
    keeps = "nothing"
    excludes = "accumulation, loop clipping, fp16 scaling; clip_norm: loss.backward() instead of backward(loss)"
    example = {"lr": 0.1}

    def __init__(
        self,
        model: nn.Module,
        lr: float = 3e-2,
        weight_decay: float = 0.0,
        *,
        clip_norm: float | None = None,
        clip_value: float | None = None,
    ):
        check_positive("clip_norm", clip_norm, optional=True)
        check_positive("clip_value", clip_value, optional=True)
        if clip_norm is not None and clip_value is not None:
            raise ValueError(f"give clip_norm ({clip_norm}) or clip_value ({clip_value}), not both")
        self.clip_norm, self.clip_value = clip_norm, clip_value
        self.needs_loss = clip_norm is not None
        self._norms: dict[nn.Parameter, Tensor] | None = None  # filled by the first of the two passes
        self._coefficient: Tensor | None = None  # for the second
        super().__init__(model, {"lr": lr, "weight_decay": weight_decay}, in_backward=True)

    def backward(self, loss: Tensor) -> None:
        """Compute the gradients of `loss` and update the weights; with `clip_norm`, in two passes."""
        self.before_backward(loss)
        if self.clip_norm is None:
            loss.backward()
            return
        try:
            self._norms = {}
            loss.backward(retain_graph=True)
            self._coefficient, self._norms = self._clip_coefficient(self._norms), None
            loss.backward()
        finally:
            self._norms = self._coefficient = None

    @property
    def elementwise(self) -> bool:
        return True

    def update(self, params: list[Tensor], grads: list[Tensor], group: dict[str, Any]) -> None:
        for p, g in zip(params, grads, strict=True):
            self._clip(g)
            if group["weight_decay"]:
                _add(g, p, group["weight_decay"])
            _add(p, g, -group["lr"])

    @torch.no_grad()
    def _update_now(self, p: nn.Parameter) -> None:
        if self._norms is None:
            super()._update_now(p)
            return
        check_not_updated(self, p)
        self._norms[p] = torch.linalg.vector_norm(p.grad, dtype=exact_dtype(p))
        p.grad = None

    def _clip(self, g: Tensor) -> None:
        if self.clip_value is not None:
            g.clamp_(-self.clip_value, self.clip_value)
        elif self.clip_norm is not None:
            if self._coefficient is None:
                raise RuntimeError(
                    "LOMO clips by norm in two backward passes: call optimizer.backward(loss), not loss.backward()"
                )
            g.mul_(self._coefficient.to(g.device))

    def _clip_coefficient(self, norms: dict[nn.Parameter, Tensor]) -> Tensor:
        # added up in the model's order, as clip_grad_norm_(model.parameters()) does: it affects the last bit
        ordered = [norms[p] for p in self._requires_grad if p in norms]
        total = torch.linalg.vector_norm(torch.stack([norm.to(ordered[0].device) for norm in ordered]))
        return torch.clamp(self.clip_norm / (total + 1e-6), max=1.0)


def _add(target: Tensor, other: Tensor, scale: float) -> None:
    """target += scale other; for low precision computed in fp32 and rounded once, without a temporary."""
    if target.dtype in LOW_PRECISION:  # add_ would round the scale, a learning rate, to that precision on a CPU
        target.addcmul_(other, other.new_ones(()), value=scale)
    else:
        target.add_(other, alpha=scale)
