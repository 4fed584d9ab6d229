"""The meter on a GPU: what it sees against what the allocator is asked for, and what it costs."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks.on_gpu.card import Card
from benchmarks.on_gpu.methods import MEMORY_STEPS, Bench
from membench.memory.meter import MemoryMeter
from membench.planning.workload import Workload
from membench.training.clock import Clock


def compare(card: Card, workload: Workload, method: str, steps: int) -> dict[str, Any]:
    """Metered steps against plain ones, on the same selection.

    Returns:
        metered_bytes: the meter's peak.
        peak_requested_bytes (and allocated, reserved): the allocator's in the same steps.
        plain_requested_bytes: the allocator's in plain steps before them.
        workspace_bytes: what libraries hold in the allocator; part of these, but unseen by the meter.
        plain_seconds, metered_seconds: medians per step.
    """
    workspace = card.workspace_bytes()
    bench = Bench(card, workload, method, {})
    bench.optimizer.worst_case()
    card.start_peaks()
    bench.steps(MEMORY_STEPS)
    plain_bytes = card.peaks()["peak_requested_bytes"]
    plain = bench.timed_steps(steps)
    card.settle()
    card.start_peaks()
    metered_bytes, metered = _metered_steps(bench, steps)
    return {
        "metered_bytes": metered_bytes,
        **card.peaks(),
        "workspace_bytes": workspace,
        "plain_requested_bytes": plain_bytes,
        "plain_seconds": _step_seconds(plain),
        "metered_seconds": _step_seconds(metered),
    }


def _metered_steps(bench: Bench, steps: int) -> tuple[int, dict[str, list[float]]]:
    """The peak that the meter sees, and the seconds of each phase."""
    clock = Clock(bench.card.device)
    with MemoryMeter(bench.model, bench.optimizer) as meter:

        @contextmanager
        def phase(name: str) -> Iterator[None]:
            with clock.phase(name), meter.phase(name):
                yield

        for _ in range(steps):
            with meter.hold([bench.batch]):
                bench.step(phase)
            clock.end_step()
    return meter.report()["peak_allocated_bytes"], clock.steps


def _step_seconds(phases: dict[str, list[float]]) -> float:
    return statistics.median(map(sum, zip(*phases.values(), strict=True)))
