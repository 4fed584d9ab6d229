"""Enough of Slurm to run arrays on this machine: sbatch, srun, sacct, scancel and scontrol, by the name it is called.

A job is a process group whose leader runs the script; its number and state are files in $LITTLE_SLURM.
"""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

PLACE = Path(os.environ["LITTLE_SLURM"])


def sbatch(script):
    count = int(re.search(r"^#SBATCH --array=0-(\d+)", Path(script).read_text(), re.MULTILINE)[1]) + 1
    number = str(1000 + len(list(PLACE.glob("*.array"))))
    (PLACE / f"{number}.array").touch()
    for task in range(count):
        start(script, number, task)
    print(f"Submitted batch job {number}")


def start(script, number, task):
    (PLACE / f"{number}_{task}.script").write_text(script)
    env = {"JOB_ID": f"{number}{task}", "ARRAY_JOB_ID": number, "ARRAY_TASK_ID": str(task), "NTASKS": "1"}
    env |= {"JOB_NUM_NODES": "1", "JOB_NODELIST": "here", "NODEID": "0", "PROCID": "0", "LOCALID": "0"}
    # one after the other, as if there were one node
    command = ["flock", str(PLACE / "node"), "bash", script]
    job = subprocess.Popen(
        command,
        env={**os.environ, **{f"SLURM_{name}": value for name, value in env.items()}},
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        stdout=(PLACE / f"{number}_{task}.out").open("a"),
        stderr=subprocess.STDOUT,
    )
    (PLACE / f"{number}_{task}.pid").write_text(str(job.pid))


def srun(*arguments):
    values = [at for at, argument in enumerate(arguments) if argument in ("--output", "--error")]
    skipped = {at + step for at in values for step in (0, 1)}
    command = [one for at, one in enumerate(arguments) if at not in skipped and one != "--unbuffered"]
    os.execvp(command[0], command)


def sacct(*arguments):
    print("JobID|State|NodeList")
    for pid in PLACE.glob("*.pid"):
        print(f"{pid.stem}|{'RUNNING' if alive(int(pid.read_text())) else 'COMPLETED'}|here")


def alive(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def scancel(number):
    group = int((PLACE / f"{number}.pid").read_text())
    if alive(group):
        os.killpg(group, signal.SIGTERM)
        (PLACE / f"{number}.cancelled").touch()


def scontrol(verb, number):
    assert verb == "requeue"
    array, task = number.rsplit("_", 1) if "_" in number else (number[:4], number[4:])
    (PLACE / f"{array}_{task}.requeued").touch()
    start((PLACE / f"{array}_{task}.script").read_text(), array, task)


if __name__ == "__main__":
    {one.__name__: one for one in (sbatch, srun, sacct, scancel, scontrol)}[Path(sys.argv[0]).name](*sys.argv[1:])
