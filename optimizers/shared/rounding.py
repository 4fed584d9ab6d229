"""Stochastic rounding: fp32 to bf16, up or down at random, so that the mean is right.

A bf16 weight has 8 bits of fraction: an update below half the distance to the next one is lost if it is rounded to the
nearest, every time. Rounded up with the probability of its share of that distance it is kept on average, without an
fp32 master.
"""

from __future__ import annotations

import random

import torch
from torch import Tensor, nn

Key = tuple[int, ...]  # what the random numbers of one tensor's update are a function of


def check_rounding(model: nn.Module, *, stochastic: bool, master_weights: bool) -> None:
    """Refuse stochastic rounding where it can't work.

    Raises:
        ValueError: there are fp32 masters, which need none, or weights in fp16.
    """
    if stochastic and master_weights:
        raise ValueError("stochastic_rounding takes the place of fp32 masters: set master_weights=False as well")
    if stochastic and any(p.dtype is torch.float16 for p in model.parameters()):
        raise ValueError("stochastic_rounding is of bfloat16 weights; this model has float16 ones")


def generator(key: Key, device: torch.device) -> torch.Generator:
    """The source of an update's random numbers."""
    return torch.Generator(device).manual_seed(random.Random("/".join(map(str, key))).getrandbits(63))


def write(target: Tensor, values: Tensor, source: torch.Generator | None = None) -> None:
    """Write fp32 `values` into `target`, of any dtype: rounded to the nearest or, into bf16 from a `source` of random
    numbers, at random: bits of fp32 plus 16 random ones, the last 16 cut off. `values` may be overwritten.
    """
    if source is not None and target.dtype is torch.bfloat16:
        noise = torch.randint(1 << 16, values.shape, dtype=torch.int32, device=values.device, generator=source)
        values.view(torch.int32).add_(noise).bitwise_and_(-1 << 16)
    target.copy_(values)
