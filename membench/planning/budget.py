"""What fits into a budget: the largest batch, the longest sequence, the largest built-in model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

from membench.memory.allocator import CUDA_CONTEXT_BYTES
from membench.planning.blueprint import Blueprint
from membench.planning.extrapolate import NotAlikeError
from membench.planning.growth import Growth
from membench.planning.method import Plan, TooLargeError, plan_method
from membench.planning.workload import Workload
from tasks.models.source import CONFIGURATIONS, PREFIX

CHUNKS = 8  # pieces of a sequence whose logits are there one after another, if that is tried
_FEW = 8  # sequences: a batch that one would like to be larger
_ALIGNED = 32  # tokens: some kernels round up to a multiple of them
_MOST = 1 << 22  # sequences or tokens: beyond any use


@dataclass(frozen=True)
class Limits:
    """The largest of each that fits with everything else as planned; 0 or None if nothing does.

    A plan says that it fits, and another that one more doesn't. What the allocator adds follows no rule, so an even
    larger one might fit again; the largest found is returned.

    Attributes:
        batch: sequences.
        sequence: tokens, at most as many as the model has positions for.
        model: name of a built-in configuration of the same kind.
        in_chunks: where only a few sequences fit on one GPU, how many do ("batch") with so many
            "loss_chunks", if these are more.
    """

    batch: int
    sequence: int
    model: str | None
    in_chunks: dict[str, int] | None = None


def find_limits(plan: Plan, blueprint: Blueprint, values: Mapping[str, Any], budget_bytes: int) -> Limits:
    """What fits into `budget_bytes`, the process's own context included.

    Every allocation is linear in the batch and (because of the attention mask) quadratic in the sequence: see `growth`.
    Models are planned, starting from the size that the current plan suggests.
    """
    model = _largest_model(plan, blueprint, values, budget_bytes)
    if plan.lasting_bytes + CUDA_CONTEXT_BYTES > budget_bytes:
        return Limits(0, 0, model)
    batch = largest_batch(plan, blueprint, values, budget_bytes)
    return Limits(
        batch,
        longest_sequence(plan, blueprint, values, budget_bytes),
        model,
        _in_chunks(plan, blueprint, values, budget_bytes, batch),
    )


def _in_chunks(
    plan: Plan, blueprint: Blueprint, values: Mapping[str, Any], budget: int, without: int
) -> dict[str, int] | None:
    workload = blueprint.workload
    if not 0 < without < _FEW or not blueprint.is_causal or workload.loss_chunks > 1 or workload.gpus > 1:
        return None
    other = blueprint.with_workload(loss_chunks=CHUNKS)
    made = plan_within(plan, other, values, budget)
    found = largest_batch(made, other, values, budget) if made else 0
    return {"loss_chunks": CHUNKS, "batch": found} if found > without else None


def plan_within(plan: Plan, blueprint: Blueprint, values: Mapping[str, Any], budget: int) -> Plan | None:
    """The plan of the same method for another model, training step or `values`, if it fits into `budget` bytes.

    The process's own context is included. There is none either if the method or the model refuses.
    """
    try:
        room = budget - CUDA_CONTEXT_BYTES
        made = plan_method(blueprint, plan.method, values, most_bytes=room, skipped=plan.skipped)
    except (TooLargeError, ValueError):
        return None
    return made if made.fits_in(budget) else None


def largest_batch(plan: Plan, blueprint: Blueprint, values: Mapping[str, Any], budget: int) -> int:
    """The most sequences per step that fit into `budget` bytes."""
    workload = blueprint.workload
    if workload.micro_batch_size == 1 and not plan.fits_in(budget):
        return 0
    start = max(2, workload.micro_batch_size)  # a single sequence has strides that no other batch has
    found = _last_that_fits(plan, blueprint, values, budget, "micro_batch_size", (start, 2 * start), _MOST)
    return found * workload.gradient_accumulation_steps


def longest_sequence(plan: Plan, blueprint: Blueprint, values: Mapping[str, Any], budget: int) -> int:
    """The most tokens per sequence that fit into `budget` bytes, no more than the model has positions for."""
    length, most = blueprint.workload.sequence_length, blueprint.longest_sequence or _MOST
    return _last_that_fits(plan, blueprint, values, budget, "sequence_length", learning_lengths(length, most), most)


def learning_lengths(length: int, most: int) -> list[int]:
    """Three lengths up to `most` to learn a polynomial from, the planned one among them; fewer if it is tiny."""
    if most >= 3 * length:
        return [length, 2 * length, 3 * length]
    low, high = (length, most) if 2 * most > 3 * length else (length // 2, length)
    middle = (low + high) // 2
    aligned = middle // _ALIGNED * _ALIGNED
    return sorted({max(1, low), aligned if low < aligned else middle, high} - {0})


def _last_that_fits(
    plan: Plan,
    blueprint: Blueprint,
    values: Mapping[str, Any],
    budget: int,
    option: str,
    points: Sequence[int],
    most: int,
) -> int:
    """The largest size found, up to `most`, that fits while the next one doesn't."""

    @cache
    def planned(at: int) -> Plan | None:
        if at == getattr(blueprint.workload, option):
            return plan if plan.fits_in(budget) else None
        return plan_within(plan, blueprint.with_size(option, at), values, budget)

    def fits(at: int) -> bool:
        return planned(at) is not None

    with suppress(NotAlikeError):
        try:
            growth = Growth(plan, blueprint, values, option, points)
        except NotAlikeError:  # steps at the plan's own size may differ from all larger ones
            there = planned(points[0])
            if there is None:
                return settle(fits, points[0], most)
            growth = Growth(there, blueprint.with_size(option, points[0]), values, option, points)
        guess = _search(growth, budget, most)
        if growth.holds(max(guess, 1)) and (guess == most or growth.holds(guess + 1)):
            return guess
        return settle(fits, guess, most)
    return largest(fits, most)


def _search(growth: Growth, budget: int, most: int) -> int:
    """A size that fits while the next one doesn't."""
    room = budget - CUDA_CONTEXT_BYTES

    def whose_peak_fits_with(surplus: int) -> int:
        return largest(lambda at: growth.peak_bytes(at) + surplus <= room, most)

    low, high = 0, whose_peak_fits_with(0) + 1
    at = whose_peak_fits_with(growth.surplus_bytes(max(high - 1, 1)))  # with all that the allocator would like
    while high - low > 1:
        at = min(max(at, low + 1), high - 1)
        low, high = (at, high) if growth.has_room(at, room) else (low, at)
        at = (low + high) // 2
    return low


def largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number from 1 to `most` that fits, if all below one that fits do too; 0 if none."""
    low, high = 0, 1
    while high <= most and fits(high):
        low, high = high, 2 * high
    return _between(fits, low, min(high, most + 1))


def _between(fits: Callable[[int], bool], low: int, high: int) -> int:
    """A number that fits while the next one doesn't, between `low`, which fits, and `high`, which doesn't."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def settle(fits: Callable[[int], bool], start: int, most: int) -> int:
    """The number nearest to `start` that fits while the next one doesn't, or `most`; 0 if none is found."""
    low, high, at, step = 0, most + 1, max(start, 1), 1
    while high - low > 1:
        if fits(at):
            low, at = at, at + step
        else:
            high, at = at, at - step
        if low and high <= most:
            at = (low + high) // 2
        at, step = min(max(at, low + 1), high - 1), 2 * step
    return low


def _largest_model(plan: Plan, blueprint: Blueprint, values: Mapping[str, Any], budget: int) -> str | None:
    """Walk up or down from the size that would need the budget if bytes depended on weights alone."""
    names = built_in_models(blueprint.is_causal)
    expected = blueprint.parameters * budget / plan.total_bytes
    start = sum(size <= expected for size in names.values())

    def fits(name: str) -> bool:
        if PREFIX + name == blueprint.source.name:
            return plan.fits_in(budget)
        other = _of_built_in(replace(blueprint.workload, model=name))
        takes = (other.longest_sequence or _MOST) >= blueprint.workload.sequence_length
        return takes and plan_within(plan, other, _with_head(values, blueprint, other), budget) is not None

    return walk(list(names), start, fits)


def _with_head(values: Mapping[str, Any], blueprint: Blueprint, other: Blueprint) -> Mapping[str, Any]:
    """The hyper-parameters with the name of another model's new head, which comes first of what is always trained."""
    if "always_train" not in values:
        return values
    return {**values, "always_train": (*other.head, *values["always_train"][len(blueprint.head) :])}


def walk(names: Sequence[str], start: int, fits: Callable[[str], bool]) -> str | None:
    """The last of `names` that fits, searching from `start`: up while they fit, else down until one does."""
    best = None
    for name in names[start:]:
        if not fits(name):
            break
        best = name
    return best or next((name for name in reversed(names[:start]) if fits(name)), None)


_of_built_in = cache(Blueprint)  # all methods are planned on the same ones


@cache
def built_in_models(causal: bool) -> dict[str, int]:
    """Built-in configurations of one kind by number of weights, the smallest first; one of each size."""
    sizes: dict[int, str] = {}
    for name in CONFIGURATIONS:
        blueprint = Blueprint(Workload(name))
        if blueprint.is_causal == causal:
            sizes.setdefault(_weights(blueprint), name)
    return {sizes[size]: size for size in sorted(sizes)}


def _weights(blueprint: Blueprint) -> int:
    """How many weights there are, without building all layers: those of a built-in model have as many each."""
    with torch.device("meta"):
        one, two = (sum(p.numel() for p in blueprint.build(depth).parameters()) for depth in (1, 2))
    return one + (blueprint.depth - 1) * (two - one)
