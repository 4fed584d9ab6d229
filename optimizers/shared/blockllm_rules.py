"""When BlockLLM chooses anew, and which tensors: the paper's rule and the authors' release's (arXiv 2406.17296)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, ClassVar


class PaperRule:
    """Choose by ||g|| / f, f = 1 + how often chosen, once the loss isn't below the mean of the last `patience` losses.

    Args:
        sizes: weights of each tensor that may be chosen.
        sparsity: s; the budget is round((1 - s) n) of n weights.
        patience: m, how many past losses count.
        update_every: not used by this rule.
    """

    masks_entries: ClassVar[bool] = True
    probe_every: ClassVar[int] = 1

    def __init__(self, sizes: list[int], sparsity: float, patience: int, update_every: int):
        self.sizes, self.sparsity, self.patience, self.update_every = sizes, sparsity, patience, update_every
        self.budget = max(1, round((1.0 - sparsity) * sum(sizes)))  # weights
        self.counts = [0] * len(sizes)  # how often each was chosen
        self.norms: dict[int, float] = {}  # the newest known norm of each
        self.chosen: list[int] = []
        self.steps = 0
        self.losses: list[float] = []  # since the last choice, the newest `patience` of them

    def first(self, order: Iterable[int]) -> list[int]:
        """The first of `order` that reach the budget."""
        chosen: list[int] = []
        for i in order:
            if sum(self.sizes[j] for j in chosen) >= self.budget:
                break
            chosen.append(i)
        return chosen

    def choose(self) -> list[int]:
        """The tensors to train from now on, by what is known."""
        return self.first(sorted(range(len(self.sizes)), key=self._rank))

    def take(self, chosen: list[int]) -> None:
        """Make `chosen` the choice."""
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
        """What must be remembered, as JSON."""
        norms = [self.norms.get(i) for i in range(len(self.sizes))]
        shared = {"chosen": self.chosen, "counts": self.counts, "steps": self.steps, "losses": self.losses}
        return {**shared, "norms": norms}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what `state` gave."""
        self.chosen, self.counts = list(state["chosen"]), list(state["counts"])
        self.steps, self.losses = state["steps"], list(state["losses"])
        self.norms = {i: norm for i, norm in enumerate(state["norms"]) if norm is not None}

    def _rank(self, i: int) -> float:
        return -self.norms.get(i, -math.inf) / self._penalty(i)

    def _penalty(self, i: int) -> float:
        return 1.0 + self.counts[i]


class ReleaseRule(PaperRule):
    """The package's rule: whole tensors by ||g|| / exp(f / step), at most every `update_every` steps.

    Two defects are mended: the first choice and each later one hold at least one tensor, and the best that fits is
    taken where the very best is larger than the budget.
    """

    masks_entries = False
    probe_every = 20

    def __init__(self, sizes: list[int], sparsity: float, patience: int, update_every: int):
        super().__init__(sizes, sparsity, patience, update_every)
        self.loss_sum = 0.0  # over all steps

    def first(self, order: Iterable[int]) -> list[int]:
        """The first int((1 - s) T) of T tensors."""
        return list(order)[: max(1, int((1.0 - self.sparsity) * len(self.sizes)))]

    def choose(self) -> list[int]:
        chosen: list[int] = []
        ranked = sorted(range(len(self.sizes)), key=self._rank)
        for i in ranked:
            if sum(self.sizes[j] for j in chosen) + self.sizes[i] <= self.budget:
                chosen.append(i)
        return chosen or ranked[:1]

    def is_time(self, loss: float) -> bool:
        self.steps += 1
        self.loss_sum += loss
        self.losses = [*self.losses, loss][-self.patience :]
        due = len(self.losses) == self.patience and self.steps % self.update_every == 0
        return due and self.loss_sum / self.steps < sum(self.losses) / self.patience

    def state(self) -> dict[str, Any]:
        return {**super().state(), "loss_sum": self.loss_sum}

    def load_state(self, state: dict[str, Any]) -> None:
        super().load_state(state)
        self.loss_sum = state["loss_sum"]

    def _penalty(self, i: int) -> float:
        return math.exp(self.counts[i] / max(1, self.steps))


RULES = {"paper": PaperRule, "release": ReleaseRule}
