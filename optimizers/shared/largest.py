"""The entries of largest magnitude over several tensors, without sorting them.

On a CPU a sort or `topk` needs 16 bytes of workspace per entry, which no meter sees. The magnitude of an fp32 number,
read as a 31-bit integer, sorts in the same order; so the smallest magnitude to keep is found digit by digit, from
histograms over pieces of the tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from optimizers.base import has_values
from optimizers.shared.sharded import gathered

PIECE = 2**20  # entries per piece, or one row of a tensor if that is longer: 17 bytes each
DIGITS = ((20, 11), (10, 10), (0, 10))  # (lowest bit, width), the highest digit first


def largest_entries(tensors: list[Tensor], count: int) -> Iterator[Tensor]:
    """For each tensor the positions (k,), int32 and increasing, of its entries among the `count` largest |x| of all.

    Among entries equal to the limit the first are taken. Magnitudes are compared in fp32; NaN counts as the largest.
    Fake tensors get their first entries: the distribution over tensors doesn't change the bytes.

    Args:
        tensors: of any shape; positions are those in each flattened tensor.
        count: at most the number of entries.
    """
    limit, ties = _limit(tensors, count)
    left = count
    for tensor in tensors:
        start, found = 0, []
        for bits in _pieces(tensor):
            if has_values(bits):
                chosen = bits > limit
                equal = (bits == limit).nonzero().flatten()[:ties]
                chosen[equal] = True
                ties -= len(equal)
                positions = chosen.nonzero().flatten()
            else:
                positions = torch.empty(min(left, len(bits)), dtype=torch.int64, device=bits.device)
            found.append((positions + start).to(torch.int32))
            left -= len(positions)
            start += len(bits)
            if not left and not has_values(bits):
                break  # the other pieces take the same bytes, and leave none
        yield found[0] if len(found) == 1 else torch.cat(found)


def _limit(tensors: list[Tensor], count: int) -> tuple[int, int]:
    """The smallest of the `count` largest magnitudes, as bits, and how many of them are equal to it."""
    prefix = 0
    for shift, width in DIGITS:
        digits = 2**width
        histogram = torch.zeros(digits + 1, dtype=torch.int64, device=tensors[0].device)  # the last bin: another prefix
        for tensor in tensors if has_values(histogram) else _unlike(tensors):
            for bits in _pieces(tensor):
                digit = (bits >> shift) - (prefix << width)
                digit = digit.where((digit >= 0) & (digit < digits), digits)
                if not has_values(digit):
                    break  # the other pieces take the same bytes
                histogram += torch.bincount(digit, minlength=digits + 1).to(histogram.device)
        if has_values(histogram):
            place = digits
            numbers = histogram.tolist()
            while numbers[place - 1] < count:
                place -= 1
                count -= numbers[place]
            prefix = (prefix << width) + place - 1
    return prefix, count


def _unlike(tensors: list[Tensor]) -> Iterable[Tensor]:
    """One of each shape: the others take the same bytes."""
    return {(tensor.shape, tensor.stride(), tensor.dtype): tensor for tensor in tensors}.values()


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """|x| of the entries, in their order, as the bits of fp32 numbers: int32 tensors (n,)."""
    tensor = gathered(tensor)
    rows = tensor[None] if tensor.dim() == 0 else tensor
    length = max(1, PIECE * len(rows) // max(1, rows.numel()))
    for start in range(0, max(1, len(rows)), length):  # one by one: who plans looks at the first alone
        yield rows[start : start + length].abs().reshape(-1).to(torch.float32).view(torch.int32)
