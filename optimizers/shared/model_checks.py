"""What a method requires of its model, and how a failed construction leaves that model."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from optimizers.shared.sharded import is_sharded

if TYPE_CHECKING:
    from optimizers.base import MemoryEfficientOptimizer

CHECKED_EVERY = 64  # steps, and after 1, 2, 4, 8, ...
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


def uncompiled(model: nn.Module) -> nn.Module:
    """The model inside a `torch.compile`d one: there its parts have their own names, and hooks are traced too."""
    inner: Any = getattr(model, "_orig_mod", model)
    return inner


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


def check_unchanged(method: MemoryEfficientOptimizer) -> None:
    """Refuse to update a model that was changed since the method was built: a part of it would never be trained.

    Of a sharded model nothing is checked, since its whole parameters come and go. To go through all modules takes as
    long as to update the adapters in them, so that is done where a parameter came to require gradients, ceased to or
    has another dtype, where no gradient reached any, and now and then.

    Raises:
        RuntimeError: names a parameter, what is wrong with it, and the way out.
        ValueError: it was cast to float16, and the method would keep second moments in that.
    """
    steps = method._steps_done
    seen = [p.dtype if p.requires_grad else None for p in method._requires_grad]
    reached = method.asks_losses or any(p.grad is not None for p in method._group_of)
    if reached and seen == method._seen and steps & (steps - 1) and steps % CHECKED_EVERY:
        return
    if any(map(is_sharded, method._group_of)):
        return
    check_moments(method)
    trained = method._group_of if method._chosen is None else method._chosen
    for name, p in method.model.named_parameters():
        if p.requires_grad:
            problem = _changed_dtype(method, p) if p in trained else _untrained(method, p)
            if problem:
                raise RuntimeError(f"{type(method).__name__} can't go on: {name} {problem}")
    method._seen = seen  # only now: what was refused is refused again


def _untrained(method: MemoryEfficientOptimizer, p: nn.Parameter) -> str:
    if p in method._group_of:
        return f"requires gradients, but {method.selection} is being trained: leave requires_grad alone until finish()"
    if p in method._requires_grad:
        return "requires gradients, but didn't when it was built: unfreeze it before, or finish() and build another"
    return (
        "came into the model after it was built (by a new module, resize_token_embeddings or "
        "load_state_dict(assign=True)), so it isn't trained: finish() and build another"
    )


def _changed_dtype(method: MemoryEfficientOptimizer, p: nn.Parameter) -> str | None:
    before = method._dtypes.get(p, p.dtype)
    if before is not p.dtype and method.state.get(p):
        return f"has become {p.dtype}, while what is kept for it is for {before}: cast the model before building it"
    method._dtypes[p] = p.dtype
    return None


def follow_modes(model: nn.Module, known: Collection[nn.Module]) -> None:
    """Modules that aren't `known` train or evaluate as the module that they are in: a new one trains, and its dropout
    would act in a model that evaluates."""
    for module in model.modules():  # from the outside in
        for child in module.children():
            if child not in known:
                child.training = module.training


@contextmanager
def restored_on_error(model: nn.Module) -> Iterator[None]:
    """If the body raises, restore the model's modules and parameters: parts, hooks, flags, gradients."""
    modules = [(module, vars(module).copy(), _contents(module)) for module in model.modules()]
    parameters = [(p, _attributes(p)) for p in model.parameters()]
    try:
        yield
    except BaseException:
        for module, attributes, contents in modules:
            vars(module).clear()
            vars(module).update(attributes)
            for name, items in contents.items():  # in place: handles of hooks refer to the dict
                attributes[name].clear()
                attributes[name].update(items)
        for p, attributes in parameters:
            _restore(p, attributes)
        raise


def _contents(module: nn.Module) -> dict[str, dict[Any, Any]]:
    return {name: value.copy() for name, value in vars(module).items() if isinstance(value, dict)}


def _attributes(p: nn.Parameter) -> dict[str, Any]:
    hooks = p._post_accumulate_grad_hooks
    return {
        "data": p.data,
        "requires_grad": p.requires_grad,
        "grad": p.grad,
        "grad_dtype": p.grad_dtype,
        "hooks": None if hooks is None else dict(hooks),
    }


def _restore(p: nn.Parameter, before: dict[str, Any]) -> None:
    p.data = before["data"]
    p.requires_grad_(before["requires_grad"])
    p.grad = None  # grad_dtype can't be set while there is a gradient of another dtype
    p.grad_dtype = before["grad_dtype"]
    p.grad = before["grad"]
    hooks = p._post_accumulate_grad_hooks
    if hooks is not None:
        hooks.clear()
        hooks.update(before["hooks"] or {})
