"""fp32 masters of low-precision weights, where something else than the method changes these weights.

A master would undo what a loop does to a weight between steps: `model.load_state_dict(best)`, a reset, a clamp.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from optimizers.shared.storages import storages_of

LOW_PRECISION = (torch.bfloat16, torch.float16)


def exact_dtype(t: Tensor) -> torch.dtype:
    """What to compute in: fp32, or fp64 for an fp64 tensor."""
    return torch.promote_types(t.dtype, torch.float32)


class Masters:
    """Notices that weights were changed since a method last wrote them; then their masters follow.

    It goes by torch's count of changes and by where weights are, for `p.data = x`; both cost nothing. What is done to
    `p.data` in place isn't counted.
    """

    def __init__(self) -> None:
        self._written: dict[Tensor, list[int]] = {}  # the mark of the weight when the method last wrote it

    def forget(self) -> None:
        """Compare all masters with their weights before they are used again: others were loaded."""
        self._written.clear()

    @torch.no_grad()
    def follow(self, params: Iterable[Tensor], state: Any, weights_of: Callable[[Any], Tensor]) -> None:
        """Give the masters of changed weights their new values; entries that are the same keep their last bits.

        Args:
            params: in low precision, about to be updated.
            state: of the method, by parameter.
            weights_of: the weights of a parameter that its master stands for.
        """
        for p in params:
            if self._written.get(p) != _mark(p) and "master" in state.get(p, ()):
                master, weights = state[p]["master"], weights_of(p)
                master.copy_(torch.where(master.to(weights.dtype) == weights, master, weights))

    def note(self, params: Iterable[Tensor]) -> None:
        """These were written by the method."""
        for p in params:
            self._written[p] = _mark(p)


def _mark(p: Tensor) -> list[int]:
    return [p._version, *(storage._cdata for storage in storages_of(p))]
