"""`membench study`, for real: tuned, resumed, split into shards; the same in the end as an undisturbed one."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from commands import DATA, command
from reports_factory import make_record

from membench.config.settings import resolve
from membench.runs import processes, study
from membench.runs.prepare import prepare
from membench.runs.processes import Outcome
from membench.runs.run_folder import Folder
from membench.runs.study import _extend, _Trial, _Workshop
from reports import record

ROOT = Path(__file__).resolve().parent.parent

SMALL = f"""
optimizers = "badam"
task = "superglue/cb"
data = {DATA!r}
seeds = [0]
steps = 8
batch_size = 2
sequence_length = 16
threads = 1
memory = "1GiB"

[tune]
lr = [1e-3, 5e-2]
budget = 2
"""

FULL = """
optimizers = "badam,blockllm"
task = "superglue/cb,superglue/copa"
seeds = [0, 1, 2]
steps = 6
threads = 1
memory = ["45MiB", "60MiB"]

[tune]
lr = [5e-4, 2e-3]
budget = 2

[badam]
tune = {lr = [1e-3, 4e-3], switch_every = [2, 3]}
"""


def run(file, out, *options):
    return command("study", str(file), "--out", str(out), "--quiet", *options)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    (folder / "study.toml").write_text(SMALL)
    done = run(folder / "study.toml", folder / "out", "--jobs", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


def results(folder):
    """What a record says that is the same whenever and wherever it is made."""
    runs = record.load_folder(folder)
    return {made["run_id"]: (made["metrics"], made["memory"]["at_peak"], made["hyperparameters"]) for made in runs}


def test_each_method_is_tuned_and_the_chosen_values_are_run(small):
    folder, text = small
    trials, finals = record.load_folder(folder / "out" / "tuning"), record.load_folder(folder / "out")
    assert {(t["method"], t["hyperparameters"]["lr"], t["seed"]) for t in trials} == {
        (method, rate, 1) for method in ("adamw", "badam") for rate in (1e-3, 5e-2)
    }
    distinct = {t["metrics"]["score"] for t in trials if t["method"] == "badam"}
    assert len(distinct) == 2  # or any choice would be the best
    for final in finals:
        scores = {t["hyperparameters"]["lr"]: t["metrics"]["score"] for t in trials if t["method"] == final["method"]}
        assert scores[final["hyperparameters"]["lr"]] == max(scores.values())
    assert [final["method"] for final in finals] == ["adamw", "badam"]
    assert "How much tuning mattered" in text and "For 1,024 MiB" in text


def test_runs_that_were_made_beside_others_say_so_and_have_no_speeds(small):
    folder, text = small
    assert {made["environment"]["jobs"] for made in record.load_folder(folder / "out")} == {2}
    assert "Speeds of runs that may have shared a device with others are left out" in text and "tokens/s  " not in text


def test_the_same_command_again_makes_nothing_and_prints_the_same(small):
    folder, text = small
    before = {path: path.stat().st_mtime_ns for path in (folder / "out").rglob("*.json")}
    left = Folder(folder / "out" / "tuning").checkpoint(next((folder / "out" / "tuning").glob("*.json")).stem)
    left.parent.mkdir(exist_ok=True)
    left.write_text("of a command that was killed before it deleted this")
    again = run(folder / "study.toml", folder / "out", "--jobs", "2")
    assert {path: path.stat().st_mtime_ns for path in (folder / "out").rglob("*.json")} == before
    assert not left.exists()
    assert again.stdout.partition("\nsuperglue/cb - ")[2] == text.partition("\nsuperglue/cb - ")[2] != ""


def test_a_report_rebuilds_what_a_study_concludes_from_its_records_alone(small):
    folder, text = small
    assert text.rstrip("\n").endswith(command("report", str(folder / "out")).stdout.rstrip("\n"))
    told = json.loads(command("report", str(folder / "out"), "--format", "json").stdout)
    assert {row["method"] for row in told["tuning"]} == {"adamw", "badam"}
    assert told["recommendation"][0].startswith("For 1,024 MiB")


@pytest.mark.slow
def test_a_best_trial_at_the_edge_is_followed_by_one_beyond_it_within_the_budget(tmp_path):
    grid = SMALL.replace("lr = [1e-3, 5e-2]\nbudget = 2", "lr = [1e-9, 1e-8, 1e-7]\nbudget = 5")
    (tmp_path / "study.toml").write_text(grid)
    done = run(tmp_path / "study.toml", tmp_path / "out")
    trials = record.load_folder(tmp_path / "out" / "tuning")
    for method in ("adamw", "badam"):
        mine = sorted((t for t in trials if t["method"] == method), key=lambda t: t["hyperparameters"]["lr"])
        rates = [t["hyperparameters"]["lr"] for t in mine]
        assert {1e-9, 1e-8, 1e-7} < set(rates) and len(rates) <= 5  # rates that change nothing: the first is the best
        assert all(later == pytest.approx(10 * rate) for rate, later in zip(rates, rates[1:], strict=False))
    again = run(tmp_path / "study.toml", tmp_path / "out")
    assert again.stdout.partition("Summary")[2] == done.stdout.partition("Summary")[2] != ""


OF_RUN = ("run_id", "task", "method", "model", "seed", "hyperparameters", "training", "environment")
MEASURED = {name: value for name, value in make_record().items() if name not in OF_RUN}


class Kills:
    """An executor under which the first run is killed, once."""

    remark, killed = None, False

    def call_all(self, calls):
        for call in calls:
            outcome = Outcome("ok", value=MEASURED) if self.killed else processes.cause_of_death(-9, False)
            self.killed = True
            yield call, outcome


def test_a_trial_that_was_killed_is_made_once_more_before_anything_is_chosen(tmp_path, capsys):
    given = {"task": "superglue/cb", "data": DATA, "steps": 1, "optimizers": "sgd", "quiet": True}
    settings = resolve({**given, "out": str(tmp_path)})
    runs = prepare(settings)
    workshop = _Workshop(Folder(tmp_path), Folder(tmp_path / "tuning"), settings, Kills(), lambda: 0)
    workshop.try_out(runs)
    assert [(trial["run_id"], trial["status"]) for trial in workshop.trials] == [(run.run_id, "ok") for run in runs]
    assert "1 trial failed: once more" in capsys.readouterr().out
    assert [trial["status"] for trial in record.load_folder(tmp_path / "tuning")] == ["ok", "ok"]


def test_what_cannot_be_tuned_on_the_data_to_choose_on_is_refused_before_anything_is_run(tmp_path):
    """Its runs had the first values of the grid, as if they were the best."""
    shutil.copytree(Path(DATA) / "CB", tmp_path / "data" / "CB")
    (tmp_path / "data" / "RTE").mkdir()
    for part in ("train", "val"):
        row = {"premise": "A cat sleeps.", "hypothesis": "A cat.", "idx": 0}
        rows = [json.dumps({**row, "label": label}) for label in ("entailment", "not_entailment")]
        (tmp_path / "data" / "RTE" / f"{part}.jsonl").write_text("\n".join(rows))
    both = SMALL.replace("superglue/cb", "superglue/cb,superglue/rte").replace(DATA, str(tmp_path / "data"))
    (tmp_path / "study.toml").write_text(f"{both}data = {DATA!r}\n")
    done = run(tmp_path / "study.toml", tmp_path / "out")
    assert done.returncode == 2 and not (tmp_path / "out").exists()
    assert re.search(r"no trial of adamw on superglue/rte can be made: .*RTE/train\.jsonl is missing", done.stderr)


def test_a_task_that_cannot_be_built_is_a_result_of_a_study_as_of_a_comparison(tmp_path):
    """After tuning, which had taken its hours, the study ended with the task's mistake, and no other task was run."""
    both = SMALL.replace("superglue/cb", "superglue/cb,superglue/rte").replace('"badam"', '"badam"\nreference = false')
    (tmp_path / "study.toml").write_text(both)
    done = run(tmp_path / "study.toml", tmp_path / "out", "--shard", "2/2")  # RTE alone
    (made,) = record.load_folder(tmp_path / "out")
    assert (
        done.returncode == 1 and made["error"].startswith("can't: ") and "RTE/train.jsonl is missing" in made["error"]
    )


def test_a_step_beyond_a_rate_that_is_written_as_a_whole_number_is_not_rounded(monkeypatch):
    def made(lr):
        return SimpleNamespace(method="lora", hyperparameters={"lr": float(lr), "rank": 4})

    grid = [{"lr": lr, "rank": 4} for lr in (1, 10, 100)]
    cell = SimpleNamespace(task="t", settings=None, trials=[_Trial(made(one["lr"]), one) for one in grid])
    tried = []
    monkeypatch.setattr(study, "_chosen", lambda *given: grid[0])
    monkeypatch.setattr(study, "_tuned", lambda *given: tried.append(given[-1]["lora"]) or [])
    _extend(SimpleNamespace(budget=4), cell, "lora", SimpleNamespace(trials=[]))
    assert tried == [{"lr": 0.1, "rank": 4}]


@pytest.mark.slow
def test_shards_make_all_of_it_between_them(small, tmp_path):
    folder, _ = small
    for shard in ("1/2", "2/2"):
        done = run(folder / "study.toml", tmp_path, "--shard", shard)
        assert done.returncode == 0 and f"Shard {shard[0]} of 2 is done" in done.stdout
    assert results(tmp_path) == results(folder / "out")
    assert results(tmp_path / "tuning") == results(folder / "out" / "tuning")


def test_times_that_shards_measure_beside_each_other_are_not_true(tmp_path):
    study, out = tmp_path / "study.toml", tmp_path / "out"
    study.write_text(SMALL.partition("[tune]")[0])
    with Folder(out).locked("-2-of-2", "cpu", at_once=3):
        assert run(study, out, "--shard", "1/2").returncode == 0
    (beside,) = record.load_folder(out)
    assert beside["environment"]["jobs"] == 1 + 3 and not record.has_true_times(beside)
    for file in out.glob("superglue*.json"):
        file.unlink()
    with Folder(out).locked("-2-of-2", "cuda:0 of all"):  # on something else
        assert run(study, out, "--shard", "1/2").returncode == 0
    (alone,) = record.load_folder(out)
    assert record.has_true_times(alone)


def test_runs_beside_are_those_of_living_processes_that_make_other_parts_on_the_same_device(tmp_path):
    folder = Folder(tmp_path)
    with folder.locked("-1-of-3", "cpu", 2), folder.locked("-2-of-3", "cpu"), folder.locked("-3-of-3", "cuda of all"):
        assert [folder.runs_beside(f"-{part}-of-3", "cpu") for part in (1, 2, 3)] == [1, 2, 3]
    assert folder.runs_beside("-1-of-3", "cpu") == 0
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    (tmp_path / ".lock-2-of-3").write_text(f"{ended.pid} 1 {socket.gethostname()} cpu")
    assert folder.runs_beside("-1-of-3", "cpu") == 0
    (tmp_path / ".lock-2-of-3").write_text(f"{os.getpid()} 1 another-machine cpu")
    assert folder.runs_beside("-1-of-3", "cpu") == 0


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_neither_a_zombie_nor_a_later_process_of_the_same_number_makes_runs_beside(tmp_path):
    with Folder(tmp_path).locked("-1-of-2", "cpu"):
        mine = (tmp_path / ".lock-1-of-2").read_text()
        assert Folder(tmp_path).runs_beside("-2-of-2", "cpu") == 1
    lock, (owner, rest) = tmp_path / ".lock-1-of-2", mine.split(" ", 1)
    lock.write_text(f"{owner}1 {rest}")  # it began at another time
    assert Folder(tmp_path).runs_beside("-2-of-2", "cpu") == 0
    killed = subprocess.Popen(["sleep", "60"])
    lock.write_text(f"{killed.pid} {rest}")
    assert Folder(tmp_path).runs_beside("-2-of-2", "cpu") == 1
    killed.kill()
    os.waitid(os.P_PID, killed.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and is still there
    assert Folder(tmp_path).runs_beside("-2-of-2", "cpu") == 0
    killed.wait()


@pytest.mark.slow
def test_the_jobs_are_listed_and_nothing_is_run(small, tmp_path):
    done = run(small[0] / "study.toml", tmp_path / "none", "--dry-run", "--shard", "2/2")
    assert "\n3 runs, 2 of them to tune:\nsuperglue/cb  config:roberta-tiny  badam  seeds 0\n" in done.stdout
    assert re.search(r"^In all (< )?0\.0", done.stdout, re.MULTILINE)
    assert not (tmp_path / "none").exists()


def kill_after(count, file, out):
    """Start the study, and kill it without warning once it has so many records."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    study = [sys.executable, "-m", "membench", "study", str(file), "--out", str(out), "--quiet"]
    process = subprocess.Popen(study, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    try:
        while len(list(out.rglob("*.json"))) < count and process.poll() is None:
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL


@pytest.mark.slow
def test_a_study_killed_twice_and_resumed_ends_with_the_same_tables_as_an_undisturbed_one(tmp_path):
    """3 methods x 2 tasks x 3 seeds, each method tuned on two trials a task: 30 runs."""
    file = tmp_path / "study.toml"
    file.write_text(FULL)
    undisturbed = run(file, tmp_path / "one")
    assert undisturbed.returncode == 0, undisturbed.stdout + undisturbed.stderr
    kill_after(3, file, tmp_path / "two")  # while it tunes
    kill_after(14, file, tmp_path / "two")  # while it runs seeds
    resumed = run(file, tmp_path / "two")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert len(results(tmp_path / "one")) == 18 and len(results(tmp_path / "one" / "tuning")) == 12
    for part in (".", "tuning"):
        assert results(tmp_path / "two" / part) == results(tmp_path / "one" / part)
    tables = [without_speeds(done.stdout) for done in (undisturbed, resumed)]
    assert tables[0] == tables[1] and all(word in tables[0] for word in ("Quality", "Memory", "For 60 MiB"))


def without_speeds(text):
    """From the first table on, what doesn't depend on the clock."""
    tables = text[text.index("\nsuperglue, 2 tasks") :]
    kept = [block for block in tables.split("\n\n") if not block.startswith(("Summary", "Throughput"))]
    words = " ".join("\n\n".join(kept).split())  # where lines are wrapped depends on the speeds, too
    words = re.sub(r"Slowed by waiting for processors: .*? of its time\. ?", "", words)
    return re.sub(r", at [\d.]+ times the speed of adamw( \(not to be relied on: [^)]*\))?", "", words)
