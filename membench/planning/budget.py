"""What fits into a budget: the largest batch, the longest sequence, the largest built-in model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from membench.memory.allocator import CUDA_CONTEXT_BYTES
from membench.planning.blueprint import Blueprint
from membench.planning.extrapolate import weights
from membench.planning.method import Plan, profile_like
from membench.planning.moments import Moments
from membench.planning.workload import Workload
from reports.parts import LASTING
from tasks.models.source import CONFIGURATIONS, DTYPES, PREFIX

_MOST = 1 << 22  # sequences or tokens: beyond any use


@dataclass(frozen=True)
class Limits:
    """The largest of each that fits with all else as planned; 0 or None if nothing does.

    Attributes:
        batch: sequences.
        sequence: tokens, at most those that the model has positions for.
        model: name of a built-in configuration of the same kind.
    """

    batch: int
    sequence: int
    model: str | None


def find_limits(plan: Plan, blueprint: Blueprint, values: Mapping[str, Any], budget_bytes: int) -> Limits:
    """What fits into `budget_bytes`, the process's own context included.

    A batch is on a line and a sequence on a parabola (the attention mask), so a few sizes are simulated and the rest
    follows. Models are planned, from the size that the plan at hand suggests.
    """
    model = _largest_model(plan, blueprint, values, budget_bytes)
    if lasting_bytes(plan.profile) + CUDA_CONTEXT_BYTES > budget_bytes:
        return Limits(0, 0, model)
    return Limits(
        largest_batch(plan, blueprint, values, budget_bytes),
        _longest_sequence(plan, blueprint, values, budget_bytes),
        model,
    )


def lasting_bytes(profile: Moments) -> int:
    """What is there all the time, whatever the batch is."""
    return max(sum(moment.sizes[1 + part] for part in LASTING) for moment in profile.moments.values())


def total_bytes(profile: Moments) -> int:
    """What a process takes on a GPU."""
    return profile.maximum(0) + profile.surplus_bytes + CUDA_CONTEXT_BYTES


def largest_batch(plan: Plan, blueprint: Blueprint, values: Mapping[str, Any], budget: int) -> int:
    """The most sequences a step that fit into `budget` bytes."""
    size = blueprint.workload.batch_size
    start = max(2, size)  # one sequence alone has strides that no other batch has
    profiles = {size: plan.profile}
    for batch in {start, 2 * start} - {size}:
        profiles[batch] = profile_like(plan, blueprint.with_workload(batch_size=batch), values)
    curve = total_curve({batch: profiles[batch] for batch in (start, 2 * start)})
    known = {batch: total_bytes(one) for batch, one in profiles.items()}
    return largest(lambda batch: known.get(batch, curve(batch)) <= budget, _MOST)


def _longest_sequence(plan: Plan, blueprint: Blueprint, values: Mapping[str, Any], budget: int) -> int:
    length = blueprint.workload.sequence_length
    profiles = {length: plan.profile}
    for longer in (2 * length, 3 * length):
        profiles[longer] = profile_like(plan, blueprint.with_workload(sequence_length=longer), values)
    curve = total_curve(profiles)
    return largest(lambda tokens: curve(tokens) <= budget, blueprint.longest_sequence)


def total_curve(profiles: Mapping[int, Moments]) -> Callable[[int], int]:
    """`total_bytes` as a function, from profiles at some points: each moment on a polynomial, the surplus on a line."""
    points, known = tuple(profiles), list(profiles.values())
    shared = [key for key in known[0].moments if all(key in one.moments for one in known)]
    rows = {tuple([one.moments[key].sizes[0] for one in known]) for key in shared}
    surplus = (known[0].surplus_bytes, known[-1].surplus_bytes)

    def total(at: int) -> int:
        weight, line = weights(points, at), weights((points[0], points[-1]), at)
        return max(map(weight.apply, rows)) + max(0, line.apply(surplus)) + CUDA_CONTEXT_BYTES

    return total


def largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number from 1 to `most` that fits, where all below one that fits do; 0 if none."""
    low, high = 0, 1
    while high <= most and fits(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _largest_model(plan: Plan, blueprint: Blueprint, values: Mapping[str, Any], budget: int) -> str | None:
    """Walks up or down from the size that needs the budget, if bytes went by weights alone."""
    names = built_in_models(blueprint.is_causal)
    expected = parameters(blueprint) * budget / total_bytes(plan.profile)
    start = sum(size <= expected for size in names.values())
    room = budget - CUDA_CONTEXT_BYTES
    ordered = [name for name, size in names.items() if size * DTYPES[blueprint.workload.dtype].itemsize <= room]

    def fits(name: str) -> bool:
        if PREFIX + name == blueprint.source.name:
            return total_bytes(plan.profile) <= budget
        other = blueprint.with_workload(model=name)
        return other.longest_sequence >= blueprint.workload.sequence_length and (
            total_bytes(profile_like(plan, other, values)) <= budget
        )

    return walk(ordered, min(start, len(ordered)), fits)


def walk(names: Sequence[str], start: int, fits: Callable[[str], bool]) -> str | None:
    """The last of `names` that fits, looking from `start` on: up while they fit, else down until one does."""
    best = None
    for name in names[start:]:
        if not fits(name):
            break
        best = name
    return best or next((name for name in reversed(names[:start]) if fits(name)), None)


@cache
def built_in_models(causal: bool) -> dict[str, int]:
    """Built-in configurations of one kind by their number of weights, the smallest first; one of each size."""
    sizes: dict[int, str] = {}
    for name in CONFIGURATIONS:
        blueprint = Blueprint(Workload(name))
        if blueprint.is_causal == causal:
            sizes.setdefault(parameters(blueprint), name)
    return {sizes[size]: size for size in sorted(sizes)}


@cache
def parameters(blueprint: Blueprint) -> int:
    """Weights of a model; its layers are alike, so two depths tell."""
    with torch.device("meta"):
        one, more = (sum(p.numel() for p in blueprint.build(depth).parameters()) for depth in (1, 1 + blueprint.period))
    return one + (more - one) * (blueprint.depth - 1) // blueprint.period
