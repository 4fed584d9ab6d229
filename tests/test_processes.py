"""A run on several processes has a single process's losses, continues on any number, and ends if a rank does."""

import importlib
import itertools
import json
import os
import random
import secrets
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import gloo
import numpy as np
import pytest
import torch
from commands import DATA, command
from safetensors.torch import load_file
from test_resume import members_of_session, wait_for
from torch import nn

import optimizers
from membench.config.errors import UserError
from membench.config.run import Training
from membench.config.settings import resolve
from membench.training import checkpoint, parallel
from membench.training import loop as training_loop
from membench.training.loop import Loop

TRAINING = Training(steps=6, batch_size=8, sequence_length=3, evaluate_every=4)
CASES = {
    "badam, sharded": ("badam", {"lr": 1e-2, "switch_every": 2, "always_train": ("head",)}, {}),
    "lora, sharded, clipped": ("lora", {"lr": 1e-2, "rank": 2}, {"max_grad_norm": 0.1}),  # built before
    "galore, sharded, clipped": ("galore", {"lr": 1e-2, "rank": 2}, {"max_grad_norm": 0.1}),
    "adamw, replicas, clipped, accumulated": (
        "adamw",
        {"lr": 1e-2},
        {"strategy": "replicate", "max_grad_norm": 0.1, "gradient_accumulation_steps": 2, "track": "gradient_norm"},
    ),
    "badam, replicas, in backward": (
        "badam",
        {"lr": 1e-2, "switch_every": 2, "always_train": ("head",), "in_backward": True},
        {"strategy": "replicate", "track": "gradient_norm"},
    ),
}
REFUSED = {("mezo", "fsdp2")}
EVERY = {
    f"{method}, {strategy}": (method, optimizers.get(method).example, {"strategy": strategy})
    for method in optimizers.available()
    for strategy in ("fsdp2", "replicate")
    if (method, strategy) not in REFUSED
}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x).tanh()
        return self.head(x)


class Dropping(Net):
    """Leaves out some of its layers at random in training, as FlauBERT."""

    def __init__(self):
        super().__init__()
        self.layerdrop = 0.5

    def forward(self, x):
        for layer in self.layers:
            if not self.training or torch.rand([]) >= self.layerdrop:
                x = x + layer(x).tanh()
        return self.head(x)


class Task:
    """Examples with one to three labels each, so that the ranks' losses aren't of equal weight."""

    def __init__(self, batch_size):
        self.size = batch_size

    def batch(self, step):
        numbers = range(step * self.size, (step + 1) * self.size)
        draws = [torch.Generator().manual_seed(number) for number in numbers]
        x = torch.stack([torch.randn(3, 8, generator=draw, dtype=torch.float64) for draw in draws])
        labels = x.sum(2).long().remainder(5)
        for row, number in enumerate(numbers):
            labels[row, 1 + number % 3 :] = -100
        return {"x": x, "labels": labels, "attention_mask": torch.ones(self.size, 3, dtype=torch.long)}

    def loss(self, model, batch):
        return nn.functional.cross_entropy(model(batch["x"]).flatten(0, 1), batch["labels"].flatten())

    def evaluate(self, model):
        with torch.no_grad():
            return {"error": float(self.loss(model, self.batch(10_000)))}


class FromGlobalGenerators(Task):
    def batch(self, step):
        return super().batch(int(torch.randint(100, ())) + np.random.randint(100) + random.randrange(100))


class Unlabelled(Task):
    """A half of some batches has no labels."""

    def batch(self, step):
        made = super().batch(step)
        if step % 3:
            made["labels"][self.size // 2 :] = -100
        return made


class FromNoSeed(Task):
    def batch(self, step):
        return super().batch(secrets.randbelow(10**6))


def losses(case, path=None, stop_after=None, task=Task, net=Net):
    """All losses of a run, with metrics and, where they are tracked, norms of gradients.

    With `stop_after`, those up to this step, the last with a checkpoint.
    """
    method, given, more = (CASES | EVERY)[case]
    training = replace(TRAINING, **more)
    torch.manual_seed(0)
    model = net().double()
    optimizer = parallel.place(model, method, training.strategy, partial(optimizers.create, method, **given))
    loop = Loop(model, optimizer, task(training.micro_batch_size), training, seed=0, device=torch.device("cpu"))

    def stop(step, loss):
        if stop_after is not None and step > stop_after:
            raise InterruptedError

    try:
        loop.run(report=stop, checkpoint_path=path, checkpoint_every=3 if path else 0)
    except InterruptedError:
        return None
    tracked = training.track is not None
    return [
        (entry["loss"], (entry["metrics"] or {}) | ({"norm": entry["gradient_norm"]} if tracked else {}))
        for entry in loop.progress.history
    ]


def as_ranks(rank, folder, cases, stop_after=None):
    return {case: losses(case, Path(folder, f"{number}.pt"), stop_after) for number, case in enumerate(cases)}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Of two processes, in the middle of each run."""
    importlib.import_module("peft")  # here, or each process would import it
    folder = tmp_path_factory.mktemp("checkpoints")
    gloo.run(as_ranks, folder, CASES, 3)
    assert len(list(folder.glob("*.pt"))) == len(CASES)
    return folder


def expect_losses_of_one(checkpoints, cases, count, folder):
    """Continue from checkpoints of two processes with `count`."""
    shutil.copytree(checkpoints, folder, dirs_exist_ok=True)
    found = gloo.run(as_ranks, folder, cases, size=count)[0] if count > 1 else as_ranks(0, folder, cases)
    for case in cases:
        for (loss, metrics), (wanted, scores) in zip(found[case], losses(case), strict=True):
            assert loss == pytest.approx(wanted, rel=1e-6), case
            assert metrics == pytest.approx(scores, rel=1e-6), case


@pytest.mark.parametrize("count", [2, 1, pytest.param(4, marks=pytest.mark.slow)])
def test_a_run_begun_by_two_processes_and_continued_by_any_number_has_the_losses_of_one(count, checkpoints, tmp_path):
    expect_losses_of_one(checkpoints, CASES, count, tmp_path)


def test_a_shard_that_has_changed_is_never_continued_from(checkpoints, tmp_path):
    shutil.copytree(checkpoints, tmp_path, dirs_exist_ok=True)
    number, case = next(iter(enumerate(CASES)))
    first, *_ = sorted(tmp_path.glob(f"{number}.shards/*/*"))
    content = bytearray(first.read_bytes())
    content[-1] ^= 1
    for damage in (lambda: first.write_bytes(content), first.unlink):
        damage()
        with pytest.raises(UserError, match=rf"{number}\.pt is damaged: remove it to start that run again"):
            losses(case, tmp_path / f"{number}.pt")


def test_a_checkpoint_that_is_not_there_for_all_ranks_is_refused(checkpoints, monkeypatch):
    monkeypatch.setattr(parallel, "of_all_ranks", lambda value: [value, None])  # as on a machine with another disk
    with pytest.raises(UserError, match=r"0\.pt: put --out on a disk that they share"):
        losses(next(iter(CASES)), checkpoints / "0.pt")


def drawn(rank, task):
    try:
        return [loss for loss, _ in losses("adamw, replicas, clipped, accumulated", task=task)]
    except ValueError as error:
        return str(error)


def test_ranks_share_the_batches_of_a_task_that_draws_from_global_generators():
    one, two = drawn(0, FromGlobalGenerators), gloo.run(drawn, FromGlobalGenerators)
    assert two == [pytest.approx(one, rel=1e-6)] * 2


def test_a_rank_whose_share_has_no_labels_counts_for_nothing():
    one, two = drawn(0, Unlabelled), gloo.run(drawn, Unlabelled)
    assert two == [pytest.approx(one, rel=1e-6)] * 2


def sharded_and_dropping(rank):
    return [loss for loss, _ in losses("adamw, fsdp2", net=Dropping)]


def test_ranks_whose_layers_are_sharded_leave_out_the_same_ones_at_random():
    one, two = sharded_and_dropping(0), gloo.run(sharded_and_dropping)
    assert two == [pytest.approx(one, rel=1e-6)] * 2


def test_batches_that_differ_between_ranks_are_refused():
    for said in gloo.run(drawn, FromNoSeed):
        assert "drew different batches of one step" in said and "\n" not in said


def seconds_of_updates(rank, slow_rank):
    """Of each step, as this rank measures them."""
    training = replace(TRAINING, steps=3, strategy="replicate")
    model = Net().double()
    optimizer = parallel.place(model, "sgd", training.strategy, partial(optimizers.create, "sgd"))
    if rank == slow_rank:
        update = optimizer.update
        optimizer.update = lambda *given: time.sleep(0.2) or update(*given)
    loop = Loop(model, optimizer, Task(training.batch_size), training, seed=0, device=torch.device("cpu"))
    loop.run()
    return loop.clock.steps["update"]


def test_a_step_has_ended_when_it_has_on_all_ranks():
    first, slow = gloo.run(seconds_of_updates, 1)
    assert min(slow) >= 0.2 <= min(first)  # neither averages gradients, in its update, before the other does


def seconds_waited(rank, waits):
    said = itertools.count(step=waits[rank])  # by each look
    training_loop.waited_seconds = lambda: next(said)
    model = Net().double()
    optimizer = parallel.place(model, "sgd", "replicate", partial(optimizers.create, "sgd"))
    training = replace(TRAINING, evaluate_every=None, strategy="replicate")
    loop = Loop(model, optimizer, Task(training.batch_size), training, seed=0, device=torch.device("cpu"))
    loop.run()
    return loop.progress.waited_seconds


def test_a_run_has_waited_for_processors_as_long_as_the_rank_that_waited_most():
    assert gloo.run(seconds_waited, (1, 5)) == [5 * TRAINING.steps] * 2


def without_room(rank, folder):
    """Go on, on a disk that is full when the checkpoint is to be completed."""
    checkpoint.save = lambda state, path: os.write(os.open("/dev/full", os.O_WRONLY), b"no room")
    return as_ranks(rank, folder, CASES)


@pytest.mark.slow
def test_the_checkpoint_before_stands_until_the_next_is_complete(checkpoints, tmp_path):
    shutil.copytree(checkpoints, tmp_path, dirs_exist_ok=True)
    with pytest.raises(AssertionError, match="No space left on device"):
        gloo.run(without_room, tmp_path)
    assert len(list((tmp_path / "0.shards").iterdir())) == 2
    expect_losses_of_one(tmp_path, CASES, 2, tmp_path / "again")


@pytest.mark.slow
def test_so_it_is_with_every_method_on_one_two_and_four_processes(tmp_path_factory):
    importlib.import_module("peft")
    folder = tmp_path_factory.mktemp("every")
    gloo.run(as_ranks, folder, EVERY, 3)
    for count in (1, 2, 4):
        expect_losses_of_one(folder, EVERY, count, tmp_path_factory.mktemp(str(count)))


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"strategy": "replicate"}, "--strategy replicate is for several processes: also give --processes"),
        ({"processes": 3, "batch_size": 16}, "can't be split into 3 equal shares"),
        ({"processes": 2, "track": "gradient_norm"}, "takes a gradient of whole weights: .* --strategy replicate"),
        ({"processes": 2, "device": "cuda:1"}, "--device cuda:1: each process has a card of its own: name them with"),
        ({"processes": 2, "devices": "cuda:0,cuda:1,cuda:2"}, "name a multiple of 2, one for each process of a run"),
        ({"processes": 2, "devices": "cuda:0,cuda:1", "jobs": 2}, "each run takes 2 devices, so at most 1"),
        ({"processes": 2, "begun_with": 2}, "--begun-with 2: the same --processes go on by themselves: leave it out"),
    ],
)
def test_what_several_processes_cannot_do_is_refused(given, sentence):
    with pytest.raises(UserError, match=sentence):
        resolve(given)


COMPARE = ["compare", "--no-reference", "--task", "superglue/cb", "--data", DATA, "--quiet"]
COMPARE += ["--batch-size", "8", "--sequence-length", "32", "--threads", "1", "--checkpoint-every", "10"]
BADAM = ["--optimizers", "badam"]
ROOT = Path(__file__).resolve().parent.parent


def record_in(folder):
    (path,) = folder.glob("*.json")
    return json.loads(path.read_text())


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "method"), [("fsdp2", "badam"), ("fsdp2", "lora"), ("replicate", "badam")])
def test_a_comparison_on_two_processes_has_one_record_with_both_peaks_and_saves_the_model(strategy, method, tmp_path):
    for name, more in (("one", []), ("two", ["--processes", "2", "--strategy", strategy])):
        saved = ["--out", str(tmp_path / name), "--save", str(tmp_path / f"{name}-models")]
        done = command(*COMPARE, "--optimizers", method, "--steps", "6", *more, *saved)
        assert done.returncode == 0, done.stdout + done.stderr
    one, two = record_in(tmp_path / "one"), record_in(tmp_path / "two")
    assert one["run_id"] != two["run_id"] and "parallel" not in one
    found = [[entry["loss"] for entry in record["history"]] for record in (one, two)]
    assert found[1] == pytest.approx(found[0], rel=1e-4)
    section = two["parallel"]
    assert (section["processes"], section["strategy"]) == (2, strategy) and section["sent_bytes"] > 0
    assert two["memory"]["peak_allocated_bytes"] == max(section["peaks_bytes"]) and len(section["peaks_bytes"]) == 2
    weights = [record["memory"]["at_peak"]["optimizer_state_bytes"] for record in (one, two)]
    share = weights[1] / weights[0]
    assert share == pytest.approx(0.5 if strategy == "fsdp2" else 1.0, rel=0.01)
    assert two["trained_fraction"] == pytest.approx(one["trained_fraction"], rel=0.01)
    models = [load_file(path) for path in sorted(tmp_path.glob("*-models/*/model.safetensors"))]
    assert len(models) == 2 and models[0].keys() == models[1].keys()
    for name, p in models[0].items():  # the true gradient of a key's bias is zero: Adam makes steps of rounding errors
        assert name.endswith("key.bias") or torch.allclose(p, models[1][name], atol=1e-4), name


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("victim", [1, 0])
def test_a_rank_that_is_killed_ends_the_run_with_its_record_and_the_next_command_continues(victim, tmp_path):
    arguments = [*COMPARE, *BADAM, "--processes", "2", "--steps", "40"]
    out = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, "-m", "membench", *arguments, "--out", str(out)], cwd=ROOT, start_new_session=True
    )
    wait_for(lambda: list((out / "checkpoints").glob("*.pt")), 300, "a checkpoint")
    os.kill(_ranks_of(process.pid)[victim], signal.SIGKILL)
    assert process.wait(timeout=120) == 1
    wait_for(lambda: not members_of_session(process.pid), 60, "the end of all processes")
    record = record_in(out)
    assert record["status"] == "failed"
    assert record["error"] == f"the process of rank {victim} was killed by signal 9 (SIGKILL)"
    assert command(*arguments, "--out", str(out)).returncode == 0
    assert command(*arguments, "--out", str(tmp_path / "whole")).returncode == 0
    again, whole = record_in(out), record_in(tmp_path / "whole")
    assert again["metrics"] == whole["metrics"]
    assert [e["loss"] for e in again["history"]] == [e["loss"] for e in whole["history"]]


@pytest.fixture(scope="module", params=["fsdp2", "replicate"])
def begun_by_two(request, tmp_path_factory):
    """The folder of a run on two processes that was interrupted, and the command that makes it."""
    arguments = [*COMPARE, *BADAM, "--strategy", request.param, "--steps", "40"]
    out = tmp_path_factory.mktemp("begun") / "out"
    line = [sys.executable, "-m", "membench", *arguments, "--processes", "2", "--out", str(out)]
    process = subprocess.Popen(line, cwd=ROOT, start_new_session=True)
    wait_for(lambda: list((out / "checkpoints").glob("*.pt")), 300, "a checkpoint")
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=120) == 130
    wait_for(lambda: not members_of_session(process.pid), 60, "the end of all processes")
    return out, arguments


@pytest.fixture(scope="module")
def by_one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("by-one")
    assert command(*COMPARE, *BADAM, "--steps", "40", "--out", str(folder)).returncode == 0
    return record_in(folder)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 4])
def test_a_comparison_goes_on_on_another_number_of_processes_and_its_record_says_which_made_its_steps(
    count, begun_by_two, by_one, tmp_path
):
    begun, arguments = begun_by_two
    shutil.copytree(begun, tmp_path, dirs_exist_ok=True)
    given = [*arguments, "--processes", str(count), "--begun-with", "2", "--out", str(tmp_path)]
    done = command(*given)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 of 1 runs go on from where 2 processes came to" in done.stdout
    record = record_in(tmp_path)
    first, then = record["made_by"]
    assert (first["processes"], then["processes"]) == (2, count) and first["steps"] >= 10
    assert first["steps"] + then["steps"] == 40 == len(record["history"])
    assert first["tokens"] + then["tokens"] == record["history"][-1]["tokens"]
    assert record["training"]["processes"] == count == len(record.get("parallel", {"peaks_bytes": [0]})["peaks_bytes"])
    assert record["time"]["timed_steps"] <= then["steps"]
    assert record["time"]["tokens_per_second"] == then["tokens"] / then["train_seconds"]
    assert "Throughput" not in done.stdout and "Speeds of runs that went on on other processes" in done.stdout
    wanted = [entry["loss"] for entry in by_one["history"]]
    assert [entry["loss"] for entry in record["history"]] == pytest.approx(wanted, abs=1e-6)
    if count == 1:  # the same run as if one process had made all of it, and its memory
        assert record["run_id"] == by_one["run_id"]
        assert record["memory"]["at_peak"] == by_one["memory"]["at_peak"]
    assert not list(tmp_path.glob("checkpoints/*"))
    assert "1 of 1 runs are already in" in command(*given).stdout


def _ranks_of(session: int) -> list[int]:
    """The processes with a rank, in its order: they alone have a parent in common that isn't the command."""
    children: dict[str, list[int]] = {}
    for pid in members_of_session(session):
        parent = Path("/proc", pid, "stat").read_text().rpartition(")")[2].split()[1]
        if parent != str(session):
            children.setdefault(parent, []).append(int(pid))
    return sorted(max(children.values(), key=len))
