"""The plan of one method: a few depths simulated, and what they tell of the model's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any

import numpy as np

import optimizers
from membench.config.errors import explain
from membench.memory.allocator import CUDA_CONTEXT_BYTES, has_room
from membench.memory.breakdown import levels, summarize
from membench.memory.trace import Trace
from membench.planning.blueprint import Blueprint
from membench.planning.deepen import deepen, tells
from membench.planning.extrapolate import NotAlikeError
from membench.planning.simulate import Simulation, TooLargeError, chooses, layer_pattern, simulate, trained_weights
from reports.parts import ACTIVATIONS, FIELDS, GRADIENTS, LASTING, OPTIMIZER_STATE, WEIGHTS
from tasks.models.source import DTYPES

Table = dict[str, dict[str, int]]  # bytes of each part, by name

HELD = (WEIGHTS, GRADIENTS, OPTIMIZER_STATE, ACTIVATIONS)  # by each layer at once
LARGEST_REAL_BYTES = 2 << 30  # the largest weights of a model to try on a CPU if values are needed


@dataclass
class Plan:
    """What a method needs.

    Attributes:
        method: its name.
        depths: those simulated.
        skipped: how many depths below them tell too little; with other models, GPUs or values, most likely as many.
        row: the keys are those in the JSON.
        modules: parts at the peak by component and module; layers are added up, with * as their number.
        simulation: of the model's own depth.
        of_values: real steps were metered, since an operation depends on values.
    """

    method: str
    depths: tuple[int, ...]
    skipped: int
    row: dict[str, Any]
    modules: dict[str, Table]
    simulation: Simulation
    of_values: bool = False

    @property
    def total_bytes(self) -> int:
        """What a process takes on a GPU."""
        return int(self.row["estimated_total_bytes"])

    @property
    def lasting_bytes(self) -> int:
        """What is there whatever the batch."""
        return int(levels(self.simulation.trace)[:, list(LASTING)].sum(1).max())

    def fits_in(self, budget_bytes: int) -> bool:
        """Does a process run on a card of so many bytes, perhaps only since the allocator gives back what is unused?"""
        room, trace = budget_bytes - CUDA_CONTEXT_BYTES, self.simulation.trace
        if self.total_bytes <= budget_bytes or self.row["peak_allocated_bytes"] > room:
            return self.total_bytes <= budget_bytes
        return has_room(trace.events, trace.sizes, room)

    def without_trace(self) -> Plan:
        """For other processes, to which a trace would be slow to send."""
        return replace(self, simulation=replace(self.simulation, trace=Trace(), of_gradients=set()))

    @property
    def surplus_bytes(self) -> int:
        """What the allocator reserves beyond the peak: rounding, and gaps too small to use."""
        return int(self.row["peak_reserved_bytes"] - self.row["peak_allocated_bytes"])


def plan_method(
    blueprint: Blueprint,
    method: str,
    values: Mapping[str, Any],
    *,
    most_bytes: int | None = None,
    skipped: int = 0,
) -> Plan:
    """Plan `method` with the hyper-parameters `values`.

    If an operation depends on values (it counts a mask's ones, or looks for the ends of texts), steps on a real model
    with random weights are metered on the CPU instead.

    Args:
        blueprint: of the model and the training step.
        method: a name in `optimizers`.
        values: its hyper-parameters.
        most_bytes: what a shallow model may show to be too little at the peak: then no plan is needed.
        skipped: depths not to simulate, of a plan like this one.

    Raises:
        ValueError: the method refuses a value or the model, or the model needs values and is large.
        TooLargeError: the peak is more than `most_bytes`.
    """
    try:
        return _plan_on(None, blueprint, method, values, most_bytes, skipped)
    except RuntimeError as error:  # from what fake tensors can't do; what no tensor can do fails again
        size = blueprint.parameters * DTYPES[blueprint.workload.dtype].itemsize
        if size > LARGEST_REAL_BYTES:
            raise ValueError(
                f"it fails without values, and is too large to try with real ones: {explain(error)}"
            ) from error
    return replace(_plan_on("cpu", blueprint, method, values, most_bytes, skipped), of_values=True)


def _plan_on(
    device: str | None,
    blueprint: Blueprint,
    method: str,
    values: Mapping[str, Any],
    most_bytes: int | None,
    skipped: int,
) -> Plan:
    """Plan from simulations on `device`, or on fake tensors if that is None."""
    kernels, made, shallow = device or blueprint.workload.device, list[Simulation](), _shallow_depths(blueprint)
    simulated = partial(simulate, blueprint, method, values, device=device)
    same = (method, repr(sorted(values.items())), blueprint.workload.gpus > 1, device)
    known = blueprint.telling.get(same)  # if other sizes of the batch were planned, or another number of GPUs
    with suppress(NotAlikeError):
        for depth in known or shallow[skipped:][: 1 if known == () else None]:
            with suppress(ValueError):  # so few layers may be too few for a method
                made.append(simulated(depth))
            if len(made) == 1:
                if most_bytes is not None and least_peak(made[0], blueprint.depth) > most_bytes:
                    raise TooLargeError
                if known is None:
                    _check_choices(blueprint, method, values)
            if any(one.leaves_state for one in made):
                break
            if (known and len(made) == 2) or (len(made) > 2 and tells(*made[-3:])):
                whole = deepen(made[-2], made[-1], blueprint.depth)
                blueprint.telling[same] = made[-2].depth, made[-1].depth
                return _plan(method, whole, made[-3:], kernels, shallow.index(made[-1].depth) - 2)
    leaves_state = any(one.leaves_state for one in made)
    if not leaves_state:  # which the others must find out, too
        blueprint.telling[same] = ()
    whole = simulated(blueprint.depth, whole_cycle=leaves_state, most_bytes=most_bytes)
    return _plan(method, whole, [whole], kernels, skipped)


def _shallow_depths(blueprint: Blueprint) -> list[int]:
    """Depths to simulate until three tell the model's own, which is as quick to simulate as all of them."""
    first, *others = blueprint.depths
    if not others:
        return []
    depths = range(first, blueprint.depth, others[0] - first)
    return [depth for depth, layers in zip(depths, accumulate(depths), strict=True) if layers < blueprint.depth]


def _check_choices(blueprint: Blueprint, method: str, values: Mapping[str, Any]) -> None:
    """Raise NotAlikeError, before more steps are simulated, if the weights that a method chooses aren't on a line."""
    if chooses(optimizers.get(method)):
        try:
            trained = [trained_weights(blueprint, method, values, depth) for depth in blueprint.depths]
        except ValueError:  # too few layers
            return
        alike = len({len(selections) for selections in trained}) == 1
        if not alike or any(2 * second != first + third for first, second, third in zip(*trained, strict=True)):
            raise NotAlikeError("what is chosen isn't on a line")


def least_peak(simulation: Simulation, depth: int) -> int:
    """A bound from below for the peak at a larger `depth`: each layer more holds what the least of these does.

    What a layer needs only while it is worked on doesn't count: a few of them may have that at once. Of a method that
    selects what it trains, weights alone count: a shallow model may have all layers selected.
    """
    trace, pattern = simulation.trace, layer_pattern(simulation.layers)
    counts = np.isin(range(len(FIELDS)), HELD if set(simulation.trained) == {None} else WEIGHTS)
    layers = {module: match[0] for module in set(trace.modules) if (match := pattern.match(module))}
    events = np.asarray(trace.events, dtype=np.int64)
    index = np.where(events < 0, ~events, events)
    layer = np.asarray([layers.get(module, "") for module in trace.modules])[index]
    changes = np.where(events < 0, -1, 1) * np.asarray(trace.sizes, dtype=np.int64)[index]
    held = changes * counts[np.asarray(trace.parts)[index]]
    least = np.min([np.where(layer == name, held, 0).cumsum() for name in {*layers.values()}] or [0 * held], axis=0)
    return int((changes.cumsum() + (depth - simulation.depth) * least).max(initial=0))


def _plan(method: str, whole: Simulation, simulated: Sequence[Simulation], kernels: str, skipped: int) -> Plan:
    """The plan that the simulation of the `whole` depth says."""
    report, pattern = summarize(whole.trace, whole.component), layer_pattern(whole.layers)
    modules: dict[str, Table] = {}
    for module, sizes in report["modules"].items():
        of_component = modules.setdefault(whole.component.get(module, "other"), {})
        added_up = of_component.setdefault(pattern.sub(r"\1.*", module), dict.fromkeys(FIELDS, 0))
        for field, size in sizes.items():
            added_up[field] += size
    reserved, selection = report["estimated_reserved_bytes"], report["peak_selection"]
    as_reported = ("peak_allocated_bytes", "at_peak", "maximum", "peak_phase", "peak_module", "peak_selection")
    row = {
        "method": method,
        **{key: report[key] for key in as_reported},
        "peak_reserved_bytes": reserved,
        "estimated_total_bytes": reserved + CUDA_CONTEXT_BYTES,
        "trained_weights": whole.trained[selection],
        "components": {name: sizes for name, sizes in report["components"].items() if name in modules},
        "kernels": kernels,
    }
    return Plan(method, tuple([one.depth for one in simulated]), skipped, row, modules, whole)
