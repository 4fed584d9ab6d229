"""A run on several processes, started by torch's elastic launcher from the run's own process. Cheap to import."""

import json
import os
import signal
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from membench.config.run import Run
from membench.runs import worker

Send = Callable[[str, Any], None]

HANGS = timedelta(minutes=10)  # of a rank that waits for another: then it gives up, and the run ends


def execute(run: Run, checkpoint_path: Path, checkpoint_every: int, save_to: Path | None, send: Send) -> dict[str, Any]:
    """See `execute.execute`: what the first rank measured, or the first that failed, or how one ended without a word.

    The launcher ends the other ranks if one fails. Ranks are forked, so that nothing is imported again.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    count = run.training.processes
    with tempfile.TemporaryDirectory() as told:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=count,
            run_id=run.run_id,
            rdzv_backend="c10d",
            rdzv_endpoint="127.0.0.1:0",
            max_restarts=0,
            monitor_interval=0.1,
            start_method="fork",
        )
        try:
            elastic_launch(config, _rank)(Path(told), run, checkpoint_path, checkpoint_every, save_to, send)
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            return _told(Path(told), rank) or {"status": "failed", "error": _end_of(rank, failure.exitcode)}
        measured = _told(Path(told), 0)
    assert measured is not None  # every rank ended well
    return measured


def _told(folder: Path, rank: int) -> dict[str, Any] | None:
    """What a rank measured, if it came to tell it."""
    path = folder / str(rank)
    return json.loads(path.read_text()) if path.exists() else None


def _end_of(rank: int, code: int) -> str:
    if code < 0:
        return f"the process of rank {rank} was killed by signal {-code} ({signal.Signals(-code).name})"
    return f"the process of rank {rank} ended early, with exit code {code}"


def _rank(told: Path, run: Run, checkpoint_path: Path, checkpoint_every: int, save_to: Path | None, send: Send) -> None:
    """The work of a rank, in its process."""
    worker.die_with_parent()
    import torch
    from torch import distributed

    from membench.training import execute

    rank, local = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    device = torch.device(run.device)
    if device.type == "cuda":
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=HANGS)

    def tell(message: Any) -> None:
        if rank == 0:
            send("message", message)

    report = worker.throttled(run, send) if rank == 0 else lambda step, loss: None
    measured = execute.execute(
        replace(run, device=str(device)), checkpoint_path, checkpoint_every, report, tell, save_to, tell
    )
    try:
        (told / f".{rank}").write_text(json.dumps(measured))
        os.replace(told / f".{rank}", told / str(rank))
    except (OSError, TypeError):
        traceback.print_exc()
    if measured["status"] not in ("ok", "diverged"):
        os._exit(1)  # the others may wait for it: the launcher ends them
    distributed.destroy_process_group()
