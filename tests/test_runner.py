"""A run is alone in its process: whatever happens to it leaves a record, and nothing happens to the others."""

import errno
import fcntl
import gc
import itertools
import json
import os
import signal
import subprocess
import sys
import time
import weakref
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import announce
import pytest
import torch
from announce import echo
from commands import DATA, command
from reports_factory import make_failure, make_record
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher import api as launcher_api

import optimizers
from membench.config.errors import UserError
from membench.config.launcher import Place
from membench.config.run import Run, Training
from membench.config.settings import resolve
from membench.planning import rehearsal
from membench.runs import prepare as preparing
from membench.runs import processes, ranks, worker
from membench.runs import to_record as assemble
from membench.runs.compare import compare
from membench.runs.executors import Local, elsewhere
from membench.runs.prepare import prepare
from membench.runs.processes import Outcome
from membench.runs.run_folder import Folder
from membench.training import execute
from membench.training.build import build_model
from membench.training.loop import Diverged
from optimizers import AdamW, BAdam
from reports import record
from tasks.models.damage import is_out_of_memory

ROOT = Path(__file__).resolve().parent.parent
TINY = {"steps": 4, "batch_size": 2, "sequence_length": 16, "threads": 1, "quiet": True, "task": "superglue/cb"}
TINY |= {"data": DATA}

# A module of the user's own, with a method for everything that can go wrong.
METHODS = """
import os
import signal

from optimizers import AdamW


class Raises(AdamW):
    def after_step(self):
        raise RuntimeError("this method is broken")


class Killed(AdamW):
    def after_step(self):
        os.kill(os.getpid(), signal.SIGKILL)


class Exits(AdamW):
    def after_step(self):
        os._exit(3)


class Hungry(AdamW):
    def after_step(self):
        import torch
        torch.empty(2**60, dtype=torch.uint8)


class FailsToBuild(AdamW):
    def __init__(self, model, lr=1e-3):
        raise RuntimeError("no such luck")
"""


def refuse(send):
    raise UserError("no")


def fail(send):
    return 1 / 0


def wait_for(file, send):
    while not Path(file).exists():
        time.sleep(0.01)
    return "there"


def touch(file, send):
    Path(file).touch()


@dataclass(frozen=True)
class OnDevice:
    """As much of a run as says where it is made."""

    device: str = ""
    threads: int = 1
    training = SimpleNamespace(processes=1)


def use(run, send):
    """When a device was in use, and which."""
    start = time.monotonic()
    time.sleep(0.02)
    return {"device": run.device, "start": start, "end": time.monotonic()}


def cards(run, send):
    """Those that a process of a run may use."""
    return worker.cards_shown()


def kill_itself(send):
    os.kill(os.getpid(), signal.SIGKILL)


def look_at_the_server(send):
    """What the server that forked this process has imported."""
    return [name for name in ("torch", "transformers", "tasks") if name in sys.modules]


@pytest.fixture(scope="module", autouse=True)
def server():
    processes.start_server()


def call(function, *arguments, tmp_path, **given) -> Outcome:
    return processes.call(function, *arguments, log=tmp_path / "log", **given)


def test_a_call_gives_its_result_and_its_messages(tmp_path):
    messages = []
    outcome = call(echo, {"a": 1}, tmp_path=tmp_path, on_message=messages.append)
    assert outcome == Outcome("ok", value={"a": 1})
    assert messages == ["on the way"]


def test_calls_are_taken_as_there_is_room_and_a_death_ends_only_its_own(tmp_path):
    """Of five calls two at a time; the first waits for the file that the fourth writes, and the second is killed."""
    taken, file = [], tmp_path / "done"

    def calls():
        for number, (function, *arguments) in enumerate(
            [(wait_for, str(file)), (kill_itself,), (echo, 2), (touch, str(file)), (echo, 4)]
        ):
            taken.append(number)
            yield processes.Call(function, tuple(arguments), tmp_path / f"log-{number}")

    ended = {}
    for one, outcome in processes.call_all(calls(), at_once=2):
        ended[one.log.name] = outcome
        assert len(taken) <= len(ended) + 2
    assert list(ended)[:2] == ["log-1", "log-2"] and "killed by signal 9" in ended["log-1"].error
    assert {name: outcome.value for name, outcome in ended.items() if outcome.status == "ok"} == {
        "log-0": "there",
        "log-2": 2,
        "log-3": None,
        "log-4": 4,
    }


def test_each_run_has_one_of_the_devices_to_itself(tmp_path):
    """Six runs on two devices (which torch takes for names of the CPU)."""
    calls = [processes.Call(use, (OnDevice(),), tmp_path / f"log-{number}") for number in range(6)]
    made = [outcome.value for _, outcome in Local(2, (("cpu:0",), ("cpu:1",))).call_all(calls)]
    assert {one["device"] for one in made} == {"cpu:0", "cpu:1"} and len(made) == 6
    assert all(one["environment"]["device"] == "cpu" for one in made)
    for device in ("cpu:0", "cpu:1"):
        used = sorted((one["start"], one["end"]) for one in made if one["device"] == device)
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(used))


def test_a_run_has_the_card_that_a_reused_worker_of_ray_was_handed_last(tmp_path, monkeypatch):
    found = []
    for shown in ({"CUDA_VISIBLE_DEVICES": "1"}, {"CUDA_VISIBLE_DEVICES": "0"}, {"ROCR_VISIBLE_DEVICES": "2"}):
        for name in worker.cards_shown():
            monkeypatch.delenv(name)
        for name, value in shown.items():
            monkeypatch.setenv(name, value)
        outcome = elsewhere.carry_out(cards, (OnDevice("cpu"),), tmp_path / "log", lambda message: None)
        found.append({name: value for name, value in outcome.value.items() if name in shown or "CUDA" in name})
    assert found == [{"CUDA_VISIBLE_DEVICES": "1"}, {"CUDA_VISIBLE_DEVICES": "0"}, {"ROCR_VISIBLE_DEVICES": "2"}]


def test_calls_that_nobody_waits_for_any_more_are_ended(tmp_path):
    file = tmp_path / "pid"
    calls = [
        processes.Call(announce.announce_and_wait, (str(file),), tmp_path / "log"),
        processes.Call(echo, (1,), tmp_path / "b"),
    ]
    ended = processes.call_all(calls, at_once=2)
    assert next(ended)[1].value == 1
    while not (file.exists() and file.read_text()):
        time.sleep(0.01)
    ended.close()
    assert not alive(int(file.read_text()))


def test_a_refusal_and_a_failure_are_told_apart(tmp_path):
    assert call(refuse, tmp_path=tmp_path) == Outcome("refused", error="no")
    outcome = call(fail, tmp_path=tmp_path)
    assert outcome.status == "failed"
    assert outcome.error.startswith("ZeroDivisionError: division by zero (")
    assert "Traceback" in (tmp_path / "log").read_text()


def test_the_server_has_imported_what_is_heavy(tmp_path):
    assert call(look_at_the_server, tmp_path=tmp_path).value == ["torch", "transformers", "tasks"]


THREADS = """
import pathlib, membench.runs.preload
print(*(path.read_text().strip() for path in pathlib.Path("/proc/self/task").glob("*/comm")))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_the_server_imports_starts_no_thread_since_children_of_a_pool_of_threads_wait_for_ever():
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "4", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", THREADS], env=environment, capture_output=True, text=True, check=True)
    assert len([name for name in done.stdout.split() if name != "jemalloc_bg_thd"]) == 1  # it stops for a fork


WAITING = """
import pathlib, sys, announce
from membench.runs import processes
processes.start_server(crowded=sys.argv[1] == "crowded")
print(processes.call(announce.variable, "OMP_WAIT_POLICY", log=pathlib.Path(sys.argv[2])).value)
"""


@pytest.mark.parametrize(
    ("given", "own", "policy"),
    [("crowded", {}, "passive"), ("alone", {}, "None"), ("crowded", {"OMP_WAIT_POLICY": "active"}, "active")],
)
def test_threads_that_share_processors_sleep_while_they_wait_unless_told_otherwise(given, own, policy, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"} | own
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    command = [sys.executable, "-c", WAITING, given, str(tmp_path / "log")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == policy


@pytest.mark.parametrize(
    ("given", "crowded"),
    [
        ({}, False),
        ({"jobs": 2}, True),
        ({"jobs": 2, "threads": 2}, False),
        ({"jobs": 2, "threads": 3}, True),
        ({"processes": 2}, True),
        ({"processes": 4, "threads": 1}, False),
        ({"devices": "cuda:0,cuda:1", "jobs": 2}, False),
        ({"executor": "slurm", "jobs": 3}, False),
    ],
)
def test_a_comparison_whose_runs_have_more_threads_than_there_are_processors_says_so(given, crowded, monkeypatch):
    told = []

    def start(crowded):
        told.append(crowded)
        raise KeyboardInterrupt

    monkeypatch.setattr(processes, "start_server", start)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    assert compare(resolve(TINY | {"threads": None, "batch_size": 4} | given)) == 130
    assert told == [crowded]


def test_a_process_killed_for_want_of_memory_is_told_from_one_that_somebody_killed():
    cause = processes.cause_of_death
    assert cause(-9, killed_for_memory=True).status == "out_of_memory"
    for code, told in ((-9, "9 (SIGKILL)"), (-11, "11 (SIGSEGV)")):
        error = f"the process was killed by signal {told}"
        assert cause(code, killed_for_memory=code == -11) == Outcome("failed", error=error, died=True)


@pytest.mark.parametrize(
    ("kills", "status", "words"), [([3, 4], "out_of_memory", "ran out of memory"), ([3, 3], "failed", "signal 9")]
)
def test_so_is_a_rank(kills, status, words, monkeypatch, tmp_path):
    """Or it would be begun again, to die again, by every command."""
    failure = ProcessFailure(local_rank=1, pid=0, exitcode=-9, error_file="")

    def launch(config, function):
        def begin(*arguments):
            raise ChildFailedError("rank", {1: failure})

        return begin

    monkeypatch.setattr(launcher_api, "elastic_launch", launch)
    monkeypatch.setattr(processes, "out_of_memory_kills", lambda: kills.pop(0))
    run = SimpleNamespace(run_id="run", training=SimpleNamespace(processes=2))
    measured = ranks.execute(run, tmp_path / "run.pt", 0, None, lambda kind, value: None)
    assert measured["status"] == status and "rank 1" in measured["error"] and words in measured["error"]


def test_a_rank_on_a_machine_without_a_gpu_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    seat = ranks.Seat(Place(1, 2, 1, "localhost", 1), 0)
    measured = ranks.part(OnDevice("cuda"), tmp_path / "run.pt", 0, None, lambda kind, value: None, seat)
    assert measured["status"] == "failed" and measured["error"].startswith("rank 1 finds no GPU on ")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"), True),
        (RuntimeError("shape mismatch"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_running_out_of_memory_is_told_from_other_errors(error, expected):
    assert is_out_of_memory(error) == expected


def made(folder: Path) -> dict[str, dict]:
    return {found["method"].rpartition(":")[2]: found for found in record.load_folder(folder)}


@pytest.fixture(scope="module")
def mishaps(tmp_path_factory):
    """One comparison in which nearly everything goes wrong."""
    folder = tmp_path_factory.mktemp("mishaps")
    (folder / "mishaps.py").write_text(METHODS)
    names = [f"mishaps:{name}" for name in ("Raises", "Killed", "Exits", "Hungry", "FailsToBuild")]
    arguments = ["--optimizers", ",".join([*names, "sgd"]), "--out", "out", "--set", "sgd.lr=1e30"]
    for key, value in TINY.items():
        arguments += [f"--{key.replace('_', '-')}"] if value is True else [f"--{key.replace('_', '-')}", str(value)]
    return command("compare", *arguments, cwd=folder), folder / "out"


def test_what_goes_wrong_in_one_run_leaves_a_record_and_the_others_go_on(mishaps):
    result, out = mishaps
    assert result.returncode == 1, result.stderr
    found = made(out)
    assert {name: run["status"] for name, run in found.items()} == {
        "adamw": "ok",
        "Raises": "failed",
        "Killed": "failed",
        "Exits": "failed",
        "Hungry": "out_of_memory",
        "FailsToBuild": "failed",
        "sgd": "diverged",
    }
    assert found["Raises"]["error"].startswith("RuntimeError: this method is broken (")
    assert found["Killed"]["error"] == "the process was killed by signal 9 (SIGKILL)"
    assert found["Exits"]["error"] == "the process ended early, with exit code 3"
    assert "no such luck" in found["FailsToBuild"]["error"]
    assert found["sgd"]["error"].startswith("the loss is ")


def test_what_was_measured_before_a_mishap_is_kept(mishaps):
    found = made(mishaps[1])
    assert found["sgd"]["history"][-1]["loss"] is None
    assert found["sgd"]["memory"]["peak_allocated_bytes"] > 0
    assert found["Raises"]["parameters"] == found["adamw"]["parameters"]
    assert found["Raises"]["memory"]["process_peak_bytes"] > 0
    assert found["Killed"]["memory"] is None


def test_every_run_is_in_the_tables_and_the_log_of_a_failure_is_named(mishaps):
    result, out = mishaps
    for method in ("adamw", "Raises", "Killed", "Exits", "Hungry", "FailsToBuild", "sgd"):
        assert method in result.stdout
    logs = list((out / "logs").glob("*Raises*.log"))
    assert len(logs) == 1
    assert f"out/logs/{logs[0].name}" in result.stdout
    assert "this method is broken" in logs[0].read_text()
    assert not list((out / "logs").glob("*--adamw--*.log"))
    assert "Traceback" not in result.stderr


def test_only_what_failed_is_made_again_unless_a_retry_is_asked_for(mishaps):
    folder = Folder(mishaps[1])
    kept = [run["status"] for run in record.load_folder(folder.path) if folder.finished(run["run_id"])]
    assert sorted(kept) == ["diverged", "ok", "out_of_memory"]
    kept = [run["status"] for run in record.load_folder(folder.path) if folder.finished(run["run_id"], retry=True)]
    assert kept == ["ok"]


@pytest.mark.parametrize(
    ("status", "kept"),
    [("ok", set()), ("diverged", {"log"}), ("failed", {"log", "checkpoint"}), ("out_of_memory", {"log", "checkpoint"})],
)
def test_a_run_leaves_what_it_can_go_on_from_and_what_tells_why_it_ended(tmp_path, status, kept):
    folder, made = Folder(tmp_path), make_record() if status == "ok" else make_failure(status)
    places = {"checkpoint": folder.checkpoint(made["run_id"]), "log": folder.log(made["run_id"])}
    with folder.locked():
        for place in places.values():
            place.parent.mkdir()
            place.write_text("something")
        folder.write(made)
        folder.clear(made)
    assert {name for name, place in places.items() if place.exists()} == kept
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {f"{name}s" for name in kept}
    assert record.load_folder(tmp_path) == [made]


@pytest.fixture
def models_left(monkeypatch):
    """How many of the models that were built are alive now; nobody collects garbage unasked."""
    built = []

    def build(run, task):
        model = build_model(run, task)
        built.append(weakref.ref(model))
        return model

    monkeypatch.setattr(execute, "build_model", build)
    monkeypatch.setattr(preparing, "build_model", build)
    gc.disable()
    yield lambda: sum(model() is not None for model in built)
    gc.enable()


@pytest.mark.parametrize("status", ["ok", "diverged"])
def test_the_trained_model_is_gone_before_the_metered_one_is_built(tmp_path, monkeypatch, models_left, status):
    def diverge(*_):
        raise Diverged("no score is finite")

    (run,) = prepare(resolve({**TINY, "optimizers": "badam", "reference": False}))
    if status == "diverged":
        monkeypatch.setattr(execute, "_evaluate", diverge)
    gc.collect()
    before = models_left()
    monkeypatch.setattr(execute, "_meter", lambda *_: {"alive": models_left() - before})
    measured = execute.execute(run, tmp_path / "run.pt", 0)
    assert (measured["status"], measured["alive"]) == (status, 0)


def test_a_model_that_a_method_refused_is_gone_before_the_next_is_built(monkeypatch, models_left):
    class Refuses(BAdam):
        def __init__(self, model, lr=1e-3, weight_decay=0.0, *, seed: int = 0, always_train: tuple[str, ...] = ()):
            super().__init__(model, lr, weight_decay, seed=seed, always_train=always_train)
            raise ValueError("not this model")

    build, seen = preparing.build_model, []

    def look(run, task):
        seen.append(models_left())
        return build(run, task)

    monkeypatch.setitem(optimizers.registry._METHODS, "refuses", Refuses)
    monkeypatch.setattr(preparing, "build_model", look)
    runs = prepare(resolve({**TINY, "optimizers": "refuses,sgd"}))
    assert [run.method for run in runs if run.refused] == ["refuses"]
    assert len(seen) > 1 and not any(seen)


def test_the_model_before_training_is_built_in_host_memory_to_compare_with(tmp_path, monkeypatch):
    """Beside the trained one and its method a card may have no room for it."""
    (run,) = prepare(resolve({**TINY, "optimizers": "badam", "reference": False}))
    devices = []
    monkeypatch.setattr(execute, "build_model", lambda run, task: devices.append(run.device) or build_model(run, task))
    measured = execute.execute(replace(run, device="cpu:0"), tmp_path / "run.pt", 0)
    assert measured["status"] == "ok" and 0 < measured["trained_fraction"] < 1
    assert devices == ["cpu:0", "cpu", "cpu:0"]  # torch takes cpu:0 for a name of the CPU


def test_a_runs_card_is_the_current_one_of_its_process(tmp_path, monkeypatch):
    (run,) = prepare(resolve({**TINY, "optimizers": "badam", "reference": False}))
    chosen = []
    monkeypatch.setattr(torch.accelerator, "set_device_index", chosen.append)
    monkeypatch.setattr(execute, "create_task", lambda *_: 1 / 0)
    monkeypatch.setattr(rehearsal, "create_task", lambda *_: 1 / 0)
    for device in ("cpu", "cuda:1"):
        execute.execute(replace(run, device=device), tmp_path / "run.pt", 0)
        with pytest.raises(ZeroDivisionError):
            rehearsal.rehearse(replace(run, device=device), evaluates=False)
    assert chosen == 2 * [torch.device("cuda:1")]


def test_a_cpu_has_one_name_whatever_torch_takes_for_it(tmp_path):
    (run,) = prepare(resolve({**TINY, "optimizers": "sgd", "reference": False, "device": "cpu:1"}))
    assert run.device == "cpu"


def test_a_card_that_torch_cannot_number_is_refused(monkeypatch):
    """It takes cuda:256 for cuda:0."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    assert [str(preparing.find_device(name)) for name in ("cuda", "cuda:1")] == ["cuda", "cuda:1"]
    with pytest.raises(UserError, match="--device cuda:256: this machine has 2, numbered from 0"):
        preparing.find_device("cuda:256")


def test_a_run_that_failed_goes_on_from_its_checkpoint_when_it_is_made_again(tmp_path, monkeypatch):
    class Stops(AdamW):
        """Fails at its fourth step, if somebody wants it to."""

        broken, steps = True, 0

        def after_step(self):
            self.steps += 1
            if self.broken and self.steps == 4:
                raise RuntimeError("this method is broken")

    monkeypatch.setitem(optimizers.registry._METHODS, "stops", Stops)
    settings = resolve({**TINY, "steps": 6, "optimizers": "stops", "reference": False})
    (run,) = prepare(settings)
    folder, reported = Folder(tmp_path), []

    def carry_out():
        outcome = execute.execute(run, folder.checkpoint(run.run_id), 2, lambda step, loss: reported.append(step))
        made = assemble.assemble(run, Outcome("ok", value=outcome))
        folder.write(made)
        return made

    assert carry_out()["status"] == "failed" and reported == [1, 2, 3]
    Stops.broken = False
    again = carry_out()
    assert again["status"] == "ok" and reported == [1, 2, 3, 3, 4, 5, 6]  # from the checkpoint after step 2
    folder.checkpoint(run.run_id).unlink(missing_ok=True)
    whole = carry_out()
    assert whole["metrics"] == again["metrics"] and [e["loss"] for e in whole["history"]] == [
        e["loss"] for e in again["history"]
    ]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Two methods on two seeds, finished: the settings, the folder, and what was printed."""
    folder = tmp_path_factory.mktemp("finished")
    given = {"optimizers": "badam,blockllm", "seeds": "0,1", "hyperparameters": ["badam.switch_every=2"]}
    settings = resolve({**TINY, **given, "out": str(folder)})
    with redirect_stdout(StringIO()) as said:
        assert compare(settings) == 0
    return settings, folder, said.getvalue()


def test_a_finished_comparison_is_ok_and_makes_nothing_twice(finished, capsys):
    settings, folder, first = finished
    runs, methods = made(folder), ("adamw", "badam", "blockllm")
    assert {(run["method"], run["seed"]) for run in record.load_folder(folder)} == {
        (method, seed) for method in methods for seed in (0, 1)
    }
    order = [line.split(": ")[0] for line in first.splitlines() if line.startswith("[")]
    assert [line.split("cb ")[1] for line in order] == [f"{name} seed {seed}" for seed in (0, 1) for name in methods]
    assert runs["badam"]["block_coverage"] is not None and runs["badam"]["trained_fraction"] < 1.0
    assert runs["adamw"]["trained_fraction"] > 0.5
    assert compare(settings) == 0
    assert "6 of 6 runs are already in" in capsys.readouterr().out


def test_what_a_command_that_was_killed_after_a_run_had_no_time_to_delete_is_deleted_by_the_next(finished):
    settings, path, _ = finished
    folder, name = Folder(path), next(path.glob("*--badam--*.json")).stem
    for left in (folder.checkpoint(name), folder.log(name)):
        left.parent.mkdir(exist_ok=True)
        left.write_text("something")
    assert compare(settings) == 0
    assert not [left for left in path.iterdir() if left.is_dir()]


def test_a_method_of_low_memory_needs_less_than_the_reference_and_its_parts_add_up(finished):
    runs = made(finished[1])
    peaks = {name: run["memory"]["peak_allocated_bytes"] for name, run in runs.items()}
    assert max(peaks["badam"], peaks["blockllm"]) < 0.75 * peaks["adamw"]
    for run in runs.values():
        assert sum(run["memory"]["at_peak"].values()) == run["memory"]["peak_allocated_bytes"]
        assert run["memory"]["process_peak_bytes"] > run["memory"]["peak_allocated_bytes"]


def test_every_option_of_the_training_reaches_the_run(tmp_path):
    options = {"dtype": "bfloat16", "checkpointing": True, "gradient_accumulation_steps": 2, "max_grad_norm": 0.5}
    options |= {"evaluate_every": 3, "schedule": "cosine", "warmup_fraction": 0.5, "learning_rate": 1e-3}
    settings = resolve(
        {
            **TINY,
            **options,
            "out": str(tmp_path),
            "optimizers": "blockllm",
            "hyperparameters": ["blockllm.sparsity=0.5"],
        }
    )
    assert compare(settings) == 0
    run, reference = made(tmp_path)["blockllm"], made(tmp_path)["adamw"]
    training = {name: options[name] for name in ("dtype", "gradient_accumulation_steps", "max_grad_norm", "schedule")}
    training |= {"steps": 4, "batch_size": 2, "gradient_checkpointing": True, "evaluate_every": 3, "weights": "random"}
    assert training.items() <= run["training"].items()
    assert [entry["metrics"] is not None for entry in run["history"]] == [False, False, True, True]
    assert run["history"][-1]["metrics"] == run["metrics"]
    assert [entry["learning_rate"] for entry in run["history"]] == pytest.approx([5e-4, 1e-3, 1e-3, 5e-4])
    assert run["hyperparameters"]["sparsity"] == 0.5
    assert reference["memory"]["maximum"]["weights_bytes"] == pytest.approx(2 * reference["parameters"], rel=0.01)


def test_two_comparisons_do_not_write_to_one_folder(tmp_path):
    with Folder(tmp_path).locked(), pytest.raises(UserError, match=f"process {os.getpid()} is writing there"):
        compare(resolve({**TINY, "out": str(tmp_path)}))
    with Folder(tmp_path).locked():
        pass


def test_who_writes_there_from_another_machine_is_told_with_its_name(tmp_path):
    with Folder(tmp_path).locked():
        (tmp_path / ".lock").write_text("77 1 node-3 cpu")
        with pytest.raises(UserError, match="process 77 on node-3 is writing there"), Folder(tmp_path).locked():
            pass


@pytest.mark.parametrize(
    ("one", "other", "together"),
    [
        ("-1-of-2", "-2-of-2", True),
        ("-1-of-2", "-1-of-2", False),
        ("-1-of-2", "-1-of-3", False),
        ("-1-of-2", "-2-of-12", False),
        ("-1-of-2", "", False),
        ("", "-1-of-2", False),
    ],
)
def test_only_parts_of_one_division_are_made_at_the_same_time(tmp_path, one, other, together):
    refused = pytest.raises(UserError, match=f"process {os.getpid()} is writing there")
    with Folder(tmp_path).locked(one), nullcontext() if together else refused, Folder(tmp_path).locked(other):
        pass
    with Folder(tmp_path).locked(other):  # afterwards it is free
        pass


def test_a_folder_on_a_disk_without_locks_is_refused_with_its_name(tmp_path, monkeypatch):
    def flock(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(UserError, match=r"^--out .*: its disk has no locks \(No locks.*\).*: choose a folder on"):
        Folder(tmp_path).locked().__enter__()


def test_a_folder_on_a_full_disk_is_refused_with_its_name(tmp_path, monkeypatch):
    def write(file, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(UserError, match=rf"^--out {tmp_path}/\.lock: No space left on device; make room there"):
        Folder(tmp_path).locked().__enter__()


def test_a_log_on_a_full_disk_takes_no_errors_place():
    outcome = processes.call(echo, log=Path("/dev/full"))  # it lacks an argument
    assert (outcome.status, outcome.died) == ("failed", False) and "TypeError: echo() missing" in outcome.error


def test_a_run_whose_log_can_not_be_written_says_so(tmp_path):
    (tmp_path / "logs").touch()
    outcome = processes.call(echo, 1, log=tmp_path / "logs" / "run.log")
    assert (outcome.status, outcome.died) == ("failed", False)
    assert outcome.error == f"its log can't be written: {tmp_path / 'logs'}: File exists"


def test_a_file_that_is_no_record_is_named_and_not_replaced(tmp_path):
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(UserError, match=r"run\.json: malformed JSON.* Remove the file"):
        Folder(tmp_path).finished("run")


def test_a_record_under_the_name_of_another_run_does_not_pass_for_it(tmp_path):
    record.write(make_record(), tmp_path).rename(tmp_path / "other.json")
    with pytest.raises(UserError, match=rf"other\.json: the record of another run, {make_record()['run_id']}\. Remove"):
        Folder(tmp_path).finished("other")


def test_a_record_of_a_run_that_died_is_a_valid_record(tmp_path):
    given = {"hyperparameters": {"lr": 0.1}, "device": "cpu", "threads": 1, "environment": {"threads": 1}}
    run = Run(run_id="r", task="t", method="m", seed=0, training=Training(steps=3, model="config:x"), **given)
    made = assemble.assemble(run, Outcome("failed", error="killed"))
    record.check(made, "here")
    assert (made["status"], made["error"], made["history"]) == ("failed", "killed", [])
    partial = assemble.assemble(run, Outcome("ok", value={"status": "failed", "error": "e", "memory": {"peak": 1}}))
    record.check(partial, "here")
    assert partial["memory"]["peak_allocated_bytes"] is None
    broken = assemble.assemble(
        run, Outcome("ok", value={"status": "ok", "error": None, "metrics": {"a": float("nan")}})
    )
    record.check(broken, "here")
    assert broken["status"] == "failed" and "nan" in broken["error"]


PARENT = """
import sys
from pathlib import Path
sys.path[:0] = [{root!r}, {tests!r}]
import announce
from membench.runs import processes
if __name__ == "__main__":
    processes.call(announce.announce_and_wait, {file!r}, log=Path({file!r} + ".log"))
"""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_child_ends_with_a_parent_that_was_killed(tmp_path):
    script, file = tmp_path / "parent.py", tmp_path / "pid"
    script.write_text(PARENT.format(root=str(ROOT), tests=str(ROOT / "tests"), file=str(file)))
    parent = subprocess.Popen([sys.executable, str(script)])
    try:
        end = time.monotonic() + 300  # of a machine that does much else
        while not (file.exists() and file.read_text()):
            assert time.monotonic() < end and parent.poll() is None
            time.sleep(0.02)
    finally:
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait()
    child, end = int(file.read_text()), time.monotonic() + 300
    while alive(child):
        assert time.monotonic() < end, "the child lives on"
        time.sleep(0.02)


def test_an_interrupt_keeps_what_is_finished_and_ends_with_130(tmp_path):
    arguments = [sys.executable, "-m", "membench", "compare", "--optimizers", "sgd", "--out", str(tmp_path), "--task"]
    arguments += ["superglue/cb", "--data", DATA, "--steps", "60", "--batch-size", "2", "--sequence-length", "16"]
    arguments += ["--threads", "1"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # a suite that runs in the background of a script has interrupts ignored, and its children inherit that
    heed = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    process = subprocess.Popen(arguments, cwd=ROOT, start_new_session=True, **pipes, **heed)
    end = time.monotonic() + 600
    while not list(tmp_path.glob("*--adamw--*.json")):
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: all processes get it
    out, err = process.communicate(timeout=300)
    assert process.returncode == 130, err
    assert "Interrupted: 1 of 2 runs are finished" in out
    assert "The same command makes the others" in out
    assert err == ""
    assert len([json.loads(path.read_text()) for path in tmp_path.glob("*.json")]) == 1
