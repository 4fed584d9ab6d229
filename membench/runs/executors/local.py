"""On this machine: some processes at a time, or one on each of some devices."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial

from membench.config.run import Run
from membench.runs import processes, worker
from membench.runs.processes import AnyCall, Outcome


@dataclass(frozen=True)
class Local:
    """`at_once` calls at a time. If there are `devices`, each has some of them to itself, one per process of a run."""

    at_once: int = 1
    devices: tuple[tuple[str, ...], ...] = ()
    remark: str | None = None

    def call_all(self, calls: Iterable[AnyCall]) -> Iterator[tuple[AnyCall, Outcome]]:
        free = list(self.devices)
        taken = (_on(call, free.pop(0)) for call in calls) if free else calls
        for call, outcome in processes.call_all(taken, self.at_once):
            if isinstance(call.function, partial):
                free += call.function.args
            yield call, outcome

    def preview(self, run: Run, count: int) -> None:
        """Nothing is handed over."""


def _on(call: AnyCall, devices: tuple[str, ...]) -> AnyCall:
    """The call, on `devices`; the first of its arguments is a run."""
    call.arguments = call.function, *call.arguments
    call.function = partial(worker.on, devices)
    return call
