"""Stop a loop that would clip gradients which are already freed, or scale a loss that a method must see as it is.

Torch has no hook for either. So once a method is built that updates inside the backward pass or must see the loss, or
has replicas, torch's functions for clipping gradients and scaling losses are wrapped. They change only for what such a
method trains.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.nn.utils import clip_grad

if TYPE_CHECKING:
    from optimizers.base import MemoryEfficientOptimizer

CLIPPERS = (
    (clip_grad, "_clip_grads_with_norm_"),  # clip_grad_norm_ calls it, under whatever name that was imported
    (torch.nn.utils, "clip_grads_with_norm_"),
    (clip_grad, "clip_grad_value_"),
    (torch.nn.utils, "clip_grad_value_"),
)
MARK = "_refuses_for_memory_efficient_methods"

_methods: WeakSet[MemoryEfficientOptimizer] = WeakSet()


def watch(method: MemoryEfficientOptimizer) -> None:
    """From now on, refuse to clip what `method` updates inside the backward pass or hasn't averaged over replicas, and
    to scale a loss that it must see."""
    _methods.add(method)
    for module, name in CLIPPERS:
        _wrap(module, name, _clipping)
    for scaler in _with_subclasses(torch.amp.GradScaler):
        if "scale" in vars(scaler):
            _wrap(scaler, "scale", _scaling)


def _wrap(owner: Any, name: str, wrapper: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    function = getattr(owner, name)
    if not hasattr(function, MARK):
        wrapped = wrapper(function)
        setattr(wrapped, MARK, True)
        setattr(owner, name, wrapped)


def _with_subclasses(cls: Any) -> Iterator[Any]:
    yield cls
    for subclass in cls.__subclasses__():
        yield from _with_subclasses(subclass)


def _clipping(clip: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(clip)
    def clip_unless_gone(parameters: Tensor | Iterable[Tensor], *args: Any, **given: Any) -> Any:
        parameters = [parameters] if torch.is_tensor(parameters) else list(parameters)
        limit = next(iter(args), given.get("max_norm", given.get("clip_value", 0.0)))
        for method in _methods if limit < math.inf else ():  # otherwise only the norm is wanted
            if method.in_backward and _owns(method, parameters):
                raise ValueError(
                    f"{type(method).__name__} updates inside the backward pass and leaves no gradients to clip: "
                    "don't clip in the loop (in the Trainer max_grad_norm=0; LOMO clips by itself: clip_norm), or use "
                    "in_backward=False"
                )
            if method._replicas is not None and not method._averaged and _owns(method, parameters):
                raise ValueError(
                    f"the gradients that {type(method).__name__} would clip are not yet averaged over the "
                    "replicas: call optimizer.average_gradients() before clipping"
                )
        return clip(parameters, *args, **given)

    return clip_unless_gone


def _owns(method: MemoryEfficientOptimizer, parameters: Iterable[Tensor]) -> bool:
    return not method._finished and any(p in method._group_of for p in parameters)


def _scaling(scale: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(scale)
    def scale_unless_seen(self: torch.amp.GradScaler, outputs: Any) -> Any:
        watched = _methods if self.is_enabled() else ()
        methods = [m for m in watched if not m._finished and (m.in_backward or m.needs_loss)]
        if methods:
            outputs = outputs if torch.is_tensor(outputs) or isinstance(outputs, list | tuple) else list(outputs)
            for p in leaves_of([outputs] if torch.is_tensor(outputs) else outputs):
                for method in methods:
                    if p in method._group_of:
                        why = "updates inside the backward pass" if method.in_backward else "must see the loss itself"
                        raise ValueError(
                            f"{type(method).__name__} {why}, so its loss can't be scaled by a GradScaler: train in "
                            "bfloat16 instead of float16"
                        )
        return scale(self, outputs)

    return scale_unless_seen


def leaves_of(outputs: Iterable[Any]) -> Iterator[Tensor]:
    """The leaves of the graph of `outputs`."""
    waiting = [output.grad_fn for output in outputs if torch.is_tensor(output)]
    seen = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        waiting += [following for following, _ in node.next_functions]
