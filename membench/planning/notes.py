"""Notes of a step's forward and backward pass: what they allocate and free, whatever the method does beside them."""

from __future__ import annotations

import itertools
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from torch import Tensor, nn

from membench.memory.trace import Trace
from membench.planning.metered import FakeMeter, Place


class Accumulated(NamedTuple):
    """A parameter's gradient: how many events there are before it, the parameter's number, the gradient's place."""

    position: int
    parameter: int
    place: Place


@dataclass(frozen=True)
class Notes:
    """What both passes allocate and free.

    Attributes:
        trace: of these passes alone.
        middle: the number of events in the forward pass.
        loss: its allocation and geometry.
        gradients: in the order in which they are accumulated.
        kept: what lives as long as the loss, in the order in which it is freed.
    """

    trace: Trace
    middle: int
    loss: Place
    gradients: list[Accumulated]
    kept: list[int]


class Noting:
    """Takes notes of real passes from now on, but not of what hooks do to a gradient that has been accumulated.

    Args:
        meter: of the model, entered.
        parameters: of the model.
    """

    def __init__(self, meter: FakeMeter, parameters: Sequence[nn.Parameter]):
        self._meter, self._parameters, self._trace = meter, parameters, meter.trace
        self._start = len(self._trace.events)
        self._found: list[tuple[int, int, Place | None]] = []  # an event, a parameter's number, its gradient
        self._hooked: set[int] = set()  # positions of the hooks' events

    @contextmanager
    def backward(self) -> Iterator[None]:
        """Within this context, notice the gradients."""
        self._middle = len(self._trace.events)
        with ExitStack() as after:
            for number, p in enumerate(self._parameters):
                if p.requires_grad:
                    after.enter_context(_around_hooks(p, partial(self._before_hooks, number), self._after_hooks))
            yield

    def _before_hooks(self, number: int, p: Tensor) -> None:
        assert p.grad is not None
        self._found.append((len(self._trace.events), number, self._meter.place(p.grad)))

    def _after_hooks(self, p: Tensor) -> None:
        self._hooked.update(range(self._found[-1][0], len(self._trace.events)))

    def end(self, loss: Tensor) -> None:
        """Both passes of `loss` are over."""
        self._loss, self._stop = self._meter.place(loss), len(self._trace.events)
        self._of_gradients = self._meter.of_gradients
        del self._meter, self._parameters  # the model need not live as long as its notes

    def notes(self) -> Notes | None:
        """The notes, once the step is over; None if they don't tell all that the passes of another step would do."""
        places = {number: place for _, number, place in self._found if place is not None}
        if self._loss is None or len(places) < len(self._found):  # or a gradient is accumulated twice
            return None
        gradients = {place.allocation for place in places.values()}
        own = [at for at in range(self._start, self._stop) if at not in self._hooked]
        own = [at for at in own if ~self._trace.events[at] not in gradients]  # freed by hooks, if perhaps a bit later
        events = [self._trace.events[at] for at in own]
        made, freed = [event for event in events if event >= 0], {~event for event in events if event < 0}
        left = {*made} - freed - {self._loss.allocation, *gradients}
        kept = [index for index in self._freed_next() if index in left]
        hooks = {self._trace.events[at] for at in self._hooked}
        strange = not freed <= {*made} or any(~index in hooks for index in made if index not in gradients)
        if strange or len(kept) < len(left) or self._of_gradients.intersection(made):
            return None
        numbers = {index: number for number, index in enumerate(made)}
        return Notes(
            self._selected(made, [numbers[event] if event >= 0 else ~numbers[~event] for event in events]),
            bisect_left(own, self._middle),
            self._loss._replace(allocation=numbers[self._loss.allocation]),
            [
                Accumulated(bisect_left(own, at), number, place._replace(allocation=numbers[place.allocation]))
                for at, number, place in self._found
                if place is not None
            ],
            [numbers[index] for index in kept],
        )

    def _freed_next(self) -> Iterator[int]:
        """What is freed after the passes, before anything else is made."""
        events = itertools.islice(self._trace.events, self._stop, None)
        return (~event for event in itertools.takewhile(lambda event: event < 0, events))

    def _selected(self, indices: Sequence[int], events: Sequence[int]) -> Trace:
        """The trace of some allocations alone."""
        trace = self._trace
        sizes, parts = [trace.sizes[i] for i in indices], [trace.parts[i] for i in indices]
        phases, modules = [trace.phases[i] for i in indices], [trace.modules[i] for i in indices]
        return Trace(sizes, parts, phases, modules, array("q", events))


@contextmanager
def _around_hooks(p: Tensor, before: Callable[[Tensor], None], after: Callable[[Tensor], None]) -> Iterator[None]:
    """Within this context, call these before and after the hooks that act when the gradient of `p` is accumulated."""
    if p._post_accumulate_grad_hooks is None:
        p.register_post_accumulate_grad_hook(before).remove()
    hooks: dict[int, Callable[[Tensor], None]] = p._post_accumulate_grad_hooks
    own = dict(hooks)
    hooks.clear()  # torch calls them in the order in which they came
    hooks.update({-1: before, **own, -2: after})
    try:
        yield
    finally:
        hooks.clear()
        hooks.update(own)
