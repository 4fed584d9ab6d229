"""A rank killed at any moment: one record, no orphan, and the run continued is the run that nobody disturbed."""

import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from commands import command
from test_processes import BADAM, COMPARE, record_in
from test_resume import wait_for

MOMENTS = 20
ARGUMENTS = [*COMPARE[:-2], *BADAM, "--checkpoint-every", "4", "--processes", "2", "--steps", "30"]  # oftener
STRATEGIES = ("fsdp2", "replicate")  # with checkpoints of shards, and of the whole model

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")]


def descendants():
    """Processes below this one, by how far: children, children of the server of forks, ranks."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if state not in "ZX":
            parents[int(path.parent.name)] = int(parent)
    generations = [{os.getpid()}]
    while generations[-1]:
        generations.append({pid for pid, parent in parents.items() if parent in generations[-1]})
    return generations[1:-1]


def ranks():
    generations = descendants()
    return sorted(generations[2]) if len(generations) > 2 else []


def kill(rank, delay, stop):
    """End one of two ranks, some seconds after both began."""
    while len(ranks()) < 2 and not stop.is_set():
        time.sleep(0.01)
    stop.wait(delay)
    for pid in ranks()[rank : rank + 1]:
        os.kill(pid, signal.SIGKILL)


def arguments(strategy, folder):
    return [*ARGUMENTS, "--strategy", strategy, "--out", str(folder), "--save", str(folder / "models")]


def outcome(folder):
    """What doesn't depend on the clock: of the record, and the trained weights."""
    record = record_in(folder)
    history = [{key: value for key, value in entry.items() if key != "seconds"} for entry in record["history"]]
    memory = {key: value for key, value in record["memory"].items() if key != "process_peak_bytes"}
    (weights,) = folder.glob("models/*/model.safetensors")
    of_record = record["status"], history, record["metrics"], record["trained_fraction"], memory, record["parallel"]
    return *of_record, weights.read_bytes()


@pytest.fixture(scope="module", params=STRATEGIES)
def undisturbed(request, tmp_path_factory):
    """A strategy, the outcome of a run, and how long its ranks lived."""
    folder, begun = tmp_path_factory.mktemp("whole"), []
    stop = threading.Event()

    def watch():
        while not stop.is_set():
            if len(ranks()) == 2:
                begun.append(time.monotonic())
            time.sleep(0.01)

    watcher = threading.Thread(target=watch)
    watcher.start()
    assert command(*arguments(request.param, folder)).returncode == 0
    stop.set()
    watcher.join()
    return request.param, outcome(folder), begun[-1] - begun[0]


@pytest.mark.parametrize("number", range(MOMENTS))
def test_a_rank_killed_at_a_random_moment_leaves_one_record_and_no_orphan_and_the_run_continues(
    number, undisturbed, tmp_path
):
    strategy, wanted, seconds = undisturbed
    given = arguments(strategy, tmp_path)
    draw = random.Random(number)
    stop = threading.Event()
    killer = threading.Thread(target=kill, args=(draw.randrange(2), draw.uniform(0, seconds), stop))
    killer.start()
    first = command(*given)
    stop.set()
    killer.join()
    wait_for(lambda: len(descendants()) <= 1, 60, "the end of all processes of the run")
    if first.returncode:
        record = record_in(tmp_path)
        assert record["status"] == "failed" and "was killed by signal 9 (SIGKILL)" in record["error"]
        assert command(*given).returncode == 0
    assert outcome(tmp_path) == wanted
    assert not list((tmp_path / "checkpoints").glob("*"))
