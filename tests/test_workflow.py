"""The CI workflow of docs/ci.md runs as it stands, and holds this repository's own demo to its committed memory."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from commands import command

ROOT = Path(__file__).resolve().parent.parent


def commands():
    """What the workflow runs, the installation left out."""
    block = re.search(r"<!-- workflow: .*?```yaml\n(.*?)```", (ROOT / "docs" / "ci.md").read_text(), re.DOTALL)[1]
    (job,) = yaml.safe_load(block)["jobs"].values()
    return [step["run"] for step in job["steps"] if "run" in step and "pip install" not in step["run"]]


def shell(line, folder):
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "GITHUB_STEP_SUMMARY": str(folder / "summary.md"),
    }
    return subprocess.run(["bash", "-e", "-c", line], cwd=folder, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A folder with the baseline and what the workflow's first command makes."""
    folder = tmp_path_factory.mktemp("checkout")
    (folder / "benchmarks").mkdir()
    shutil.copy(ROOT / "benchmarks" / "baseline.json", folder / "benchmarks")
    python, m, membench, *arguments = shlex.split(commands()[0])
    assert (python, m, membench) == ("python", "-m", "membench")
    done = command(*arguments, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_demo_needs_the_memory_of_the_committed_baseline(checkout):
    for line in commands()[1:]:
        done = shell(line, checkout)
        assert done.returncode == 0, (checkout / "summary.md").read_text() + done.stderr
    assert (checkout / "summary.md").read_text().startswith("## Fine: no regression")
    assert 'failures="0" errors="0"' in (checkout / "membench.xml").read_text()


def test_a_method_that_needs_two_percent_more_fails_the_workflow(checkout):
    (path,) = checkout.glob("runs/*copa--badam*.json")
    made = json.loads(path.read_text())
    more = made["memory"]["peak_allocated_bytes"] // 50
    made["memory"]["peak_allocated_bytes"] += more
    made["memory"]["at_peak"]["activations_bytes"] += more
    path.write_text(json.dumps(made))
    assert shell(commands()[1], checkout).returncode == 1
    assert "activations +" in (checkout / "summary.md").read_text()
