"""Updates shared by several methods: torch's own fused kernels, and fp32 masters of low-precision weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from optimizers.base import LOW_PRECISION
from optimizers.shared.quantized import PIECE_ON_GPU

MOMENTS = ("exp_avg", "exp_avg_sq")


def adamw_update(
    states: list[dict[str, Any]], params: list[Tensor], grads: list[Tensor], group: dict[str, Any], master_weights: bool
) -> None:
    """One step of AdamW (Loshchilov & Hutter, 2019, arXiv 1711.05101, Algorithm 2) on each of `params`, in place.

    Args:
        states: one per parameter; filled at its first step with `step`, `exp_avg`, `exp_avg_sq` and, for a
            low-precision parameter with `master_weights`, `master` (the moments are then fp32 as well).
        params: the weights.
        grads: their gradients, of the same shapes.
        group: gives `lr`, `betas`, `eps`, `weight_decay`.
        master_weights: keep fp32 moments and an fp32 master of low-precision weights.
    """
    for state, p in zip(states, params, strict=True):
        if "step" not in state:
            init_adam_state(state, p, master_weights)
    update_through_masters(_adamw_kernel, states, params, grads, group)


def init_adam_state(state: dict[str, Any], p: Tensor, master_weights: bool) -> None:
    """Zero moments for `p` and, with `master_weights` and a low-precision `p`, its fp32 master."""
    weight = p
    if master_weights and p.dtype in LOW_PRECISION:
        weight = state["master"] = p.detach().to(torch.float32, copy=True)
    state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
    state["exp_avg"] = torch.zeros_like(weight)
    state["exp_avg_sq"] = torch.zeros_like(weight)


def bias_correction(group: dict[str, Any], step: int | Tensor) -> Any:
    """What Adam multiplies m / sqrt(v) by at step `step`, counted from 1: a number, or a tensor in fp64."""
    beta1, beta2 = group["betas"]
    step = step.double() if torch.is_tensor(step) else step
    return (1.0 - beta2**step) ** 0.5 / (1.0 - beta1**step)


def decayed(p: Tensor, group: dict[str, Any]) -> Iterator[tuple[Tensor, Any]]:
    """`p` less its weight decay, to be updated in place by the loop's body: pieces, and where in `p` they are.

    Low-precision weights come as fp32 copies of some rows, written back afterwards, so that decay and step are rounded
    together. Alone, a decay of lr weight_decay < 2 ** -9 would leave each weight in bf16 as it is, whatever the step.
    """
    if not group["weight_decay"]:
        yield p, ...
        return
    kept = 1.0 - group["lr"] * group["weight_decay"]
    if p.dtype not in LOW_PRECISION:
        yield p.mul_(kept), ...
        return
    for place in _pieces(p):
        exact = p[place].float().mul_(kept)
        yield exact, place
        p[place] = exact


def _pieces(p: Tensor) -> list[Any]:
    """Places of some rows each; the loop holds a piece while the next one is made."""
    if not p.dim():
        return [...]
    rows = max(1, PIECE_ON_GPU // 2 * len(p) // max(1, p.numel()))
    return [slice(start, start + rows) for start in range(0, len(p), rows)]


def expected_adam_state(p: Tensor, master_weights: bool, *shape: int) -> dict[str, Any]:
    """What `adamw_update` keeps for a tensor like `p`, possibly of another shape; as meta tensors."""
    state: dict[str, Any] = {}
    init_adam_state(state, torch.empty(shape or p.shape, dtype=p.dtype, device="meta"), master_weights)
    return state


def expected_sgd_state(p: Tensor, saved: dict[str, Any], master_weights: bool) -> dict[str, Any]:
    """What `sgd_update` keeps for a tensor like `p`, with momentum if `saved` was; as meta tensors."""
    low = master_weights and p.dtype in LOW_PRECISION
    weight = torch.empty(p.shape, dtype=torch.float32 if low else p.dtype, device="meta")
    names = (["master"] if low else []) + (["momentum_buffer"] if "momentum_buffer" in saved else [])
    return dict.fromkeys(names, weight)


def sgd_update(
    states: list[dict[str, Any]], params: list[Tensor], grads: list[Tensor], group: dict[str, Any], master_weights: bool
) -> None:
    """One step of SGD on each of `params`, in place; with `momentum` in the group, keeps a `momentum_buffer`."""
    for state, p in zip(states, params, strict=True):
        if master_weights and p.dtype in LOW_PRECISION and "master" not in state:
            state["master"] = p.detach().to(torch.float32, copy=True)
    update_through_masters(_sgd_kernel, states, params, grads, group)


Kernel = Callable[[list[dict[str, Any]], list[Tensor], list[Tensor], dict[str, Any]], None]


def update_through_masters(
    kernel: Kernel, states: list[dict[str, Any]], params: list[Tensor], grads: list[Tensor], group: dict[str, Any]
) -> None:
    """Run `kernel` once for the plain parameters, and one by one for those whose gradient must be cast first.

    A list of casts would hold a copy of all gradients at once.
    """
    plain = [i for i, s in enumerate(states) if "master" not in s and grads[i].dtype == params[i].dtype]
    if len(plain) == len(params):
        kernel(states, params, grads, group)
        return
    if plain:
        kernel([states[i] for i in plain], [params[i] for i in plain], [grads[i] for i in plain], group)
    for i in sorted(set(range(len(params))) - set(plain)):
        weight = states[i].get("master", params[i])
        kernel([states[i]], [weight], [grads[i].to(weight.dtype)], group)
        if weight is not params[i]:
            params[i].copy_(weight)


def _adamw_kernel(
    states: list[dict[str, Any]], weights: list[Tensor], grads: list[Tensor], group: dict[str, Any]
) -> None:
    odd = _laid_out_unlike([weights, grads, *([s[name] for s in states] for name in MOMENTS)])
    for i in odd:
        _update_contiguous(_adamw_kernel, states[i], weights[i], grads[i], group)
    if odd:
        alike = [i for i in range(len(weights)) if i not in odd]
        states, weights, grads = [states[i] for i in alike], [weights[i] for i in alike], [grads[i] for i in alike]
    if not weights:
        return
    adamw(
        weights,
        grads,
        [s["exp_avg"] for s in states],
        [s["exp_avg_sq"] for s in states],
        [],
        [s["step"] for s in states],
        fused=True,
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )


def _laid_out_unlike(lists: list[list[Tensor]]) -> set[int]:
    """The places at which the tensors of these lists lie differently in memory, or with gaps.

    Torch's fused kernels go through memory from the first entry, whatever the strides: they would pair each weight with
    the gradient and moments of others. Layouts come to differ by `to(memory_format=...)`, by a state that was loaded,
    or where a gradient was set by hand.
    """
    if all(all(map(Tensor.is_contiguous, tensors)) for tensors in lists):
        return set()
    return {i for i, tensors in enumerate(zip(*lists, strict=True)) if not _alike(tensors)}


def _alike(tensors: tuple[Tensor, ...]) -> bool:
    if all(map(Tensor.is_contiguous, tensors)):
        return True
    first = tensors[0]
    return len({t.stride() for t in tensors}) == 1 and torch.empty_like(first, device="meta").stride() == first.stride()


def _update_contiguous(kernel: Kernel, state: dict[str, Any], weight: Tensor, g: Tensor, group: dict[str, Any]) -> None:
    """Run `kernel` on contiguous copies, and write back what it changes."""
    kept = {name: state[name].contiguous() for name in MOMENTS}
    copy = weight.contiguous()
    kernel([{**state, **kept}], [copy], [g.contiguous()], group)
    weight.copy_(copy)
    for name, values in kept.items():
        state[name].copy_(values)


def _sgd_kernel(
    states: list[dict[str, Any]], weights: list[Tensor], grads: list[Tensor], group: dict[str, Any]
) -> None:
    momentum = group.get("momentum", 0.0)
    for state, weight in zip(states, weights, strict=True) if momentum else ():
        if "momentum_buffer" not in state:  # torch's fused kernel takes a list of all buffers or none
            state["momentum_buffer"] = torch.zeros_like(weight)
    kept: list[Tensor] = [state["momentum_buffer"] for state in states] if momentum else []
    sgd(
        weights,
        grads,
        [*kept] or [None] * len(weights),
        # On a CPU torch 2.13's fused SGD is no faster, and leaves most entries of a low-precision tensor unchanged;
        # `foreach` would hold a copy of all gradients when there is weight decay.
        foreach=False,
        fused=weights[0].is_cuda and not _laid_out_unlike([weights, grads, *([kept] if momentum else [])]),
        weight_decay=group["weight_decay"],
        momentum=momentum,
        lr=group["lr"],
        dampening=0.0,
        nesterov=False,
        maximize=False,
    )
