"""One method on one workload: its peaks by the allocator and its times, block by block if it trains them in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

import optimizers
from benchmarks.on_gpu.card import Card
from benchmarks.on_gpu.plans import given_to
from membench.planning.blueprint import Blueprint
from membench.planning.planner import method_values
from membench.planning.workload import LOSSES, Workload
from membench.training.clock import PHASES, Clock
from membench.training.loop import training_step
from optimizers import MemoryEfficientOptimizer

MOST_VISITS = 8  # blocks that represent a longer cycle
MEMORY_STEPS = 2  # the second one has the state created by the first


class Bench:
    """A model with random weights on the card, its method, and a batch of random tokens."""

    def __init__(self, card: Card, workload: Workload, method: str, variant: Mapping[str, Any]):
        self.card, self.workload = card, workload
        blueprint = Blueprint(workload)
        card.settle()
        start = time.perf_counter()
        with torch.device(card.device):
            self.model: nn.Module = blueprint.build(blueprint.depth)
        self.batch = blueprint.batch(str(card.device))
        self.values = method_values(blueprint, method, given_to(method, variant))
        self.optimizer: MemoryEfficientOptimizer = optimizers.create(method, self.model, **self.values)
        card.settle()
        self.build_seconds = time.perf_counter() - start

    def steps(self, count: int) -> None:
        """Training steps without timing."""
        for _ in range(count):
            self.step(lambda name: nullcontext())

    def timed_steps(self, count: int) -> dict[str, list[float]]:
        """Seconds of each phase of `count` steps, or of those done before the time was up."""
        clock = Clock(self.card.device)
        for _ in range(count):
            self.step(clock.phase)
            clock.end_step()
        return clock.steps

    def step(self, phase: Any) -> None:
        """One training step; see `training_step` for `phase`."""
        loss = LOSSES[self.workload.loss]
        training_step(self.model, self.optimizer, loss, [self.batch], phase=phase)


def measure(card: Card, workload: Workload, method: str, variant: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """Peaks and times of `method` with the hyper-parameters of a `variant`; see `summary` for the keys."""
    workspace = card.workspace_bytes()
    bench = Bench(card, workload, method, variant)
    card.start_peaks()
    visits = [visit(bench, steps, **turn) for turn in turns(bench.optimizer, card)]
    return {
        **summary(visits, workspace),
        "build_seconds": bench.build_seconds,
        "outside_bytes": card.outside_bytes(),
        "waits_for_switches": True,  # early sessions didn't
    }


def turns(optimizer: MemoryEfficientOptimizer, card: Card) -> Iterator[dict[str, Any]]:
    """Select what to visit: the worst case if the method knows it, then a cycle or an evenly spaced part of one.

    The seconds of a switch are those until the card has done it.
    """
    method = type(optimizer)
    knows_worst = method.worst_case is not MemoryEfficientOptimizer.worst_case
    changes = method.advance is not MemoryEfficientOptimizer.advance
    if knows_worst:
        for number in range(optimizer.worst_cases):
            optimizer.worst_case(number)
            yield {"worst": True}
    count = max(optimizer.cycle_length, 2 if changes else 1)
    most = min(count, MOST_VISITS // 2 if knows_worst else MOST_VISITS)
    wanted = {round(number * (count - 1) / max(1, most - 1)) for number in range(most)}
    for turn in range(count):
        if turn or (knows_worst and changes):
            card.wait()
            start = time.perf_counter()
            optimizer.advance()
            card.wait()
            switch_seconds: float | None = time.perf_counter() - start
        else:
            switch_seconds = None
        if turn in wanted and (changes or not knows_worst):
            yield {"worst": False, "switch_seconds": switch_seconds}


def visit(bench: Bench, steps: int, worst: bool, switch_seconds: float | None = None) -> dict[str, Any]:
    """Peaks since the last visit and of a few steps on the current selection, then times of a few more."""
    first = bench.timed_steps(1)  # it makes the state, or new subspaces
    bench.steps(MEMORY_STEPS - 1)
    peaks = bench.card.peaks()
    seconds = bench.timed_steps(steps)
    bench.card.start_peaks()  # the next selection is made before its visit
    return {
        "selection": bench.optimizer.selection,
        "worst": worst,
        **peaks,
        "trained_weights": sum(p.numel() for p in bench.optimizer.trainable),
        "switch_seconds": switch_seconds,
        "first_update_seconds": first["update"][0],
        **{f"{name}_seconds": statistics.median(seconds[name]) for name in PHASES},
    }


def summary(visits: list[dict[str, Any]], workspace: int | None) -> dict[str, Any]:
    """A summary of the visits.

    Returns:
        peak_requested_bytes, peak_allocated_bytes, peak_reserved_bytes: the largest of any visit.
        workspace_bytes: what libraries hold in the allocator without any tensor; part of these three.
        forward_seconds, backward_seconds, update_seconds: means over the visits, without worst cases if there are
            others.
        visits: each of them.
    """
    usual = [one for one in visits if not one["worst"]] or visits
    peaks = ("peak_requested_bytes", "peak_allocated_bytes", "peak_reserved_bytes")
    return {
        **{key: max((one[key] for one in visits if one[key] is not None), default=None) for key in peaks},
        "workspace_bytes": workspace,
        **{f"{name}_seconds": statistics.mean(one[f"{name}_seconds"] for one in usual) for name in PHASES},
        "visits": visits,
    }
