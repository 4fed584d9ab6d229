"""When BlockLLM chooses again, and which tensors: the paper's rule, and that of the authors' code (2406.17296)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

from optimizers.shared.subset_sums import subset_below
from optimizers.shared.values import check_indices


class PaperRule:
    """Choose by ||g|| / f, f = 1 + how often chosen, once the loss isn't below the mean of the last `patience` losses.

    Args:
        sizes: number of weights in each tensor that may be chosen.
        sparsity: s; the budget is round((1 - s) n) of n weights.
        patience: m, how many past losses count.
        update_every: not used by this rule.
    """

    masks_entries: ClassVar[bool] = True
    probe_every: ClassVar[int] = 1
    keeps_probes: ClassVar[bool] = False  # is a tensor probed until the next ones are due?

    def __init__(self, sizes: list[int], sparsity: float, patience: int, update_every: int):
        self.sizes, self.sparsity, self.patience, self.update_every = sizes, sparsity, patience, update_every
        self.budget = max(1, round((1.0 - sparsity) * sum(sizes)))  # weights
        self.counts = [0] * len(sizes)  # how often each was chosen
        self.norms: dict[int, float] = {}  # the newest known norm of each
        self.chosen: list[int] = []
        self.steps = 0
        self.losses: list[float] = []  # since the last choice, the newest `patience` of them

    def first(self, order: Iterable[int]) -> list[int]:
        """The first tensors in `order` that together reach the budget."""
        chosen: list[int] = []
        for i in order:
            if sum(self.sizes[j] for j in chosen) >= self.budget:
                break
            chosen.append(i)
        return chosen

    def fullest(self, largest: Sequence[int]) -> list[int]:
        """The choice with the most weights that any order makes; `largest` is in order of size, the largest first.

        It fills the budget up as far as possible without reaching it, and then takes the largest.
        """
        return [*subset_below(self.sizes, largest[1:], self.budget), largest[0]]

    def choose(self, order: Sequence[int] = ()) -> list[int]:
        """The tensors to train from now on, by the known norms; `order` is a random order."""
        return self.first(sorted(range(len(self.sizes)), key=self._rank))

    def take(self, chosen: list[int]) -> None:
        """Choose `chosen`."""
        self.chosen = chosen
        self.losses = []
        for i in chosen:
            self.counts[i] += 1

    def is_time(self, loss: float) -> bool:
        """Note the loss of a step: is it time for a new choice?"""
        self.steps += 1
        stalled = len(self.losses) == self.patience and loss >= sum(self.losses) / self.patience
        self.losses = [*self.losses, loss][-self.patience :]
        return stalled

    def state(self) -> dict[str, Any]:
        """What must be saved, as JSON."""
        norms = [self.norms.get(i) for i in range(len(self.sizes))]
        shared = {"chosen": self.chosen, "counts": self.counts, "steps": self.steps, "losses": self.losses}
        return {**shared, "norms": norms}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned.

        Raises:
            ValueError: it is for another number of tensors, or chooses one that doesn't exist.
        """
        count = len(self.sizes)
        if len(state["counts"]) != count or len(state["norms"]) != count:
            raise ValueError(f"this state is damaged: its counts and norms must be of {count} tensors")
        check_indices("chosen", state["chosen"], count)
        self.chosen, self.counts = list(state["chosen"]), list(state["counts"])
        self.steps, self.losses = state["steps"], list(state["losses"])
        self.norms = {i: norm for i, norm in enumerate(state["norms"]) if norm is not None}

    def _rank(self, i: int) -> float:
        return -self.norms.get(i, -math.inf) / self._penalty(i)

    def _penalty(self, i: int) -> float:
        return 1.0 + self.counts[i]


class ReleaseRule(PaperRule):
    """The authors' package: whole tensors, by ||g|| / exp(f / step), f being a tensor's share of all choices so far.

    It chooses again at steps divisible by `update_every`, once more than `patience` losses have been seen since the
    last choice and their mean is below that of the newest `patience` losses. The tensors with a known norm are taken
    in the order of their rank, up to the one that reaches the budget of int((1 - s) n) weights, which is left out; if
    too few norms are known, others are added at random. The loss of the very first step isn't kept.

    Three defects are fixed: the first step trains; a choice holds at least one tensor; and if the best tensor is
    larger than the budget, the best that fit are taken.
    """

    masks_entries = False
    probe_every = 20
    keeps_probes = True

    def __init__(self, sizes: list[int], sparsity: float, patience: int, update_every: int):
        super().__init__(sizes, sparsity, patience, update_every)
        self.budget = int((1.0 - sparsity) * sum(sizes))
        self.loss_sum, self.loss_count = 0.0, 0  # of the losses since the last choice
        self.shares = [1.0 / len(sizes)] * len(sizes)  # f of each

    def first(self, order: Iterable[int]) -> list[int]:
        """The first int((1 - s) T) of T tensors."""
        return list(order)[: max(1, int((1.0 - self.sparsity) * len(self.sizes)))]

    def choose(self, order: Sequence[int] = ()) -> list[int]:
        ranked = sorted(self.norms, key=self._rank)
        chosen: list[int] = []
        reached = 0
        for i in ranked:
            reached += self.sizes[i]
            if reached >= self.budget:
                return chosen or self._that_fit(ranked)
            chosen.append(i)
        for i in order:
            if reached >= self.budget:
                break
            if i not in chosen:
                chosen.append(i)
                reached += self.sizes[i]
        return chosen or self._that_fit(ranked or list(order))

    def _that_fit(self, ranked: list[int]) -> list[int]:
        chosen: list[int] = []
        for i in ranked:
            if sum(self.sizes[j] for j in chosen) + self.sizes[i] < self.budget:
                chosen.append(i)
        return chosen or ranked[:1]

    def take(self, chosen: list[int]) -> None:
        super().take(chosen)
        self.loss_sum, self.loss_count = 0.0, 0
        for i in sorted(chosen) if self.steps else ():  # the first choice isn't counted
            self.shares[i] += 1.0
            self._normalise()

    def _normalise(self) -> None:
        total = sum(self.shares)
        self.shares = [share / total for share in self.shares]

    def is_time(self, loss: float) -> bool:
        self.steps += 1
        if self.steps > 1:
            self.loss_sum += loss
            self.loss_count += 1
            self.losses = [*self.losses, loss][-self.patience :]
        if self.loss_count <= self.patience or self.steps % self.update_every:
            return False
        return self.loss_sum / self.loss_count < sum(self.losses) / self.patience

    def state(self) -> dict[str, Any]:
        return {**super().state(), "loss_sum": self.loss_sum, "loss_count": self.loss_count, "shares": self.shares}

    def load_state(self, state: dict[str, Any]) -> None:
        super().load_state(state)
        self.loss_sum, self.loss_count = state["loss_sum"], state["loss_count"]
        self.shares = list(state["shares"])

    def _penalty(self, i: int) -> float:
        return math.exp(self.shares[i] / max(1, self.steps))


RULES = {"paper": PaperRule, "release": ReleaseRule}
