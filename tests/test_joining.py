"""membench started by a launcher: rank 0 leads, all take part in each run, and what one suffers ends it for all."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from commands import command
from test_processes import COMPARE, ROOT, record_in
from test_resume import members_of_session, wait_for

from membench.config.errors import UserError
from membench.config.launcher import Place, place
from membench.config.settings import resolve

TORCHRUN = {"RANK": "1", "LOCAL_RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "head", "MASTER_PORT": "29500"}
SRUN = {
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_JOB_ID": "1234567",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NODELIST": "gpu[017-018,3],login",
}


def test_a_place_is_what_torchrun_says():
    assert place(TORCHRUN) == Place(rank=1, size=4, local_rank=0, host="head", port=29500)


def test_srun_gives_a_place_on_its_first_node_with_a_port_of_the_step_alone():
    found = place(SRUN)
    assert found == Place(rank=5, size=8, local_rank=1, host="gpu017", port=15000 + 4569)
    assert place({**SRUN, "SLURM_STEP_ID": "3"}).port == found.port + 1
    assert place({**SRUN, "MASTER_ADDR": "other", "MASTER_PORT": "4"}).host == "other"


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("one", "one"), ("a-1,a-2", "a-1"), ("n[3,5]", "n3"), ("n[07-12]-ib,x", "n07-ib"), ("", "")],
)
def test_the_first_node_of_slurms_list(nodes, first):
    environment = {**SRUN, "SLURM_STEP_NODELIST": nodes, **({} if first else {"MASTER_ADDR": "x"})}
    assert place(environment).host == (first or "x")


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"WORLD_SIZE": "1", "RANK": "0", **SRUN},  # torchrun of one process, in a step of several
        {**SRUN, "SLURM_STEP_NUM_TASKS": "1"},  # a shell
        {"ENVIRONMENT": "BATCH", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},  # a batch script
        {"SLURM_NTASKS": "8"},  # salloc
    ],
)
def test_nobody_is_waited_for_where_no_others_were_started(environment):
    assert place(environment) is None


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"LOCAL_RANK": ""}, "WORLD_SIZE is 4, and LOCAL_RANK isn't set: start membench by torchrun, srun"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT is 'http': a launcher sets it to a number"),
    ],
)
def test_what_a_launcher_does_not_say_is_named(wrong, said):
    with pytest.raises(UserError, match=said):
        place({**TORCHRUN, **wrong})


def test_runs_have_as_many_processes_as_the_launcher_and_no_other_number(monkeypatch):
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    assert resolve({}).processes == 4
    with pytest.raises(UserError, match="--processes 2: a launcher has started 4 processes"):
        resolve({"processes": 2})
    with pytest.raises(UserError, match="leave out --executor, --devices and --jobs"):
        resolve({"jobs": 2})


# ---- for real


def start(rank, *arguments):
    """One of two tasks as srun starts them, in a session of its own."""
    said = {"PROCID": str(rank), "LOCALID": str(rank), "STEP_NUM_TASKS": "2", "STEP_NODELIST": "localhost"}
    said |= {"JOB_ID": str(os.getpid()), "STEP_ID": "0"}
    environment = {**os.environ, **{f"SLURM_{name}": value for name, value in said.items()}}
    return subprocess.Popen(
        [sys.executable, "-m", "membench", *arguments],
        env={**environment, "PYTHONPATH": os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def ends_of(tasks):
    """The exit code, output and errors of each."""
    told = [task.communicate(timeout=300) for task in tasks]
    return [(task.returncode, *texts) for task, texts in zip(tasks, told, strict=True)]


def losses(folder):
    record = record_in(folder)
    return record["run_id"], [entry["loss"] for entry in record["history"]], record["metrics"], record["parallel"]


@pytest.mark.slow
def test_under_torchrun_a_comparison_is_the_one_that_starts_its_processes_itself(tmp_path):
    arguments = [*COMPARE, "--steps", "6"]
    line = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "membench"]
    done = subprocess.run(
        [*line, *arguments, "--out", str(tmp_path / "joined")], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("badam seed 0: ok") == 1
    assert command(*arguments, "--processes", "2", "--out", str(tmp_path / "own")).returncode == 0
    assert losses(tmp_path / "joined") == losses(tmp_path / "own")


@pytest.mark.slow
def test_a_mistake_is_told_once_and_all_tasks_of_srun_end_with_2(tmp_path):
    ends = ends_of([start(rank, *COMPARE, "--steps", "x", "--out", str(tmp_path)) for rank in (0, 1)])
    assert [end[0] for end in ends] == [2, 2]
    assert [end[2].count("error: --steps") for end in ends] == [1, 0] and not ends[1][1]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("rank", "whose", "error"),
    [
        (1, "part", "the process of rank 1 was killed by signal 9 (SIGKILL)"),
        (0, "part", "the process of rank 0 was killed by signal 9 (SIGKILL)"),
        (1, "task", "the launcher's process of rank 1 has ended"),
        (0, "task", None),  # nobody is left who could tell
    ],
)
def test_a_death_ends_the_run_for_all_and_the_same_command_continues(rank, whose, error, tmp_path):
    arguments = [*COMPARE, "--steps", "40", "--out", str(tmp_path)]
    tasks = [start(number, *arguments) for number in (0, 1)]
    wait_for(lambda: list((tmp_path / "checkpoints").glob("*.pt")), 300, "a checkpoint")
    os.kill(tasks[rank].pid if whose == "task" else part_of(tasks[rank].pid), signal.SIGKILL)
    codes = [end[0] for end in ends_of(tasks)]
    assert all(codes) and (codes[rank] == -signal.SIGKILL) == (whose == "task")
    wait_for(lambda: not any(members_of_session(task.pid) for task in tasks), 60, "the end of all processes")
    if error:
        assert (record_in(tmp_path)["status"], record_in(tmp_path)["error"]) == ("failed", error)
    assert [end[0] for end in ends_of([start(number, *arguments) for number in (0, 1)])] == [0, 0]
    assert record_in(tmp_path)["status"] == "ok" and not list(tmp_path.glob("checkpoints/*"))


def part_of(task):
    """The process of a task's part in a run: the child of its server of forks."""
    parents = {}
    for pid in members_of_session(task):
        parents[int(pid)] = int(Path("/proc", pid, "stat").read_text().rpartition(")")[2].split()[1])
    (part,) = [pid for pid, parent in parents.items() if parents.get(parent) == task]
    return part


@pytest.mark.slow
def test_from_python_all_ranks_get_the_leaders_records(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys, membench\n"
        "for steps in (2, 3):\n"
        "    runs = membench.compare('badam', 'superglue/cb', reference=False, steps=steps, batch_size=2,\n"
        "        sequence_length=16, threads=1, quiet=True, out=sys.argv[1])\n"
        "    lengths, processes = [len(run['history']) for run in runs], runs[0]['parallel']['processes']\n"
        "    os.write(1, f'{os.environ[\"RANK\"]} {lengths} {processes}\\n'.encode())\n"  # whole: both ranks print
    )
    line = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", str(script)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([*line, str(tmp_path / "out")], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [f"{rank} [{steps}] 2" for rank in (0, 1) for steps in (2, 3)]
