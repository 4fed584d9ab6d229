"""Where runs are made: by processes on this machine or of a launcher, as tasks on a Ray cluster, as jobs of Slurm."""

from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

from membench.config.errors import UserError
from membench.config.run import Run
from membench.config.settings import Settings
from membench.runs import launched
from membench.runs.executors.by_launcher import ByLauncher
from membench.runs.executors.local import Local
from membench.runs.processes import AnyCall, Outcome

_NEEDS = {"ray": "ray", "slurm": "submitit"}  # the package of each extra


class Executor(Protocol):
    """Carries out calls, as many at a time as it has room for."""

    @property
    def remark(self) -> str | None:
        """What to say before the first call: where the runs are made, and what Ctrl-C does."""

    def call_all(self, calls: Iterable[AnyCall]) -> Iterator[tuple[AnyCall, Outcome]]:
        """Each call with its outcome, as they end.

        The paths among a call's arguments are files or folders that it reads and writes: they and its log are there
        afterwards, wherever it was carried out.
        """

    def preview(self, run: Run, count: int) -> str | None:
        """What would be handed over for `count` runs like this one, if it can be read."""


def create(options: Settings) -> Executor:
    """The executor that is asked for, or a launcher's processes.

    Raises:
        UserError: its package isn't installed, or an option is wrong.
    """
    group = launched.group()
    if group is not None:
        return ByLauncher(group)
    needs = _NEEDS.get(options.executor)
    if needs and find_spec(needs) is None:
        raise UserError(f"--executor {options.executor} needs {needs}: pip install 'membench[{options.executor}]'")
    folder = Path(options.out).absolute()
    if options.executor == "ray":
        from membench.runs.executors.on_ray import Ray

        return Ray(options.ray_address, folder, options.jobs, options.detach)
    if options.executor == "slurm":
        from membench.runs.executors.on_slurm import Slurm

        return Slurm(dict(options.slurm), folder / "slurm", options.jobs, options.detach)
    names, size = options.devices or (), options.processes
    devices = tuple(names[start : start + size] for start in range(0, len(names), size))
    return Local(options.jobs or max(1, len(devices)), devices)
