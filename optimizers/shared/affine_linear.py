"""Linear modules whose trained weights are in 8 bits, as Q-GaLore's (Zhang et al., 2024, arXiv 2407.08296)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from optimizers.shared import affine
from optimizers.shared.stand_ins import StandIn, stand_ins

BITS = 8
PACKED = ("codes", "scales", "zeros")


class AffineLinear(StandIn):
    """y = x W^T + b, with W in 8 bits and trained.

    W is dequantised to the compute dtype for each product, forward and backward, and kept by neither. Its bytes are
    buffers; `weight` is still the parameter of the dense module, at which W's gradient arrives, in full. But it holds
    a single number, NaN, so that code which reads W elsewhere than here doesn't go on with other values. It isn't in
    `state_dict`, where the bytes are; a dense weight that is loaded is quantised.

    Args:
        dense: the linear module.
    """

    scales: Tensor

    def __init__(self, dense: Any):
        super().__init__(dense)
        for name, tensor in affine.quantize(dense.weight.detach(), BITS).items():
            self.register_buffer(name, tensor)
        self.weight, self.bias = dense.weight, dense.bias
        self.weight.data = _nothing(self.weight, self.weight.shape)

    def __setstate__(self, state: Any) -> None:
        """As any module's; a copy (`copy.deepcopy`) of the weight would have all of its numbers."""
        super().__setstate__(state)
        self.weight.data = _nothing(self.weight, self.weight.shape)

    @property
    def packed(self) -> affine.Packed:
        """The bytes of W in the dense module's layout, to be changed in place."""
        return {name: self._buffers[name] for name in PACKED}  # type: ignore[misc]

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        y: Tensor = _Product.apply(x, self.weight, self.bias, self)
        return y

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """W (out, in) in `dtype`."""
        weight = self.dequantized(dtype)
        return weight.t() if self._is_transposed else weight

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """W in the dense module's layout, in `dtype`."""
        return affine.dequantize(self.packed, BITS, self.weight.shape, dtype)

    def gradient(self, grad: Tensor, x: Tensor) -> Tensor:
        """Of W in the dense module's layout, from those of the outputs (n, out) of inputs (n, in)."""
        return x.t() @ grad if self._is_transposed else grad.t() @ x

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """As any module's, called by `to()`, `half()`, ...; but a cast leaves the scales in fp32."""
        shape, before = self.weight.shape, self.packed
        self.weight.data = _nothing(self.weight, torch.Size())
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in self.packed.items():
            if buffer.dtype is not before[name].dtype:
                setattr(self, name, before[name].to(buffer.device))
        self.weight.data = self.weight.data.expand(shape)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        del destination[f"{prefix}weight"]

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        own = {**state_dict, f"{prefix}weight": self.weight.data}
        dense = state_dict.get(f"{prefix}weight")
        if dense is not None and dense.shape == self.weight.shape:
            own |= {f"{prefix}{name}": tensor for name, tensor in affine.quantize(dense, BITS).items()}
        super()._load_from_state_dict(own, prefix, *args)

    def dense_weight(self) -> Tensor:
        return self.dequantized(self.weight.dtype)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, module: AffineLinear) -> Tensor:
        ctx.module = module
        ctx.save_for_backward(x if weight.requires_grad else None)
        return F.linear(x, module.matrix(x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        of_x, of_weight, of_bias, _ = ctx.needs_input_grad
        rows = _rows(grad)
        return (
            grad @ ctx.module.matrix(grad.dtype) if of_x else None,
            ctx.module.gradient(rows, _rows(x)) if of_weight else None,
            rows.sum(0) if of_bias else None,
            None,
        )


def _rows(t: Tensor) -> Tensor:
    """(..., n) as a matrix; reshape(-1, n) can't do that for n = 0."""
    return torch.atleast_2d(t).flatten(0, -2)


def _nothing(like: Tensor, shape: torch.Size) -> Tensor:
    """A tensor of NaN with the shape that it needs for gradients, and the memory of one number."""
    return torch.full((), math.nan, dtype=like.dtype, device=like.device).expand(shape)


def quantize_linears(model: nn.Module, names: Iterable[str]) -> dict[Tensor, AffineLinear]:
    """Replace the linear modules `names` by `AffineLinear`s; these, by their weights."""
    replaced: dict[Tensor, AffineLinear] = {}
    for name in names:
        module = AffineLinear(model.get_submodule(name))
        model.set_submodule(name, module)
        replaced[module.weight] = module
    return replaced


def kept_weights(model: nn.Module) -> Iterator[Tensor]:
    """The model's parameters; in place of those in 8 bits, whose values are elsewhere, the scales of their groups."""
    scales = {module.weight: module.scales for module in stand_ins(model).values() if isinstance(module, AffineLinear)}
    return (scales.get(p, p) for p in model.parameters())
