"""What fits into a budget: the largest batch, the longest sequence, the largest built-in model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from membench.memory.allocator import CUDA_CONTEXT_BYTES
from membench.planning.blueprint import Blueprint
from membench.planning.extrapolate import NotAlikeError, weights
from membench.planning.method import Plan, plan_method, whole_profile
from membench.planning.moments import Moments
from membench.planning.simulate import Simulation
from membench.planning.workload import Workload
from reports.parts import LASTING
from tasks.models.source import CONFIGURATIONS, DTYPES, PREFIX

_MOST = 1 << 22  # sequences or tokens: beyond any use
_STEPS = 64  # from the largest size whose tensors alone would fit, down to nothing

Size = Callable[[int], int]  # batch or sequence -> bytes


@dataclass(frozen=True)
class Limits:
    """The largest of each that fits with everything else as planned; 0 or None if nothing does.

    Each is verified by plans: it fits, and one more doesn't. What the allocator adds follows no rule, so an even larger
    one might fit again; the largest found is returned.

    Attributes:
        batch: sequences.
        sequence: tokens, at most as many as the model has positions for.
        model: name of a built-in configuration of the same kind.
    """

    batch: int
    sequence: int
    model: str | None


def find_limits(plan: Plan, blueprint: Blueprint, values: Mapping[str, Any], budget_bytes: int) -> Limits:
    """What fits into `budget_bytes`, the process's own context included.

    Every allocation is linear in the batch and (because of the attention mask) quadratic in the sequence. So a few
    sizes are simulated, the others follow, and the answer is planned, as is the next size. Models are planned, starting
    from the size that the current plan suggests.
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
    """What is always there, whatever the batch."""
    return max(sum(moment.sizes[1 + part] for part in LASTING) for moment in profile.moments.values())


def total_bytes(profile: Moments) -> int:
    """What a process takes on a GPU."""
    return profile.maximum(0) + profile.surplus_bytes + CUDA_CONTEXT_BYTES


def largest_batch(plan: Plan, blueprint: Blueprint, values: Mapping[str, Any], budget: int) -> int:
    """The most sequences per step that fit into `budget` bytes."""
    size = blueprint.workload.batch_size
    start = max(2, size)  # a single sequence has strides that no other batch has

    @cache
    def planned(batch: int) -> Plan:
        if batch == size:
            return plan
        return plan_method(blueprint.with_workload(batch_size=batch), plan.method, values)

    return _last_that_fits(planned, (start, 2 * start), budget, _MOST)


def _longest_sequence(plan: Plan, blueprint: Blueprint, values: Mapping[str, Any], budget: int) -> int:
    length = blueprint.workload.sequence_length

    @cache
    def planned(tokens: int) -> Plan:
        if tokens == length:
            return plan
        return plan_method(blueprint.with_workload(sequence_length=tokens), plan.method, values)

    most = blueprint.longest_sequence or _MOST
    points = sorted({min(tokens, most) for tokens in (length, 2 * length, 3 * length)})
    return _last_that_fits(planned, points, budget, most)


def _last_that_fits(planned: Callable[[int], Plan], points: Sequence[int], budget: int, most: int) -> int:
    """The largest found, up to `most`, whose plan fits while the next one's doesn't."""
    known = {point: planned(point) for point in points}
    peak = peak_curve(known)
    roof = largest(lambda at: peak(at) <= budget, most)
    guess = search_down(lambda at: interpolated(known, at) <= budget, roof)
    return settle(lambda at: total_bytes(planned(at).profile) <= budget, guess, most)


def peak_curve(plans: Mapping[int, Plan]) -> Size:
    """What a process takes, minus the allocator's share, from plans at some points: one polynomial per moment."""
    points, known = tuple(plans), [plan.profile for plan in plans.values()]
    shared = [key for key in known[0].moments if all(key in one.moments for one in known)]
    rows = {tuple([one.moments[key].sizes[0] for one in known]) for key in shared}
    return lambda at: max(map(weights(points, at).apply, rows)) + CUDA_CONTEXT_BYTES


def interpolated(plans: Mapping[int, Plan], at: int) -> int:
    """What a process takes, from plans at some points: one polynomial per allocation.

    If the plans' allocations differ or don't match each other, a polynomial for the peak alone.
    """
    runs = zip(*(plan.simulations for plan in plans.values()), strict=True)
    try:
        simulations = [_interpolate(tuple(plans), run, at) for run in runs]
        return total_bytes(whole_profile(simulations, plans[max(plans)].depth)[1])
    except (NotAlikeError, ValueError):
        return peak_curve(plans)(at)


def _interpolate(points: Sequence[int], run: Sequence[Simulation], at: int) -> Simulation:
    """Raises ValueError if the traces have different lengths."""
    apply = weights(points, at).apply
    rows = zip(*(one.trace.sizes for one in run), strict=True)
    return replace(run[-1], trace=replace(run[-1].trace, sizes=[apply(row) for row in rows]))


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


def search_down(fits: Callable[[int], bool], roof: int) -> int:
    """A number that fits while the next one doesn't, near the largest below `roof`: from there down, in steps."""
    step = max(1, roof // _STEPS)
    low = next((at for at in range(roof, 0, -step) if fits(at)), 0)
    return low if low == roof else _between(fits, low, low + step if low else 1 + (roof - 1) % step)


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
    expected = blueprint.parameters * budget / total_bytes(plan.profile)
    start = sum(size <= expected for size in names.values())
    room = budget - CUDA_CONTEXT_BYTES
    ordered = [name for name, size in names.items() if size * DTYPES[blueprint.workload.dtype].itemsize <= room]

    def fits(name: str) -> bool:
        if PREFIX + name == blueprint.source.name:
            return total_bytes(plan.profile) <= budget
        other = blueprint.with_workload(model=name)
        return (other.longest_sequence or _MOST) >= blueprint.workload.sequence_length and (
            total_bytes(plan_method(other, plan.method, values).profile) <= budget
        )

    return walk(ordered, min(start, len(ordered)), fits)


def walk(names: Sequence[str], start: int, fits: Callable[[str], bool]) -> str | None:
    """The last of `names` that fits, searching from `start`: up while they fit, else down until one does."""
    best = None
    for name in names[start:]:
        if not fits(name):
            break
        best = name
    return best or next((name for name in reversed(names[:start]) if fits(name)), None)


@cache
def built_in_models(causal: bool) -> dict[str, int]:
    """Built-in configurations of one kind by number of weights, the smallest first; one of each size."""
    sizes: dict[int, str] = {}
    for name in CONFIGURATIONS:
        blueprint = Blueprint(Workload(name))
        if blueprint.is_causal == causal:
            sizes.setdefault(blueprint.parameters, name)
    return {sizes[size]: size for size in sorted(sizes)}
