"""`--log-to`: what trackers' own stores say, read back with their own readers, is what the record says."""

import json
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from commands import DATA, command
from reports_factory import make_failure, make_record

from membench.config import options
from membench.config.errors import UserError
from membench.config.settings import resolve
from membench.runs import trackers
from membench.runs.progress import Lines
from reports import record as records

LOCAL = ["tensorboard", "trackio", "mlflow"]
HISTORY = [
    {"step": 1, "tokens": 900, "seconds": 0.5, "loss": 0.7, "learning_rate": 1e-4, "metrics": None},
    {"step": 2, "tokens": 1700, "seconds": 0.9, "loss": 0.5, "learning_rate": 2e-4, "metrics": {"accuracy": 0.5}},
    {"step": 3, "tokens": 2600, "seconds": 1.4, "loss": None, "learning_rate": 1e-4, "metrics": {"accuracy": 0.75}},
]
PER_SECOND = [900 / 0.5, 800 / 0.4, 900 / 0.5]


def tensorboard(out, run_id):
    """Scalars by name, as (step, value), and the record."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(out / "tensorboard" / run_id), size_guidance={"scalars": 0})
    read.Reload()
    scalars = {name: [(one.step, one.value) for one in read.Scalars(name)] for name in read.Tags()["scalars"]}
    (text,) = read.Tensors("record")
    return scalars, json.loads(text.tensor_proto.string_val[0])


def trackio(out, run_id):
    from trackio.sqlite_storage import SQLiteStorage

    logs = SQLiteStorage.get_logs("membench", run_id)
    scalars = {}
    for log in logs:
        for name, value in log.items():
            if isinstance(value, int | float) and name not in ("step", "timestamp"):
                scalars.setdefault(name, []).append((log["step"], value))
    return scalars, json.loads(logs[-1]["record"])


def mlflow(out, run_id):
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{out / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("membench").experiment_id
    (run,) = client.search_runs([experiment], f"tags.`mlflow.runName` = '{run_id}'")
    number = run.info.run_id
    names = run.data.metrics
    scalars = {name: [(one.step, one.value) for one in client.get_metric_history(number, name)] for name in names}
    return scalars, json.loads((out / "mlflow-artifacts" / number / "artifacts" / "record.json").read_text())


READ = {"tensorboard": tensorboard, "trackio": trackio, "mlflow": mlflow}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The output folder, beside which the trackers' own stores are."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    if "trackio" not in sys.modules:
        monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    return tmp_path


def test_a_runs_seed_is_its_own_whatever_seed_its_method_was_given():
    run = SimpleNamespace(task="t", method="lora", seed=2, hyperparameters={"lr": 1e-3, "seed": 5})
    assert trackers.settings_of(run) == {"lr": 1e-3, "task": "t", "method": "lora", "seed": 2}


def log(name, out, record, *, told=0):
    """Log a record, of whose history the first `told` entries come during the run."""
    run = SimpleNamespace(run_id=record["run_id"], task="t", method="m", seed=0, hyperparameters={"lr": 1e-3})
    tracked = trackers.create(Lines(1, 1), resolve({"log_to": name, "out": str(out)}))
    with tracked:
        tracked.begin(run)
        for entry in record["history"][:told]:
            tracked.entry(run, entry)
        tracked.end(run, record, 1.0)


def test_a_run_that_goes_on_from_its_checkpoint_is_logged_once_to_its_last_entry(place):
    """The command keeps waiting for it, as when Slurm puts a job back or a node of Ray is lost."""
    pytest.importorskip("tensorboard")
    made = make_record(history=HISTORY, metrics={"accuracy": 0.75})
    run = SimpleNamespace(run_id=made["run_id"], task="t", method="m", seed=0, hyperparameters={"lr": 1e-3})
    with trackers.create(Lines(1, 1), resolve({"log_to": "tensorboard", "out": str(place)})) as tracked:
        tracked.begin(run)
        for entry in (HISTORY[0], HISTORY[1], HISTORY[0], HISTORY[1]):
            tracked.entry(run, entry)
        tracked.end(run, made, 1.0)
    scalars, record = tensorboard(place, made["run_id"])
    expect(scalars, made)
    assert scalars["tokens_per_second"] == [(step, pytest.approx(one)) for step, one in enumerate(PER_SECOND, 1)]
    assert record == made


def interrupt(names, place, made):
    run = SimpleNamespace(run_id=made["run_id"], task="t", method="m", seed=0, hyperparameters={"lr": 1e-3})
    with (
        pytest.raises(KeyboardInterrupt),
        trackers.create(Lines(1, 1), resolve({"log_to": names, "out": str(place)})) as tracked,
    ):
        tracked.begin(run)
        raise KeyboardInterrupt


def test_an_interrupted_run_is_left_ended_in_every_tracker(place, monkeypatch):
    """Only those whose runs go on when the command ends; one that fails then keeps the others from nothing."""
    ended = []

    def begin(name):
        def interrupted():
            ended.append(name)
            if name == "wandb":
                raise OSError("no network")

        return SimpleNamespace(log=lambda *_: None, end=lambda *_: ended.append("ok"), interrupt=interrupted)

    for name in ("wandb", "mlflow"):
        module = ModuleType(f"membench.runs.trackers.to_{name}")
        module.begin = lambda run, out, name=name: begin(name)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(options, "find_spec", lambda name: name)
    made = make_record(history=HISTORY)
    log("wandb,mlflow", place, made)
    assert ended == ["ok", "ok"]
    interrupt("wandb,mlflow", place, made)
    assert ended == ["ok", "ok", "wandb", "mlflow"]


@pytest.mark.slow
def test_mlflow_shows_an_interrupted_run_as_killed(place):
    pytest.importorskip("mlflow")
    from mlflow import MlflowClient

    made = make_record(history=HISTORY)
    interrupt("mlflow", place, made)
    client = MlflowClient(f"sqlite:///{place / 'mlflow.db'}")
    (found,) = client.search_runs([client.get_experiment_by_name("membench").experiment_id])
    assert found.info.status == "KILLED"


def expect(scalars, record):
    """The history and what follows it, in the tracker's precision (32 bits in TensorBoard)."""

    def same(name, wanted):
        assert [step for step, _ in scalars[name]] == [step for step, _ in wanted], name
        np.testing.assert_allclose([x for _, x in scalars[name]], [x for _, x in wanted], rtol=1e-7, err_msg=name)

    history = record["history"]
    for key in ("loss", "learning_rate", "tokens", "seconds"):
        same(key, [(entry["step"], entry[key]) for entry in history if entry[key] is not None])
    for name in record["metrics"] or {}:
        scores = [(entry["step"], entry["metrics"][name]) for entry in history if entry["metrics"]]
        same(f"metrics/{name}", scores)
    last = history[-1]["step"]
    for part, size in record["memory"]["at_peak"].items():
        same(f"memory/at_peak/{part}", [(last, size)])
    same("memory/peak_allocated_bytes", [(last, record["memory"]["peak_allocated_bytes"])])


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "tensorboard" else pytest.mark.slow) for name in LOCAL]
)
def test_what_a_tracker_has_is_what_the_record_says(name, place):
    pytest.importorskip(name)
    made = make_record(history=HISTORY, metrics={"accuracy": 0.75})
    log(name, place, made, told=1)  # an attempt that ended before the second step, and one with all steps
    log(name, place, made, told=2)
    scalars, record = READ[name](place, made["run_id"])
    expect(scalars, made)
    np.testing.assert_allclose([value for _, value in scalars["tokens_per_second"]], PER_SECOND, rtol=1e-7)
    assert record == made


def test_a_tracker_that_fails_is_left_out_of_the_run_and_says_so(place, monkeypatch, capsys):
    """One fails when it begins, one at its second entry; the third has everything."""
    kept = []

    def tracker(name, fails):
        def add(step, values):
            if fails:
                raise OSError("no network")
            kept.append(step)

        module = ModuleType(f"membench.runs.trackers.to_{name}")
        module.begin = lambda run, out: SimpleNamespace(log=add, end=lambda record, values: kept.append(record))
        if fails == "at once":
            module.begin = lambda run, out: 1 / 0
        monkeypatch.setitem(sys.modules, module.__name__, module)

    for name, fails in {"wandb": "at once", "mlflow": "later", "trackio": ""}.items():
        tracker(name, fails)
    monkeypatch.setattr(options, "find_spec", lambda name: name)
    made = make_record(history=HISTORY)
    log("wandb,mlflow,trackio", place, made, told=2)
    text = capsys.readouterr().out
    assert text.count("--log-to wandb: ") == text.count("--log-to mlflow: ") == 1 and "no network" in text
    assert "trackio" not in text and f"{made['task']} {made['method']} seed 0: ok" in text
    assert kept == [1, 2, 3, made]


def test_a_run_that_failed_is_logged_too(place):
    pytest.importorskip("tensorboard")
    failed = make_failure("failed", "no such luck")
    log("tensorboard", place, failed)
    assert tensorboard(place, failed["run_id"]) == ({}, failed)


def test_a_tracker_that_is_not_installed_is_told_before_a_folder_is_made(monkeypatch):
    monkeypatch.setattr(options, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--log-to wandb needs wandb: pip install 'membench\[wandb\]'"):
        resolve({"log_to": "wandb"})


@pytest.mark.slow
def test_runs_are_logged_while_they_are_made(place):
    for name in LOCAL:
        pytest.importorskip(name)
    small = "--task", "superglue/cb", "--data", DATA, "--optimizers", "badam", "--batch-size", "2", "--steps", "6"
    options = "--sequence-length", "16", "--evaluate-every", "2", "--jobs", "2", "--quiet"
    done = command("compare", *small, *options, "--out", str(place), "--log-to", ",".join(LOCAL))
    assert done.returncode == 0, done.stdout + done.stderr
    for made in records.load_folder(place):
        for read in READ.values():
            scalars, record = read(place, made["run_id"])
            expect(scalars, made)
            assert record == made
