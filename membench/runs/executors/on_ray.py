"""On a Ray cluster: each call is a task with its processors or its card; one that a lost node took is made again.

The tasks belong to an actor, the desk, which keeps what they send until the command collects it: progress,
checkpoints, logs and outcomes. So no disk is shared; and with `--detach` the desk, and all that belongs to it, outlives
the command.
"""

import asyncio
import logging
import os
import socket
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import OutOfMemoryError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from membench.config.errors import UserError, explain
from membench.config.run import Run
from membench.runs.executors import elsewhere
from membench.runs.executors.elsewhere import Files
from membench.runs.processes import AnyCall, Outcome

_NODES_LOST = 5  # by one run, before it counts as failed: it may be what ends them
_NAMESPACE = "membench"
_POLL_SECONDS = 1.0  # at most, without news


@dataclass
class _Parcel:
    """A call on its way: which of its arguments are paths, and what there is at each."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    resources: dict[str, float]  # num_cpus, num_gpus
    files: dict[int, Files] = field(default_factory=dict)  # by the argument's number

    def unpack(self, place: Path) -> tuple[Any, ...]:
        """The arguments, with their files below `place`."""
        paths = {number: place / str(number) / self.arguments[number].name for number in self.files}
        for number, path in paths.items():
            path.parent.mkdir()
            elsewhere.unpack(self.files[number], path)
        return tuple(paths.get(number, value) for number, value in enumerate(self.arguments))


@dataclass
class _News:
    """What has come from a call since the last time: its latest message, the files that changed, and how it ended."""

    messages: list[Any] = field(default_factory=list)  # the latest, and all entries of the history
    files: dict[int, Files] = field(default_factory=dict)
    log: bytes = b""
    outcome: Outcome | None = None


def _task(desk: Any, name: str, parcel: _Parcel) -> _News:
    """Carry out a call in a temporary folder, and tell the desk of its progress."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        arguments = parcel.unpack(place)
        paths = {number: arguments[number] for number in parcel.files}
        sent = _changes(paths)

        def tell(message: Any) -> None:
            changed = {number: time for number, time in _changes(paths).items() if sent.get(number) != time}
            sent.update(changed)
            desk.tell.remote(name, _News([message], {number: elsewhere.pack(paths[number]) for number in changed}))

        desk.tell.remote(name, _News([None]))
        outcome = elsewhere.carry_out(parcel.function, arguments, place / "log", tell)
        files = {number: elsewhere.pack(path) for number, path in paths.items()}
        return _News([], files, (place / "log").read_bytes(), outcome)


def _changes(paths: dict[int, Path]) -> dict[int, int]:
    """When each file was last written; a folder is complete only at the end."""
    return {number: path.stat().st_mtime_ns for number, path in paths.items() if path.is_file()}


class _Desk:
    """Has calls carried out, and keeps what comes from them until it is collected."""

    def __init__(self, at_once: int | None):
        self._news: dict[str, _News] = {}
        self._history: dict[str, list[Any]] = {}  # all entries that a call has told, for a command that comes later
        self._parcels: dict[str, _Parcel] = {}  # of calls whose outcome hasn't been collected
        self._ready = asyncio.Event()
        self._room = asyncio.Semaphore(at_once or 1_000_000)
        self._tasks = set[asyncio.Task]()

    async def submit(self, name: str, parcel: _Parcel) -> None:
        """Have a call carried out, unless it is on its way from an earlier command: then its history is news again."""
        if name not in self._parcels:
            self._parcels[name], self._history[name] = parcel, []
            task = asyncio.create_task(self._make(name))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        elif self._history[name]:
            known = self._news.setdefault(name, _News())
            known.messages = self._history[name] + [one for one in known.messages if not isinstance(one, dict)]

    async def _make(self, name: str) -> None:
        parcel, me = self._parcels[name], ray.get_runtime_context().current_actor
        task = ray.remote(_task).options(max_retries=0, **parcel.resources)
        outcome = Outcome("failed", error=f"the node that made it was lost, {_NODES_LOST} times", died=True)
        async with self._room:
            for _ in range(_NODES_LOST):
                try:
                    await self.tell(name, await task.remote(me, name, parcel))
                    return
                except OutOfMemoryError as error:
                    outcome = Outcome("out_of_memory", error=explain(error), died=True)
                    break
                except RayTaskError as error:  # it raised an error: that node can't import membench, or has no room
                    outcome = Outcome("failed", error=explain(error), died=True)
                    break
                except RayError:  # its node or its worker is gone; what it sent is in the parcel
                    continue
        await self.tell(name, _News(outcome=outcome))

    async def tell(self, name: str, news: _News) -> None:
        """Called by a task: something has happened."""
        if name not in self._parcels:  # late: the call has ended
            return
        known = self._news.setdefault(name, _News())
        entries = [message for message in known.messages if isinstance(message, dict)]
        known.messages = entries + news.messages if news.messages else known.messages
        self._history[name] += [message for message in news.messages if isinstance(message, dict)]
        known.files |= news.files
        known.log, known.outcome = news.log or known.log, news.outcome or known.outcome
        self._parcels[name].files |= news.files  # it would be continued from there
        self._ready.set()

    async def collect(self) -> dict[str, _News]:
        """What there is of news, by call; waits a while if there are none."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._ready.wait(), _POLL_SECONDS)
        self._ready.clear()
        news, self._news = self._news, {}
        for name in [name for name, one in news.items() if one.outcome]:
            del self._parcels[name], self._history[name]
        return news

    async def is_empty(self) -> bool:
        return not self._parcels


@dataclass(frozen=True)
class Ray:
    """On the cluster at `address`, or on one that is started on this machine."""

    address: str | None
    folder: Path  # of the comparison, after which its desk is named
    at_once: int | None = None
    detach: bool = False

    @property
    def remark(self) -> str:
        place = f"the cluster at {self.address}" if self.address else "a local cluster"
        return f"Ray, on {place}. Ctrl-C {'leaves the runs going there' if self.detach else 'ends the runs'}."

    def preview(self, run: Run, count: int) -> None:
        """Nothing that could be read is handed over."""

    def call_all(self, calls: Iterable[AnyCall]) -> Iterator[tuple[AnyCall, Outcome]]:
        waiting = {call.log.stem: call for call in calls}
        if not waiting:
            return
        with self._connected(), self._desk() as desk:
            for name, call in waiting.items():
                parcel = _parcel(call)
                self._look_for_room(parcel.resources)
                ray.get(desk.submit.remote(name, parcel))
            while waiting:
                for name, news in ray.get(desk.collect.remote()).items():
                    if name in waiting:
                        _receive(waiting[name], news)
                        if news.outcome:
                            yield waiting.pop(name), news.outcome

    @contextmanager
    def _connected(self) -> Iterator[None]:
        quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
        quiet |= {} if self.address else {"include_dashboard": False}
        try:
            ray.init(self.address or "local", namespace=_NAMESPACE, runtime_env=_environment(), **quiet)
        except (RayError, ConnectionError, RuntimeError, ValueError) as error:
            raise UserError(f"--ray-address {self.address}: no cluster answers ({explain(error)})") from error
        try:
            yield
        finally:
            ray.shutdown()

    def _look_for_room(self, needs: dict[str, float]) -> None:
        """Raises UserError if no node will ever be large enough; a cluster may still grow."""
        kinds = {"num_cpus": "CPU", "num_gpus": "GPU"}
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if any(all(node.get(kinds[need], 0) >= count for need, count in needs.items()) for node in nodes):
            return
        wanted = " and ".join(f"{count} {kinds[need]}s" for need, count in needs.items())
        if self.address is None:
            raise UserError(f"--executor ray: a run needs {wanted}, which this machine doesn't have: see --threads")
        print(f"No node has {wanted}, which a run needs (see --threads): waiting for one", flush=True)

    @contextmanager
    def _desk(self) -> Iterator[Any]:
        """The comparison's desk, on this node; one that was left by an earlier command, if there is one."""
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        # Ray hands an actor that needs nothing to any node, even one that is lost already, to be placed from there
        options = {"num_cpus": 0, "memory": 1, "scheduling_strategy": here, "max_concurrency": 1000}
        options |= {"get_if_exists": True}
        options |= {"name": f"{socket.gethostname()}:{self.folder}"} | ({"lifetime": "detached"} if self.detach else {})
        desk = ray.remote(_Desk).options(**options).remote(self.at_once)
        try:
            yield desk
        except (KeyboardInterrupt, GeneratorExit):
            if not self.detach:
                ray.kill(desk)
            raise
        if ray.get(desk.is_empty.remote()):
            ray.kill(desk)


def _environment() -> dict[str, Any]:
    """Workers see the modules that we see, where they lie in the same places."""
    return {"env_vars": {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONSAFEPATH": "1"}}


def _parcel(call: AnyCall) -> _Parcel:
    run = call.arguments[0]
    each: dict[str, float] = {"num_cpus": 1, "num_gpus": 1} if run.device == "cuda" else {"num_cpus": run.threads}
    needs = {need: count * run.training.processes for need, count in each.items()}
    files = {number: elsewhere.pack(path) for number, path in enumerate(call.arguments) if isinstance(path, Path)}
    return _Parcel(call.function, call.arguments, needs, files)


def _receive(call: AnyCall, news: _News) -> None:
    """Put files and log where they belong, and pass on the message."""
    for number, files in news.files.items():
        elsewhere.unpack(files, call.arguments[number])
    if news.log:
        elsewhere.unpack({call.log.name: news.log}, call.log)
    call.on_start()
    for message in news.messages:
        if message is not None:
            call.on_message(message)
