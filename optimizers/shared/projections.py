"""GaLore's projections of a matrix: of which sides, there and back, and how they are stored, in full or quantised."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from optimizers.shared import affine
from optimizers.shared.quantized import PIECE_ON_GPU, pieces
from optimizers.shared.rounding import write
from optimizers.shared.sharded import has_values

SIDES = ("left", "right")
State = dict[str, Any]
COSINES, STABLE = 5, 0.4  # a subspace counts as stable if its newest cosines, this many, have at least this mean


def sides(projection: str, rows: int, columns: int) -> tuple[bool, bool]:
    """Which sides of a matrix are projected: (left, right)."""
    if projection == "std":
        return rows < columns, rows >= columns
    if projection == "reverse_std":
        return rows >= columns, rows < columns
    return projection in ("left", "full"), projection in ("right", "full")


def project(g: Tensor, subspace: Mapping[str, Tensor]) -> Tensor:
    """G (m, n) in the subspace: (r, n), (m, r) or (r, r)."""
    if "left" in subspace:
        g = subspace["left"].t() @ g
    return g @ subspace["right"].t() if "right" in subspace else g


def add_back(p: Tensor, step: Tensor, subspace: Mapping[str, Tensor], decay: float, rate: float) -> None:
    """p = decay p + rate (the step in full), in place and without a full-sized temporary."""
    left, right = _factors(step, subspace)
    p.addmm_(left, right, beta=decay, alpha=rate)


def left_out(g: Tensor, low_rank: Tensor, subspace: Mapping[str, Tensor]) -> Tensor:
    """What `project` lost of `g`, a new tensor: `g` less `low_rank` in full."""
    left, right = _factors(low_rank, subspace)
    return torch.addmm(g, left, right, alpha=-1.0)


def add_back_at_random(
    p: Tensor, step: Tensor, subspace: Mapping[str, Tensor], decay: float, rate: float, source: torch.Generator
) -> None:
    """As `add_back`, in fp32 and rounded at random, some rows at a time."""
    left, right = _factors(step, subspace)
    right = right.float()
    for rows in pieces(p[:, 0], -(-PIECE_ON_GPU // p.shape[1])):
        write(p[rows], torch.addmm(p[rows].float(), left[rows].float(), right, beta=decay, alpha=rate), source)


def add_back_in_8_bits(
    packed: affine.Packed,
    step: Tensor,
    subspace: Mapping[str, Tensor],
    decay: float,
    rate: float,
    source: torch.Generator,
) -> None:
    """As `add_back_at_random`, to a matrix in 8 bits; nothing is rounded anew at a rate of 0."""
    if decay == 1.0 and rate == 0.0:
        return
    left, right = _factors(step, subspace)
    right = right.float()
    for values, rows in affine.rewritten(packed, right.shape[1], source):
        values.addmm_(left[rows].float(), right, beta=decay, alpha=rate)


def _factors(step: Tensor, subspace: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Two matrices whose product is the step in full."""
    if "right" not in subspace:
        return subspace["left"], step
    return subspace["left"] @ step if "left" in subspace else step, subspace["right"]


# ---- how a subspace is stored


def keep_subspace(state: State, subspace: Mapping[str, Tensor], bits: int | None) -> None:
    """Put `subspace` into `state`, in place of one that is there, quantised if `bits` are given."""
    for side, vectors in subspace.items():
        kept = {"codes": vectors} if bits is None else affine.quantize(vectors, bits)
        for name, tensor in kept.items():
            if _key(side, name) in state:
                state[_key(side, name)].copy_(tensor)
            else:
                state[_key(side, name)] = tensor


def kept_subspace(state: State, bits: int | None, p: Tensor, rank: int) -> dict[str, Tensor]:
    """The subspace in `state`, in the dtype of `p` (m, n): "left" (m, rank), "right" (rank, n)."""
    kept = [side for side in SIDES if side in state]
    if bits is None:
        return {side: state[side] for side in kept}
    shapes = {"left": torch.Size((p.shape[0], rank)), "right": torch.Size((rank, p.shape[1]))}
    names = ("codes", "scales", "zeros")
    packed = {side: {name: state[_key(side, name)] for name in names} for side in kept}
    return {side: affine.dequantize(packed[side], bits, shapes[side], p.dtype) for side in kept}


def drop_subspace(state: State) -> None:
    """Remove the subspace from `state`."""
    for side in SIDES:
        for name in ("codes", "scales", "zeros"):
            state.pop(_key(side, name), None)


def _key(side: str, name: str) -> str:
    return side if name == "codes" else f"{side}_{name}"


# ---- how long it is kept


def first_vector(subspace: Mapping[str, Tensor]) -> Tensor | None:
    """The leading singular vector of a subspace, a copy; None if there is none."""
    if "left" in subspace:
        return subspace["left"][:, 0].clone()
    return subspace["right"][0].clone() if "right" in subspace else None


def note_choice(state: State, before: Tensor | None, now: Tensor | None, update_every: int) -> None:
    """Set when `state` is due for its next subspace: after twice as long, once the leading vector is stable.

    A vector and its opposite span the same subspace, so their cosine counts as 1: a decomposition gives either.
    """
    state.setdefault("interval", update_every)
    state.setdefault("cosines", [])
    if before is not None and now is not None and has_values(now):
        cosine = F.cosine_similarity(before.float(), now.float(), dim=0).abs().item()
        state["cosines"] = cosines = [*state["cosines"], cosine][-COSINES:]
        if len(cosines) == COSINES and sum(cosines) / COSINES >= STABLE:
            state["interval"] *= 2
    state["due"] = state["updates"] + state["interval"]
