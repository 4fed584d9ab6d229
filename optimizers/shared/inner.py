"""AdamW and SGD as methods run them: with fp32 masters, moments in 8 bits, or weights rounded at random."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from optimizers.base import LOW_PRECISION, check_choice
from optimizers.shared import in_pieces
from optimizers.shared.arithmetic import adamw_update, expected_sgd_state, init_adam_state, sgd_update
from optimizers.shared.rounding import Key, check_rounding, generator

STATES = ("full", "8bit")
State = dict[str, Any]


class InnerAdamW:
    """AdamW, by torch's fused kernel where that is possible.

    Args:
        model: the model whose parameters it will update.
        master_weights: fp32 masters (and, for full states, moments) for low-precision weights.
        states: "full" moments, or "8bit": two bytes per weight and 8 per 256 weights; tensors of fewer than 4,096
            weights have theirs in fp32.
        stochastic_rounding: round bf16 weights up or down at random.

    Raises:
        ValueError: `states` is unknown, or the model's weights can't be rounded at random.
    """

    def __init__(
        self, model: nn.Module, *, master_weights: bool, states: str = "full", stochastic_rounding: bool = False
    ):
        check_choice("states", states, STATES)
        check_rounding(model, stochastic=stochastic_rounding, master_weights=master_weights)
        self.master_weights, self.states, self.stochastic_rounding = master_weights, states, stochastic_rounding

    @property
    def elementwise(self) -> bool:
        """See `MemoryEfficientOptimizer.elementwise`: 8-bit values share a magnitude, random numbers a source."""
        return self.states == "full" and not self.stochastic_rounding

    def init_state(self, state: State, p: Tensor) -> None:
        """The state of `p` before its first step."""
        if self.states == "8bit":
            if self.master_weights and p.dtype in LOW_PRECISION:
                state["master"] = p.detach().to(torch.float32).contiguous()
            in_pieces.init_8bit_state(state, p)
        elif self.stochastic_rounding and p.dtype is torch.bfloat16:
            in_pieces.init_low_precision_state(state, p)
        else:
            init_adam_state(state, p, self.master_weights)

    def expected_state(self, p: Tensor, saved: State | None = None, *shape: int) -> State:
        """What it keeps for a tensor like `p`, possibly of another shape; as meta tensors."""
        state: State = {}
        self.init_state(state, torch.empty(shape or p.shape, dtype=p.dtype, device="meta"))
        return state

    def update(
        self, states: list[State], params: list[Tensor], grads: list[Tensor], group: dict[str, Any], keys: Sequence[Key]
    ) -> None:
        """One step on each of `params`, in place; `keys` are of the random numbers of each."""
        for state, p in zip(states, params, strict=True):
            if "step" not in state:
                self.init_state(state, p)
        fused = [i for i, state in enumerate(states) if torch.is_tensor(state["step"])]
        if fused:
            trained, gradients = [params[i] for i in fused], [grads[i] for i in fused]
            adamw_update([states[i] for i in fused], trained, gradients, group, self.master_weights)
        for i in sorted(set(range(len(params))) - set(fused)):
            key = keys[i] if self.stochastic_rounding else None
            _in_pieces(in_pieces.adamw, states[i], params[i], grads[i], group, key)


class InnerSGD:
    """SGD, by torch's kernels; arguments and errors as for `InnerAdamW`."""

    def __init__(
        self, model: nn.Module, *, master_weights: bool, states: str = "full", stochastic_rounding: bool = False
    ):
        if states != "full":
            raise ValueError(f"states={states!r} is for AdamW's moments, which SGD doesn't have: leave it out")
        check_rounding(model, stochastic=stochastic_rounding, master_weights=master_weights)
        self.master_weights, self.stochastic_rounding = master_weights, stochastic_rounding

    @property
    def elementwise(self) -> bool:
        """See `MemoryEfficientOptimizer.elementwise`: random numbers share a source."""
        return not self.stochastic_rounding

    def expected_state(self, p: Tensor, saved: State) -> State:
        """What it keeps for a tensor like `p`, with momentum if `saved` was; as meta tensors."""
        return expected_sgd_state(p, saved, self.master_weights)

    def update(
        self, states: list[State], params: list[Tensor], grads: list[Tensor], group: dict[str, Any], keys: Sequence[Key]
    ) -> None:
        """One step on each of `params`, in place; `keys` are of the random numbers of each."""
        rounded = [i for i, p in enumerate(params) if self.stochastic_rounding and p.dtype is torch.bfloat16]
        others = sorted(set(range(len(params))) - set(rounded))
        if others:
            trained, gradients = [params[i] for i in others], [grads[i] for i in others]
            sgd_update([states[i] for i in others], trained, gradients, group, self.master_weights)
        for i in rounded:
            _in_pieces(in_pieces.sgd, states[i], params[i], grads[i], group, keys[i])


Update = Callable[[State, Tensor, Tensor, dict[str, Any], torch.Generator | None], None]


def _in_pieces(update: Update, state: State, p: Tensor, g: Tensor, group: dict[str, Any], key: Key | None) -> None:
    """Run `update` on the master of `p` if it has one, else on `p` or a contiguous copy of it."""
    weight = state.get("master", p).contiguous()
    update(state, weight, g, group, None if key is None else generator(key, p.device))
    if weight is not p:
        p.copy_(weight)
