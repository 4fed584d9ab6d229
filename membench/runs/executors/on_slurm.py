"""By Slurm: the calls are an array of jobs, through submitit; a job that is preempted goes on from its checkpoint.

The folder must be on a disk that all nodes share. A job tells of its progress in a file beside its script. A command
that starts again, after it was detached or killed, finds its jobs in the queue by what it wrote there.
"""

import itertools
import json
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from os import pathsep
from pathlib import Path
from typing import Any

import submitit
from submitit.slurm import slurm as sbatch

from membench.config.errors import UserError, explain
from membench.config.run import Run
from membench.runs.executors import elsewhere
from membench.runs.processes import AnyCall, Outcome, blocked, environment_of
from reports import files
from reports.names import suggestion

_POLL_SECONDS = 0.2
_CLUSTERS = ("slurm", "local", "debug")
_DEFAULTS = {
    "job_name": "membench",
    "time": 24 * 60,  # minutes; submitit's own default is five
    "wckey": None,
    "additional_parameters": {"requeue": True},  # when a node is lost, too
}
_TIMEOUTS = 100  # after so many a job isn't put back into the queue


class _Job(submitit.helpers.Checkpointable):
    """What runs as a job. When it must make room, it is put back into the queue, as it was submitted."""

    def __call__(self, function: Callable[..., Any], arguments: tuple[Any, ...], log: Path, told: Path) -> Outcome:
        with told.open("a") as file:

            def tell(message: Any) -> None:
                file.write(json.dumps(message) + "\n")
                file.flush()

            tell(None)
            # the signal that says so goes to all processes; only this one knows what to do
            with blocked(signal.SIGUSR2):
                elsewhere.start_server()
            return elsewhere.carry_out(function, arguments, log, tell)


@dataclass
class _Queued:
    """A call whose job is in the queue or running."""

    call: Any
    job: Any  # submitit's
    told: Path
    read: int = 0  # bytes of what it has told

    def tell(self) -> None:
        """Pass on its messages since the last time."""
        if not self.told.exists():
            return
        with self.told.open("rb") as file:
            file.seek(self.read)
            *lines, _ = file.read().split(b"\n")
        self.read += sum(len(line) + 1 for line in lines)
        for message in map(json.loads, lines):
            self.call.on_start()
            if message is not None:
                self.call.on_message(tuple(message) if isinstance(message, list) else message)

    def outcome(self) -> Outcome:
        """Of a job that has ended."""
        try:
            return self.job.result()
        except Exception as error:  # submitit's: it has left no result
            state = self.job.state
            status = "out_of_memory" if state == "OUT_OF_MEMORY" else "failed"
            text = f"job {self.job.job_id} ended without a result ({state}): see {self.job.paths.stderr}"
            return Outcome(status, error=text if state != "UNKNOWN" else f"{text}; {explain(error)}", died=True)


@dataclass
class Slurm:
    """Jobs with sbatch's options `parameters`, whose `cluster` may also be one of submitit's own: local or debug."""

    parameters: dict[str, Any]
    folder: Path
    at_once: int | None = None
    detach: bool = False
    cluster: str = field(init=False)

    def __post_init__(self) -> None:
        """Raises UserError for an option that sbatch (as submitit knows it) doesn't have."""
        self.cluster = self.parameters.pop("cluster", "slurm")
        if self.cluster not in _CLUSTERS:
            raise UserError(f"--slurm cluster={self.cluster}: it must be one of {', '.join(_CLUSTERS)}")
        known = submitit.SlurmExecutor._valid_parameters()
        for name in self.parameters.keys() - known:
            raise UserError(f"--slurm {name}: sbatch has no such option. {suggestion(name, sorted(known))}")
        if self.detach and self.cluster != "slurm":
            raise UserError(f"--detach: jobs of cluster={self.cluster} end with the command: leave it out")

    @property
    def remark(self) -> str:
        place = "Slurm" if self.cluster == "slurm" else f"Slurm's stand-in, {self.cluster}"
        return f"{place}: jobs in {self.folder}. Ctrl-C {'leaves them in the queue' if self.detach else 'ends them'}."

    def preview(self, run: Run, count: int) -> str | None:
        """The script of the array."""
        if self.cluster != "slurm":
            return None
        command = f"{shlex.quote(sys.executable)} -u -m submitit.core._submit {shlex.quote(str(self.folder))}"
        return sbatch._make_sbatch_string(
            command, self.folder, map_count=count if count > 1 else None, **self._parameters(run)
        )

    def call_all(self, calls: Iterable[AnyCall]) -> Iterator[tuple[AnyCall, Outcome]]:
        waiting = iter(calls)
        queued = dict[str, _Queued]()
        ended_well = True
        try:
            while True:
                queued |= self._submit(list(itertools.islice(waiting, self._room(len(queued)))))
                if not queued:
                    break
                for name, one in self._ended(queued):
                    del queued[name]
                    outcome = one.outcome()
                    one.tell()
                    ended_well &= outcome.status == "ok"
                    self._forget([name])
                    yield one.call, outcome
        except (KeyboardInterrupt, GeneratorExit):
            if not self.detach:
                self._cancel(queued)
            raise
        if ended_well:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _room(self, queued: int) -> int | None:
        """For so many more; Slurm itself holds back those that are too many."""
        return None if self.cluster == "slurm" else (self.at_once or 1) - queued

    def _submit(self, calls: list[AnyCall]) -> dict[str, _Queued]:
        """The calls, each with its job: a new one, or one that is in the queue since an earlier command."""
        if not calls:
            return {}
        self.folder.mkdir(parents=True, exist_ok=True)
        known = self._remembered()
        new = [call for call in calls if call.log.stem not in known]
        jobs: dict[str, Any] = {name: submitit.SlurmJob(self.folder, number) for name, number in known.items()}
        jobs |= dict(zip((call.log.stem for call in new), self._array(new), strict=True))
        files.write(self._queue, json.dumps({name: job.job_id for name, job in jobs.items()}).encode())
        return {call.log.stem: _Queued(call, jobs[call.log.stem], self._told(call)) for call in calls}

    def _array(self, calls: list[AnyCall]) -> list[Any]:
        if not calls:
            return []
        for call in calls:
            self._told(call).unlink(missing_ok=True)
        given = zip(*((call.function, call.arguments, call.log, self._told(call)) for call in calls), strict=True)
        # a job sees the modules that we see
        with environment_of({"PYTHONPATH": pathsep.join(sys.path), "PYTHONSAFEPATH": "1"}):
            executor = self._executor(calls[0].arguments[0])
            try:
                return executor.map_array(_Job(), *given)
            except RuntimeError as error:  # submitit's, with what sbatch says
                raise UserError(f"--executor slurm: {str(error) or repr(error)}: see --slurm") from error

    def _executor(self, run: Run) -> Any:
        try:
            executor = submitit.AutoExecutor(self.folder, cluster=self.cluster, slurm_max_num_timeout=_TIMEOUTS)
            executor.update_parameters(**{f"slurm_{name}": value for name, value in self._parameters(run).items()})
        except (RuntimeError, ValueError, TypeError) as error:
            raise UserError(f"--executor slurm: {error}") from error
        return executor

    def _parameters(self, run: Run) -> dict[str, Any]:
        """All of sbatch's options: what all processes of a run need, unless the user says otherwise."""
        count = run.training.processes
        cards = {"gpus_per_node": count} if run.device == "cuda" else {}
        limit = {"array_parallelism": self.at_once} if self.at_once else {}
        return {**_DEFAULTS, "cpus_per_task": run.threads * count, **cards, **limit, **self.parameters}

    def _ended(self, queued: Mapping[str, _Queued]) -> list[tuple[str, _Queued]]:
        """Those jobs that have ended, some time later."""
        time.sleep(_POLL_SECONDS)
        for one in queued.values():
            one.tell()
        return [(name, one) for name, one in queued.items() if one.job.done()]

    def _cancel(self, queued: Mapping[str, _Queued]) -> None:
        for one in queued.values():
            one.job.cancel(check=False)
        self._forget(queued)

    def _told(self, call: AnyCall) -> Path:
        return self.folder / f"{call.log.stem}.told"

    @property
    def _queue(self) -> Path:
        return self.folder / "queue.json"

    def _remembered(self) -> dict[str, str]:
        """The numbers of jobs in the queue, by call; processes of submitit's own clusters can't be found again."""
        return json.loads(self._queue.read_text()) if self.cluster == "slurm" and self._queue.exists() else {}

    def _forget(self, names: Iterable[str]) -> None:
        numbers = {name: number for name, number in self._remembered().items() if name not in set(names)}
        files.write(self._queue, json.dumps(numbers).encode())
