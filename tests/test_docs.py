"""What the documents show is what the code does."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def examples():
    """Path and code of each worked example in CONTRIBUTING.md."""
    pattern = r"<!-- example: (\S+) -->\n```python\n(.*?)```"
    return dict(re.findall(pattern, (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL))


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """A copy of the packages with the worked examples written into it, as their reader would."""
    folder = tmp_path_factory.mktemp("workshop")
    for package in ("optimizers", "tasks", "reports", "membench"):
        shutil.copytree(ROOT / package, folder / package)
    for path, code in examples().items():
        (folder / path).write_text(code)
    return folder


def run(folder, *command):
    return subprocess.run([sys.executable, *command], cwd=folder, capture_output=True, text=True, timeout=300)


def test_the_worked_example_of_a_method_keeps_the_contract(workshop):
    done = run(workshop, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "test_signs.py")
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr


def test_the_worked_example_of_a_task_is_compared_with_the_worked_example_of_a_method(workshop):
    options = ("--steps", "4", "--batch-size", "8", "--sequence-length", "16", "--threads", "1")
    done = run(
        workshop,
        "-m",
        "membench",
        "compare",
        "--task",
        "counting:Majority",
        "--optimizers",
        "optimizers.signs:SignSGD",
        *options,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"signs:SignSGD +\d", done.stdout) and "counting:Majority" in done.stdout


@pytest.mark.slow
def test_the_plan_in_the_readme_is_what_its_command_prints():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    command, shown = re.search(r"    python -m (membench plan .*?)\n\n```\n(.*?)```", readme, re.DOTALL).groups()
    printed = run(ROOT, "-m", *shlex.split(command.replace("\\\n", " "))).stdout
    assert all(part in printed for part in shown.split("...\n"))
