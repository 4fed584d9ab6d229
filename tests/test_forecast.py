"""`study --dry-run` says what its runs will take, in the bytes they are metered at and in hours; or what can't fit."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from commands import DATA

import optimizers
from membench.config.errors import UserError
from membench.config.run import Run, Training
from membench.config.study_file import Study
from membench.planning import rehearsal
from membench.runs import forecast, processes, study
from membench.runs.forecast import Kind
from membench.runs.processes import Outcome
from membench.training.build import create_task
from membench.training.execute import _meter

TRAINING = Training(model="config:roberta-tiny", steps=100, batch_size=2, sequence_length=32, evaluate_every=40)
RUN = Run(
    run_id="r",
    task="superglue/copa",
    method="badam",
    seed=0,
    hyperparameters=optimizers.resolve("badam"),
    training=TRAINING,
    device="cpu",
    threads=1,
    environment={},
)


WITH_HEAD = optimizers.resolve("badam", always_train=("lm_head",))  # as the runner sets it for random weights
WITH_LAYERS = optimizers.resolve("lora", always_train=("classifier", "*.layer.0", "*.layer.1"))  # as a user asks
LANGUAGE = replace(TRAINING, model="config:llama-tiny", data="demo", sequence_length=64, weights="random")
PACKED = replace(LANGUAGE, sequence_length=256, loss_chunks=8, options={"packing": True})


@pytest.mark.parametrize(
    "run",
    [
        RUN,  # of two classes, not two answers
        replace(RUN, task="superglue/rte", method="lora", hyperparameters=WITH_LAYERS),
        replace(RUN, task="instruct", hyperparameters=WITH_HEAD, training=LANGUAGE),
        replace(RUN, task="dpo", hyperparameters=WITH_HEAD, training=LANGUAGE),
        replace(RUN, task="instruct", method="mezo", hyperparameters=optimizers.resolve("mezo"), training=PACKED),
    ],
    ids=lambda run: f"{run.task} {run.method}",
)
def test_it_needs_what_will_be_metered(run):
    task = create_task(run.training, run.task, seed=0)
    metered = _meter(run, task, {})["memory"]["peak_allocated_bytes"]
    assert rehearsal.planned_bytes(run, task, 2**40) == pytest.approx(metered, rel=0.01)


UNKNOWN = [replace(TRAINING, model="config:llama-tiny"), replace(TRAINING, autocast="bfloat16")]


@pytest.mark.parametrize("changes", [{"task": "mine:Task"}, *({"training": training} for training in UNKNOWN)])
def test_what_plans_do_not_know_is_not_planned(changes):
    run = replace(RUN, **{"task": "superglue/cb", **changes})
    task = create_task(TRAINING, "superglue/cb", seed=0)
    assert rehearsal.planned_bytes(run, task, 2**40) is None


def test_a_rehearsal_times_steps_and_an_evaluation_and_leaves_out_what_does_not_fit(monkeypatch):
    run = replace(RUN, task="superglue/cb", training=replace(TRAINING, data=DATA))
    found = rehearsal.rehearse(run, evaluates=True)
    assert found["planned_bytes"] < found["room_bytes"]
    assert found["step_seconds"] > 0 and 0 < found["evaluation_seconds"] < rehearsal.LONGEST_EVALUATION
    monkeypatch.setattr(rehearsal, "room_bytes", lambda device: found["planned_bytes"] - 1)
    assert rehearsal.rehearse(run, evaluates=True)["step_seconds"] is None


def test_an_evaluation_without_end_is_stopped(monkeypatch):
    monkeypatch.setattr(rehearsal, "LONGEST_EVALUATION", 0.05)

    def endless():
        while True:
            pass

    assert rehearsal._seconds(torch.device("cpu"), endless) == 0.05


def test_a_rehearsal_asks_a_reference_of_all_the_training_and_takes_a_norm_for_each_tracked_step(monkeypatch):
    def seconds(device, work):
        work()
        return 1.0

    monkeypatch.setattr(rehearsal, "_seconds", seconds)
    dpo = replace(RUN, task="dpo", hyperparameters=WITH_HEAD, training=replace(LANGUAGE, steps=6))
    tracked = replace(dpo, training=replace(dpo.training, track="gradient_norm"))
    other = [rehearsal.rehearse(run, evaluates=False)["other_seconds"] for run in (RUN, dpo, tracked)]
    assert other == [0, 1, 1 + 6]


def rehearsed(monkeypatch, more=0, **found):
    """What is said of two kinds of runs, of which each rehearsal found this."""
    seconds = {"step_seconds": 0.9, "evaluation_seconds": 6.0, "other_seconds": 9.0}
    found = {"planned_bytes": 2 << 30, "room_bytes": 8 << 30, **seconds, **found}
    monkeypatch.setattr(processes, "call_all", lambda calls, at_once: [(call, Outcome("ok", found)) for call in calls])
    return forecast.forecast([Kind(RUN, 10), Kind(replace(RUN, method="adamw"), 30, more)])


def test_hours_are_those_of_steps_and_evaluations_of_all_runs(monkeypatch):
    text = rehearsed(monkeypatch)
    assert "superglue/copa  config:roberta-tiny  badam   2.00 GiB     0.900    10   0.33" in text
    assert "In all 1.30 hours." in text  # 40 runs of 100 steps of .9 s, three evaluations of 6 s and 9 s before


def test_hours_of_seconds_are_not_0(monkeypatch):
    assert "In all < 0.01 hours." in rehearsed(monkeypatch, step_seconds=1e-4, evaluation_seconds=0, other_seconds=0)


def test_as_many_trials_may_come_on_top_as_the_budget_exceeds_a_grid():
    plan = Study((SimpleNamespace(seeds=(0, 1)),), {"": {"lr": [1e-4, 1e-3, 1e-2]}}, 5, 2, ())
    cell = study._Cell(plan.settings[0], RUN.task, ["badam"], [RUN, replace(RUN, refused="can't")])
    assert study._kinds(plan, cell) == [Kind(RUN, 2 + 3, 2)]
    assert study._kinds(replace(plan, budget=0), cell) == [Kind(RUN, 2, 0)]


def test_a_method_that_is_refused_is_listed_with_the_reason_and_has_no_trials():
    plan = Study((SimpleNamespace(seeds=(0, 1), model="m"),), {"": {"lr": [1e-4, 1e-3, 1e-2]}}, 5, 2, ())
    runs = [RUN, replace(RUN, method="lomo", refused="it can't accumulate")]
    said = study.describe(plan, [study._Cell(plan.settings[0], RUN.task, ["badam", "lomo"], runs)])
    assert said.startswith("7 runs, 3 of them to tune, and at most 2 more")
    assert said.endswith("  lomo  seeds 0, 1\n    can't: it can't accumulate") and said.count("    try ") == 3


def test_hours_have_the_trials_beyond_a_grids_edge_as_a_range(monkeypatch):
    text = rehearsed(monkeypatch, more=20)
    assert "adamw   2.00 GiB     0.900  30 to 50  0.97 to 1.62" in text and "       10          0.33" in text
    assert "In all 1.30 to 1.95 hours, the more the more often the best value is at the edge of a grid." in text


def test_what_cannot_fit_is_refused_with_both_figures(monkeypatch):
    with pytest.raises(
        UserError,
        match=r"copa badam needs 2.00 GiB, and cpu has 1.00 GiB \(1.00 GiB missing\); .*: choose other",
    ):
        rehearsed(monkeypatch, step_seconds=None, room_bytes=1 << 30)
    with pytest.raises(UserError, match=r"needs 2.00 GiB, and cpu has 2.00 GiB \(1.00 MiB missing\)"):
        rehearsed(monkeypatch, step_seconds=None, room_bytes=(2 << 30) - (1 << 20))
