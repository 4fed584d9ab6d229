"""Linear modules with frozen NF4 weights: the base of QLoRA (Dettmers et al., 2023, arXiv 2305.14314)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from optimizers.shared import nf4
from optimizers.shared.stand_ins import StandIn


class NF4Linear(StandIn):
    """y = x W^T + b, with W in NF4.

    W is dequantised to the compute dtype for each product, forward and backward, and kept by neither: autograd keeps
    only the input's gradient function. The bytes of W are buffers, so they are in `state_dict` and move with the
    model; a cast of the model is of the values that they stand for, never of their magnitudes.

    Args:
        dense: the module, which must be frozen. Its weight is empty until `restore`.
        double: double quantisation.
        kernels: of `nf4.KERNELS`: what dequantises W.
    """

    def __init__(self, dense: Any, *, double: bool, kernels: str = "torch"):
        super().__init__(dense)
        self._kernels = kernels
        self._shape, self._dtype = dense.weight.shape, dense.weight.dtype
        self.bias = dense.bias
        for name, tensor in nf4.quantize(dense.weight, double=double).items():
            self.register_buffer(name, tensor)
        dense.weight.data = dense.weight.new_empty(0)

    @property
    def weight(self) -> Tensor:
        """W in the dense module's layout, dequantised on each access."""
        return self._restored(self._dtype)

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        y: Tensor = _Product.apply(x, self)
        return y

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """W (out, in) in `dtype`."""
        weight = self._restored(dtype)
        return weight.t() if self._is_transposed else weight

    def _restored(self, dtype: torch.dtype) -> Tensor:
        return nf4.dequantize(dict(self.named_buffers()), self._shape, dtype, self._kernels)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """As any module's, called by `to()`, `half()`, ...; but a cast leaves the magnitudes in fp32."""
        before = dict(self.named_buffers())
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in self.named_buffers():
            if buffer.dtype is not before[name].dtype:
                setattr(self, name, before[name].to(buffer.device))
        self._dtype = fn(torch.empty(0, dtype=self._dtype, device=next(self.buffers()).device)).dtype
        return self

    def dense_weight(self) -> Tensor:
        return self.weight


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, module: NF4Linear) -> Tensor:
        ctx.module = module  # not `save_for_backward`: code that offloads activations must leave weights where they are
        return F.linear(x, module.matrix(x.dtype), module.bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad @ ctx.module.matrix(grad.dtype), None


def quantize_linears(model: nn.Module, names: Iterable[str], *, double: bool, kernels: str = "torch") -> None:
    """Replace the linear modules `names` by `NF4Linear`s; if peft adapted one, replace its base."""
    for name in names:
        module: Any = model.get_submodule(name)
        path, _, attribute = name.rpartition(".")
        owner = model.get_submodule(path)
        if "base_layer" in dict(module.named_children()):
            owner, attribute, module = module, "base_layer", module.base_layer
        setattr(owner, attribute, NF4Linear(module, double=double, kernels=kernels))
