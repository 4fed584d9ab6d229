"""Calling a function in a separate process, so that whatever happens to it affects nothing else."""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from multiprocessing import connection, forkserver, resource_tracker
from multiprocessing.context import BaseContext
from pathlib import Path
from types import ModuleType
from typing import Any

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


def start_server() -> None:
    """Start importing in the background; the first call waits for it."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(["membench.runs.preload"])
    environment = {
        # the modules that we see, never one from the user's folder that shadows ours
        "PYTHONPATH": os.pathsep.join(sys.path),
        "PYTHONSAFEPATH": "1",
        # numpy's thread pool would start when it is imported
        "OPENBLAS_NUM_THREADS": "1",
    }
    resource_tracker.ensure_running()  # it unblocks signals
    with _environment(environment), _blocked(signal.SIGINT):
        forkserver.ensure_running()


def call(
    function: Callable[..., Any],
    *arguments: Any,
    log: Path,
    on_message: Callable[[Any], None] = lambda message: None,
    spawn: bool = False,
) -> Outcome:
    """Run `function(*arguments, send)` in a process: forked from the server, or spawned, which CUDA needs.

    `send("message", value)` in the child calls `on_message(value)` here. Returns when the process is gone; ends it if
    interrupted. Its output is appended to `log`.
    """
    context: BaseContext = multiprocessing.get_context("spawn" if spawn else "forkserver")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=worker.serve, args=(function, arguments, sender, log))  # type: ignore[attr-defined]
    kills_before = _out_of_memory_kills()
    # Ctrl-C while a child receives its work would make it complain; but the first child may have to wait for imports
    uninterrupted = _blocked(signal.SIGINT) if _server_answered.is_set() else nullcontext()
    with _nothing_as_main(), uninterrupted:
        process.start()
    _server_answered.set()
    sender.close()
    try:
        outcome = _listen(receiver, process.sentinel, on_message)
        process.join()
        return outcome or _cause_of_death(process.exitcode, _out_of_memory_kills() > kills_before)
    finally:
        _end(process)
        receiver.close()


def _listen(receiver: connection.Connection, sentinel: int, on_message: Callable[[Any], None]) -> Outcome | None:
    """Pass on messages up to the final one; None if the process died without one."""
    while True:
        ready = connection.wait([receiver, sentinel])
        if receiver not in ready and not receiver.poll():
            return None
        try:
            kind, value = receiver.recv()
        except (EOFError, OSError):  # died, perhaps in the middle of a message
            return None
        if kind == "message":
            on_message(value)
        else:
            return Outcome("ok", value=value) if kind == "ok" else Outcome(kind, error=value)


def _cause_of_death(exit_code: int | None, killed_for_memory: bool) -> Outcome:
    if exit_code is not None and exit_code < 0:
        name = signal.Signals(-exit_code).name
        if name == "SIGKILL" and killed_for_memory:
            return Outcome(
                "out_of_memory", error="the system ran out of memory and killed the process (SIGKILL)", died=True
            )
        return Outcome("failed", error=f"the process was killed by signal {-exit_code} ({name})", died=True)
    return Outcome("failed", error=f"the process ended early, with exit code {exit_code}", died=True)


def _out_of_memory_kills() -> int:
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


def _end(process: Any) -> None:
    if process.is_alive():
        process.terminate()
        process.join(timeout=5)
    if process.is_alive():
        process.kill()
        process.join()


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
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
def _blocked(sig: signal.Signals) -> Iterator[None]:
    """A process started in this context never sees SIGINT: Ctrl-C goes to the whole group, and we end our children."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {sig})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
