"""Calling a function in a separate process, so that whatever happens to it affects nothing else."""

import itertools
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from multiprocessing import connection, forkserver, resource_tracker
from pathlib import Path
from types import ModuleType
from typing import Any, Generic, TypeVar

from membench.runs import worker

_server_answered = threading.Event()


@dataclass(frozen=True)
class Outcome:
    """The outcome of a call: "ok" with its value, or "refused", "failed", "out_of_memory" with a one-line error.

    `died` says that the process has ended without an answer.
    """

    status: str
    value: Any = None
    error: str | None = None
    died: bool = False


def start_server(crowded: bool = False) -> None:
    """Start importing in the background; the first call waits for it.

    Args:
        crowded: calls at the same time will have more threads than there are processors. These then sleep while they
            wait for each other: spinning, as is their default, two runs of two threads on two processors take twenty
            times as long. It holds as long as the server, which is as long as this process.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload(["membench.runs.preload"])
    variables = {
        # the modules that we see, never one from the user's folder that shadows ours
        "PYTHONPATH": os.pathsep.join(sys.path),
        "PYTHONSAFEPATH": "1",
        # numpy's thread pool would start when it is imported
        "OPENBLAS_NUM_THREADS": "1",
    }
    if crowded and "OMP_WAIT_POLICY" not in os.environ:
        variables["OMP_WAIT_POLICY"] = "passive"
    resource_tracker.ensure_running()  # it unblocks signals
    with environment_of(variables), blocked(signal.SIGINT):
        forkserver.ensure_running()


@dataclass
class Call:
    """A call of `function(*arguments, send)` in a process of its own, whose output is appended to `log`.

    `send("message", value)` in the child calls `on_message(value)` here; `on_start()` is called when it begins.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    log: Path
    on_message: Callable[[Any], None] = lambda message: None
    on_start: Callable[[], None] = lambda: None


AnyCall = TypeVar("AnyCall", bound=Call)


def call(
    function: Callable[..., Any],
    *arguments: Any,
    log: Path,
    on_message: Callable[[Any], None] = lambda message: None,
) -> Outcome:
    """The outcome of a single `Call`. Returns when its process is gone; ends it if interrupted."""
    return next(outcome for _, outcome in call_all([Call(function, arguments, log, on_message)], at_once=1))


def call_all(calls: Iterable[AnyCall], at_once: int) -> Iterator[tuple[AnyCall, Outcome]]:
    """Carry out calls, up to `at_once` at a time; yields each with its outcome when its process is gone.

    A call is taken from `calls` when there is room for it. Ends all processes if interrupted, or if not asked further.
    """
    waiting, running = iter(calls), list[Child[AnyCall]]()
    try:
        while True:
            running += map(Child, itertools.islice(waiting, at_once - len(running)))
            if not running:
                return
            connection.wait([source for child in running for source in child.sources])
            for child in [child for child in running if child.ended()]:
                running.remove(child)
                yield child.call, child.outcome()
    finally:
        for child in running:
            child.end()


class Child(Generic[AnyCall]):
    """The process of a call, forked from the server (which never uses CUDA, so that a child can)."""

    def __init__(self, call: AnyCall):
        self.call = call
        call.on_start()
        self.answer: Outcome | None = None  # once it has told it
        context = multiprocessing.get_context("forkserver")
        self._receiver, sender = context.Pipe(duplex=False)
        arguments = (call.function, call.arguments, sender, call.log)
        self._process = context.Process(target=worker.serve, args=arguments)
        self._kills_before = out_of_memory_kills()
        # Ctrl-C while a child receives its work would make it complain; but the first may have to wait for imports
        uninterrupted = blocked(signal.SIGINT) if _server_answered.is_set() else nullcontext()
        with _nothing_as_main(), uninterrupted:
            self._process.start()
        _server_answered.set()
        sender.close()

    @property
    def sources(self) -> list[Any]:
        """What there may be something to read from: its messages, and its end."""
        return [self._process.sentinel, *([] if self._receiver.closed else [self._receiver])]

    def ended(self) -> bool:
        """Pass on what messages there are. Has it answered and ended, or died?"""
        dead = bool(connection.wait([self._process.sentinel], 0))  # before its last messages are read
        while not self._receiver.closed and self._receiver.poll():
            self._read()
        return dead

    def _read(self) -> None:
        try:
            kind, value = self._receiver.recv()
        except (EOFError, OSError):  # died, perhaps in the middle of a message
            self._receiver.close()
            return
        if kind == "message":
            self.call.on_message(value)
        else:
            self.answer = Outcome("ok", value=value) if kind == "ok" else Outcome(kind, error=value)

    def outcome(self) -> Outcome:
        """Of a process that has ended: its answer, or why there is none."""
        self.end()
        return self.answer or cause_of_death(self._process.exitcode, out_of_memory_kills() > self._kills_before)

    def end(self) -> None:
        """End the process if it hasn't ended."""
        if self._process.is_alive():
            self._process.terminate()
        self._process.join(timeout=5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._receiver.close()


def cause_of_death(exit_code: int | None, killed_for_memory: bool) -> Outcome:
    """Why a process has ended without an answer."""
    if exit_code is not None and exit_code < 0:
        name = signal.Signals(-exit_code).name
        if name == "SIGKILL" and killed_for_memory:
            return Outcome(
                "out_of_memory", error="the system ran out of memory and killed the process (SIGKILL)", died=True
            )
        return Outcome("failed", error=f"the process was killed by signal {-exit_code} ({name})", died=True)
    return Outcome("failed", error=f"the process ended early, with exit code {exit_code}", died=True)


def out_of_memory_kills() -> int:
    """How many processes the kernel has killed for lack of memory; 0 if it doesn't say."""
    counters = Path("/proc/vmstat")
    lines = counters.read_text().splitlines() if counters.exists() else []
    return sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))


@contextmanager
def _nothing_as_main() -> Iterator[None]:
    """A new process imports its parent's main module; ours must not run a user's script again."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


@contextmanager
def environment_of(values: Mapping[str, str]) -> Iterator[None]:
    before: Mapping[str, str | None] = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def blocked(sig: signal.Signals) -> Iterator[None]:
    """A process started in this context never sees SIGINT: Ctrl-C goes to the whole group, and we end our children."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {sig})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
