"""What the documents show is what the code does."""

import inspect
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import typer

import optimizers
from membench.cli import app
from membench.commands.explore import _settings
from membench.planning.explore import describe
from tasks import FAMILIES
from tasks.models.source import CONFIGURATIONS

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


def test_the_page_on_limits_names_the_methods_that_round_at_random():
    text = " ".join((ROOT / "docs" / "limits.md").read_text(encoding="utf-8").split())
    (named,) = re.findall(r"without masters \(([\w, ]+); those with masters", text)
    known = {name: inspect.signature(optimizers.get(name)).parameters for name in optimizers.available()}
    assert set(named.split(", ")) == {name for name, keywords in known.items() if "stochastic_rounding" in keywords}


def test_the_page_on_measuring_quotes_the_errors_of_the_gpus_page():
    gpu, text = (
        " ".join((ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8").split()) for name in ("gpu", "measuring")
    )
    row = r"\| ([\w-]+) \|[^|]*\|[^|]*\|[^|]*\| ([+-][\d.]+)% \|[^|]*\| ([\d.]+) \| ([\d.]+) \|"
    tables = [re.findall(row, table) for table in re.findall(r"### Memory at the peak, GiB (.*?) ###", gpu)]
    of_peaks = [max(abs(float(error)) for _, error, *_ in table) for table in tables]
    quoted = re.search(r"by at most ([\d.]+) % for Llama 3-8B, and by at most ([\d.]+) % for a 1B model", text)
    assert of_peaks == [float(one) for one in quoted.groups()]
    reserved = [abs(float(a) / float(b) - 1) for table in tables for name, _, a, b in table if name != "blockllm"]
    count, close, most = re.search(r"Of (\d+) plans .*?, (\d+) are within .1 % .*? within ([\d.]+) %", text).groups()
    assert (int(count), int(close)) == (len(reserved), sum(error <= 0.001 for error in reserved))
    assert max(reserved) <= float(most) / 100 < max(reserved) + 0.002


def test_the_page_on_choosing_quotes_the_times_of_the_gpus_page():
    said = (ROOT / "docs" / "which-method.md").read_text()
    quoted = re.search(r"two passes took ([^.]+), and\s+their updates ([^.]+)\.", said).groups()
    table = (ROOT / "docs" / "gpu.md").read_text().partition("### Time of a step, ms")[2].partition("###")[0]
    times = {row[0]: row[1:] for row in re.findall(r"^\| (\w+) +\| +([\d.]+) \| +([\d.]+) \| +([\d.]+) ", table, re.M)}
    forward, backward, update = zip(*(map(float, times[name]) for name in ("lora", "qlora", "adamw")), strict=True)
    for text, found in zip(quoted, (map(sum, zip(forward, backward, strict=True)), update), strict=True):
        assert list(map(int, re.findall(r"\d+", text))) == pytest.approx(list(found), abs=0.6)


def test_every_option_of_the_commands_is_on_a_page():
    text = "".join(page.read_text(encoding="utf-8") for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
    named = set(re.findall(r"--[a-z-]+", text))
    for name, command in typer.main.get_command(app).commands.items():
        options = [one for one in command.params if one.param_type_name == "option"]
        missing = [one.opts for one in options if not named & {*one.opts, *one.secondary_opts}]
        assert missing == [], name


def test_every_option_of_a_task_is_in_the_documentation_with_a_default_that_is_so():
    page = (ROOT / "docs" / "comparing.md").read_text(encoding="utf-8")
    for family in FAMILIES:
        options = inspect.signature(import_module(f"tasks.{family}").create).parameters.values()
        for one in (one for one in options if one.default is not one.empty):
            assert f"{one.name}=" in page or f"`{one.name}`" in page, f"{family}: {one.name}"
            if isinstance(one.default, int) and not isinstance(one.default, bool):
                assert f"{one.default:,} " in page, f"{family}: {one.name} is {one.default}"


def test_the_page_on_exploring_counts_the_built_in_models_and_their_tables():
    text = " ".join((ROOT / "docs" / "explore.md").read_text(encoding="utf-8").split())
    told = re.search(r"of all (\d+) built-in models \((\d+) tables\)", text)
    planned_as = {model["name"]: model["planned_as"] for model in describe(list(CONFIGURATIONS))}
    tables = {replace(one, model=planned_as[one.model]) for one in _settings(("all",), None)}
    assert told.groups() == (str(len(CONFIGURATIONS)), str(len(tables)))
