"""Real steps to compare with a plan: what torch's allocator, or the meter on a CPU, saw of the same training."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from membench.memory.breakdown import find_peaks
from membench.planning.blueprint import Blueprint
from membench.planning.planner import Given, method_values
from membench.planning.simulate import simulate
from membench.planning.workload import Workload
from reports import formats
from reports.table import NOTHING, Table, gib
from tasks.models.damage import is_out_of_memory

_NOTE = "Planned, allocated and reserved at their peaks, GiB; with random weights, on the same selection."


def check_gpu() -> None:
    """Raises ValueError if there is no GPU."""
    if not torch.cuda.is_available():
        raise ValueError("--verify runs real steps on a GPU, and this machine has none: leave it out")


def report(
    workload: Workload, methods: Sequence[str], given: Given, document: Mapping[str, Any], device: str | None = None
) -> str:
    """A table of planned, allocated and reserved bytes.

    Args:
        workload: what was planned.
        methods: in the order of the plan.
        given: their hyper-parameters.
        document: the plan.
        device: "cpu" to try this without a GPU: the meter then replaces the allocator.
    """
    blueprint, device = Blueprint(workload), device or "cuda"
    rows = {row["method"]: row for row in document["rows"]}
    cells = [
        [name, *_planned(rows[name]), *measured(blueprint, name, method_values(blueprint, name, given), device)]
        for name in methods
        if name in rows
    ]
    headers = ["method", "planned", "planned reserved", "allocated", "reserved"]
    return formats.plain([([], [Table(f"Real steps on {device}", headers, cells, {"method"}, [_NOTE])], [])]).strip()


def _planned(row: Mapping[str, Any]) -> list[str]:
    return [gib(row["peak_allocated_bytes"]), gib(row["peak_reserved_bytes"])]


def measured(blueprint: Blueprint, method: str, values: Mapping[str, Any], device: str) -> list[str]:
    """Allocated and reserved at the peak, as text."""
    try:
        return [NOTHING if size is None else gib(size) for size in measure(blueprint, method, values, device)]
    except Exception as error:
        if not is_out_of_memory(error):  # which a library of the card says in its own way
            raise
        return ["out of memory", NOTHING]


def measure(blueprint: Blueprint, method: str, values: Mapping[str, Any], device: str) -> tuple[int, int | None]:
    """Bytes allocated and reserved at the peak of real steps; on a CPU, what the meter saw, and None."""
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        gc.collect()  # what was measured before is no part of the peaks: a method and its model refer to each other
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    simulation = simulate(blueprint, method, values, blueprint.depth, device=device)
    if on_gpu:
        return torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    peaks, _ = find_peaks(simulation.trace)
    return max(peak for peak, _ in peaks), None
