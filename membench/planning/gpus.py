"""How many GPUs a method needs: models sharded over more of them are planned until they fit, and over fewer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from membench.planning.blueprint import Blueprint
from membench.planning.budget import plan_within
from membench.planning.method import Plan

COUNTS = (1, 2, 4, 8, 16, 32, 64)


def needed(plan: Plan, blueprint: Blueprint, values: Mapping[str, Any], budget_bytes: int) -> int | None:
    """The least of the `COUNTS` of GPUs, each with `budget_bytes`, on which a method fits; None if none does.

    Args:
        plan: of one of some GPUs, over which the model is sharded.
        blueprint: of its workload.
        values: the method's hyper-parameters.
        budget_bytes: of a GPU, its process's context included.
    """
    planned, fits_as_planned = blueprint.workload.gpus, plan.fits_in(budget_bytes)

    def fits(count: int) -> bool:
        if count == planned or (count > planned and fits_as_planned):
            return fits_as_planned
        return plan_within(plan, blueprint.with_workload(gpus=count), values, budget_bytes) is not None

    if fits(1):  # without buffers
        return 1
    start = max(1, _guess(plan, planned, budget_bytes))
    if not fits(COUNTS[start]):
        return next((count for count in COUNTS[start + 1 :] if fits(count)), None)
    while start > 1 and fits(COUNTS[start - 1]):
        start -= 1
    return COUNTS[start]


def _guess(plan: Plan, planned: int, budget_bytes: int) -> int:
    """Which of the counts would do if all that lasts were shared out evenly, and nothing else."""
    total, lasting = plan.total_bytes, plan.lasting_bytes
    guesses = [number for number, count in enumerate(COUNTS) if total + lasting * (planned / count - 1) <= budget_bytes]
    return guesses[0] if guesses else len(COUNTS) - 1
