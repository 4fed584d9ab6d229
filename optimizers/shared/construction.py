"""How a method is built: alone on its model, which is checked first, and left as it was if that fails."""

from __future__ import annotations

import functools
import gc
import inspect
import warnings
import weakref
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from optimizers.shared import ranks, sharded
from optimizers.shared.loop_guards import watch
from optimizers.shared.model_checks import check_model, check_moments, warn_of_quantized
from optimizers.shared.values import check_kinds

if TYPE_CHECKING:
    from optimizers.base import MemoryEfficientOptimizer

COMPILED = (
    "torch.compile makes a graph of the whole model for each choice of what {name} trains, and gives up after 8: if "
    "it trains whole layers, compile each layer (`for layer in layers: layer.compile()`, 3 graphs); otherwise don't"
)

ELEMENTWISE = ("A_log", "D")  # of Mamba's mixer, by channel and state, and of several heads together

_built: weakref.WeakSet[MemoryEfficientOptimizer] = weakref.WeakSet()  # to notice two on one model


def guard_construction(init: Callable[..., None]) -> Callable[..., None]:
    """The constructor `init`, with the model checked first, and restored if `init` raises."""

    defaults = {name: one.default for name, one in inspect.signature(init).parameters.items()}

    @functools.wraps(init)
    def guarded(self: MemoryEfficientOptimizer, *args: Any, **given: Any) -> None:
        if type(self).__init__ is not guarded or not (args or "model" in given):  # called by a subclass's
            return init(self, *args, **given)
        model, *others = args or (given.pop("model"),)
        check_model(type(self).__name__, model)
        check_kinds(given, defaults)
        plain = uncompiled(ranks.unwrapped(uncompiled(model)))
        sharded.reshard(plain)
        known = set(plain.modules())
        with restored_on_error(plain):
            init(self, plain, *others, **given)
            follow_modes(plain, known)
            _check_alone(self)
            check_moments(self)
        _warn_of_frozen(self)
        warn_of_quantized(type(self).__name__, plain)
        _built.add(self)
        if uncompiled(model) is not model and self.chooses and not self.asks_losses:
            warnings.warn(COMPILED.format(name=type(self).__name__), stacklevel=2)
        if self.in_backward or self.needs_loss:
            watch(self)

    return guarded


def is_weight(name: str, p: Tensor) -> bool:
    """Is it multiplied with what passes through: has it two or more dimensions, and isn't it a bias of as many?

    Experts and heads have theirs in one tensor (GPT-OSS's `down_proj_bias`, XLNet's `r_w_bias`).

    Args:
        name: of the parameter, perhaps with its modules'.
        p: the parameter.
    """
    own = name.rpartition(".")[2]
    return p.dim() >= 2 and own not in ELEMENTWISE and "bias" not in own.split("_")


def uncompiled(model: nn.Module) -> nn.Module:
    """The model inside a `torch.compile`d one: there its parts have their own names, and hooks are traced too."""
    inner: Any = getattr(model, "_orig_mod", model)
    return inner


def _check_alone(method: MemoryEfficientOptimizer) -> None:
    def others() -> list[str]:
        trained = method._group_of.keys()
        return [type(one).__name__ for one in _built if not one._finished and trained & one._group_of.keys()]

    if others():
        gc.collect()  # one that nobody holds any more doesn't count
        for name in others():
            raise ValueError(f"{type(method).__name__}: {name} is training this model: call its finish() first")


def mark_frozen(before: dict[nn.Parameter, bool], name: str) -> None:
    """When a method of this name is gone without `finish()`: mark what it leaves frozen. `before`: as it found it."""
    for p, requires_grad in before.items():
        if requires_grad and not p.requires_grad:
            p._left_frozen_by = name  # type: ignore[attr-defined]


def _warn_of_frozen(method: MemoryEfficientOptimizer) -> None:
    """Say it, once, if a method that nobody holds any more has left a part of the model frozen."""
    marked = {p: vars(p).pop("_left_frozen_by") for p in method._requires_grad if "_left_frozen_by" in vars(p)}
    left = [p for p in marked if not method._requires_grad[p]]
    if left:
        warnings.warn(
            f"{type(method).__name__} won't train {len(left)} parameters, the first being {method._name_of[left[0]]}: "
            f"{marked[left[0]]}, which was dropped without finish(), left them frozen; call finish() on each method, "
            "or model.requires_grad_(True) before building the next",
            stacklevel=3,
        )


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
