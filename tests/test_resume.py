"""A run that was stopped anywhere and continued is, to the last bit, the run that wasn't."""

import errno
import functools
import io
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from random import Random

import pytest
import torch
from commands import DATA, command
from library import same, subject
from plan_models import CHOICES, drawn_options
from reports_factory import make_record
from toy import ToyTask

import optimizers
from membench.config.errors import UserError
from membench.config.run import Training
from membench.runs.run_folder import Folder
from membench.training import checkpoint, loop
from membench.training.execute import times
from membench.training.loop import Loop
from optimizers.contract import build_model, loss_of
from optimizers.shared import in_pieces

METHODS = {
    "adamw": {"lr": 1e-2},
    "badam": {"lr": 1e-2, "switch_every": 3, "always_train": ("head",)},
    "blockllm": {"lr": 1e-2, "sparsity": 0.5, "patience": 2, "always_train": ("head",)},
}
DTYPES = [torch.float32, torch.bfloat16]
OTHERS = [method for method in optimizers.available() if method not in METHODS]
CASES = [*itertools.product((6, 9, 14), METHODS, DTYPES), *itertools.product((9,), OTHERS, DTYPES[:1])]


class Stop(Exception):
    pass


def build(method: str, dtype: torch.dtype, jobs: int = 1) -> Loop:
    task = ToyTask(dtype=dtype)
    model = task.build_model().to(dtype)
    optimizer = optimizers.create(method, model, **METHODS.get(method, optimizers.get(method).example))
    training = Training(steps=17, batch_size=4, sequence_length=3, evaluate_every=4)
    return Loop(model, optimizer, task, training, seed=3, device=torch.device("cpu"), jobs=jobs)


def without_times(history):
    return [{key: value for key, value in entry.items() if key != "seconds"} for entry in history]


@pytest.mark.parametrize(("stop_at", "method", "dtype"), CASES, ids=str)
def test_continuing_from_a_checkpoint_gives_the_same_bits(method, dtype, stop_at, tmp_path):
    whole = build(method, dtype)
    whole.run()

    def stop(step, loss):
        if step == stop_at:
            raise Stop

    with pytest.raises(Stop):
        build(method, dtype).run(report=stop, checkpoint_path=tmp_path / "run.pt", checkpoint_every=5)
    continued, steps = build(method, dtype), []
    continued.run(report=lambda step, loss: steps.append(step), checkpoint_path=tmp_path / "run.pt", checkpoint_every=5)
    assert steps[0] == stop_at // 5 * 5 + 1  # continued, not begun again
    for p, q in zip(whole.model.parameters(), continued.model.parameters(), strict=True):
        assert torch.equal(p, q)
    assert without_times(continued.progress.history) == without_times(whole.progress.history)
    assert continued.progress.tokens == whole.progress.tokens
    assert continued.optimizer.block_coverage == whole.optimizer.block_coverage
    assert len(continued.clock.steps["forward"]) == 17


# soon over, so that a few steps see several; and what is drawn besides where bytes don't depend on it
ROUNDS = dict.fromkeys(("switch_every", "update_every", "patience", "probe"), (1, 2, 3))
ROUNDS |= {"order": ("random", "ascending", "descending"), "svd": ("randomized", "exact"), "seed": (0, 5)}
EVENTS = ("step", "step", "step", "halved rate", "advance", "skipped step", "zero gradients")


def happen(event, model, optimizer, step):
    """What a loop may do before it makes `step`."""
    by_gradients = not (optimizer.in_backward or optimizer.asks_losses)
    if event == "halved rate":
        for group in optimizer.param_groups:
            group["lr"] *= 0.5
    elif event == "advance":
        optimizer.advance()
    elif event == "skipped step" and by_gradients:
        optimizer.backward(loss_of(model, 1000 + step))
        optimizer.zero_grad()
    elif event == "zero gradients" and by_gradients:
        optimizer.backward(0.0 * loss_of(model, 1000 + step))
        optimizer.step()
        optimizer.zero_grad()
    optimizer.ask(functools.partial(loss_of, model, step))
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("seed", [pytest.param(n, marks=pytest.mark.slow if n >= 10 else ()) for n in range(80)])
def test_a_drawn_training_that_is_saved_and_loaded_again_and_again_has_the_same_bits(seed, monkeypatch):
    monkeypatch.setattr(in_pieces, "SMALLEST", 64)
    random = Random(seed)
    method, dtype = random.choice(optimizers.available()), random.choice(DTYPES)
    given = drawn_options(random, method, CHOICES | ROUNDS)
    every, events = random.choice((1, 2, 3)), random.choices(EVENTS, k=7)

    def make():
        torch.manual_seed(seed)  # of dropout
        model = build_model(dtype)
        return model, subject(method, **given).build(model)

    (model, optimizer), continued = make(), make()
    for step, event in enumerate(events):
        if step % every == 0:
            file = io.BytesIO()
            torch.save([part.state_dict() for part in continued], file)
            file.seek(0)
            continued = make()
            for part, state in zip(continued, torch.load(file, weights_only=True), strict=True):
                part.load_state_dict(state)
        for one in ((model, optimizer), continued):
            torch.manual_seed(step)
            happen(event, *one, step)
        assert same_bits(continued[0].state_dict(), model.state_dict()), (method, given, dtype, events[: step + 1])
        assert same(continued[1].state_dict(), optimizer.state_dict()), (method, given, dtype, events[: step + 1])
    said = {name: t.clone() for name, t in optimizer.finished_state_dict().items()}
    assert same_bits(said, optimizer.finish().state_dict()) and same_bits(said, continued[1].finish().state_dict())


def same_bits(one, other):
    """Also where a weight in 8 bits has NaN in its place."""
    return one.keys() == other.keys() and all(torch.allclose(t, other[k], 0, 0, equal_nan=True) for k, t in one.items())


def test_a_checkpoint_is_whole_or_not_there(tmp_path, monkeypatch):
    path = tmp_path / "run.pt"
    checkpoint.save({"step": 1}, path)

    def fail(*arguments, **given):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(UserError, match=r"run\.pt can't be written \(No space left on device\)"):
        checkpoint.save({"step": 2}, path)
    assert list(tmp_path.iterdir()) == [path]
    assert checkpoint.load(path) == {"step": 1}
    assert checkpoint.load(tmp_path / "other.pt") is None


def test_a_checkpoint_whose_folder_is_a_file_is_told_in_a_sentence(tmp_path):
    (tmp_path / "checkpoints").touch()
    with pytest.raises(UserError, match=r"checkpoints/run\.pt can't be written \(File exists\): make room there, or"):
        checkpoint.save({"step": 1}, tmp_path / "checkpoints" / "run.pt")


def test_nothing_is_left_of_a_checkpoint_that_was_being_written_when_its_process_was_killed(tmp_path):
    folder, made = Folder(tmp_path), make_record()
    with folder.locked():
        checkpoint.save({"step": 1}, folder.checkpoint(made["run_id"]))
        half = folder.checkpoint(made["run_id"]).with_name(f".{made['run_id']}.pt.tmp")
        half.write_bytes(b"half of one")
        folder.clear(made)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_a_broken_checkpoint_is_named(tmp_path):
    (tmp_path / "run.pt").write_bytes(b"PK\x03\x04 half of it")
    with pytest.raises(UserError, match=r"run\.pt can't be read .*remove it"):
        checkpoint.load(tmp_path / "run.pt")


def stopped(path: Path, **given) -> None:
    def stop(step, loss):
        if step == 6:
            raise Stop

    with pytest.raises(Stop):
        build("badam", torch.float32, **given).run(report=stop, checkpoint_path=path, checkpoint_every=5)


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state["progress"].update(unheard_of=1),
        lambda state: state.pop("seconds"),
        lambda state: state["model"].popitem(),
        lambda state: state["optimizer"].clear(),
    ],
)
def test_a_checkpoint_of_another_version_is_named_with_the_way_out(change, tmp_path):
    path = tmp_path / "run.pt"
    stopped(path)
    state = checkpoint.load(path)
    change(state)
    checkpoint.save(state, path)
    with pytest.raises(UserError, match=r"run\.pt doesn't fit .*remove it to start that run again"):
        build("badam", torch.float32).run(checkpoint_path=path)


@pytest.mark.parametrize(("jobs", "machine"), [(1, "this one"), (2, "this one"), (1, "another")])
def test_times_of_steps_that_were_made_beside_other_runs_or_elsewhere_are_not_mixed(
    jobs, machine, tmp_path, monkeypatch
):
    path = tmp_path / "run.pt"
    with monkeypatch.context() as then:
        then.setattr(loop, "device_name", lambda device: machine)
        stopped(path, jobs=jobs)
    monkeypatch.setattr(loop, "device_name", lambda device: "this one")
    continued = build("badam", torch.float32)
    continued.run(checkpoint_path=path)
    found = [(one["steps"], one["jobs"], one["device_name"]) for one in continued.progress.made_by]
    same = (jobs, machine) == (1, "this one")
    assert found == ([(17, 1, "this one")] if same else [(5, jobs, machine), (12, 1, "this one")])
    assert len(continued.clock.steps["forward"]) == (17 if same else 12)


@pytest.mark.parametrize("machine", ["this one", "another"])
def test_the_peaks_of_a_run_are_those_of_all_processes_that_made_its_steps_on_one_device(
    machine, tmp_path, monkeypatch
):
    """The last of them may have made few steps, and needed less than the training does."""

    def peaks_from_here(process, reserved, device):
        peaks = {"process_peak_bytes": process, "peak_reserved_bytes": reserved}
        monkeypatch.setattr(loop, "process_memory", lambda _: peaks)
        monkeypatch.setattr(loop, "device_name", lambda _: device)

    path = tmp_path / "run.pt"
    peaks_from_here(900, 800, machine)
    stopped(path)
    peaks_from_here(950, 300, "this one")
    continued = build("badam", torch.float32)
    continued.run(checkpoint_path=path)
    reserved = 800 if machine == "this one" else 300
    assert continued.peaks() == {"process_peak_bytes": 950, "peak_reserved_bytes": reserved}


def test_a_run_of_which_only_the_evaluation_is_left_keeps_the_times_and_peaks_of_its_steps(tmp_path, monkeypatch):
    path = tmp_path / "run.pt"
    monkeypatch.setattr(loop, "process_memory", lambda _: {"peak_reserved_bytes": 800})
    made = build("badam", torch.float32)
    made.run(checkpoint_path=path, checkpoint_every=17)  # and is stopped before it is evaluated
    monkeypatch.setattr(loop, "process_memory", lambda _: {"peak_reserved_bytes": 300})
    monkeypatch.setattr(loop, "device_name", lambda _: "another")
    left = build("badam", torch.float32, jobs=2)
    left.run(checkpoint_path=path)
    assert [(one["steps"], one["jobs"]) for one in left.progress.made_by] == [(17, 1), (0, 2)]
    assert times(left) == times(made) and times(left)["tokens_per_second"] > 0 < times(left)["update_seconds"]
    assert left.peaks() == {"peak_reserved_bytes": 800}


COMPARE = [
    "compare",
    "--task",
    "superglue/cb",
    "--data",
    DATA,
    "--optimizers",
    "badam",
    "--set",
    "badam.switch_every=7",
]
COMPARE += ["--steps", "40", "--batch-size", "2", "--sequence-length", "16", "--threads", "1", "--quiet"]
COMPARE += ["--checkpoint-every", "10"]
ROOT = Path(__file__).resolve().parent.parent


def records(folder: Path) -> dict[str, dict]:
    """The records without what differs from one time to the next."""
    found = {}
    for path in folder.glob("*.json"):
        record = json.loads(path.read_text())
        del record["time"], record["memory"]["process_peak_bytes"]
        for key in ("created", "commit", "dirty"):  # somebody may commit while the tests run
            del record["environment"][key]
        for entry in record["history"]:
            del entry["seconds"]
        found[path.name] = record
    return found


def members_of_session(leader: int) -> list[str]:
    """Processes of a session that are alive."""
    alive = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, session = path.read_text().rpartition(")")[2].split()[:4]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(session) == leader and state not in "ZX":
            alive.append(path.parent.name)
    return alive


def wait_for(condition, seconds: float, what: str):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what}: not within {seconds} s"
        time.sleep(0.005)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_comparison_that_was_killed_ends_with_the_records_of_one_that_was_not(tmp_path):
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    arguments = [sys.executable, "-m", "membench", *COMPARE, "--out", str(killed)]
    process = subprocess.Popen(arguments, cwd=ROOT, start_new_session=True)
    try:
        checkpoints = killed / "checkpoints"
        wait_for(lambda: list(checkpoints.glob("*--badam--*.pt")), 600, "a checkpoint of the second run")
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert [name.split("--")[1] for name in records(killed)] == ["adamw"]
    wait_for(lambda: not members_of_session(process.pid), 300, "the end of all processes of a killed comparison")

    again = command(*COMPARE, "--out", str(killed))
    assert again.returncode == 0, again.stderr
    assert "1 of 2 runs are already in" in again.stdout
    undisturbed = command(*COMPARE, "--out", str(whole))
    assert undisturbed.returncode == 0, undisturbed.stderr
    assert records(killed) == records(whole)
    assert len(records(whole)) == 2
    assert not list(checkpoints.glob("*"))

    stamps = {path: path.stat().st_mtime_ns for path in killed.glob("*.json")}
    third = command(*COMPARE, "--out", str(killed))
    assert third.returncode == 0
    assert "2 of 2 runs are already in" in third.stdout
    assert stamps == {path: path.stat().st_mtime_ns for path in killed.glob("*.json")}
