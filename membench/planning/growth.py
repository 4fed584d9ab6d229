"""How a plan's allocations grow with the batch or the sequence: each is a polynomial, found on a shallow model.

A plan needs all layers, several steps and selections, but what an allocation takes for other batches depends only on
where it is made. So one step on the shallowest model with all kinds of layers tells, for each place, phase and size at
the plan's own batch, the size at another one. The plan's trace is then replayed with those sizes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from membench.memory.trace import INPUTS
from membench.planning.blueprint import Blueprint
from membench.planning.extrapolate import NotAlikeError, weights
from membench.planning.method import Plan
from membench.planning.replay import Replay
from membench.planning.simulate import Simulation, layer_pattern, made_between_passes, simulate
from reports.parts import ACTIVATIONS, TEMPORARIES

Spot = tuple[str, str, int, int]  # phase, module with * for the layer's number, bytes in the plan, rank
Sizes = dict[Spot, int]
COMPUTING = ("forward", "backward")  # an update or a switch sees weights, gradients and states, whatever the batch


class StepsDifferError(NotAlikeError):
    """Steps of two sizes don't allocate and free alike."""


class Growth:
    """What a plan's process takes at other batches or sequences.

    Args:
        plan: at the size where it was made.
        blueprint: its workload.
        values: the method's hyper-parameters.
        option: "micro_batch_size" or "sequence_length".
        points: sizes that determine the polynomial of an allocation, as many as it has coefficients.

    Raises:
        StepsDifferError: the steps at the points differ in more than sizes.
        NotAlikeError: the sizes at the points don't tell all that the plan allocates.
    """

    def __init__(self, plan: Plan, blueprint: Blueprint, values: Mapping[str, Any], option: str, points: Sequence[int]):
        self._plan, self._blueprint, self._values, self._option = plan, blueprint, values, option
        self._points = tuple(points)
        self._replay = Replay(plan.simulation.trace)
        self.peak_bytes = cache(lambda at: self._replay.peak_bytes(self._sizes(at)))
        self.surplus_bytes = cache(lambda at: self._replay.surplus_bytes(self._sizes(at)))
        self.has_room = cache(lambda at, room_bytes: self._replay.has_room(self._sizes(at), room_bytes))
        self._step = cache(self._simulated_step)
        deeper = [(depth, True) for depth in blueprint.depths[:2]]
        for depth, ranked in ((blueprint.shallowest, False), (blueprint.shallowest, True), *deeper):
            try:
                self._learn(depth, ranked=ranked)
                return
            except StepsDifferError:  # whatever the depth
                raise
            except (NotAlikeError, ValueError) as error:  # a model may be too shallow for a method
                why = error
        raise NotAlikeError(str(why))

    def _learn(self, depth: int, *, ranked: bool) -> None:
        """Find the sizes at the points, from models of some depth."""
        self._ranked = ranked
        self._spots = spots(self._plan.simulation, ranked=ranked)
        self._needed = {spot for spot in self._spots if spot is not None}
        self._here = self._step(depth, getattr(self._blueprint.workload, self._option))
        if not self._needed <= set(spots(self._here, ranked=ranked)):
            raise NotAlikeError("a shallow model doesn't have all that is made at the model's own depth")
        self._known = [self.simulated(point) for point in self._points]

    def simulated(self, at: int) -> Sizes:
        """The sizes in real steps of the size `at`.

        Raises:
            StepsDifferError: the steps differ in more than sizes.
            NotAlikeError: allocations that aren't told apart grow differently.
        """
        there = self._step(self._here.depth, at)
        if self._here.trace.events != there.trace.events or _places(self._here) != _places(there):
            raise StepsDifferError(f"steps with {self._option} {at} differ in more than sizes")
        sizes: Sizes = {}
        for spot, size in zip(spots(self._here, ranked=self._ranked), there.trace.sizes, strict=True):
            if spot is not None and sizes.setdefault(spot, size) != size:
                raise NotAlikeError("allocations of one place and size grow differently")
        return sizes

    def holds(self, at: int) -> bool:
        """Are the polynomials right about real steps of the size `at`?"""
        seen, expected = self.simulated(at), self._expected(at)
        return all(seen[spot] == size for spot, size in expected.items())

    def _expected(self, at: int) -> Sizes:
        apply = weights(self._points, at).apply
        expected = {spot: apply([sizes[spot] for sizes in self._known]) for spot in self._needed}
        if min(expected.values(), default=0) < 0:
            raise NotAlikeError(f"the sizes at {self._points} don't tell those at {at}")
        return expected

    def _sizes(self, at: int) -> list[int]:
        """The size of each allocation of the plan."""
        expected, sizes = self._expected(at), self._plan.simulation.trace.sizes
        return [size if spot is None else expected[spot] for spot, size in zip(self._spots, sizes, strict=True)]

    def _simulated_step(self, depth: int, at: int) -> Simulation:
        blueprint = self._blueprint.with_size(self._option, at)
        return simulate(blueprint, self._plan.method, self._values, depth, steps=1)


def spots(simulation: Simulation, *, ranked: bool) -> list[Spot | None]:
    """The spot of each allocation; None if its size doesn't depend on the batch.

    With `ranked`, those of one module and size are told apart by their order in the step.
    """
    trace, pattern = simulation.trace, layer_pattern(simulation.layers)
    general = {module: pattern.sub(r"\1.*", module) for module in set(trace.modules)}
    ranks: Counter[tuple[str, str, int]] = Counter()
    found: list[Spot | None] = []
    before = ""
    for index, (phase, module, part) in enumerate(zip(trace.phases, trace.modules, trace.parts, strict=True)):
        if phase == "forward" != before:
            ranks.clear()
        before = phase or before
        computed = phase in COMPUTING and part in (ACTIVATIONS, TEMPORARIES) and index not in simulation.of_gradients
        if (not computed and module != INPUTS) or made_between_passes(trace, index):
            found.append(None)
            continue
        at = (phase, module, trace.sizes[index])
        ranks[at] += ranked
        found.append((phase, general[module], trace.sizes[index], ranks[at]))
    return found


def _places(simulation: Simulation) -> tuple[list[str], list[str]]:
    return simulation.trace.phases, simulation.trace.modules
