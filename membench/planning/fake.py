"""FakeTensorMode with a cache that is quick to ask and to answer: torch's own takes most of a plan's time."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager

_DEVICE = torch.ops.prim.device.default
_GROUPED = torch.ops.aten._grouped_mm.default  # of experts
_LAYER_NORM = torch.ops.aten.native_layer_norm.default
_VIEW, _UNSAFE_VIEW = torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default  # one below autograd
# of `fold` and `unfold`: their kernels make a tensor like the input, and give it another shape
_RESIZED = {torch.ops.aten.col2im.default, torch.ops.aten.im2col.default}
_META = torch.device("meta")
_BY_VALUES = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}

UNKNOWN = object()  # no output

logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)  # what fails is told in a sentence


class _UnknownError(Exception):
    """An argument that a key, or an output that an entry of the cache doesn't describe."""


class QuickFakeTensorMode(FakeTensorMode):
    """Does what `FakeTensorMode` does, but finds outputs that it has seen before in a cache of its own.

    The key has everything that an output can depend on if no size is symbolic: for tensors the shape, strides, dtype,
    device, offset and flags; for anything else type and value. All other operations go through torch's own code.

    Args:
        on_gpu: layer norm keeps its statistics in fp32, as on a GPU; see `kernels` for the rest.
    """

    _of: ClassVar[dict[bool, dict[tuple[Any, ...], _Recipe]]] = {False: {}, True: {}}  # by `on_gpu`, for all modes

    def __init__(self, *, on_gpu: bool = False) -> None:
        super().__init__()
        self._on_gpu, self._known = on_gpu, self._of[on_gpu]
        self.cache_enabled = False  # torch's own cache knows nothing that this one doesn't, and is slow to fill

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.dispatch(func, types, args, kwargs)

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
        try:
            key, tensors = self._key(func, args, kwargs)
        except _UnknownError:
            return super().dispatch(func, types, args, kwargs or {})
        recipe = self._known.get(key)
        if recipe is not None:
            return self._make(recipe, tensors)
        output = self._work_out(func, types, args, kwargs or {})
        if output is not NotImplemented and not _BY_VALUES.intersection(func.tags):
            try:
                if self._key(func, args, kwargs)[0] == key:  # no argument was reshaped
                    self._known[key] = _recipe(output, tensors)
            except _UnknownError:
                pass
        return output

    def _work_out(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        """What torch's own code says; of a view its kernel does, which takes any tensor's shape and strides."""
        if func is _LAYER_NORM and self._on_gpu:
            normalized: Any = super().dispatch(func, types, args, kwargs)
            with self:
                return (normalized[0], *(statistics.float() for statistics in normalized[1:]))
        if func in _RESIZED:
            made: Any = super().dispatch(func, types, args, kwargs)
            with self:
                return made.new_empty(max(args[0].numel(), made.numel()))[: made.numel()].view(made.shape)
        if not _is_view(func) or not isinstance(args[0], FakeTensor):
            return super().dispatch(func, types, args, kwargs)
        with in_kernel_invocation_manager(self):
            view = func(*args, **kwargs)
        return FakeTensor(self, view, args[0].fake_device)

    def recall(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The output of an operation that was seen before, or `UNKNOWN`."""
        try:
            key, tensors = self._key(_VIEW if func is _UNSAFE_VIEW else func, args, kwargs)
        except _UnknownError:
            return UNKNOWN
        recipe = self._known.get(key)
        return UNKNOWN if recipe is None else self._make(recipe, tensors)

    def _make(self, recipe: _Recipe, tensors: list[FakeTensor]) -> Any:
        if recipe.kind is None:
            return self._make_one(recipe.outputs[0], tensors)
        return recipe.kind([self._make_one(output, tensors) for output in recipe.outputs])

    def _make_one(self, output: _Output, tensors: list[FakeTensor]) -> Any:
        shape, stride, dtype, device, offset, base, attributes, plain = output
        if shape is None:
            return plain if base is None else tensors[base]
        with torch._C._DisableTorchDispatch():
            if base is None:
                inner = torch.empty_strided(shape, stride, dtype=dtype, device=_META)
            else:
                inner = torch.empty(0, dtype=dtype, device=_META)
                inner.set_(tensors[base].untyped_storage(), offset, shape, stride)
            made = Tensor._make_subclass(FakeTensor, inner, False, dispatch_device=True, device_for_backend_keys=device)
        torch._C._set_throw_on_mutable_data_ptr(made)
        made.__dict__.update(attributes)
        made.fake_mode = self
        return made

    def _key(self, func: Any, args: Any, kwargs: Any) -> tuple[tuple[Any, ...], list[FakeTensor]]:
        described: list[Any] = [func, torch.get_default_dtype()]
        tensors: list[FakeTensor] = []
        self._describe(described, tensors, args)
        if kwargs:
            described.append(tuple(kwargs))
            self._describe(described, tensors, kwargs.values())
        return tuple(described), tensors

    def _describe(self, key: list[Any], tensors: list[FakeTensor], values: Iterable[Any]) -> None:
        for value in values:
            kind = type(value)
            if kind in _PLAIN:
                key += (kind, value)
            elif kind is tuple or kind is list:
                key += (kind, len(value))
                self._describe(key, tensors, value)
            elif kind is FakeTensor or isinstance(value, FakeTensor):
                if value.fake_mode is not self or value.constant is not None or value.layout is not torch.strided:
                    raise _UnknownError
                key += (value.shape, value.stride(), value.dtype, value.fake_device, value.storage_offset())
                key += (value.requires_grad, value.is_conj(), value.is_neg())
                tensors.append(value)
            elif kind is torch.Generator:
                key.append(kind)
            else:
                raise _UnknownError


@cache
def _is_view(func: Any) -> bool:
    """Has an operation a kernel of its own that returns just a view of its first argument?"""
    returns = func._schema.returns
    composed = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")
    return func.is_view and not composed and [str(one.type) for one in returns] == ["Tensor"]


class _Output(NamedTuple):
    """A tensor to make: new, or a view of argument `base`; without a shape that argument itself, or a `plain` value."""

    shape: torch.Size | None
    stride: tuple[int, ...]
    dtype: torch.dtype | None
    device: torch.device | None
    offset: int
    base: int | None
    attributes: dict[str, Any]
    plain: int | None = None


class _Recipe(NamedTuple):
    """The outputs of an operation: a sequence of a kind, or (None) a single one."""

    kind: type | None
    outputs: list[_Output]


def _recipe(output: Any, tensors: list[FakeTensor]) -> _Recipe:
    """Raises _UnknownError if such an output can't be made again."""
    bases = {tensor.untyped_storage()._cdata: index for index, tensor in enumerate(tensors)}
    made = [one for one in (output if type(output) in (list, tuple) else [output]) if isinstance(one, Tensor)]
    new = [one.untyped_storage()._cdata for one in made if one.untyped_storage()._cdata not in bases]
    if len(new) > len(set(new)):  # two views of what is new
        raise _UnknownError
    if type(output) in (list, tuple):
        return _Recipe(type(output), [_describe_output(one, tensors, bases) for one in output])
    return _Recipe(None, [_describe_output(output, tensors, bases)])


def _describe_output(output: Any, tensors: list[FakeTensor], bases: Mapping[int, int]) -> _Output:
    same = next((index for index, tensor in enumerate(tensors) if tensor is output), None)
    if output is None or type(output) is int or same is not None:
        return _Output(None, (), None, None, 0, same, {}, None if same is not None else output)
    if type(output) is not FakeTensor or output.constant is not None or output.layout is not torch.strided:
        raise _UnknownError
    if output.requires_grad or output.is_conj() or output.is_neg():
        raise _UnknownError
    storage = output.untyped_storage()
    base, offset = bases.get(storage._cdata), int(output.storage_offset())
    if base is None and (offset or storage.nbytes() != _dense_bytes(output)):
        raise _UnknownError
    attributes = {name: value for name, value in vars(output).items() if name != "fake_mode"}
    return _Output(output.shape, output.stride(), output.dtype, output.fake_device, offset, base, attributes)


def _dense_bytes(tensor: Tensor) -> int:
    """The size of a new storage with a tensor's layout."""
    if not tensor.numel():
        return 0
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _grouped(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    """What `torch._grouped_mm` returns: the product of each group of rows (for weights, of columns)."""
    return a.new_empty(*([len(offsets)] if b.dim() == 2 else []), a.shape[0], b.shape[-1])


_PLAIN = {int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size}
