"""NF4: weights in 4 bits, coded as quantiles of a normal distribution (Dettmers et al., 2023, arXiv 2305.14314).

Blocks of 64 weights; the blocks' magnitudes are in fp32 or, with double quantisation, minus their mean in 8 bits with
the signed dynamic map, in blocks of 256. So a weight takes .5 + 4/64 = .5625 bytes, or .5 + 1/64 + 4/(64 x 256) = .516
(and 4 bytes per matrix, for the mean). Codes, magnitudes and values are those of bitsandbytes.

The weights are restored by a table in plain torch or by bitsandbytes' compiled kernel, from the same bytes and to the
same bits, with one exception: on a CPU with AVX-512's bf16 that kernel makes zeros of values in bf16 below 2 ** -126.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from optimizers.shared.quantized import SIGNED, Codebook, Constant, blocks_of, pieces, scale_
from optimizers.shared.sharded import has_values

BLOCK, BLOCK_OF_MAGNITUDES = 64, 256
KERNELS = ("torch", "bitsandbytes")
OF_BITSANDBYTES = (torch.float32, torch.bfloat16, torch.float16)  # the dtypes that its kernel gives
# Appendix E of the paper
VALUES = torch.tensor(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    dtype=torch.float32,
    device="cpu",
)
NF4 = Codebook(VALUES)
# (256,): the two values of each byte as one 64-bit number: lookup is twice as fast
PAIRS = Constant(torch.stack([VALUES.repeat_interleave(16), VALUES.repeat(16)], 1).view(torch.int64).flatten())

Packed = dict[str, Tensor]


def quantize(weight: Tensor, *, double: bool) -> Packed:
    """A weight of any shape in NF4.

    Returns:
        codes: two per byte (ceil(n / 2),), the first in the upper half; magnitudes: (ceil(n / 64),), fp32, or with
        double quantisation their 8-bit codes, with magnitudes_of_magnitudes (one per 256), fp32, and their mean.
    """
    flat = weight.detach().reshape(-1)
    packed = {
        "codes": flat.new_empty(-(-flat.numel() // 2), dtype=torch.uint8),
        "magnitudes": flat.new_empty(-(-flat.numel() // BLOCK), dtype=torch.float32),
    }
    for piece in pieces(flat):
        codes, magnitudes = NF4.quantize_(flat[piece].to(torch.float32, copy=True), BLOCK)
        packed["codes"][piece.start // 2 : -(-piece.stop // 2)] = _pack(codes)
        packed["magnitudes"][blocks_of(piece, BLOCK)] = magnitudes
    return _quantize_magnitudes(packed) if double else packed


def dequantize(packed: Packed, shape: torch.Size, dtype: torch.dtype, kernels: str = "torch") -> Tensor:
    """The weight that `packed` stands for; in plain torch also where bitsandbytes' kernel can't restore it."""
    codes, magnitudes = packed["codes"], _magnitudes(packed)
    if kernels == "bitsandbytes" and _is_for_bitsandbytes(magnitudes, shape, dtype):
        rows = (shape.numel() // BLOCK, BLOCK)  # rows that aren't of whole blocks it restores wrongly, with AVX-512
        return torch.ops.bitsandbytes.dequantize_4bit(codes, magnitudes, BLOCK, "nf4", rows, dtype).view(shape)
    pairs = PAIRS.on(codes)
    weight = torch.empty(2 * codes.numel(), dtype=dtype, device=codes.device)
    for piece in pieces(weight):
        half = slice(piece.start // 2, piece.stop // 2)
        _dequantize(codes[half], magnitudes[blocks_of(piece, BLOCK)], pairs, weight[piece])
    return weight[: shape.numel()].view(shape)


def check_bitsandbytes(devices: Iterable[torch.device]) -> None:
    """Import bitsandbytes, and have its kernel restore every byte on each device, in each dtype.

    Raises:
        ValueError: it isn't installed, has no such kernel, or restores other values than ours.
    """
    try:
        importlib.import_module("bitsandbytes")
        wrong = [f"other values on {device}" for device in devices if not _agree_on(device)]
    except Exception as error:  # whatever its libraries raise
        wrong = [*str(error).strip().splitlines(), type(error).__name__]
    if wrong:
        raise ValueError(
            f"kernels='bitsandbytes' can't be used here ({wrong[0]}): pip install 'bitsandbytes>=0.50.2', or use "
            "kernels='torch'"
        )


def _agree_on(device: torch.device) -> bool:
    """Do both kernels restore the same bits?"""
    codes = torch.arange(256, dtype=torch.uint8, device=device).repeat(8)
    packed = {"codes": codes, "magnitudes": torch.linspace(0.01, 3.0, 2 * codes.numel() // BLOCK, device=device)}
    pairs = [
        [dequantize(packed, torch.Size([2 * codes.numel()]), dtype, kernels) for kernels in KERNELS]
        for dtype in OF_BITSANDBYTES
    ]
    return not has_values(codes) or all(torch.equal(ours, theirs) for ours, theirs in pairs)


def _is_for_bitsandbytes(magnitudes: Tensor, shape: torch.Size, dtype: torch.dtype) -> bool:
    """Can its kernel restore such a weight? It counts in 32 bits, and reads magnitudes as fp32, whatever they are."""
    whole = shape.numel() % BLOCK == 0 and shape.numel() < 1 << 31
    return whole and dtype in OF_BITSANDBYTES and magnitudes.dtype is torch.float32


def _dequantize(codes: Tensor, magnitudes: Tensor, pairs: Tensor, out: Tensor) -> None:
    if out.dtype is torch.float32:  # directly into its place
        torch.index_select(pairs, 0, codes.int(), out=out.view(torch.int64))
        scale_(out, magnitudes, BLOCK)
    else:
        out.copy_(scale_(pairs.index_select(0, codes.int()).view(torch.float32), magnitudes, BLOCK))


def _pack(codes: Tensor) -> Tensor:
    if codes.numel() % 2:
        codes = F.pad(codes, (0, 1), value=7)  # the code of zero, as bitsandbytes does
    first, second = codes.view(-1, 2).unbind(1)
    return (first << 4) | second


def _quantize_magnitudes(packed: Packed) -> Packed:
    magnitudes = packed["magnitudes"]
    mean = magnitudes.mean()
    codes = torch.empty_like(magnitudes, dtype=torch.uint8)
    of_magnitudes = magnitudes.new_empty(-(-magnitudes.numel() // BLOCK_OF_MAGNITUDES))
    for piece in pieces(magnitudes):
        blocks = blocks_of(piece, BLOCK_OF_MAGNITUDES)
        codes[piece], of_magnitudes[blocks] = SIGNED.quantize_(magnitudes[piece] - mean, BLOCK_OF_MAGNITUDES)
    return {**packed, "magnitudes": codes, "magnitudes_of_magnitudes": of_magnitudes, "mean": mean}


def _magnitudes(packed: Packed) -> Tensor:
    """The magnitudes in fp32."""
    if "mean" not in packed:
        return packed["magnitudes"]
    codes, of_magnitudes = packed["magnitudes"], packed["magnitudes_of_magnitudes"]
    return SIGNED.dequantize(codes, of_magnitudes, BLOCK_OF_MAGNITUDES).add_(packed["mean"])
