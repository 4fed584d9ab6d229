"""The parts that the processes of a launcher have in a run: here, and, told over a connection, elsewhere."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import connection
from typing import Any

from membench.runs.processes import Call, Child, Outcome
from membench.runs.ranks import Seat, failed, of_rank

ENDED = Outcome("ended")  # of a rank whose process was ended because another failed


@dataclass(frozen=True)
class Begin:
    """The leader's word: begin your part of a run."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    number: int  # of the run


@dataclass(frozen=True)
class Stop:
    """The leader's word: another rank has failed."""


class Part:
    """A rank's process in a run, on this machine."""

    def __init__(self, call: Call, seat: Seat):
        self._child = Child(replace(call, function=partial(call.function, seat=seat)))
        self._rank, self._stopped = seat.place.rank, False

    @property
    def sources(self) -> list[Any]:
        """What there may be something to read from."""
        return self._child.sources

    def answer(self) -> Outcome | None:
        """How it ended; of a failure as soon as it is told, before others fail because of it."""
        if self._stopped:
            return ENDED
        if self._child.ended():
            outcome = self._child.outcome()
            return of_rank(outcome, self._rank) if outcome.died else outcome
        told = self._child.answer
        return told if told is not None and failed(told) else None

    def stop(self) -> None:
        """End it, if it hasn't ended by itself."""
        if not self._child.ended():
            self._stopped = True
            self._child.end()


class Distant:
    """The part of another process of the launcher in a run."""

    def __init__(self, rank: int, other: connection.Connection, call: Call, number: int):
        self.rank, self._other, self._log = rank, other, call.log
        self._answer: Outcome | None = None
        self.sources, self.is_gone = [other], False
        self._say(Begin(call.function, call.arguments, number))

    def answer(self) -> Outcome | None:
        """How it ended; what a failing one has printed goes into the log."""
        try:
            if self._answer is None and self._other.poll():
                self._answer, printed = self._other.recv()
                if failed(self._answer):
                    self._log.parent.mkdir(parents=True, exist_ok=True)
                    with self._log.open("a") as file:
                        file.write(printed)
        except (EOFError, ConnectionError):
            self._answer = Outcome("failed", error=f"the launcher's process of rank {self.rank} has ended", died=True)
            self.is_gone = True
        return self._answer

    def stop(self) -> None:
        """Have it end its process, if it has not told of its end."""
        if self._answer is None:
            self._say(Stop())

    def _say(self, word: Any) -> None:
        with suppress(OSError):  # it has died, which its answer tells
            self._other.send(word)
