"""AdamW on a part of a tensor: on single entries, or on groups of rows, which are updated in place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from optimizers.base import has_values
from optimizers.shared.inner import InnerAdamW
from optimizers.shared.rounding import Key
from optimizers.shared.row_groups import Cuts, rows_of

PIECE = 2**18  # entries gathered at a time: 16 bytes each in fp32

State = dict[str, Any]


def update_entries(adamw: InnerAdamW, state: State, p: Tensor, g: Tensor, group: dict[str, Any], key: Key) -> None:
    """One step of AdamW on the entries of `p` at `state["index"]` (k,), int32 positions in the flattened tensor."""
    index, flat, flat_g = state["index"], p.reshape(-1), g.reshape(-1)
    if "step" not in state:
        adamw.init_state(state, flat.index_select(0, index))
    for number, (positions, part) in enumerate(zip(index.split(PIECE), _cut(state, PIECE), strict=True)):
        # twice as fast as `take` and `put_`, and a selection needs no index of 8 bytes per entry
        entries = flat.index_select(0, positions)
        entries_of_g = flat_g.index_select(0, positions)
        adamw.update([part], [entries], [entries_of_g], group, [(*key, number)])
        del entries_of_g
        put_entries(p, positions.long(), entries)
        if not has_values(p):
            break  # the other pieces take the same bytes
    state["step"] += 1


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
            adamw.init_state(state, torch.cat(own))
        parts += _cut(state, cut[1::2])
        rows += own
        rows_of_g += rows_of(g).split(cut)[1::2]
        keys_of_parts += [(*key, number) for number in range(len(own))]
    adamw.update(parts, rows, rows_of_g, group, keys_of_parts)
    for state in states:
        state["step"] += 1


def _cut(state: State, sizes: int | list[int]) -> Iterator[State]:
    """AdamW's state split along its first dimension, each part with its own step count."""
    names = [name for name in ("exp_avg", "exp_avg_sq", "master") if name in state]
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
