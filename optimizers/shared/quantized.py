"""Quantised numbers in plain torch: a code per number, and the largest magnitude per block.

A code stands for a value of a codebook between -1 and 1, times the block's magnitude. Codes, magnitudes and values are
those of bitsandbytes (its CUDA kernels, and its plain torch kernels): the nearest value, and the lower of two equally
near ones. Its CPU kernel for 8 bits is coarser: it looks numbers up in a table with steps of 2 ** -15.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from optimizers.shared.sharded import has_values

# Values processed at a time, which bounds all temporaries; a multiple of every block size. On a CPU they fit into its
# cache; a GPU needs more, or it would wait for the next kernel.
PIECE, PIECE_ON_GPU = 1 << 16, 1 << 22
SMALLEST = 1e-38  # magnitude; its reciprocal is still finite


def pieces(like: Tensor, size: int | None = None) -> Iterator[slice]:
    """Cut the positions of a tensor (n,) into pieces of `size`, or of the size that suits the device.

    For fake tensors one piece is enough to find the bytes: all others would reuse its memory.
    """
    count, size = like.numel(), size or (PIECE_ON_GPU if like.is_cuda else PIECE)
    for start in range(0, count if has_values(like) else min(count, size), size):
        yield slice(start, min(start + size, count))


def blocks_of(piece: slice, size: int) -> slice:
    """The blocks of `size` values that make up a piece."""
    return slice(piece.start // size, -(-piece.stop // size))


def magnitudes(numbers: Tensor, size: int) -> Tensor:
    """The largest magnitude of each block of `size` of `numbers` (n,); the last block may be shorter."""
    rest = numbers.numel() % size
    if not rest:
        return numbers.view(-1, size).abs().amax(1)
    return torch.cat([magnitudes(numbers[:-rest], size), numbers[-rest:].abs().amax(0, keepdim=True)])


def scale_(numbers: Tensor, factors: Tensor, size: int) -> Tensor:
    """Multiply each block of `numbers` (n,) by its factor, in place."""
    rest = numbers.numel() % size
    if rest:
        scale_(numbers[:-rest], factors[:-1], size)
        numbers[-rest:].mul_(factors[-1])
    else:
        numbers.view(-1, size).mul_(factors[:, None])
    return numbers


class Constant:
    """A constant tensor that is needed on any device."""

    def __init__(self, tensor: Tensor):
        self._array, self._dtype = tensor.numpy(), tensor.dtype  # an array, since no torch mode sees it
        self._on_gpu: dict[torch.device, Tensor] = {}

    def on(self, like: Tensor) -> Tensor:
        """The tensor on the device of `like`. A GPU keeps it: a copy from the host waits for all queued work."""
        if not has_values(like):  # fake codes look up no values; and no meter sees the array either
            return torch.empty(0, dtype=self._dtype, device=like.device)
        if like.is_cpu:
            return torch.from_numpy(self._array)
        if like.device not in self._on_gpu:
            self._on_gpu[like.device] = torch.tensor(self._array, device=like.device)
        return self._on_gpu[like.device]


class Codebook:
    """Up to 256 increasing values; a number's code is the index of the nearest one.

    It is found from the leading 17 bits of the number (sign, exponent, 8 bits of the fraction): a table has the code of
    the lowest number with these bits, and since at most one boundary between two values lies among such numbers, one
    comparison tells whether it is the next code instead. That is ten times as fast as a search.
    """

    def __init__(self, values: Tensor):
        boundaries = (values[:-1] + values[1:]) / 2
        self.values = Constant(values)
        codes = np.searchsorted(boundaries.numpy(), _ends_of_cells()[0])
        self._lowest = Constant(torch.from_numpy(codes.astype(np.uint8)))
        self._boundary_above = Constant(torch.cat([boundaries, torch.full_like(values[:1], torch.inf)]))

    def quantize_(self, numbers: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """Codes (n,), uint8, and magnitudes (blocks,), fp32, of a piece of numbers (n,), fp32, which is overwritten."""
        largest = magnitudes(numbers, size)
        return self._encode(scale_(numbers, 1.0 / largest.clamp(min=SMALLEST), size)), largest

    def dequantize(self, codes: Tensor, magnitudes: Tensor, size: int) -> Tensor:
        """The numbers (n,), fp32, that `codes` (n,) and `magnitudes` (blocks,) stand for."""
        return scale_(self.values.on(codes).index_select(0, codes.int()), magnitudes, size)

    def _encode(self, scaled: Tensor) -> Tensor:
        cells = scaled.view(torch.int32).bitwise_right_shift(15).bitwise_and_(0x1FFFF)
        codes = self._lowest.on(scaled).index_select(0, cells)
        del cells
        return codes.add_(scaled > self._boundary_above.on(scaled).index_select(0, codes.int()))


def _ends_of_cells() -> np.ndarray:
    """The lowest and the highest number with each combination of 17 leading bits (2, 131072), fp32.

    In numpy, since torch would start its thread pool, and a process that has one can't be forked.
    """
    first = np.roll(np.arange(-(1 << 16), 1 << 16, dtype=np.int32), 1 << 16) << 15
    ends = np.stack([first, first | 0x7FFF]).view(np.float32)
    return np.sort(np.nan_to_num(ends, nan=np.inf), 0)


def dynamic_values(*, signed: bool) -> Tensor:
    """The 8-bit dynamic map (Dettmers et al., 2110.02861, section 2): a power of ten, and a linear fraction in the
    remaining bits; the smaller the power, the fewer bits remain.
    """
    exact: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}  # whatever the defaults are
    values = [torch.tensor([0.0, 1.0], **exact)]
    for power in range(7):
        edges = torch.linspace(0.1, 1.0, (1 if signed else 2) * 2**power + 1, **exact)
        means = 10 ** (power - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += [means, -means] if signed else [means]
    return torch.cat(values).sort().values


SIGNED = Codebook(dynamic_values(signed=True))
UNSIGNED = Codebook(dynamic_values(signed=False))
