"""Affine quantisation in 8 bits, or in 4 at two numbers per byte: each group of 256 has a scale and the code of zero.

As in Q-GaLore (Zhang et al., 2024, arXiv 2407.08296): a number takes 1 + 5/256 or .5 + 5/256 bytes. Its package stores
4 bits in a byte, and clips groups whose numbers all have the same sign; ours widens their range to include zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from optimizers.shared.quantized import PIECE, PIECE_ON_GPU, blocks_of, pieces

GROUP = 256
SMALLEST_RANGE = 1e-5  # of a group
SPARE = 8  # codes on each side that the numbers of a new grid leave free

Packed = dict[str, Tensor]


def quantize(numbers: Tensor, bits: int) -> Packed:
    """Numbers of any shape in 8 or 4 bits.

    Returns:
        codes (n,) or (ceil(n / 2),), uint8; scales (groups,), fp32; zeros (groups,), uint8.
    """
    flat, per_byte = numbers.reshape(-1), 8 // bits
    groups = -(-flat.numel() // GROUP)
    packed = {
        "codes": torch.empty(-(-flat.numel() // per_byte), dtype=torch.uint8, device=flat.device),
        "scales": torch.empty(groups, dtype=torch.float32, device=flat.device),
        "zeros": torch.empty(groups, dtype=torch.uint8, device=flat.device),
    }
    for piece in pieces(flat):
        codes, scales, zeros = _quantize(flat[piece].float(), 2**bits - 1)
        places = slice(piece.start // per_byte, -(-piece.stop // per_byte))
        packed["codes"][places] = codes if bits == 8 else _pack(codes)
        packed["scales"][blocks_of(piece, GROUP)], packed["zeros"][blocks_of(piece, GROUP)] = scales, zeros
    return packed


def dequantize(packed: Packed, bits: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """The numbers that `packed` stands for."""
    count, per_byte = shape.numel(), 8 // bits
    numbers = torch.empty(shape, dtype=dtype, device=packed["codes"].device)
    flat = numbers.view(-1)
    for piece in pieces(flat):
        codes = packed["codes"][piece.start // per_byte : -(-piece.stop // per_byte)]
        codes = codes if bits == 8 else torch.stack([codes >> 4, codes & 0xF], 1).view(-1)
        values = F.pad(codes[: piece.stop - piece.start].float(), (0, -count % GROUP if piece.stop == count else 0))
        groups = values.view(-1, GROUP).sub_(packed["zeros"][blocks_of(piece, GROUP), None])
        groups.mul_(packed["scales"][blocks_of(piece, GROUP), None])
        flat[piece] = values[: piece.stop - piece.start]
    return numbers


def rewritten(packed: Packed, columns: int, source: torch.Generator) -> Iterator[tuple[Tensor, slice]]:
    """A matrix in 8 bits, some rows at a time in fp32, and which these are: as the loop's body leaves them they are
    stored, rounded up or down at random, so that the mean is right.

    Args:
        packed: changed in place.
        columns: of the matrix.
        source: of random numbers.
    """
    codes = packed["codes"]
    unit = math.lcm(columns, GROUP)  # values, in whole rows and whole groups
    for piece in pieces(codes, max(1, (PIECE_ON_GPU if codes.is_cuda else PIECE) // unit) * unit):
        part = {name: packed[name][piece if name == "codes" else blocks_of(piece, GROUP)] for name in packed}
        rows = slice(piece.start // columns, piece.stop // columns)
        values = dequantize(part, 8, torch.Size((rows.stop - rows.start, columns)), torch.float32)
        yield values, rows
        _store_at_random(values.view(-1), part, source)
        del values  # before the next ones are made


def _store_at_random(numbers: Tensor, part: Packed, source: torch.Generator) -> None:
    """Put `numbers` (n,), fp32, into 8 bits.

    A group keeps its grid while its numbers fit and need half of it: on another, all of them would be rounded anew,
    which disturbs them more than thousands of small updates. A new one has some codes to spare on both sides.
    """
    groups = F.pad(numbers, (0, -numbers.numel() % GROUP)).view(-1, GROUP)
    low, high = groups.amin(1).clamp(max=0.0), groups.amax(1).clamp(min=0.0)
    scales, zeros = part["scales"], part["zeros"].float()
    keeps = (low >= -zeros * scales) & (high <= (255 - zeros) * scales) & (high - low > 127 * scales)
    wider = (high - low).clamp(min=SMALLEST_RANGE) / (254 - 2 * SPARE)
    scales, zeros = scales.where(keeps, wider), zeros.where(keeps, (-low / wider).ceil_() + SPARE)
    noise = torch.rand(groups.shape, device=groups.device, generator=source)
    codes = noise.addcdiv_(groups, scales[:, None]).add_(zeros[:, None]).floor_().clamp_(0, 255)
    part["codes"].copy_(codes.view(-1)[: numbers.numel()])
    part["scales"].copy_(scales)
    part["zeros"].copy_(zeros)


def _quantize(numbers: Tensor, largest: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (n,), scales and zeros (groups,) of `numbers` (n,), fp32; the last group may be shorter."""
    groups = F.pad(numbers, (0, -numbers.numel() % GROUP)).view(-1, GROUP)
    low, high = groups.amin(1).clamp(max=0.0), groups.amax(1).clamp(min=0.0)
    scales = (high - low).clamp(min=SMALLEST_RANGE) / largest
    zeros = (-low / scales).round_()
    codes = (groups / scales[:, None]).round_().add_(zeros[:, None]).clamp_(0, largest)
    return codes.view(-1)[: numbers.numel()].to(torch.uint8), scales, zeros.to(torch.uint8)


def _pack(codes: Tensor) -> Tensor:
    first, second = F.pad(codes, (0, codes.numel() % 2)).view(-1, 2).unbind(1)
    return (first << 4) | second
