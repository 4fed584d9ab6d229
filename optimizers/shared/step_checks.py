"""What is checked at each step, and refused with the way out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from optimizers.shared import saved_states
from optimizers.shared.masters import LOW_PRECISION
from optimizers.shared.model_checks import check_moments
from optimizers.shared.sharded import has_values, is_sharded

if TYPE_CHECKING:
    from optimizers.base import MemoryEfficientOptimizer

CHECKED_EVERY = 64  # steps, and after 1, 2, 4, 8, ...


def check_unchanged(method: MemoryEfficientOptimizer) -> None:
    """Refuse to update a model that was changed since the method was built: a part of it would never be trained.

    Of a sharded model nothing is checked, since its whole parameters come and go. To go through all modules takes as
    long as to update the adapters in them, so that is done where a parameter came to require gradients, ceased to or
    has another dtype, where no gradient reached any, and now and then.

    Raises:
        RuntimeError: names a parameter, what is wrong with it, and the way out.
        ValueError: it was cast to float16, and the method would keep second moments in that.
    """
    if sum(len(group["params"]) for group in method.param_groups) > len(method._group_of):
        raise RuntimeError(
            f"{type(method).__name__} can't go on: there are parameters in its groups that it wasn't built with, and "
            "it trains what its model had then: finish() it and build another, on a model that has them"
        )
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
    if method._fp32_gradients and p.dtype in LOW_PRECISION and p.grad_dtype is not torch.float32:
        return f"has become {p.dtype} since it was built, so its gradients aren't in fp32: cast the model before"
    before = method._dtypes.get(p, p.dtype)
    if before is not p.dtype and method.state.get(p):
        return f"has become {p.dtype}, while what is kept for it is for {before}: cast the model before building it"
    method._dtypes[p] = p.dtype
    return None


def check_used(method: MemoryEfficientOptimizer) -> None:
    """With `in_backward`: refuse gradients that no backward pass has brought, as of `torch.autograd.grad` (at a rate of
    0 they change nothing: torch.distributed.checkpoint makes such a step), and what was set since the backward pass."""
    left = any(p.grad is not None and p.requires_grad for p in method._group_of)
    if left and any(group["lr"] for group in method.param_groups):
        raise RuntimeError(
            f"{type(method).__name__} updates inside the backward pass, so a p.grad that was set by hand is never "
            "used: call optimizer.backward(loss), or use in_backward=False if the method has it"
        )
    if method._updated:
        for used, now in zip(method._used, hyperparameters(method), strict=False):
            _check_not_late(type(method).__name__, used, now)


def _check_not_late(name: str, used: dict[str, Any], now: dict[str, Any]) -> None:
    late = [key for key, value in used.items() if key in now and now[key] != value]
    if late:
        raise RuntimeError(
            f"{name} updates inside the backward pass, and has done so with {late[0]}={used[late[0]]}, so "
            f"{now[late[0]]} comes too late for this step: set it before the backward pass, or after step()"
        )


def hyperparameters(method: MemoryEfficientOptimizer) -> list[dict[str, Any]]:
    """Those of each group, as they are now: a rate that is a tensor is changed in place."""
    kept = [{key: group[key] for key in method.defaults if key in group} for group in method.param_groups]
    return [{key: value.item() if torch.is_tensor(value) else value for key, value in one.items()} for one in kept]


def check_not_updated(method: MemoryEfficientOptimizer, p: nn.Parameter) -> None:
    """With `in_backward`: refuse a second gradient in one step."""
    if p in method._updated:
        raise RuntimeError(
            f"{type(method).__name__} updates inside the backward pass, so gradients can't be accumulated over "
            "several backward passes: call step() after each, or use in_backward=False if the method has it"
        )


def check_dense(method: MemoryEfficientOptimizer, pairs: list[tuple[nn.Parameter, Tensor]]) -> None:
    """Refuse sparse gradients, as of `nn.Embedding(sparse=True)`."""
    for p, grad in pairs:
        if grad.layout is not torch.strided:
            name = next((name for name, other in method.model.named_parameters() if other is p), "a parameter")
            raise ValueError(f"{type(method).__name__} can't use the sparse gradient of {name}: make it dense")


def check_not_rehearsed(method: MemoryEfficientOptimizer) -> None:
    """Refuse the way torch.distributed.checkpoint creates state: a step with zero gradients at a rate of 0."""
    grads = [p.grad for p in method.trainable if p.grad is not None]
    rates = [group["lr"] for group in method.param_groups]
    if not grads or any(rates) or not has_values(grads[0]) or any(grad.any() for grad in grads):
        return
    raise RuntimeError(
        f"a step with zero gradients at a learning rate of 0 would count as a step of {type(method).__name__}: "
        f"{saved_states.HOW_TO_SAVE}"
    )
