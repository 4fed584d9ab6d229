"""What a method requires of its model."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from optimizers.base import MemoryEfficientOptimizer

TRAINABLE = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_model(method: str, model: Any) -> None:
    """Refuse anything but a model, above all `model.parameters()`, which torch's own optimizers take.

    Raises:
        TypeError: says what was given and what to give.
        ValueError: a lazy module hasn't seen its first batch, or a parameter was made in inference mode.
    """
    if not isinstance(model, nn.Module):
        what = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        raise TypeError(
            f"{method} is built from a model, not from {what}: give the model, {method}(model, ...), instead of its "
            "parameters or groups (in the Trainer: membench.MethodTrainer(method=..., method_kwargs=...))"
        )
    for name, p in model.named_parameters():
        if nn.parameter.is_lazy(p):
            raise ValueError(
                f"{method} can't train {name}, which has no shape yet: run a batch through the model first"
            )
        if p.requires_grad and p.is_inference():
            raise ValueError(
                f"{method} can't train {name}, which was made in inference mode: make or load the model outside of it"
            )


def check_parameters(method: str, model: nn.Module, named: Iterable[tuple[str, Tensor]]) -> None:
    """Refuse parameters that no kernel can update in place.

    Raises:
        ValueError: names the parameter, what it is, and the way out.
    """
    sparse = {
        id(module.weight): path
        for path, module in model.named_modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse
    }
    owners: dict[int, list[tuple[int, int, str]]] = {}
    for name, p in named:
        problem = _problem(p) or (id(p) in sparse and "has sparse gradients: build its module with sparse=False")
        if problem:
            raise ValueError(f"{method} can't train {name}: it {problem}")
        if p.numel() and p.is_contiguous():
            start = int(p.storage_offset())
            owners.setdefault(p.untyped_storage()._cdata, []).append((start, start + int(p.numel()), name))
    for places in owners.values():
        places.sort()
        for (_, end, one), (start, _, other) in zip(places, places[1:], strict=False):
            if start < end:
                raise ValueError(
                    f"{method} can't train {one} and {other}: they are two parameters that share memory; tie them as "
                    "one nn.Parameter, or clone() one"
                )


def warn_of_quantized(method: str, model: nn.Module) -> None:
    """Say it if weights are held in 8 bits or fewer, as by `load_in_4bit`: they can't be trained, only what is left."""
    quantized = [(name, p.dtype) for name, p in model.named_parameters() if is_quantized(p)]
    if quantized:
        name, dtype = quantized[0]
        warnings.warn(
            f"{method} can't train {len(quantized)} quantized weights, the first being {name} ({dtype}): load the "
            "model in bfloat16 or float32 (qlora quantizes it by itself)",
            stacklevel=4,
        )


def is_quantized(p: Tensor) -> bool:
    """Is it of numbers of at most 8 bits?"""
    return p.element_size() < 2


def check_moments(method: MemoryEfficientOptimizer) -> None:
    """Refuse moments in float16, whose range is too small: squares of gradients below 2e-4 are 0, and the rate that a
    small first moment is multiplied by is infinite.

    Raises:
        ValueError: names a parameter and the way out.
    """
    for p, name in method._name_of.items():
        if p.dtype is torch.float16 and p.requires_grad and p in method._group_of:
            expected = method.expected_state(p, {})
            if any(expected[key].dtype is torch.float16 for key in ("exp_avg", "exp_avg_sq") if key in expected):
                raise ValueError(
                    f"{type(method).__name__} would keep the moments of {name} in float16, where squares of gradients "
                    "below 2e-4 are 0: cast the model to bfloat16, or give master_weights=True if the method has it"
                )


def _problem(p: Tensor) -> str | None:
    if p.layout is not torch.strided:
        return f"is a {str(p.layout).removeprefix('torch.')} tensor: make it dense"
    if p.is_complex():
        return "is complex: store its real and imaginary parts (torch.view_as_real)"
    if p.dtype not in TRAINABLE:
        return f"has dtype {p.dtype}: cast it to float32 or bfloat16"
    if _overlaps_itself(p):
        return "has entries that share memory, as after expand(): clone() it"
    return None


def _overlaps_itself(p: Tensor) -> bool:
    """Could two entries share a place in memory? Also True for a few exotic strides for which they don't."""
    reach = 0
    for stride, size in sorted(zip(p.stride(), p.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False
