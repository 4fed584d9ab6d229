"""Updates that torch's fused kernels don't offer, in fp32, one piece of the tensor at a time.

They are for moments in 8 bits (Dettmers et al., ICLR 2022, arXiv 2110.02861) and stochastically rounded weights.
Quantised or low-precision state is converted to fp32, updated, and written back.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from optimizers.shared.masters import exact_dtype
from optimizers.shared.quantized import SIGNED, UNSIGNED, Codebook, blocks_of, pieces
from optimizers.shared.rounding import write

BLOCK = 256  # values that share a magnitude
SMALLEST = 4096  # values; smaller tensors keep their moments in fp32 instead of 8 bits
CODEBOOKS: dict[str, Codebook] = {"exp_avg": SIGNED, "exp_avg_sq": UNSIGNED}

State = dict[str, Any]


def init_8bit_state(state: State, p: Tensor) -> None:
    """Zero moments: a code per value and a magnitude per block; in fp32 for a small tensor."""
    state["step"] = 0
    for name in CODEBOOKS:
        state[name] = torch.zeros(
            p.shape, dtype=torch.uint8 if p.numel() >= SMALLEST else torch.float32, device=p.device
        )
        if p.numel() >= SMALLEST:
            blocks = -(-p.numel() // BLOCK)
            state[f"{name}_magnitudes"] = torch.zeros(blocks, dtype=torch.float32, device=p.device)


def init_low_precision_state(state: State, p: Tensor) -> None:
    """Zero moments in the dtype of the weights."""
    state["step"] = 0
    for name in CODEBOOKS:
        state[name] = torch.zeros(p.shape, dtype=p.dtype, device=p.device)


def adamw(state: State, p: Tensor, g: Tensor, group: dict[str, Any], source: torch.Generator | None) -> None:
    """One step of AdamW on `p` (contiguous), in bitsandbytes' order of operations."""
    state["step"] += 1
    flat, flat_g = p.view(-1), g.reshape(-1)
    for piece in pieces(flat):
        _adamw(state, flat[piece], flat_g[piece], group, piece, source)


def _adamw(
    state: State, p: Tensor, g: Tensor, group: dict[str, Any], piece: slice, source: torch.Generator | None
) -> None:
    (beta1, beta2), lr = group["betas"], group["lr"]
    correction1, correction2 = 1.0 - beta1 ** state["step"], math.sqrt(1.0 - beta2 ** state["step"])
    w, g = p.to(exact_dtype(p)), g.float()
    m = _read(state, "exp_avg", piece).mul_(beta1).add_(g, alpha=1.0 - beta1)
    v = _read(state, "exp_avg_sq", piece).mul_(beta2).addcmul_(g, g, value=1.0 - beta2)
    del g
    if group["weight_decay"]:
        w.mul_(1.0 - lr * group["weight_decay"])
    w.addcdiv_(m, v.sqrt().div_(correction2).add_(group["eps"]), value=-lr / correction1)
    write(p, w, source)
    del w
    _write_(state, "exp_avg", piece, m)
    _write_(state, "exp_avg_sq", piece, v, source)  # to the nearest it would never fall: beta2 takes .1 % at a time


def sgd(state: State, p: Tensor, g: Tensor, group: dict[str, Any], source: torch.Generator | None) -> None:
    """One step of SGD on `p` (contiguous), as torch's; the momentum in the dtype of the weights."""
    if group.get("momentum", 0.0) and "momentum_buffer" not in state:
        state["momentum_buffer"] = torch.zeros(p.shape, dtype=p.dtype, device=p.device)
    flat, flat_g = p.view(-1), g.reshape(-1)
    for piece in pieces(flat):
        _sgd(state, flat[piece], flat_g[piece], group, piece, source)


def _sgd(
    state: State, p: Tensor, g: Tensor, group: dict[str, Any], piece: slice, source: torch.Generator | None
) -> None:
    w = p.float()
    step = g.float().add(w, alpha=group["weight_decay"])
    if "momentum_buffer" in state:
        step.add_(_read(state, "momentum_buffer", piece), alpha=group["momentum"])
    write(p, w.sub_(step, alpha=group["lr"]), source)
    if "momentum_buffer" in state:
        _write_(state, "momentum_buffer", piece, step)


def _read(state: State, name: str, piece: slice) -> Tensor:
    """A piece of the state in fp32: a copy, unless it is in fp32 already."""
    kept: Tensor = state[name].view(-1)[piece]
    if kept.dtype is not torch.uint8:
        return kept.float()
    return CODEBOOKS[name].dequantize(kept, state[f"{name}_magnitudes"][blocks_of(piece, BLOCK)], BLOCK)


def _write_(state: State, name: str, piece: slice, values: Tensor, source: torch.Generator | None = None) -> None:
    """Write back what `_read` returned, at random into bf16 if there is a `source`; `values` is overwritten."""
    kept = state[name].view(-1)[piece]
    if kept.dtype is torch.uint8:
        kept[:], state[f"{name}_magnitudes"][blocks_of(piece, BLOCK)] = CODEBOOKS[name].quantize_(values, BLOCK)
    elif kept.dtype is not torch.float32:
        write(kept, values, source)
