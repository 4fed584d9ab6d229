"""Groups of consecutive rows of tensors: those with the largest gradients, and where they are."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from optimizers.shared.norms import norm_of
from optimizers.shared.sharded import gathered, has_values

Cuts = list[int]  # numbers of untrained and trained rows, alternating, from the first row to the last


def largest_groups(grads: list[Tensor], rows: int, budget: int) -> list[list[int]]:
    """For each gradient the numbers, increasing, of its groups of `rows` rows among those with the largest mean square.

    As many as hold `budget` weights, and at least one. For fake tensors the first ones, and one more: no choice needs
    more bytes.
    """
    where = grads[0].device  # layers of a model may lie on several cards
    scores = torch.cat([_mean_squares(gathered(g), rows).to(where) for g in grads])
    owners = [(tensor, group) for tensor, g in enumerate(grads) for group in range(count_groups(g, rows))]
    known = has_values(scores)
    chosen: list[list[int]] = [[] for _ in grads]
    left = budget
    for number in scores.argsort(descending=True, stable=True).tolist() if known else range(len(owners)):
        tensor, group = owners[number]
        size = _length(group, rows, grads[tensor]) * math.prod(grads[tensor].shape[1:])
        if any(chosen) and (size > left if known else left <= 0):
            break
        chosen[tensor].append(group)
        left -= size
    return [sorted(groups) for groups in chosen]


def cuts_of(groups: list[int], rows: int, p: Tensor) -> Cuts:
    """The positions of the rows in `groups` of `p`, with neighbouring groups joined."""
    cuts: Cuts = []
    end = 0
    for number in groups:
        start, count = number * rows, _length(number, rows, p)
        if cuts and start == end:
            cuts[-1] += count
        else:
            cuts += [start - end, count]
        end = start + count
    return [*cuts, len(rows_of(p)) - end]


def count_groups(p: Tensor, rows: int) -> int:
    """How many groups of `rows` rows `p` has, the last of which may be smaller."""
    return -(-len(rows_of(p)) // rows)


def shape_of(groups: list[int], rows: int, p: Tensor) -> tuple[int, ...]:
    """The shape of the state kept for these groups of `p`."""
    return (sum(cuts_of(groups, rows, p)[1::2]), *rows_of(p).shape[1:])


def _mean_squares(g: Tensor, rows: int) -> Tensor:
    flat = rows_of(g).flatten(1) if g.dim() > 1 else rows_of(g)[:, None]
    squares = norm_of(flat, dim=1).square() / flat.shape[1]
    sums = pad(squares, (0, -len(squares) % rows)).view(-1, rows).sum(1)
    counts = [_length(group, rows, g) for group in range(count_groups(g, rows))]
    return sums / torch.tensor(counts, dtype=sums.dtype, device=sums.device)


def _length(group: int, rows: int, t: Tensor) -> int:
    return min(rows, len(rows_of(t)) - group * rows)


def rows_of(t: Tensor) -> Tensor:
    """The tensor with rows along its first dimension; a scalar is one row."""
    return t[None] if t.dim() == 0 else t
