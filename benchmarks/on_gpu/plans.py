"""The plans, made by processes on the machine's other cores while the GPU measures; none of them uses the GPU."""

from __future__ import annotations

import gc
import multiprocessing
import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from inspect import signature
from typing import Any

import torch

import optimizers
from benchmarks.on_gpu.workloads import EVERY_METHOD
from membench.planning.blueprint import Blueprint
from membench.planning.budget import largest_batch
from membench.planning.method import plan_method
from membench.planning.planner import method_values, plan
from membench.planning.workload import Workload

Row = dict[str, Any]
# What to try if the defaults don't fit: less of a master, then no master at all.
SMALLER: tuple[dict[str, Any], ...] = ({}, {"master_weights": False}, {"master_weights": False, "in_backward": True})


class Plans:
    """Plans by name, begun in the order in which they are requested.

    Args:
        workers: processes. They are forked at the first plan: before this process talks to a GPU.
    """

    def __init__(self, workers: int):
        gc.collect()
        gc.freeze()  # imported modules aren't garbage, and the meter collects before each step
        context = multiprocessing.get_context("fork")
        self._pool = ProcessPoolExecutor(workers, context, initializer=_without_gpu)
        self._made: dict[str, Future[Any]] = {}

    def begin(self, name: str, work: Callable[..., Any], *arguments: Any) -> None:
        self._made[name] = self._pool.submit(work, *arguments)

    def result(self, name: str) -> Any:
        """Wait for a plan and return it."""
        return self._made[name].result()

    def stop(self) -> None:
        """Drop what hasn't begun, and end the processes."""
        processes = list((self._pool._processes or {}).values())
        self._pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.kill()


def _without_gpu() -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(1)


def variants(method: str) -> list[dict[str, Any]]:
    """The settings in `SMALLER` that a method knows."""
    known = signature(optimizers.get(method)).parameters
    return [given for given in SMALLER if set(given) <= set(known)]


def given_to(method: str, variant: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The hyper-parameters that differ from the method's defaults, in the planner's form."""
    return {"*": EVERY_METHOD["*"], method: {**EVERY_METHOD.get(method, {}), **variant}}


def fitting(workload: Workload, method: str, total_bytes: int | None) -> list[Row]:
    """The plans of a method's variants up to the first that fits a card; each with the variant as `given`.

    Raises:
        ValueError: the method refuses the model.
    """
    rows = []
    for variant in variants(method):
        row = plan(workload, [method], given_to(method, variant))["rows"][0]
        keys = ("peak_allocated_bytes", "peak_reserved_bytes", "estimated_total_bytes", "peak_phase", "peak_selection")
        enough = fits(row, total_bytes)
        rows.append(
            {"given": variant, "fits": enough, **{key: row[key] for key in (*keys, "at_peak", "trained_weights")}}
        )
        if enough:
            break
    return rows


def fits(row: Row, total_bytes: int | None) -> bool:
    """Does a plan fit a card of so many bytes? If nothing limits it, it does."""
    return total_bytes is None or row["estimated_total_bytes"] <= total_bytes


def planned_batch(workload: Workload, method: str, total_bytes: int) -> int:
    """The largest batch on a card of `total_bytes`, as `membench plan --budget` says it."""
    blueprint = Blueprint(workload)
    values = method_values(blueprint, method, given_to(method, {}))
    return largest_batch(plan_method(blueprint, method, values), blueprint, values, total_bytes)
