"""Stochastic rounding: fp32 to bf16, up or down at random, so that the mean is right.

A bf16 weight has 8 significant bits: rounding to the nearest always loses an update below half the distance to the next
number. If the probability of rounding up equals the update's share of that distance, it is kept on average, without
an fp32 master.
"""

from __future__ import annotations

import math
import random

import torch
from torch import Tensor, nn

Key = tuple[int, ...]  # determines the random numbers of one tensor's update


def check_rounding(model: nn.Module, *, stochastic: bool, master_weights: bool) -> None:
    """Refuse stochastic rounding where it can't work.

    Raises:
        ValueError: there are fp32 masters, which don't need it, or weights in fp16.
    """
    if stochastic and master_weights:
        raise ValueError("stochastic_rounding replaces fp32 masters: also set master_weights=False")
    if stochastic and any(p.dtype is torch.float16 for p in model.parameters()):
        raise ValueError("stochastic_rounding is for bfloat16 weights; this model has float16 ones")


def generator(key: Key, device: torch.device) -> torch.Generator:
    """The source of an update's random numbers."""
    return torch.Generator(device).manual_seed(random.Random("/".join(map(str, key))).getrandbits(63))


def write(target: Tensor, values: Tensor, source: torch.Generator | None = None) -> None:
    """Write fp32 `values` into `target`, of any dtype: rounded to the nearest, or at random into bf16 if there is a
    `source` of random numbers: 16 random bits are added to the fp32 bits, and the last 16 cut off. `values` may be
    overwritten.
    """
    if source is not None and target.dtype is torch.bfloat16:
        # random bits added to other NaNs, such as a GPU's (all bits 1), would overflow and make zeros of them
        values.nan_to_num_(math.nan, math.inf, -math.inf)
        noise = torch.randint(1 << 16, values.shape, dtype=torch.int32, device=values.device, generator=source)
        values.view(torch.int32).add_(noise).bitwise_and_(-1 << 16)
    target.copy_(values)
