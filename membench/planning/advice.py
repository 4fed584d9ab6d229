"""Ways to make a method fit: options of it and of the training step, each really planned, the cheapest first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import optimizers
from membench.planning.blueprint import Blueprint
from membench.planning.budget import CHUNKS, plan_within
from membench.planning.method import Plan
from membench.planning.simulate import simulate
from reports.parts import (
    ACTIVATIONS,
    COMMUNICATION,
    FIELDS,
    GRADIENTS,
    OPTIMIZER_STATE,
    TEMPORARIES,
    UNSHARDED_WEIGHTS,
    WEIGHTS,
)

Values = Mapping[str, Any]


class Lever(NamedTuple):
    """A change that may make a method fit.

    Attributes:
        reduces: the parts of memory that can become smaller by it.
        workload: what changes in the training step; None if it doesn't apply.
        values: what changes in the method's hyper-parameters; None if it doesn't apply.
        without: what it rules out.
    """

    reduces: tuple[int, ...]
    workload: Callable[[Blueprint], dict[str, Any] | None] = lambda blueprint: {}
    values: Callable[[Values], dict[str, Any] | None] = lambda values: {}
    without: str = ""


def _step(name: str) -> Callable[[Blueprint], dict[str, Any] | None]:
    """An option of the workload that isn't on yet."""
    return lambda blueprint: None if getattr(blueprint.workload, name) else {name: True}


def _option(name: str, value: Any) -> Callable[[Values], dict[str, Any] | None]:
    """A hyper-parameter that the method has, and that isn't set so."""
    return lambda values: {name: value} if name in values and values[name] != value else None


def _chunks(blueprint: Blueprint) -> dict[str, Any] | None:
    return {"loss_chunks": CHUNKS} if blueprint.is_causal and blueprint.workload.loss_chunks == 1 else None


def _accumulation(blueprint: Blueprint) -> dict[str, Any] | None:
    size = blueprint.workload.batch_size
    return {"gradient_accumulation_steps": size} if blueprint.workload.micro_batch_size > 1 else None


# The cheapest first: in time, then in what the training can no longer do, then in what it learns.
COMPUTED = (ACTIVATIONS, TEMPORARIES)
GATHERED = (UNSHARDED_WEIGHTS, COMMUNICATION)
LEVERS = (
    Lever(COMPUTED, workload=_chunks),
    Lever(
        (GRADIENTS, TEMPORARIES),
        values=_option("in_backward", True),
        without="no accumulation, no clipping by the loop",
    ),
    Lever(COMPUTED, workload=_accumulation),
    Lever(COMPUTED, workload=_step("checkpointing")),
    Lever((OPTIMIZER_STATE, TEMPORARIES), values=_option("states", "8bit")),
    Lever(
        (GRADIENTS, OPTIMIZER_STATE, *GATHERED, *COMPUTED),
        values=_option("train_embeddings", False),
        without="embeddings and head stay as they are",
    ),
    Lever(
        (WEIGHTS, *GATHERED, *COMPUTED),
        values=_option("base", "nf4"),
        without="the frozen weights are rounded to 4 bits",
    ),
    Lever(
        (WEIGHTS, *COMPUTED),
        values=_option("weights", "8bit"),
        without="the weights of the layers' linear modules are rounded to 8 bits",
    ),
    Lever(COMPUTED, workload=_step("offload_activations"), without="slow: activations go to host memory and back"),
)


@dataclass(frozen=True)
class Advice:
    """Changes with which a method fits, in all of its steps.

    Attributes:
        options: in words, as they are given to `membench plan`.
        workload: by name of the option.
        values: hyper-parameters.
        without: what they rule out.
        estimated_total_bytes: planned with them.
        left_bytes: of the budget; less than 0 if it fits only since the allocator gives back what is unused.
    """

    options: list[str]
    workload: dict[str, Any]
    values: dict[str, Any]
    without: list[str] = field(default_factory=list)
    estimated_total_bytes: int = 0
    left_bytes: int = 0


def advise(plan: Plan, blueprint: Blueprint, values: Values, budget_bytes: int) -> Advice | None:
    """The cheapest change, or as few as possible, with which a method that doesn't fit does; None if none is found.

    One with which it fits only tightly is for where nothing else does.
    """
    values = optimizers.resolve(plan.method, **values)  # those left out at their defaults are levers, too
    levers = [lever for lever in LEVERS if _applies(lever, blueprint, values)]
    missing = plan.total_bytes - budget_bytes
    tight: list[Advice] = []
    for found in _ways(plan, blueprint, values, budget_bytes, levers, missing):
        if found.left_bytes >= 0:
            return found
        tight.append(found)
    return next(iter(tight), None)


def _ways(
    plan: Plan, blueprint: Blueprint, values: Values, budget_bytes: int, levers: Sequence[Lever], missing: int
) -> Iterator[Advice]:
    """What makes it fit, perhaps tightly: each lever alone, then several."""
    for lever in levers:
        if _most_saved(plan, [lever]) > missing and (found := _try(plan, blueprint, values, budget_bytes, [lever])):
            yield found
    if len(levers) < 2 or _most_saved(plan, levers) <= missing:
        return
    for together in _compatible(levers, blueprint):
        if found := _together(plan, blueprint, values, budget_bytes, together):
            yield found


def _together(
    plan: Plan, blueprint: Blueprint, values: Values, budget_bytes: int, levers: Sequence[Lever]
) -> Advice | None:
    """With all levers, if that fits: without those that aren't needed, the dearest left out first."""
    kept = list(levers)
    if _is_refused(plan, blueprint, values, kept):
        kept = [lever for lever in levers if not _is_refused(plan, blueprint, values, [lever])]
    best = _try(plan, blueprint, values, budget_bytes, kept)
    if best is None:
        return None
    for lever in reversed(kept[:]):
        fewer = [one for one in kept if one is not lever]
        found = _try(plan, blueprint, values, budget_bytes, fewer) if len(fewer) > 1 else None
        if found and (found.left_bytes >= 0 or best.left_bytes < 0):
            kept, best = fewer, found
    return best


def _compatible(levers: Sequence[Lever], blueprint: Blueprint) -> Iterator[list[Lever]]:
    """All levers; where gradients would be gone before they accumulate, without accumulating, then without that."""
    early = [lever for lever in levers if "in_backward" in (lever.values({"in_backward": False}) or {})]
    late = [lever for lever in levers if "gradient_accumulation_steps" in (lever.workload(blueprint) or {})]
    for without in (late, early) if early and late else ([],):
        yield [lever for lever in levers if lever not in without]


def _applies(lever: Lever, blueprint: Blueprint, values: Values) -> bool:
    changes, given = lever.workload(blueprint), lever.values(values)
    if changes is None or given is None:
        return False
    accumulates = max(blueprint.workload.gradient_accumulation_steps, changes.get("gradient_accumulation_steps", 1)) > 1
    return not (accumulates and (values.get("in_backward") or given.get("in_backward")))


def _most_saved(plan: Plan, levers: Sequence[Lever]) -> int:
    """A bound: all of the parts that the levers reduce, and all that the allocator adds."""
    parts = {part for lever in levers for part in lever.reduces}
    return sum(plan.row["at_peak"][FIELDS[part]] for part in parts) + plan.surplus_bytes


def _is_refused(plan: Plan, blueprint: Blueprint, values: Values, levers: Sequence[Lever]) -> bool:
    """By the method, such as accumulation by LOMO, or by the model."""
    changes, given = _changes(blueprint, values, levers)
    device = "cpu" if plan.of_values else None
    try:
        simulate(
            blueprint.with_workload(**changes), plan.method, {**values, **given}, plan.depths[0], steps=1, device=device
        )
    except ValueError:
        return True
    return False


def _try(plan: Plan, blueprint: Blueprint, values: Values, budget_bytes: int, levers: Sequence[Lever]) -> Advice | None:
    changes, given = _changes(blueprint, values, levers)
    made = plan_within(plan, blueprint.with_workload(**changes), {**values, **given}, budget_bytes)
    if made is None:
        return None
    total = made.total_bytes
    without = [lever.without for lever in levers if lever.without]
    return Advice(_words(plan.method, changes, given), changes, given, without, total, budget_bytes - total)


def _changes(blueprint: Blueprint, values: Values, levers: Sequence[Lever]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of the workload, and of the hyper-parameters."""
    changes = {name: value for lever in levers for name, value in (lever.workload(blueprint) or {}).items()}
    given = {name: value for lever in levers for name, value in (lever.values(values) or {}).items()}
    return changes, given


def _words(method: str, changes: Mapping[str, Any], given: Values) -> list[str]:
    flags = [f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}") for name, value in changes.items()]
    name = optimizers.split(method)[0]
    return [*(f"--set {name}.{key}={str(value).lower()}" for key, value in given.items()), *flags]
