"""A run on several processes, started by torch's elastic launcher from the run's own process. Cheap to import."""

import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from membench.config import launcher
from membench.config.errors import log_traceback
from membench.config.launcher import Place
from membench.config.run import Run
from membench.runs import processes, worker
from membench.runs.processes import Outcome

Send = Callable[[str, Any], None]

HANGS = timedelta(minutes=10)  # of a rank that waits for another: then it gives up, and the run ends
_LOOKS_EVERY = 0.1  # seconds: the launcher, whether a rank has ended; it reports the first that it sees
_FINISHED = ("ok", "diverged")  # the statuses that ranks come to together


def execute(run: Run, checkpoint_path: Path, checkpoint_every: int, save_to: Path | None, send: Send) -> dict[str, Any]:
    """See `execute.execute`: what the first rank measured, or the first that failed, or how one ended without a word.

    The launcher ends the other ranks if one fails. Ranks are forked, so that nothing is imported again.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # it asks whether there is CUDA, which by default begins to use it: forked ranks couldn't any more
    with processes.environment_of({"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}):
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=run.training.processes,
            run_id=run.run_id,
            rdzv_backend="c10d",
            rdzv_endpoint="127.0.0.1:0",
            max_restarts=0,
            monitor_interval=_LOOKS_EVERY,
            start_method="fork",
        )
    kills_before = processes.out_of_memory_kills()
    with tempfile.TemporaryDirectory() as told:
        try:
            elastic_launch(config, _rank)(Path(told), run, checkpoint_path, checkpoint_every, save_to, send)
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            killed_for_memory = processes.out_of_memory_kills() > kills_before
            ended = of_rank(processes.cause_of_death(failure.exitcode, killed_for_memory), rank)
            return _told(Path(told), rank) or {"status": ended.status, "error": ended.error}
        measured = _told(Path(told), 0)
    assert measured is not None  # every rank ended well
    return measured


def _told(folder: Path, rank: int) -> dict[str, Any] | None:
    """What a rank measured, if it came to tell it."""
    path = folder / str(rank)
    return json.loads(path.read_text()) if path.exists() else None


def of_rank(outcome: Outcome, rank: int) -> Outcome:
    """How a rank's process ended without a word."""
    return replace(outcome, error=(outcome.error or "").replace("the process", f"the process of rank {rank}", 1))


def failed(outcome: Outcome) -> bool:
    """Has a rank failed, so that the others would wait for it?"""
    return outcome.status != "ok" or outcome.value["status"] not in _FINISHED


@dataclass(frozen=True)
class Seat:
    """Of a rank in a run: its place among the processes of a launcher, and the number of the run among theirs."""

    place: Place
    number: int

    def join(self, backend: str) -> None:
        """Wait for the other ranks in the launcher's store, which is there already."""
        from torch import distributed

        store = distributed.TCPStore(self.place.host, self.place.port, is_master=False)
        apart = distributed.PrefixStore(f"membench/{self.number}", store)
        distributed.init_process_group(
            backend, store=apart, rank=self.place.rank, world_size=self.place.size, timeout=HANGS
        )


def _rank(told: Path, run: Run, checkpoint_path: Path, checkpoint_every: int, save_to: Path | None, send: Send) -> None:
    """The work of a rank of the elastic launcher, in its process."""
    worker.die_with_parent()
    place = launcher.place()
    assert place is not None
    measured = part(run, checkpoint_path, checkpoint_every, save_to, send, Seat(place, 0))
    try:
        (told / f".{place.rank}").write_text(json.dumps(measured))
        os.replace(told / f".{place.rank}", told / str(place.rank))
    except (OSError, TypeError):
        log_traceback()
    if measured["status"] not in _FINISHED:
        time.sleep(10 * _LOOKS_EVERY)  # if it failed because another died, the launcher is to see that one first
        os._exit(1)  # the others may wait for it: the launcher ends them


def part(
    run: Run, checkpoint_path: Path, checkpoint_every: int, save_to: Path | None, send: Send, seat: Seat
) -> dict[str, Any]:
    """A rank's part of a run, as the only one in its process; see `execute.execute`. Rank 0 tells of the progress."""
    import torch
    from torch import distributed

    from membench.training import execute

    rank, device = seat.place.rank, torch.device(run.device)
    if device.type == "cuda" and not torch.cuda.device_count():
        error = f"rank {rank} finds no GPU on {platform.node()}, and each process needs one"
        return {"status": "failed", "error": error}
    if device.type == "cuda":  # srun may let each see a card of its own alone
        device = torch.device("cuda", seat.place.local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    seat.join("nccl" if device.type == "cuda" else "gloo")

    def tell(message: Any) -> None:
        if rank == 0:
            send("message", message)

    report = worker.throttled(run, send) if rank == 0 else lambda step, loss: None
    measured = execute.execute(
        replace(run, device=str(device)), checkpoint_path, checkpoint_every, report, tell, save_to, tell
    )
    if measured["status"] in _FINISHED:
        distributed.destroy_process_group()
    return measured
