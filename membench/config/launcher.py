"""What a launcher (torchrun, accelerate launch, Slurm's srun) says to each of the processes that it has started."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from membench.config.errors import UserError

_NEEDED = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # beside WORLD_SIZE, as torchrun sets them
_PORTS = range(15_000, 25_000)  # of a job of Slurm, which gives none


@dataclass(frozen=True)
class Place:
    """This process's among those of a launcher.

    Attributes:
        rank: its number.
        size: how many there are.
        local_rank: its number among those of its machine.
        host, port: of the store in which they find each other; on the machine of rank 0.
    """

    rank: int
    size: int
    local_rank: int
    host: str
    port: int


def place(environment: Mapping[str, str] = os.environ) -> Place | None:
    """This process's place; None if no launcher has started others beside it.

    Raises:
        UserError: a variable is missing, or isn't a number.
    """
    if not environment.get("WORLD_SIZE"):
        environment = {**_of_slurm(environment), **environment}
    size = _number(environment, "WORLD_SIZE")
    if size == 1:
        return None
    for name in _NEEDED:
        if not environment.get(name):
            raise UserError(
                f"WORLD_SIZE is {size}, and {name} isn't set: start membench by torchrun, srun or accelerate launch, "
                "or once, with --processes"
            )
    rank, local_rank, port = (_number(environment, name) for name in ("RANK", "LOCAL_RANK", "MASTER_PORT"))
    return Place(rank, size, local_rank, environment["MASTER_ADDR"], port)


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name) or "1"
    if not text.isdecimal():
        raise UserError(f"{name} is {text!r}: a launcher sets it to a number")
    return int(text)


def _of_slurm(environment: Mapping[str, str]) -> dict[str, str]:
    """What srun says, in torchrun's words; nothing outside a step of srun.

    A batch script has the number of its job's tasks, too, but is alone.
    """
    alone = environment.get("ENVIRONMENT") == "BATCH"
    size = environment.get("SLURM_STEP_NUM_TASKS") or ("" if alone else environment.get("SLURM_NTASKS"))
    if not size or "SLURM_PROCID" not in environment:
        return {}
    numbers = (environment.get(name, "0") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    job = sum(int(number) for number in numbers if number.isdecimal())
    return {
        "WORLD_SIZE": size,
        "RANK": environment["SLURM_PROCID"],
        "LOCAL_RANK": environment.get("SLURM_LOCALID", ""),
        "MASTER_ADDR": _first(environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_NODELIST", "")),
        "MASTER_PORT": str(_PORTS[job % len(_PORTS)]),
    }


def _first(nodes: str) -> str:
    """The first of Slurm's list of nodes: node03 of "node[03-05,9],login"."""
    found = re.match(r"([^,\[]*)(?:\[([^\],-]*)[^\]]*\]([^,]*))?", nodes)
    assert found is not None  # an empty list matches, too
    return "".join(part or "" for part in found.groups())
