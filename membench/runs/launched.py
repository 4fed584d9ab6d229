"""A command in several processes that a launcher has started: rank 0 leads, the others do their part of each run.

The leader alone reads the command line, writes files and prints. In each run, each of them has a process of its own, so
that its memory is the run's alone; if one fails or dies, the others are ended.
"""

import functools
import itertools
import secrets
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing import connection
from pathlib import Path
from typing import Any, TypeVar

from membench.config import launcher
from membench.config.errors import UserError, explain
from membench.config.launcher import Place
from membench.runs import processes
from membench.runs.parts import Begin, Part
from membench.runs.processes import Call
from membench.runs.ranks import Seat

T = TypeVar("T")

_JOINING = timedelta(minutes=5)  # in which a launcher must have started all processes


@dataclass(frozen=True)
class Group:
    """The processes of a launcher, as one of them sees them.

    Attributes:
        place: this process's.
        store: torch's; if it is this process's own, it lives as long as this.
        others: the connections of the leader to the others, in their order; of another, that to the leader.
        numbers: of the next runs; each is used once.
    """

    place: Place
    store: Any
    others: Sequence[connection.Connection]
    numbers: Iterator[int] = field(default_factory=itertools.count)


@dataclass(frozen=True)
class _End:
    """The leader's word: the command has ended."""

    result: Any
    error: Exception | None = None


def group() -> Group | None:
    """All processes of the launcher, once all have come; None without one.

    Raises:
        UserError: they don't come, or the launcher's variables are incomplete.
    """
    place = launcher.place()
    if place is None:
        return None
    try:
        return _joined(place)
    except (RuntimeError, OSError, EOFError) as error:  # torch's errors of a store are of the first kind
        raise UserError(
            f"the {place.size} processes of the launcher don't find each other at {place.host}, port {place.port}: "
            f"{explain(error)}"
        ) from error


@functools.cache
def _joined(place: Place) -> Group:
    from torch import distributed

    url = f"tcp://{place.host}:{place.port}?rank={place.rank}&world_size={place.size}"
    store, *_ = next(distributed.rendezvous(url, timeout=_JOINING))
    found = distributed.PrefixStore("membench", store)
    if place.rank:
        port, secret = found.get("leader").decode().split()
        found.set(str(place.rank), "here")
        leader = connection.Client((place.host, int(port)), authkey=bytes.fromhex(secret))
        leader.send(place.rank)
        return Group(place, store, [leader])
    key = secrets.token_bytes(32)
    with connection.Listener(("", 0), backlog=place.size, authkey=key) as listener:
        found.set("leader", f"{listener.address[1]} {key.hex()}")
        found.wait([str(rank) for rank in range(1, place.size)], _JOINING)
        came = [listener.accept() for _ in range(1, place.size)]
    by_rank = {one.recv(): one for one in came}
    return Group(place, store, [by_rank[rank] for rank in range(1, place.size)])


def together(work: Callable[[], T]) -> T:
    """What `work()` returns or raises in the leader, in all processes of a launcher; without one, just `work()`."""
    joined = group()
    if joined is None:
        return work()
    if joined.place.rank:
        return _follow(joined)
    end = _End(None, RuntimeError("the leader was interrupted"))
    try:
        result = work()
        end = _End(result)
        return result
    except Exception as error:
        end = _End(None, error if isinstance(error, UserError) else RuntimeError(explain(error)))
        raise
    finally:
        for other in joined.others:
            with suppress(OSError):  # it has died
                other.send(end)
        for other in joined.others:  # all end at the same time, or a launcher would end those that are late
            with suppress(OSError, EOFError):
                other.recv()


def _follow(joined: Group) -> Any:
    """Do this process's part of each run, until the leader says how the command ended, or is gone."""
    (leader,) = joined.others
    with tempfile.TemporaryDirectory() as folder, _deaf_to_ctrl_c():
        processes.start_server()
        try:
            end = _serve(leader, joined.place, Path(folder) / "log")
        except (EOFError, OSError):
            sys.exit(1)  # who started us sees how the leader ended
    leader.send(end)
    if end.error is not None:
        raise end.error
    return end.result


def _serve(leader: connection.Connection, place: Place, log: Path) -> _End:
    """Begin and stop this process's part of runs as the leader says, and answer; returns its last word."""
    mine: Part | None = None
    try:
        while True:
            connection.wait([leader, *(mine.sources if mine else [])])
            answer = mine.answer() if mine else None
            if mine and answer:
                leader.send((answer, log.read_text(errors="replace") if log.exists() else ""))
                mine.stop()
                mine = None
            elif leader.poll():
                word = leader.recv()
                if isinstance(word, _End):
                    return word
                if isinstance(word, Begin):
                    log.unlink(missing_ok=True)
                    mine = Part(Call(word.function, word.arguments, log), Seat(place, word.number))
                elif mine:
                    mine.stop()
    finally:
        if mine:
            mine.stop()


@contextmanager
def _deaf_to_ctrl_c() -> Iterator[None]:
    """Ctrl-C goes to all processes; the leader ends the others."""
    try:
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    except ValueError:  # a thread that isn't the main one never sees it
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
