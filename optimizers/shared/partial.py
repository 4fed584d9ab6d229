"""AdamW on a part of a tensor: on single entries, gathered or marked, or on groups of rows updated in place."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from optimizers.base import LOW_PRECISION
from optimizers.shared.inner import InnerAdamW
from optimizers.shared.rounding import Key
from optimizers.shared.row_groups import Cuts, rows_of
from optimizers.shared.sharded import has_values

PIECE = 2**18  # entries gathered at a time: 16 bytes each in fp32

State = dict[str, Any]

_LEAST_DECAY = 1e-30  # of a second moment: at 0, infinite ones would become NaN

_PER_ENTRY = ("exp_avg", "exp_avg_sq", "master")  # of AdamW's state, what has a value for each entry


def update_entries(adamw: InnerAdamW, state: State, p: Tensor, g: Tensor, group: dict[str, Any], key: Key) -> None:
    """One step of AdamW on the entries of `p` at `state["index"]` (k,), int32 positions in the flattened tensor."""
    index, flat, flat_g = state["index"], p.reshape(-1), g.reshape(-1)
    if "step" not in state:
        adamw.init_state(state, flat.index_select(0, index))
    for number, start in enumerate(range(0, len(index), PIECE)):
        positions, part = index[start : start + PIECE], _piece(state, start)
        # twice as fast as `take` and `put_`, and a selection needs no index of 8 bytes per entry
        entries = flat.index_select(0, positions)
        entries_of_g = flat_g.index_select(0, positions)
        adamw.update([part], [entries], [entries_of_g], group, [(*key, number)])
        del entries_of_g
        put_entries(p, positions.long(), entries)
        if not has_values(p):
            break  # the other pieces take the same bytes
    state["step"] += 1


def marks_are_smaller(adamw: InnerAdamW, tensors: list[Tensor], count: int) -> bool:
    """To train `count` entries of `tensors`, does it take less memory to mark them than to keep their positions?

    Never where each weight's last bits matter to the kernel that decays it: see `update_marked`.
    """
    if adamw.stochastic_rounding or not all(p.is_contiguous() for p in tensors):
        return False
    if not adamw.master_weights and any(p.dtype in LOW_PRECISION for p in tensors):
        return False
    per_weight = sum(value.element_size() for value in adamw.expected_state(tensors[0]).values() if value.dim())
    return per_weight * sum(p.numel() for p in tensors) < (per_weight + 4) * count


def marked_state(adamw: InnerAdamW, p: Tensor, positions: Tensor) -> State:
    """AdamW's state of the whole of `p`, with marks for the entries (k,), int32, that are trained.

    The second moment of any other entry is infinite, and remains so: then Adam moves it by m / inf, exactly nothing.
    """
    state: State = {}
    adamw.init_state(state, p)
    flat = state["exp_avg_sq"].fill_(math.inf).view(-1)
    for piece in positions.split(PIECE):
        flat.index_fill_(0, piece.long(), 0.0)
        if not has_values(p):
            break  # the other pieces take the same bytes
    return state


def update_marked(
    adamw: InnerAdamW, states: list[State], params: list[Tensor], grads: list[Tensor], group: dict[str, Any]
) -> None:
    """One step of AdamW on the entries of each of `params` that are marked by a finite second moment."""
    share = float(group["lr"]) * group["weight_decay"]
    for state, p in zip(states, params, strict=True) if share else ():
        _decay_marked(state.get("master", p), state["exp_avg_sq"], share)
    betas = (group["betas"][0], max(group["betas"][1], _LEAST_DECAY))
    adamw.update(states, params, grads, {**group, "betas": betas, "weight_decay": 0.0}, [])


def _decay_marked(weight: Tensor, moment: Tensor, share: float) -> None:
    """Take `share` of them from the entries of `weight` with a finite `moment`; without booleans, which are slow."""
    if not (weight.is_contiguous() and moment.is_contiguous()):
        weight.addcmul_(weight, moment.isfinite().to(weight.dtype), value=-share)
        return
    buffer = torch.empty(min(PIECE, weight.numel()), dtype=weight.dtype, device=weight.device)
    flat, flat_moment = weight.view(-1), moment.view(-1)
    for start in range(0, len(flat), PIECE):
        entries, moments = flat[start : start + PIECE], flat_moment[start : start + PIECE]
        marks = torch.lt(moments, math.inf, out=buffer[: len(entries)])
        entries.addcmul_(entries, marks, value=-share)
        if not has_values(weight):
            break  # the other pieces take nothing more


def update_rows(
    adamw: InnerAdamW,
    states: list[State],
    params: list[Tensor],
    grads: list[Tensor],
    cuts: list[Cuts],
    group: dict[str, Any],
    keys: Sequence[Key],
) -> None:
    """One step of AdamW on some rows of each of `params`: on views, so nothing is gathered or copied back."""
    parts: list[State] = []
    rows: list[Tensor] = []
    rows_of_g: list[Tensor] = []
    keys_of_parts: list[Key] = []
    for state, p, g, cut, key in zip(states, params, grads, cuts, keys, strict=True):
        own = rows_of(p).split(cut)[1::2]
        if "step" not in state:
            adamw.init_state(state, trained_rows(p, cut))
        parts += _cut(state, cut[1::2])
        rows += own
        rows_of_g += rows_of(g).split(cut)[1::2]
        keys_of_parts += [(*key, number) for number in range(len(own))]
    adamw.update(parts, rows, rows_of_g, group, keys_of_parts)
    for state in states:
        state["step"] += 1


def trained_rows(p: Tensor, cut: Cuts) -> Tensor:
    """A copy of the rows of `p` that are trained."""
    return torch.cat(rows_of(p).split(cut)[1::2])


def _piece(state: State, start: int) -> State:
    """AdamW's state of the `PIECE` entries from `start`, with its own step count."""
    step = state["step"]
    own_step = step.clone() if torch.is_tensor(step) else step
    return {"step": own_step, **{name: state[name][start : start + PIECE] for name in _PER_ENTRY if name in state}}


def _cut(state: State, sizes: list[int]) -> Iterator[State]:
    """AdamW's state split along its first dimension, each part with its own step count."""
    names = [name for name in _PER_ENTRY if name in state]
    parts = list(zip(*(state[name].split(sizes) for name in names), strict=True))
    step = state["step"]
    steps = step.repeat(len(parts)).unbind() if torch.is_tensor(step) else [step] * len(parts)
    for own_step, views in zip(steps, parts, strict=True):
        yield {"step": own_step, **dict(zip(names, views, strict=True))}


def put_entries(p: Tensor, index: Tensor, entries: Tensor) -> None:
    """Write `entries` (k,) to the positions `index` (k,), int64 and distinct, of the flattened `p`."""
    if p.is_contiguous():
        p.view(-1).scatter_(0, index, entries)
    else:
        p.put_(index, entries)
