"""Many runs at once: on devices, on a Ray cluster that loses a node, as jobs of Slurm's stand-ins. Same records."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from commands import command

from membench.config.errors import UserError
from membench.config.settings import resolve
from membench.runs import executors, worker
from membench.runs.executors import Local, elsewhere
from membench.runs.processes import Call
from reports import record, tables

ROOT = Path(__file__).resolve().parent.parent

STUDY = """
optimizers = "badam,blockllm"
task = "superglue/cb,superglue/copa"
seeds = [0, 1]
steps = 6
batch_size = 2
sequence_length = 16
threads = 1
device = "cpu"

[tune]
lr = [5e-4, 2e-3]
budget = 2
"""  # 3 methods x 2 tasks x (2 trials + 2 seeds) = 24 runs
FEW = STUDY.partition("[tune]")[0].replace(",superglue/copa", "").replace(",blockllm", "")  # 2 methods x 2 seeds


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"ray_address": "auto"}, "--ray-address is for --executor ray, not local"),
        ({"executor": "ray", "slurm": ["partition=gpu"]}, "--slurm is for --executor slurm, not ray"),
        ({"detach": True}, "--detach: local runs end with the command"),
        ({"executor": "ray", "detach": True}, "--detach needs a cluster that outlives the command: give --ray-address"),
        ({"executor": "slurm", "device": "cuda:1"}, "--device cuda:1: slurm chooses the card: give --device cuda"),
        ({"executor": "ray", "devices": "cuda:0"}, "--devices is for --executor local"),
        ({"devices": "cuda:0", "device": "cuda"}, "give either --device or --devices, not both"),
        ({"devices": "cuda:0,cpu"}, "--devices cuda:0,cpu: name devices of one kind"),
        ({"devices": "cuda:0,cuda:0"}, "a device is there twice; --jobs makes runs share one"),
        ({"devices": "cuda:1,cuda,cuda:0"}, "a device is there twice"),  # the first card has two names
        ({"devices": "cpu:0,cpu:1", "processes": 2}, "--devices cpu:0,cpu:1: a CPU is one device"),
        ({"devices": "cuda:0,cuda:1", "jobs": 3}, "--jobs 3: there is one run per device, so at most 2"),
        ({"slurm": ["partition"]}, "--slurm partition: write KEY=VALUE (partition=gpu)"),
    ],
)
def test_options_that_an_executor_would_not_use_are_refused(given, said):
    with pytest.raises(UserError) as error:
        resolve(given)
    assert said in str(error.value)


def test_files_and_folders_arrive_as_they_left(tmp_path):
    folder = tmp_path / "model"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "weights").write_bytes(b"\0\1")
    (folder / "config.json").write_text("{}")
    checkpoint = tmp_path / "run.1.pt"
    checkpoint.write_text("what names the shards")
    (tmp_path / "run.1.shards" / "6").mkdir(parents=True)
    (tmp_path / "run.1.shards" / "6" / "shard").write_bytes(b"\2")
    (tmp_path / "run.2.pt").write_text("another's")
    for path in (folder, checkpoint):
        elsewhere.unpack(elsewhere.pack(path), tmp_path / "there" / path.name)
    there = {str(file.relative_to(tmp_path / "there")) for file in (tmp_path / "there").rglob("*") if file.is_file()}
    assert there == {"model/deep/weights", "model/config.json", "run.1.pt", "run.1.shards/6/shard"}
    assert (tmp_path / "there" / "run.1.shards" / "6" / "shard").read_bytes() == b"\2"
    assert elsewhere.pack(tmp_path / "missing") == {}


def slurm(tmp_path, at_once=None, **parameters):
    pytest.importorskip("submitit")
    from membench.runs.executors.on_slurm import Slurm

    return Slurm(parameters, tmp_path, at_once)


def prepared(count):
    """As much of a run as matters here."""
    return SimpleNamespace(threads=3, device="cuda", training=SimpleNamespace(processes=count))


def test_the_script_of_an_array_asks_for_what_a_run_needs_and_for_what_the_user_wants(tmp_path):
    script = slurm(tmp_path, 4, partition="gpu", time=90).preview(prepared(1), 24)
    for line in ("array=0-23%4", "cpus-per-task=3", "gpus-per-node=1", "partition=gpu", "time=90", "requeue"):
        assert f"\n#SBATCH --{line}\n" in script
    assert "wckey" not in script
    script = slurm(tmp_path / "a b; c").preview(prepared(4), 24)
    assert " -m submitit.core._submit '" in script and "a b; c'" in script  # as submitit quotes it: one word
    script = slurm(tmp_path).preview(prepared(4), 24)
    for line in ("cpus-per-task=12", "gpus-per-node=4", "nodes=1"):
        assert f"\n#SBATCH --{line}\n" in script


def test_a_dry_run_shows_the_script_of_the_array(tmp_path):
    pytest.importorskip("submitit")
    (tmp_path / "study.toml").write_text(FEW)
    line = ["compare", "--config", str(tmp_path / "study.toml"), "--out", str(tmp_path / "out"), "--processes", "2"]
    done = command(*line, "--executor", "slurm", "--slurm", "partition=gpu", "--dry-run")
    assert done.returncode == 0, done.stderr
    for option in ("array=0-3", "cpus-per-task=2", "nodes=1", "partition=gpu", "requeue"):
        assert f"\n#SBATCH --{option}" in done.stdout, option
    assert not list(tmp_path.rglob("*.json"))


def test_on_ray_a_run_takes_the_cards_of_all_its_processes_or_their_processors():
    pytest.importorskip("ray")
    from membench.runs.executors.on_ray import _parcel

    def needs(run):
        return _parcel(Call(print, (run,), Path())).resources

    assert needs(prepared(1)) == {"num_cpus": 1, "num_gpus": 1}
    assert needs(prepared(4)) == {"num_cpus": 4, "num_gpus": 4}
    run = prepared(4)
    run.device = "cpu"
    assert needs(run) == {"num_cpus": 12}


def test_a_later_command_is_told_a_rays_runs_history_from_its_beginning():
    pytest.importorskip("ray")
    from membench.runs.executors.on_ray import _Desk, _News

    entries = [{"step": step} for step in (1, 2, 3)]

    async def collected():
        desk = _Desk(1)
        desk._make = lambda name: asyncio.sleep(0)  # instead of having it carried out
        await desk.submit("run", SimpleNamespace(files={}))
        await desk.tell("run", _News([entries[0]]))
        await desk.tell("run", _News([entries[1]]))
        first = (await desk.collect())["run"].messages
        await desk.submit("run", SimpleNamespace(files={}))
        await desk.tell("run", _News([entries[2]]))
        await desk.tell("run", _News([(4, 0.5)]))
        return first, (await desk.collect())["run"].messages

    assert asyncio.run(collected()) == (entries[:2], [*entries, (4, 0.5)])


def test_devices_are_shared_out_to_runs_by_their_processes():
    """Each sees its own alone, by the numbers that CUDA knows them by."""
    made = executors.create(resolve({"devices": "cuda:0,cuda:1,cuda:2,cuda:3", "processes": 2}))
    assert made == Local(2, (("cuda:0", "cuda:1"), ("cuda:2", "cuda:3")))
    assert executors.create(resolve({"devices": "cuda:1,cuda:0"})) == Local(2, (("cuda:1",), ("cuda:0",)))
    assert worker.visible(("cuda:2", "cuda:0"), None) == "2,0"
    assert worker.visible(("cuda:2", "cuda:0"), "7,5,GPU-3") == "GPU-3,7"


def test_an_option_that_sbatch_does_not_have_is_refused(tmp_path):
    with pytest.raises(UserError, match="--slurm partitoin: sbatch has no such option. Did you mean 'partition'"):
        slurm(tmp_path, partitoin="gpu")
    with pytest.raises(UserError, match="cluster=pbs: it must be one of slurm, local, debug"):
        slurm(tmp_path, cluster="pbs")


def test_what_sbatch_refuses_is_told_in_its_words(tmp_path, monkeypatch):
    for name in ("sbatch", "srun"):
        (tmp_path / name).write_text("#!/bin/sh\necho 'sbatch: error: invalid partition specified: gpu' >&2\nexit 1\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    calls = [Call(print, (prepared(1),), tmp_path / f"{number}.log") for number in range(2)]
    with pytest.raises(UserError, match="^--executor slurm: sbatch: error: invalid partition specified: gpu: see"):
        list(slurm(tmp_path / "slurm", partition="gpu").call_all(calls))


# ---- the same study everywhere


def study(file, out, *options):
    done = command("study", str(file), "--out", str(out), "--quiet", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def made(folder):
    """What a record says that is the same wherever it is made."""
    runs = [run for place in ("tuning", ".") if (folder / place).exists() for run in record.load_folder(folder / place)]
    return {run["run_id"]: (run["metrics"], run["memory"]["at_peak"], run["history"][-1]["loss"]) for run in runs}


def printed(folder):
    """The tables, without speeds."""
    runs = record.load_folder(folder)
    return tables.render([{**run, "environment": {**run["environment"], "jobs": 2}} for run in runs])


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    folder = tmp_path_factory.mktemp("local")
    (folder / "study.toml").write_text(STUDY)
    study(folder / "study.toml", folder / "out", "--jobs", "2")
    assert len(made(folder / "out")) == 24
    return folder


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """A study of four runs."""
    folder = tmp_path_factory.mktemp("few")
    (folder / "study.toml").write_text(FEW)
    study(folder / "study.toml", folder / "out", "--jobs", "2")
    assert len(made(folder / "out")) == 4
    return folder


def expect_the_same(local, out):
    assert made(out) == made(local / "out")
    assert printed(out) == printed(local / "out")
    assert not list(out.glob("checkpoints/*")) and not list(out.glob("logs/*"))


@pytest.fixture
def cluster():
    """Two simulated nodes of one processor each."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        yield made
    finally:
        made.shutdown()


@pytest.mark.slow
def test_a_study_on_a_cluster_that_loses_a_node_gives_the_same_tables(local, cluster, tmp_path):
    import ray

    doomed, lost = cluster.add_node(num_cpus=1), []

    def lose_a_node():
        """While both nodes make a run, in the middle of the study."""
        while len(list(tmp_path.rglob("*.json"))) < 8 or ray.available_resources().get("CPU"):
            time.sleep(0.01)
        cluster.remove_node(doomed, allow_graceful=False)
        lost.append(doomed)

    thread = threading.Thread(target=lose_a_node, daemon=True)
    thread.start()
    study(local / "study.toml", tmp_path, "--executor", "ray", "--ray-address", cluster.address)
    thread.join()
    assert lost
    expect_the_same(local, tmp_path)


@pytest.mark.slow
def test_no_comparison_has_its_desk_on_a_node_that_was_lost_just_before(cluster, tmp_path):
    from membench.runs.executors.on_ray import Ray

    doomed = cluster.add_node(num_cpus=1)
    comparisons = [Ray(cluster.address, tmp_path / str(number)) for number in range(8)]
    with comparisons[0]._connected():
        cluster.remove_node(doomed, allow_graceful=False)
        for one in comparisons:
            with one._desk():
                pass  # at its end, the desk is asked whether it is empty


@pytest.mark.slow
@pytest.mark.parametrize("stand_in", ["local", "debug"])
def test_a_study_by_submitit_gives_the_same_tables(local, tmp_path, stand_in):
    pytest.importorskip("submitit")
    jobs = ["--jobs", "2"] if stand_in == "local" else []
    study(local / "study.toml", tmp_path, "--executor", "slurm", "--slurm", f"cluster={stand_in}", *jobs)
    expect_the_same(local, tmp_path)
    assert not (tmp_path / "slurm").exists()


@pytest.mark.slow
@pytest.mark.parametrize("where", ["jobs", "slurm", "ray"])
def test_runs_of_two_processes_are_the_same_two_at_a_time_as_jobs_of_slurm_and_on_ray(where, tmp_path):
    if where != "jobs":
        pytest.importorskip({"slurm": "submitit", "ray": "ray"}[where])
    options = {"jobs": ["--jobs", "2"], "slurm": ["--slurm", "cluster=local"], "ray": []}[where]
    options += ["--executor", where] if where != "jobs" else []
    (tmp_path / "study.toml").write_text(f"{FEW}\nprocesses = 2\n")
    study(tmp_path / "study.toml", tmp_path / "out", *options)
    study(tmp_path / "study.toml", tmp_path / "one-by-one")
    assert made(tmp_path / "out") == made(tmp_path / "one-by-one")
    assert {run["parallel"]["processes"] for run in record.load_folder(tmp_path / "out")} == {2}


# ---- detached, ended, preempted


@pytest.fixture
def queue(tmp_path, monkeypatch):
    """A machine with Slurm's commands."""
    pytest.importorskip("submitit")
    place = tmp_path / "slurm-of-the-machine"
    place.mkdir()
    for name in ("sbatch", "srun", "sacct", "scancel", "scontrol"):
        command = place / name
        command.write_text(f"#!{sys.executable}\n" + (ROOT / "tests" / "little_slurm.py").read_text())
        command.chmod(0o755)
    monkeypatch.setenv("LITTLE_SLURM", str(place))
    monkeypatch.setenv("PATH", f"{place}:{os.environ['PATH']}")
    yield place
    for pid in place.glob("*.pid"):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(int(pid.read_text()), signal.SIGKILL)


def start(file, out, *options):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    line = [sys.executable, "-m", "membench", "study", str(file), "--out", str(out), "--quiet", *options]
    return subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def interrupt_after(count, process, out):
    """Ctrl-C once there are so many records; what the command has said."""
    while len(list(out.rglob("superglue*.json"))) < count:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    text, _ = process.communicate()
    assert process.returncode == 130, text
    return text


@pytest.mark.slow
def test_jobs_of_a_detached_study_go_on_without_it_and_are_found_again(few, queue, tmp_path):
    file, out = few / "study.toml", tmp_path / "out"
    text = interrupt_after(1, start(file, out, "--executor", "slurm", "--detach"), out)
    assert "Ctrl-C leaves them in the queue" in text
    study(file, out, "--executor", "slurm")
    expect_the_same(few, out)
    assert len(list(queue.glob("*.array"))) == 1
    assert not list(queue.glob("*.cancelled"))


@pytest.mark.slow
def test_ctrl_c_ends_the_jobs_and_the_same_command_makes_the_missing_runs(few, queue, tmp_path):
    file, out = few / "study.toml", tmp_path / "out"
    text = interrupt_after(1, start(file, out, "--executor", "slurm"), out)
    assert "Ctrl-C ends them" in text and len(list(queue.glob("*.cancelled"))) >= 2
    study(file, out, "--executor", "slurm")
    expect_the_same(few, out)


@pytest.mark.slow
def test_a_job_that_must_make_room_is_requeued_and_ends_as_if_nothing_had_been(few, queue, tmp_path):
    file, out = few / "study.toml", tmp_path / "out"
    process = start(file, out, "--executor", "slurm", "--checkpoint-every", "2")
    while not (told := list(out.glob("slurm/*.told"))) or not told[0].stat().st_size:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)
    (job,) = subprocess.run(
        ["pgrep", "-f", f"^{sys.executable} -u -m submitit.core._submit {out}"], capture_output=True, text=True
    ).stdout.split()[:1]
    os.kill(int(job), signal.SIGUSR2)
    text, _ = process.communicate()
    assert process.returncode == 0, text
    assert len(list(queue.glob("*.requeued"))) == 1
    expect_the_same(few, out)


@pytest.mark.slow
def test_runs_of_a_detached_study_go_on_on_the_cluster_and_are_collected(few, cluster, tmp_path):
    file, out = few / "study.toml", tmp_path / "out"
    options = "--executor", "ray", "--ray-address", cluster.address
    text = interrupt_after(1, start(file, out, *options, "--detach"), out)
    assert "Ctrl-C leaves the runs going there" in text
    study(file, out, *options)
    expect_the_same(few, out)
