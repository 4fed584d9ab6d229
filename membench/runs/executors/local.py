"""On this machine: some processes at a time, or one on each of some devices."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from membench.config.run import Run
from membench.runs import processes, worker
from membench.runs.processes import AnyCall, Outcome


@dataclass(frozen=True)
class Local:
    """`at_once` calls at a time. If there are `devices`, each has one of them to itself."""

    at_once: int = 1
    devices: tuple[str, ...] = ()
    remark: str | None = None

    def call_all(self, calls: Iterable[AnyCall]) -> Iterator[tuple[AnyCall, Outcome]]:
        free = list(self.devices)
        taken = (_on(call, free.pop(0)) for call in calls) if free else calls
        for call, outcome in processes.call_all(taken, self.at_once):
            if self.devices:
                free.append(call.arguments[1].device)
            yield call, outcome

    def preview(self, run: Run, count: int) -> None:
        """Nothing is handed over."""


def _on(call: AnyCall, device: str) -> AnyCall:
    """The call, on `device`; the first of its arguments is a run."""
    run, *others = call.arguments
    call.arguments = call.function, replace(run, device=device), *others
    call.function = worker.placed
    return call
