"""FakeTensorMode with a cheaper cache key: computing torch's keys takes most of a plan's time."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    FakeTensor,
    FakeTensorMode,
    _BypassDispatchCache,
    _CacheKeyState,
    _DispatchCacheValidEntry,
)

_DEVICE = torch.ops.prim.device.default
_GROUPED = torch.ops.aten._grouped_mm.default  # of experts
_VIEW, _UNSAFE_VIEW = torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default  # one below autograd

logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)  # what fails is told in a sentence


class _UnknownError(Exception):
    """An argument that the short key doesn't describe."""


class QuickFakeTensorMode(FakeTensorMode):
    """Does what `FakeTensorMode` does, but finds results that it has cached by a shorter key.

    The key has everything that a result can depend on if no size is symbolic: for tensors the shape, strides, dtype,
    device, offset and flags; for anything else type and value. All other operations go through torch's own code.
    """

    _known: ClassVar[
        dict[tuple[Any, ...], _DispatchCacheValidEntry]
    ] = {}  # shared by all modes, like torch's own cache

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _DEVICE and isinstance(args[0], FakeTensor):
            return args[0].fake_device
        if func is _UNSAFE_VIEW:
            func = _VIEW
        if (
            func is _GROUPED and args[0].dtype is not torch.bfloat16
        ):  # CPUs take any dtype, but torch's fake one doesn't
            with self:
                return _grouped(args[0], args[1], kwargs["offs"] if kwargs else args[2])
        described: list[Any] = [func, torch.get_default_dtype()]
        try:
            self._describe(described, args)
            if kwargs:
                self._describe(described, kwargs)
        except _UnknownError:
            return super().dispatch(func, types, args, kwargs or {})
        key = tuple(described)
        entry = self._known.get(key)
        if entry is not None:
            return self._output_from_cache_entry(None, entry, None, func, args)  # type: ignore[arg-type]
        output = super().dispatch(func, types, args, kwargs or {})
        if output is not NotImplemented:
            self._remember(key, func, args, kwargs or {})
        return output

    def _remember(self, key: tuple[Any, ...], func: Any, args: Any, kwargs: Any) -> None:
        try:
            entry = FakeTensorMode.cache.get(self._cache_key(_CacheKeyState(self.shape_env), func, args, kwargs))
        except _BypassDispatchCache:
            return
        if isinstance(entry, _DispatchCacheValidEntry):
            self._known[key] = entry

    def _describe(self, key: list[Any], values: Any) -> None:
        if isinstance(values, Mapping):
            key.append(tuple(values))
            values = values.values()
        for value in values:
            kind = type(value)
            if isinstance(value, FakeTensor):
                if value.fake_mode is not self or value.constant is not None or value.layout is not torch.strided:
                    raise _UnknownError
                key += (value.shape, value.stride(), value.dtype, value.fake_device, value.storage_offset())
                key += (value.requires_grad, value.is_conj(), value.is_neg())
            elif kind in _PLAIN:
                key += (kind, value)
            elif isinstance(value, Sequence):
                key += (kind, len(value))
                self._describe(key, value)
            else:
                raise _UnknownError


def _grouped(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    """What `torch._grouped_mm` returns: the product of each group of rows (for weights, of columns)."""
    return a.new_empty(*([len(offsets)] if b.dim() == 2 else []), a.shape[0], b.shape[-1])


_PLAIN = {int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size}
