"""BAdam: block coordinate descent with Adam inside (Luo, Yu & Li, NeurIPS 2024, arXiv 2404.02827)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from optimizers.base import MemoryEfficientOptimizer, check_choice, check_count
from optimizers.registry import register
from optimizers.shared.blocks import GRANULARITIES, matching, shuffled, split_into_blocks, without
from optimizers.shared.checkpointing import keep_backward_short
from optimizers.shared.coverage import Coverage
from optimizers.shared.inner import InnerAdamW, InnerSGD
from optimizers.shared.reach import REENTRANT, Reach

INNER: dict[str, type[InnerAdamW] | type[InnerSGD]] = {"adamw": InnerAdamW, "sgd": InnerSGD}
ORDERS = ("random", "ascending", "descending")


@register("badam")
class BAdam(MemoryEfficientOptimizer):
    """BAdam (Algorithm 1): one block at a time, K steps of AdamW from zero moments, then the next block.

    Trains one of D blocks at a time, and `always_train` throughout. Embeddings, final norm and head are frozen unless
    `train_embeddings` makes blocks of them or `always_train` names them: name a new classification head there.
    Keeps 8 bytes per weight of the active block (12 with an fp32 master), dropped at the switch, and the same for
    `always_train`, whose moments persist. The backward pass ends at the active block.

    Args:
        model: the model to train; its layers are in `nn.ModuleList`s.
        lr: learning rate; one schedule over the whole run, not restarted for each block.
        weight_decay: decoupled; for tensors of two or more dimensions, biases excepted.
        betas, eps: as in Adam.
        switch_every: K, optimizer steps per block visit. The paper's guideline: min(max(n / (B D), 50), 100).
        order: of the blocks: "random" (a new order once all have been visited), "ascending" or "descending".
        block: "layer", "sublayer" (attention, MLP) or "matrix".
        always_train: name patterns of parameters that belong to no block and are trained at every step.
        train_embeddings: make the embeddings a block, and the final norm with the head another.
        inner: "adamw", or "sgd": the paper's BSGD.
        in_backward: update inside the backward pass, so that only one gradient exists at a time.
        master_weights: fp32 moments and masters for what is being trained, if the model is in low precision.
        fp32_gradients: fp32 gradients for low-precision weights (the paper's runs have them).
        states: "full", or "8bit": AdamW's moments in 8 bits, 2.03 bytes per weight instead of 8.
        stochastic_rounding: round bf16 weights up or down at random, instead of keeping masters.
        seed: for the order.

    Raises:
        ValueError: a value is out of range, a pattern matches nothing, or the model has no list of layers.
        RuntimeError: in `step()`, when a block's visit ends without any gradient having reached it.
    """

    summary = "block coordinate descent: K steps of AdamW on one block, then the next"
    paper = "Luo, Yu & Li, NeurIPS 2024, arXiv 2404.02827"
    trains = "one of D blocks at a time, in turn"
    keeps = "8 B per weight of the active block (12 B with an fp32 master)"
    excludes = "re-entrant gradient checkpointing; in_backward: accumulation, loop clipping, fp16 scaling"
    example = {"lr": 1e-2, "switch_every": 3}
    added_later = ("states", "stochastic_rounding")

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-5,
        weight_decay: float = 0.01,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        switch_every: int = 100,
        order: str = "random",
        block: str = "layer",
        always_train: tuple[str, ...] = (),
        train_embeddings: bool = False,
        inner: str = "adamw",
        in_backward: bool = False,
        master_weights: bool = True,
        fp32_gradients: bool = False,
        states: str = "full",
        stochastic_rounding: bool = False,
        seed: int = 0,
    ):
        check_count("switch_every", switch_every)
        check_choice("order", order, ORDERS)
        check_choice("block", block, GRANULARITIES)
        check_choice("inner", inner, tuple(INNER))
        self.switch_every, self.order, self.seed = switch_every, order, seed
        self.inner = INNER[inner](
            model, master_weights=master_weights, states=states, stochastic_rounding=stochastic_rounding
        )
        self._always = matching(model, always_train)
        self._all_blocks = split_into_blocks(model, block, embeddings=train_embeddings, leave_out=self._always)
        self.blocks = self._all_blocks
        super().__init__(
            model,
            {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay},
            may_train=[*self._always, *(p for params in self.blocks.values() for p in params)],
            in_backward=in_backward,
            fp32_gradients=fp32_gradients,
        )
        self._visit = 0  # block visits completed
        self._steps = 0  # steps done in this visit
        self._reached = False  # has any gradient reached the active block in this visit?
        self._hooks.append(keep_backward_short(model))
        self._activate()
        self._reach = Reach(model, self._leave_out, self.on_any_replica, self.worst_case)
        self._hooks.append(self._reach)

    @property
    def selection(self) -> str:
        """The name of the active block."""
        epoch, place = divmod(self._visit, len(self.blocks))
        return list(self.blocks)[self._order_of(epoch)[place]]

    @property
    def cycle_length(self) -> int:
        return len(self.blocks)

    @property
    def block_coverage(self) -> float:
        return min(1.0, (self._visit + (self._steps > 0)) / len(self.blocks))

    @property
    def elementwise(self) -> bool:
        return self.inner.elementwise

    def coverage_after(self, steps: int) -> Coverage:
        count = len(self.blocks)
        return Coverage(min(count, -(-steps // self.switch_every)), count, count)

    def update(self, params: list[Tensor], grads: list[Tensor], group: dict[str, Any]) -> None:
        self._reached = self._reached or any(p in self._active for p in params)
        self.inner.update([self.state[p] for p in params], params, grads, group, self.rounding_keys(params))

    def expected_state(self, p: nn.Parameter, saved: dict[str, Any]) -> dict[str, Any]:
        if not p.requires_grad:
            raise ValueError(
                f"this state doesn't fit: it was saved while another block than {self.selection!r} was trained: give "
                "the seed and order that it was saved with"
            )
        return self.inner.expected_state(p, saved)

    def after_step(self) -> None:
        self._steps += 1
        if self._steps >= self.switch_every:
            self._check_reached()
            self.advance()

    def advance(self) -> None:
        """Drop the active block's gradients, moments and masters, and go to the next block."""
        for p in self._active:
            self.state.pop(p, None)
        self._visit += 1
        self._steps, self._reached = 0, False
        self._activate()

    def extra_state(self) -> dict[str, Any]:
        position = {"visit": self._visit, "steps": self._steps, "reached": self._reached}
        return {"blocks": list(self.blocks), **position, **self._reach.state()}

    def load_extra_state(self, extra: dict[str, Any]) -> None:
        self._reach.load_state(extra)
        if extra["blocks"] != list(self.blocks):
            raise ValueError(f"this state was saved for other blocks: {extra['blocks']}, not {list(self.blocks)}")
        self._visit, self._steps, self._reached = extra["visit"], extra["steps"], extra["reached"]
        self._activate()

    def _leave_out(self, unreached: set[nn.Parameter]) -> None:
        self.blocks = without(self._all_blocks, unreached)
        self._activate()

    def _activate(self) -> None:
        # ordered, so that memory is freed in the same order every time
        self._active = dict.fromkeys(self.blocks[self.selection])
        self.train_only({*self._always, *self._active})

    def _order_of(self, epoch: int) -> Sequence[int]:
        count = len(self.blocks)
        if self.order == "random":
            return shuffled(count, self.seed, epoch)
        return range(count) if self.order == "ascending" else range(count)[::-1]

    def _check_reached(self) -> None:
        if not self._reached:
            raise RuntimeError(
                f"no gradient reached block {self.selection!r} in {self.switch_every} steps: the loss doesn't depend "
                f"on it, or the model uses {REENTRANT}"
            )
