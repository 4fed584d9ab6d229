"""The code of a child process. Cheap to import: the server from which children are forked has preloaded the rest."""

import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from multiprocessing import connection, parent_process
from pathlib import Path
from typing import Any

from membench.config.errors import UserError, about_file, explain, log_traceback
from membench.config.run import Run
from membench.config.settings import Settings

Send = Callable[[str, Any], None]

_REPORT_SECONDS = 0.1  # at least, between two reports of progress


def prepare(settings: Settings, send: Send) -> list[Run]:
    """See `prepare.prepare`."""
    from membench.runs import prepare

    return prepare.prepare(settings)


def rehearse(run: Run, evaluates: bool, tried: Sequence[Mapping[str, Any]], send: Send) -> dict[str, Any]:
    """See `rehearsal.rehearse`."""
    from membench.planning import rehearsal

    return rehearsal.rehearse(run, evaluates=evaluates, tried=tried)


def execute(
    run: Run, checkpoint_path: Path, checkpoint_every: int, save_to: Path | None, send: Send, seat: Any = None
) -> dict[str, Any]:
    """See `execute.execute`; sends (step, loss) from time to time, entries of the history, names of later stages.

    With a `ranks.Seat` it is this rank's part of the run.
    """
    if run.training.processes > 1:
        from membench.runs import ranks

        given = run, checkpoint_path, checkpoint_every, save_to, send
        return ranks.execute(*given) if seat is None else ranks.part(*given, seat)
    from membench.training import execute

    def tell(message: Any) -> None:
        send("message", message)

    report = throttled(run, send)
    return execute.execute(run, checkpoint_path, checkpoint_every, report, tell, save_to, tell)


def placed(work: Callable[..., dict[str, Any]], run: Run, *arguments: Any) -> dict[str, Any]:
    """What `work` measures of a run, with what this machine is: not the one where the run was prepared.

    On a CPU nobody says whether others use it, so that as many runs may be beside this one as there is room for.
    """
    measured = work(run, *arguments)  # first: ranks are forked, which can't be once CUDA is in use
    import torch

    from membench.runs import environment

    device = torch.device(run.device)
    taken = run.threads * run.training.processes
    beside = (os.cpu_count() or 1) // taken if device.type == "cpu" else 1
    return {**measured, "environment": environment.describe(device, run.threads) | {"jobs": max(1, beside)}}


def shown(cards: Mapping[str, str], work: Callable[..., dict[str, Any]], run: Run, *arguments: Any) -> dict[str, Any]:
    """As `placed`, with the `cards` that the variables of that name show: a process has those of the server from which
    it was forked, and Ray hands a worker, whose server stays, other cards with each task."""
    for name in cards_shown():
        del os.environ[name]
    os.environ.update(cards)
    return placed(work, run, *arguments)


def cards_shown() -> dict[str, str]:
    """What the environment says of the cards that a process may use: CUDA_VISIBLE_DEVICES, ROCR_VISIBLE_DEVICES."""
    return {name: value for name, value in os.environ.items() if name.endswith("_VISIBLE_DEVICES")}


def on(devices: Sequence[str], work: Callable[..., dict[str, Any]], run: Run, *arguments: Any) -> dict[str, Any]:
    """As `placed`, on these devices: each process of the run has one of them."""
    if len(devices) == 1:
        return placed(work, replace(run, device=devices[0]), *arguments)
    os.environ["CUDA_VISIBLE_DEVICES"] = visible(devices, os.environ.get("CUDA_VISIBLE_DEVICES"))
    return placed(work, replace(run, device="cuda"), *arguments)


def visible(devices: Sequence[str], now: str | None) -> str:
    """The cards "cuda:1", ... by the names that CUDA knows them by, given those that it shows `now`."""
    numbers = [int(name.partition(":")[2] or 0) for name in devices]
    return ",".join(now.split(",")[number] if now else str(number) for number in numbers)


def throttled(run: Run, send: Send) -> Callable[[int, float], None]:
    """A report of (step, loss) that sends some of them, and the last."""
    last = 0.0

    def report(step: int, loss: float) -> None:
        nonlocal last
        if time.monotonic() - last >= _REPORT_SECONDS or step == run.training.steps:
            last = time.monotonic()
            send("message", (step, loss))

    return report


def serve(function: Callable[..., Any], arguments: tuple[Any, ...], sender: connection.Connection, log: Path) -> None:
    """Call `function(*arguments, send)` and send back ("ok", its result), ("refused", sentence) or ("failed", text).

    Its output, including what the system prints if it crashes, goes to the file `log`.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent receives it too, and ends its children
    die_with_parent()
    _prefer_in_oom_kill()
    try:
        _redirect_output(log)
    except OSError as error:
        sender.send(("failed", f"its log can't be written: {about_file(error)}"))
        return
    faulthandler.enable()
    lock = threading.Lock()

    def send(kind: str, value: Any) -> None:
        with lock:
            sender.send((kind, value))

    try:
        send("ok", function(*arguments, send))
    except UserError as error:
        log_traceback()
        send("refused", str(error))
    except BaseException as error:
        log_traceback()
        send("failed", explain(error))


def die_with_parent() -> None:
    """A child must not continue after its parent is killed; the fork server, its direct parent, wouldn't notice."""
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _prefer_in_oom_kill() -> None:
    """If memory runs out, Linux kills the process with the highest score: let that be a run, not its recorder."""
    score = Path("/proc/self/oom_score_adj")
    if score.exists():
        score.write_text("500")


def _redirect_output(log: Path) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
