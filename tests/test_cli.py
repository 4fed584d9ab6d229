"""The command line: quick to answer, clear in its refusals, honest in its exit codes."""

import io
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import chdir
from pathlib import Path
from types import SimpleNamespace

import pytest
from commands import DATA, command
from reports_factory import make_failure, make_record
from rich.console import Console

from membench.config.assignments import unused_hyperparameters
from membench.config.defaults import hyperparameters
from membench.config.run import Run, Training
from membench.paths import leave_out_current_folder
from membench.runs import processes, progress
from reports.record import REFUSAL

ROOT = Path(__file__).resolve().parent.parent
TINY = ["--steps", "2", "--batch-size", "2", "--sequence-length", "16", "--threads", "1", "--quiet"]
CB = ["--task", "superglue/cb", "--data", DATA]


@pytest.fixture(scope="module", autouse=True)
def server():
    processes.start_server()


def run(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "membench", *arguments], cwd=cwd, env=environment, capture_output=True, text=True
    )


def call(*arguments: str) -> tuple[int, str, str]:
    """The command in this process: exit code, stdout, stderr."""
    done = command(*arguments)
    return done.returncode, done.stdout, done.stderr


def test_help_needs_no_heavy_import():
    script = "import sys; sys.argv = ['membench', '--help']\nfrom membench.cli import main\n"
    script += (
        "try: main()\nexcept SystemExit: print([n for n in ('torch', 'transformers', 'numpy') if n in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.splitlines()[-1] == "[]"
    assert "compare" in result.stdout


def test_the_process_that_waits_for_runs_stays_light():
    script = "import sys\nimport membench.runs.compare, membench.config.settings\n"
    script += "print([n for n in ('torch', 'transformers', 'numpy', 'datasets') if n in sys.modules])"
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout == "[]\n"


def test_a_mistake_is_one_line_on_stderr_and_exit_code_2(tmp_path):
    result = run("report", str(tmp_path / "nowhere"))
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1 and "nowhere" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optimizers", "badm"], "unknown method 'badm'. Did you mean 'badam'?"),
        (["--task", "superglue/rtee"], "unknown task 'superglue/rtee'. Did you mean 'superglue/rte'?"),
        (["--steps", "0"], "--steps must be at least 1, not 0"),
        (["--learning-rate", "-1"], "--learning-rate must be finite and at least 0, not -1.0"),
        (["--set", "badam.lr=-1"], "badam: lr must be a finite number of at least 0, not -1.0"),
        (["--set", "badam.switch_every=0"], "badam: switch_every must be a whole number of at least 1, not 0"),
        (["--set", "badam.switch_every=often"], "badam.switch_every must be a whole number, not 'often'"),
        (["--set", "badam.switch_evry=5"], "badam has no hyper-parameter 'switch_evry'. Did you mean 'switch_every'?"),
        (["--set", "bdam.lr=1"], "unknown method 'bdam'. Did you mean 'badam'?"),
        (
            ["--set", "switch_evry=1"],
            "--set switch_evry: none of adamw, badam, blockllm has a hyper-parameter with that name",
        ),
        (["--set", "badam.always_train=foot"], "badam: always_train: 'foot' matches no trainable parameter"),
        (["--set", "in_backward=true", "--max-grad-norm", "1"], "updates inside the backward pass"),
        (["--set", "adamw.in_backward=true", "--gradient-accumulation-steps", "2"], "updates inside the backward pass"),
        (["--data", "/no/such/folder"], "data '/no/such/folder' is neither"),
        (["--model", "config:roberta-tyni"], "roberta-tiny"),
        (["--model", "./no-such-model"], "no-such-model"),
        (["--tokenizer", "./no-such-tokenizer"], "no-such-tokenizer"),
        (["--device", "gpu"], "--device gpu: unknown kind of device"),
        (["--optimizers", "nomodule:Method"], "No module named 'nomodule'"),
        (["--optimizers", "json:JSONDecoder"], "must be a subclass of optimizers.MemoryEfficientOptimizer"),
        (["--config", "nowhere.toml"], "--config nowhere.toml: can't be read"),
        (["--out", "{file}"], "is a file, not a folder"),
    ],
)
def test_what_can_not_work_is_refused_in_a_sentence_before_anything_runs(tmp_path, arguments, message):
    (tmp_path / "file").write_text("")
    arguments = [text.replace("{file}", str(tmp_path / "file")) for text in arguments]
    out = [] if "--out" in arguments else ["--out", str(tmp_path / "out")]
    usual = CB if not {"--task", "--data"} & set(arguments) else []
    code, stdout, stderr = call("compare", *TINY[2:], *usual, *out, *arguments)
    assert code == 2
    assert message in stderr
    assert stderr.startswith("error: ") and stderr.count("\n") == 1
    assert stdout == ""
    assert not (tmp_path / "out").exists()


def test_a_malformed_line_of_the_data_is_named(tmp_path):
    (tmp_path / "CB").mkdir()
    row = '{"premise": "It rains.", "hypothesis": "It is wet.", "label": "entailment", "idx": 0}\n'
    for name in ("train.jsonl", "val.jsonl"):
        (tmp_path / "CB" / name).write_text(row * 2 + (row[:30] + "\n") * 3)  # more than half
    code, _, stderr = call("compare", *TINY, "--task", "superglue/cb", "--data", str(tmp_path), "--dry-run")
    assert code == 2
    assert re.search(r"CB/(train|val)\.jsonl.*\b3\b", stderr)


def test_a_hyper_parameter_of_a_method_that_is_not_run_is_said_to_be_unused(tmp_path):
    named = ["--set", "galore.rank=4", "--set", "adamw.lr=1e-3", "--set", "lora.rank=4", "--set", "weight_decay=0"]
    arguments = [*TINY, "--task", "superglue/cb", "--optimizers", "badam,lora:variant=vera", "--dry-run"]
    code, stdout, _ = call("compare", *arguments, *named)
    methods = "adamw, badam, lora:variant=vera"  # the reference is run, and a variant of lora
    assert code == 0 and f"--set galore.rank isn't used: the methods are {methods}\n" in stdout
    assert stdout.count("isn't used") == 1
    table = tmp_path / "settings.toml"
    table.write_text("[galore]\nrank = 4\n")  # of a file it isn't said: it may serve several commands
    assert "isn't used" not in call("compare", *arguments, "--config", str(table))[1]


def test_a_study_says_which_hyper_parameters_of_its_file_it_does_not_use(tmp_path, monkeypatch):
    monkeypatch.setattr("membench.runs.study.forecast", lambda kinds: "")
    file = tmp_path / "study.toml"
    shape = "steps = 2\nbatch-size = 2\nsequence-length = 16\nreference = false\n"
    file.write_text(f'optimizers = ["badam"]\ntask = "superglue/cb"\n{shape}[lora]\nrank = 4\n[badam]\nlr = 1e-3\n')
    code, stdout, _ = call("study", str(file), "--dry-run", "--out", str(tmp_path / "out"))
    assert code == 0 and "in the study's file lora.rank isn't used: the methods are badam\n" in stdout
    assert stdout.count("isn't used") == 1


def test_a_plan_says_which_hyper_parameters_it_does_not_use():
    shape = ["--batch-size", "1", "--sequence-length", "8"]
    code, _, stderr = call("plan", "--model", "llama-tiny", *shape, "--optimizers", "badam", "--set", "lomo.lr=1")
    assert code == 0 and "--set lomo.lr isn't used: the methods are badam\n" in stderr
    named, given = "lora:rank=4,lora:rank=2", ["--set", "lora.rank=8", "--set", "lora.alpha=8"]
    code, _, stderr = call("plan", "--model", "llama-tiny", *shape, "--optimizers", named, *given)
    assert code == 0 and "--set lora.rank isn't used: another is in the name of lora:rank=4, lora:rank=2\n" in stderr
    assert not unused_hyperparameters({"lora": {"rank": 8}, "*": {"rank": 8}}, ["lora", "lora:rank=4"])
    assert unused_hyperparameters({"lora:rank=4": {"lr": 1}}, ["lora:rank=4:alpha=8"])  # a method of its own
    assert not unused_hyperparameters({"lora:rank=4": {"lr": 1}}, ["lora:rank=4"])


def test_no_run_has_another_value_than_its_methods_name_says(tmp_path):
    """A row of that name would tell of a run with another value."""
    settings = 'optimizers = "badam:switch_every=50"\ntask = "superglue/cb"\nsteps = 2\nreference = false\n'
    (tmp_path / "compare.toml").write_text(f'{settings}["badam:switch_every=50"]\nswitch_every = 2\n')
    (tmp_path / "study.toml").write_text(f"{settings}[tune]\nbudget = 2\n[badam]\ntune = {{switch_every = [2, 4]}}\n")
    for given in (["compare", "--config", "compare.toml"], ["study", "study.toml"]):
        with chdir(tmp_path):
            code, _, stderr = call(*given, "--dry-run")
        assert code == 2
        assert "badam:switch_every=50: switch_every has a value in the method's name, and 2 is given or tried" in stderr


def test_a_dry_run_shows_every_run_with_its_values_and_makes_none(tmp_path):
    out = tmp_path / "out"
    arguments = [
        "--task",
        "superglue/rte,superglue/cb",
        "--sequence-length",
        "32",
        "--optimizers",
        "badam",
        "--seeds",
        "0,1",
        "--out",
        str(out),
    ]
    values = ["--set", "badam.switch_every=7", "--learning-rate", "0.0123"]
    code, stdout, _ = call("compare", *arguments, *values, "--dry-run")
    assert code == 0
    runs = re.findall(r"^(superglue/\w+)  (\w+)  seed (\d)", stdout, re.MULTILINE)
    assert runs == [(t, m, s) for t in ("superglue/rte", "superglue/cb") for s in "01" for m in ("adamw", "badam")]
    assert len(re.findall(r"^badam visits", stdout, re.MULTILINE)) == 0  # 300 and 100 steps are enough
    assert stdout.count("switch_every=7,") == 4 and stdout.count("lr=0.0123,") == len(runs)
    assert not out.exists()


def test_no_reference_leaves_adamw_out_and_all_takes_every_method():
    arguments = ["compare", *CB, "--dry-run"]
    _, stdout, _ = call(*arguments, "--optimizers", "sgd", "--no-reference")
    assert re.findall(r"^superglue/cb  (\w+)", stdout, re.MULTILINE) == ["sgd"]
    _, stdout, _ = call(*arguments, "--optimizers", "all")
    methods = re.findall(r"^superglue/cb  (\w+)", stdout, re.MULTILINE)
    assert methods[0] == "adamw"
    assert {"adamw", "sgd", "badam", "blockllm"} <= set(methods)


def test_epochs_become_steps():
    arguments = ["compare", "--task", "superglue/cb", "--epochs", "0.5", "--batch-size", "100", "--dry-run"]
    _, stdout, _ = call(*arguments)
    assert "8 steps" in stdout  # of 1,600 examples


def test_a_users_module_is_found_and_stands_in_for_none_of_ours(tmp_path):
    """Somebody's own tasks.py, reports.py and typing.py lie in the folder that the command starts in."""
    for name in ("tasks", "reports", "optimizers", "typing", "typer"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong module')")
    (tmp_path / "mine.py").write_text("from optimizers import SGD\n\nclass Mine(SGD):\n    pass\n")
    arguments = ["compare", "--optimizers", "mine:Mine", "--no-reference", "--task", "superglue/cb", *TINY]
    arguments += ["--out", "out"]
    result = run(*arguments, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    records = [json.loads(path.read_text()) for path in (tmp_path / "out").glob("*.json")]
    assert [record["method"] for record in records] == ["mine:Mine"]
    assert "profile demo" in result.stdout and "not a result about the methods at scale" in result.stdout


def test_the_folder_of_membench_stays_in_front(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", ["", "/elsewhere"])
    leave_out_current_folder()
    assert sys.path == [str(ROOT), "/elsewhere"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", str(ROOT), "/elsewhere"])
    leave_out_current_folder()
    assert sys.path == [str(ROOT), "/elsewhere"]
    monkeypatch.setenv("PYTHONPATH", f"{os.pathsep}{tmp_path}")
    monkeypatch.setattr(sys, "path", [str(tmp_path), str(ROOT), "/elsewhere"])
    leave_out_current_folder()
    assert sys.path == [str(ROOT), "/elsewhere", str(tmp_path)]


def test_nothing_of_the_current_folder_is_run_unless_a_user_names_it(tmp_path):
    """The libraries look for `google` and `hqq`, and packages tell of methods that they have: it may be anybody's."""
    for name in ("google", "hqq", "sentencepiece", "planted"):
        (tmp_path / f"{name}.py").write_text("open('ran', 'a').write(f'{__name__} ')")
    package = tmp_path / "planted-1.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: planted\nVersion: 1\n")
    (package / "entry_points.txt").write_text("[membench.tasks]\nplanted=planted:Task\n")
    result = run("list", "tasks", cwd=tmp_path)
    assert result.returncode == 0 and not (tmp_path / "ran").exists(), result.stderr


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    result = command("compare", *CB, "--optimizers", "badam", *TINY, "--out", str(folder))
    assert result.returncode == 0, result.stderr
    return folder


def test_a_report_is_made_from_the_records_alone(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "copy")
    code, stdout, _ = call("report", str(tmp_path / "copy"), "--format", "json")
    assert code == 0
    assert json.loads(stdout)
    for format in ("plain", "markdown", "csv", "latex"):
        code, stdout, _ = call("report", str(finished), "--format", format)
        assert code == 0
        assert "badam" in stdout


def test_a_report_on_what_is_no_folder_of_records_is_refused(tmp_path):
    code, _, stderr = call("report", str(tmp_path / "nowhere"))
    assert (code, stderr.startswith("error: ")) == (2, True)
    code, _, stderr = call("report", str(tmp_path))
    assert (code, stderr.startswith("error: ")) == (2, True)
    (tmp_path / "run.json").write_text("{")
    code, _, stderr = call("report", str(tmp_path))
    assert code == 2 and "run.json" in stderr


def test_a_report_names_what_is_no_record_reports_the_others_and_fails(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "copy")
    (tmp_path / "copy" / "cut.json").write_text(next(finished.glob("*badam*.json")).read_text()[:900])
    code, stdout, stderr = call("report", str(tmp_path / "copy"))
    assert code == 1 and "cut.json: malformed JSON" in stderr
    assert stdout == call("report", str(finished))[1]


def test_lists_say_what_there_is():
    _, methods, _ = call("list", "methods")
    assert re.search(r"^badam: .+\n    paper: +Luo.+\n    trains: .+\n    keeps: .+", methods, re.MULTILINE)
    _, tasks, _ = call("list", "tasks")
    assert "superglue/boolq" in tasks.splitlines()
    _, models, _ = call("list", "models")
    assert "  config:roberta-large" in models.splitlines()
    code, _, stderr = call("list", "tsks")
    assert code == 2 and "tasks" in stderr


def test_a_listed_default_that_runs_do_not_have_says_what_they_have():
    """As the class has it, a rate is another than in a comparison."""
    said = call("list", "methods", "lomo")[1]
    for name, value in (("lr", "0.03 to fine-tune"), ("clip_norm", "1 for a pretrained language model")):
        entry = re.search(rf"^{name} = .*?(?=\n\n)", said, re.MULTILINE | re.DOTALL)[0]
        assert f"In a comparison, unless given: {value}" in entry
    run = hyperparameters("lomo", {}, learning_rate=None, seed=0, from_scratch=False, kind="language")
    assert (run["lr"], run["clip_norm"]) == (0.03, 1)


def test_listed_defaults_tell_which_others_a_variant_has_in_a_comparison():
    said = " ".join(call("list", "methods", "lora")[1].split())
    given = {"learning_rate": None, "seed": 0, "from_scratch": False, "kind": "language"}
    run = hyperparameters("lora", {"lora": {"variant": "vera"}}, **given)
    assert f"; with variant=vera {run['lr']:g} to fine-tune" in said
    assert f"In a comparison, unless given: {run['rank']} with variant=vera." in said


def test_the_version_is_that_of_the_package():
    from membench import __version__

    assert call("--version")[:2] == (0, f"membench {__version__}\n")


def test_a_terminal_sees_the_loss_and_the_time_left_of_run_and_comparison(capsys, monkeypatch):
    clock = itertools.count(0.0, 0.5)
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    training = Training(steps=40, batch_size=2, sequence_length=8)
    given = {"hyperparameters": {}, "training": training, "device": "cpu", "threads": 1, "environment": {}}
    runs = [Run(run_id=str(n), task="t", method="m", seed=n, **given) for n in range(2)]
    screen = io.StringIO()
    with progress.Bars(Console(file=screen, force_terminal=True, width=150), runs, 3) as bars:
        bars.begin(runs[0])
        bars.step(runs[0], 1, 0.9)
        bars.begin(runs[1])
        bars.step(runs[0], 21, 0.5)
        bars.step(runs[1], 7, 0.4)
        bars.stage(runs[0], "evaluating")
        bars._progress.refresh()
        bars.end(runs[0], {"task": "t", "method": "m", "seed": 0, "status": "failed", "error": "why"}, 12.0)
    assert "t m seed 0" in screen.getvalue() and "evaluating" in screen.getvalue()
    assert re.search(r"t m seed 1.*7/40.*loss 0.400", screen.getvalue()), "two runs at a time have two bars"
    assert capsys.readouterr().out == "[2/3] t m seed 0: failed: why, 12 s\n"


def test_the_time_left_is_judged_by_the_steps_that_were_made_here(monkeypatch):
    """A run that goes on from a checkpoint, or that is refused, had most of its steps in no time."""
    now = SimpleNamespace(monotonic=lambda: now.time, time=100.0)
    monkeypatch.setattr(progress, "time", now)
    training = Training(steps=1000, batch_size=2, sequence_length=8)
    given = {"hyperparameters": {}, "training": training, "device": "cpu", "threads": 1, "environment": {}}
    runs = [Run(run_id=str(n), task="t", method="m", seed=n, **given) for n in range(4)]
    bars = progress.Bars(Console(file=io.StringIO()), runs, 4)

    def left():
        return bars._progress.tasks[0].fields["left"]

    bars.begin(runs[0])
    bars.end(runs[0], make_failure("failed", f"{REFUSAL}it can't"), 0.0)
    bars.begin(runs[1])
    bars.step(runs[1], 901, 0.5)
    assert (now.time, left()) == (100.0, "0:00:00 left")
    now.time += 10
    bars.step(runs[1], 910, 0.5)  # a second each, and 2090 are left
    assert left() == "0:34:50 left"
    now.time += 90
    bars.end(runs[1], make_record(), 100.0)
    assert left() == "0:33:20 left"
    bars.begin(runs[2])  # of a cluster, which tells no steps
    now.time += 1000
    bars.end(runs[2], make_record(), 1000.0)
    assert left() == "0:16:40 left"


def test_the_time_left_counts_everything_that_was_needed_so_far(monkeypatch):
    monkeypatch.setattr(progress.time, "monotonic", lambda: 1000.0)
    assert progress._time_left(start=900.0, done=10, to_do=400) == "1:06:40 left"
    assert progress._time_left(start=900.0, done=0, to_do=400) == progress._time_left(900.0, 10, 0) == ""


REAL = ["--model", "config:roberta-tiny", "--steps", "2", "--batch-size", "2", "--sequence-length", "32"]


@pytest.mark.parametrize("task", ["rte", "copa"])
def test_real_data_runs_from_a_folder(shared_data, tmp_path, task):
    arguments = [*REAL, "--data", str(shared_data / "superglue"), "--out", str(tmp_path), "--threads", "1", "--quiet"]
    code, stdout, stderr = call(
        "compare", "--optimizers", "badam", "--no-reference", "--task", f"superglue/{task}", *arguments
    )
    assert code == 0, stdout + stderr
    assert f"superglue/{task}" in stdout
