"""By the processes that a launcher has started: one run at a time, in which each of them has its part."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import connection

from membench.config.errors import UserError
from membench.config.run import Run
from membench.runs.launched import Group
from membench.runs.parts import ENDED, Distant, Part
from membench.runs.processes import AnyCall, Outcome
from membench.runs.ranks import Seat, failed


@dataclass(frozen=True)
class ByLauncher:
    """Called in the leader of a group."""

    group: Group

    @property
    def remark(self) -> str:
        return f"The {self.group.place.size} processes of the launcher make each run together."

    def preview(self, run: Run, count: int) -> None:
        """Nothing is handed over."""

    def call_all(self, calls: Iterable[AnyCall]) -> Iterator[tuple[AnyCall, Outcome]]:
        """See `Executor`. Raises UserError when a process of the launcher has ended, which it starts once."""
        for call in calls:
            number = next(self.group.numbers)
            others = [Distant(rank, one, call, number) for rank, one in enumerate(self.group.others, 1)]
            yield call, _carry_out([Part(call, Seat(self.group.place, number)), *others])
            gone = [str(one.rank) for one in others if one.is_gone]
            if gone:
                raise UserError(f"the launcher's process of rank {', '.join(gone)} has ended: start all of them again")


def _carry_out(parts: Sequence[Part | Distant]) -> Outcome:
    """What the first rank measured, or the first that failed; one that died is why others failed."""
    waiting, failures, measured = list(parts), list[Outcome](), ENDED
    try:
        for part, answer in _answers(waiting):
            measured = answer if part is parts[0] else measured
            if failed(answer):
                failures += [answer] if answer != ENDED else []
                _stop(parts)
    finally:
        _stop(parts)
        for _ in _answers(waiting):
            pass
    return min(failures, key=lambda failure: not failure.died, default=measured)


def _stop(parts: Iterable[Part | Distant]) -> None:
    for part in parts:
        part.stop()


def _answers(waiting: list[Part | Distant]) -> Iterator[tuple[Part | Distant, Outcome]]:
    """Each part with its answer, as they come; it is then no longer among the `waiting`."""
    while waiting:
        connection.wait([source for part in waiting for source in part.sources])
        for part in list(waiting):
            answer = part.answer()
            if answer is not None:
                waiting.remove(part)
                yield part, answer
