"""The entries of largest magnitude over several tensors, without sorting them.

On a CPU a sort or `topk` needs 16 bytes of workspace per entry, which no meter sees. The magnitude of an fp32 number,
read as a 31-bit integer, sorts in the same order; so the smallest magnitude to keep is found digit by digit, from
histograms over pieces of the tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from optimizers.shared.sharded import gathered, has_values

PIECE = 2**20  # entries per piece, or one row of a tensor if that is longer: 17 bytes each
DIGITS = ((20, 11), (10, 10), (0, 10))  # (lowest bit, width), the highest digit first


def largest_entries(tensors: list[Tensor], count: int) -> Iterator[Tensor]:
    """For each tensor the positions (k,), int32 and increasing, of its entries among the `count` largest |x| of all.

    Among entries equal to the limit the first are taken. Magnitudes are compared in fp32; NaN counts as the largest.
    Of fake tensors the last are taken as a whole, and one entry of each other: who puts the largest tensor last sees
    the most bytes at once.

    Args:
        tensors: of any shape; positions are those in each flattened tensor.
        count: at most the number of entries.
    """
    limit, ties = _limit(tensors, count)
    later = sum(tensor.numel() for tensor in tensors)
    left = count
    for tensor in tensors:
        later -= tensor.numel()
        start, found = 0, []
        for bits in _pieces(tensor):
            length, fake = len(bits), not has_values(bits)
            chosen = bits > limit
            if not fake:
                ties -= _add_first(chosen, bits == limit, ties)
            del bits  # 4 bytes per entry, which aren't needed beside the positions
            found.append(_positions(chosen, min(left, max(1, left - later))).add_(start))
            del chosen
            left -= len(found[-1])
            start += length
            if fake:  # the other pieces take the same bytes at a time, and leave their positions
                rest = max(0, left - later)
                found += [found[0].new_empty(min(length, rest - done)) for done in range(0, rest, length)]
                left -= rest
                break
        yield found[0] if len(found) == 1 else torch.cat(found)


def _add_first(chosen: Tensor, equal: Tensor, count: int) -> int:
    """Mark the first `count` of the equal ones as chosen, too. Returns how many there were, at most `count`."""
    first = equal.nonzero().flatten()[:count]
    chosen[first] = True
    return len(first)


def _positions(chosen: Tensor, most: int) -> Tensor:
    """Of what is chosen, int32; of a fake tensor `most` of them."""
    if has_values(chosen):
        return chosen.nonzero().flatten().to(torch.int32)
    return torch.empty(min(most, len(chosen)), dtype=torch.int64, device=chosen.device).to(torch.int32)


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
                    torch.empty_like(histogram)  # the piece's own, which no fake tensor can count
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
