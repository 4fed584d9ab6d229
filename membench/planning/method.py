"""The plan of one method: a few depths simulated and extrapolated, or the model's own depth if they aren't alike."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import optimizers
from membench.config.errors import explain
from membench.memory.allocator import CUDA_CONTEXT_BYTES, estimate_reserved_bytes
from membench.memory.breakdown import alive_at, find_peaks
from membench.planning.blueprint import Blueprint
from membench.planning.extrapolate import (
    NotAlikeError,
    Table,
    extend_depth,
    extend_number,
    extend_tables,
    extend_text,
)
from membench.planning.moments import Moments, profile
from membench.planning.simulate import Simulation, chooses, layer_pattern, simulate, trained_weights
from reports.parts import FIELDS, WEIGHTS
from tasks.models.source import DTYPES

LARGEST_REAL_BYTES = 2 << 30  # the largest weights of a model to try on a CPU if values are needed


@dataclass
class Plan:
    """What a method needs. The keys of `row` are those in the JSON."""

    method: str
    depth: int  # of the model
    depths: tuple[int, ...]  # those simulated
    row: dict[str, Any]
    components: Table  # parts at the peak
    modules: dict[str, Table]  # by component; layers are added up, with * as their number
    profile: Moments  # at the model's own depth
    simulations: Sequence[Simulation]  # of `depths`


class TooLargeError(Exception):
    """More is needed than was asked about."""


def plan_method(
    blueprint: Blueprint,
    method: str,
    values: Mapping[str, Any],
    *,
    most_bytes: int | None = None,
    alike: bool = False,
) -> Plan:
    """Plan `method` with the hyper-parameters `values`.

    If an operation depends on values (it counts a mask's ones, or looks for the ends of texts), steps on a real model
    with random weights are metered on the CPU instead.

    Args:
        blueprint: of the model and the training step.
        method: a name in `optimizers`.
        values: its hyper-parameters.
        most_bytes: what a shallow model may show to be too little for the allocator: then no plan is needed.
        alike: is it known that several depths tell the model's own?

    Raises:
        ValueError: the method refuses a value or the model, or the model needs values and is large.
        TooLargeError: more than `most_bytes` are reserved.
    """
    try:
        return _plan_on(None, blueprint, method, values, most_bytes, alike)
    except RuntimeError as error:  # from what fake tensors can't do; what no tensor can do fails again
        size = blueprint.parameters * DTYPES[blueprint.workload.dtype].itemsize
        if size > LARGEST_REAL_BYTES:
            raise ValueError(
                f"it fails without values, and is too large to try with real ones: {explain(error)}"
            ) from error
    return _plan_on("cpu", blueprint, method, values, most_bytes, alike)


def _plan_on(
    device: str | None,
    blueprint: Blueprint,
    method: str,
    values: Mapping[str, Any],
    most_bytes: int | None,
    alike: bool,
) -> Plan:
    """Plan from simulations on `device`, or on fake tensors if that is None."""
    leaves_state, kernels = False, device or blueprint.workload.device
    simulated = partial(simulate, blueprint, method, values, device=device)
    with suppress(
        NotAlikeError, ValueError
    ):  # what is refused here is refused at full depth too, unless it was only too shallow
        depths = blueprint.depths
        if chooses(optimizers.get(method)) and len(depths) > 1:  # of two layers it may train all
            depths = (*depths[1:], _next_depth(depths, blueprint.depth))
        first, *others = depths
        simulations = [simulated(first)]
        if most_bytes is not None and least_peak(simulations[0], blueprint.depth) > most_bytes:
            raise TooLargeError
        if simulations[0].knows_worst:
            _check_selections(blueprint, method, values, depths)
        if most_bytes is not None and alike and least_bytes(simulations[0], blueprint.depth) > most_bytes:
            raise TooLargeError
        simulations += [simulated(depth) for depth in others]
        leaves_state = any(one.leaves_state for one in simulations)
        if not leaves_state:
            with suppress(NotAlikeError):
                return _combine(method, simulations, blueprint.depth, kernels)
            simulations = [*simulations[1:], simulated(_next_depth(depths, blueprint.depth))]
            return _combine(method, simulations, blueprint.depth, kernels)
    return _combine(method, [simulated(blueprint.depth, whole_cycle=leaves_state)], blueprint.depth, kernels)


def _next_depth(depths: Sequence[int], most: int) -> int:
    """One to try instead of the first: FSDP2 has no layer to gather ahead while it runs the first of two.

    Raises:
        NotAlikeError: it isn't below `most`.
    """
    deeper = 2 * depths[-1] - depths[-2]
    if deeper >= most:
        raise NotAlikeError(f"{deeper} layers are no fewer than {most}")
    return deeper


def _check_selections(blueprint: Blueprint, method: str, values: Mapping[str, Any], depths: Sequence[int]) -> None:
    """Raise NotAlikeError, before steps are simulated, if the weights that are trained aren't on a line."""
    trained = [trained_weights(blueprint, method, values, depth) for depth in depths]
    for counts in zip(*trained, strict=True):
        extend_number(depths, counts, blueprint.depth)


def least_peak(simulation: Simulation, depth: int) -> int:
    """A bound from below for the peak at a larger `depth`: each layer more holds what the least of these does.

    Of a method that selects what it trains, that is the weights alone: a shallow model may have all layers selected.
    """
    trace, pattern = simulation.trace, layer_pattern(simulation.layers)
    peaks, _ = find_peaks(trace)
    peak, moment = max(peaks)
    parts = range(len(FIELDS)) if set(simulation.trained) == {None} else (WEIGHTS,)
    held: Counter[str] = Counter()
    for index in alive_at(trace, moment):
        if layer := pattern.match(trace.modules[index]):
            held[layer[0]] += trace.sizes[index] * (trace.parts[index] in parts)
    return peak + (depth - simulation.depth) * min(held.values(), default=0)


def least_bytes(simulation: Simulation, depth: int) -> int:
    """A bound from below for what is reserved at a larger `depth`, if several depths tell it.

    Of what the allocator adds at each of these, the most is taken.
    """
    surplus = estimate_reserved_bytes(simulation.trace) - max(find_peaks(simulation.trace)[0])[0]
    return least_peak(simulation, depth) + surplus


def whole_profile(simulations: Sequence[Simulation], depth: int) -> tuple[list[Moments], Moments]:
    """The profiles of simulations, and the one at the model's own depth.

    Raises:
        NotAlikeError: the depths don't follow one rule.
    """
    profiles = [profile(one, complete=len(simulations) == 1) for one in simulations]
    depths = [one.depth for one in simulations]
    return profiles, extend_depth(depths, profiles, depth) if len(profiles) > 1 else profiles[0]


def _combine(method: str, simulations: Sequence[Simulation], depth: int, kernels: str) -> Plan:
    """Raises NotAlikeError."""
    depths = tuple(one.depth for one in simulations)
    profiles, whole = whole_profile(simulations, depth)
    positions = [one.moments[whole.peak].position for one in profiles]
    pairs = list(zip(simulations, positions, strict=True))
    modules = extend_tables(depths, [_sizes_by_module(*pair) for pair in pairs], depth)
    components = extend_tables(depths, [_sizes_by_component(*pair) for pair in pairs], depth)
    selections = [_selection(*pair) for pair in pairs]
    trained = [one.trained[selection] for one, selection in zip(simulations, selections, strict=True)]
    reserved = whole.maximum(0) + whole.surplus_bytes
    row = {
        "method": method,
        "peak_allocated_bytes": whole.maximum(0),
        "at_peak": dict(zip(FIELDS, whole.moments[whole.peak].sizes[1:], strict=True)),
        "maximum": {part: whole.maximum(1 + number) for number, part in enumerate(FIELDS)},
        "peak_reserved_bytes": reserved,
        "estimated_total_bytes": reserved + CUDA_CONTEXT_BYTES,
        "peak_phase": whole.peak.phase,
        "peak_module": _largest_module(pairs, depth),
        "peak_selection": _named(depths, selections, depth),
        "trained_weights": extend_number(depths, trained, depth),
        "components": components,
        "kernels": kernels,
    }
    return Plan(method, depth, depths, row, components, _nested(modules), whole, simulations)


def _named(depths: Sequence[int], selections: Sequence[str | None], depth: int) -> str | None:
    texts = [selection for selection in selections if selection is not None]
    return extend_text(depths, texts, depth) if texts else None


def _selection(simulation: Simulation, position: int) -> str | None:
    return [name for start, name in simulation.trace.selections if start <= position][-1]


def _sizes_by_component(simulation: Simulation, position: int) -> Table:
    names = simulation.component
    return _sizes(simulation, position, lambda module: names.get(module, "other"))


def _sizes_by_module(simulation: Simulation, position: int) -> Table:
    """Sizes by "component module", with layer numbers replaced by *."""
    names, pattern = simulation.component, layer_pattern(simulation.layers)

    def name(module: str) -> str:
        return f"{names.get(module, 'other')} " + pattern.sub(r"\1.*", module)

    return _sizes(simulation, position, name)


def _sizes(simulation: Simulation, position: int, name: Any) -> Table:
    trace = simulation.trace
    table: Table = {}
    for index in alive_at(trace, position):
        row = table.setdefault(name(trace.modules[index]), dict.fromkeys(FIELDS, 0))
        row[FIELDS[trace.parts[index]]] += trace.sizes[index]
    return table


def _largest_module(pairs: Sequence[tuple[Simulation, int]], depth: int) -> str:
    """The module that holds most at the peak, without what its children hold."""
    names = []
    for simulation, position in pairs:
        table = _sizes(simulation, position, lambda module: module)
        names.append(max(table, key=lambda module: sum(table[module].values())))
    try:
        return extend_text([simulation.depth for simulation, _ in pairs], names, depth)
    except NotAlikeError:
        return names[-1]


def _nested(modules: Table) -> dict[str, Table]:
    result: dict[str, Table] = {}
    for name, parts in modules.items():
        component, _, module = name.partition(" ")
        result.setdefault(component, {})[module] = parts
    return result
