"""`study --dry-run` says what its runs will take, in the bytes they are metered at and in hours; or what can't fit."""

import json
from dataclasses import replace
from random import Random
from types import SimpleNamespace

import pytest
import torch
import transformers
from architectures import VOCABULARY
from commands import DATA
from letters import folder, letters
from plan_models import KINDS, ODD, drawn_options

import optimizers
from membench.config.errors import UserError
from membench.config.run import Run, Training
from membench.config.settings import resolve
from membench.config.study_file import Study
from membench.planning import rehearsal
from membench.runs import forecast, processes, study
from membench.runs.forecast import Kind
from membench.runs.prepare import prepare
from membench.runs.processes import Outcome
from membench.training import execute
from membench.training.build import create_task
from membench.training.execute import _meter
from membench.training.loop import largest_micro_batches
from optimizers.shared import in_pieces

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


# ---- drawn by chance: what a comparison meters, with all that its settings and its data make of a step


def text(random, most):
    return " ".join(random.choices(["a", "bird", "sang", "in", "the", "rain"], k=random.randint(2, most)))


ROWS = {
    "classify": lambda random: {"text": text(random, 6), "label": random.choice("xy")},
    "c4": lambda random: {"text": text(random, 80)},
    "instruct": lambda random: {"prompt": text(random, 2), "completion": text(random, 4)},
    "dpo": lambda random: {"prompt": text(random, 2), "chosen": text(random, 4), "rejected": text(random, 4)},
}


def drawn_run(seed, path):
    """A run of a task on a tiny pretrained model, and data of it."""
    random = Random(seed)
    torch.manual_seed(seed)
    task, method = random.choice([*ROWS]), random.choice([name for name in optimizers.available() if name != "welore"])
    kinds = [kind for kind in KINDS if (kind in ("bert", "roberta")) == (task == "classify")]
    shape = {"hidden_size": 24, "num_attention_heads": 3, "num_hidden_layers": random.choice((1, 2, 3))}
    kind, shape["num_key_value_heads"] = random.choice(kinds), random.choice((1, 3))
    values = {**ODD, **shape, **KINDS[kind], "vocab_size": VOCABULARY, "max_position_embeddings": 200}
    auto = transformers.AutoModelForMaskedLM if task == "classify" else transformers.AutoModelForCausalLM
    model = folder(path / "model", auto.from_config(transformers.AutoConfig.for_model(kind, **values)), letters())
    data = path / "rows.jsonl"
    data.write_text("".join(json.dumps(ROWS[task](random)) + "\n" for _ in range(60)))
    options = drawn_options(random, method)
    parts = 1 if options.get("in_backward") or method in ("lomo", "adalomo") else random.choice((1, 2))
    checkpointing = random.random() < 0.5
    settings = {
        "task": (task,),
        "model": model,
        "data": str(data),
        "optimizers": (method,),
        "hyperparameters": {method: options},
        "batch_size": parts * random.choice((1, 2, 3)),
        "gradient_accumulation_steps": parts,
        "sequence_length": random.choice((24, 40)) if task in ("classify", "c4") else 180,
        "dtype": random.choice(("float32", "float32", "bfloat16")),
        "checkpointing": checkpointing,
        "checkpointing_every": random.choice((1, 2)) if checkpointing else 1,
        "loss_chunks": 1 if task == "classify" else random.choice((1, 3)),
        "options": {"packing": True} if task == "instruct" and kind not in UNPACKED and random.random() < 0.5 else {},
        "max_grad_norm": 0.5 if parts == 2 and method != "mezo" else None,
        "reference": False,
        "device": "cpu",
    }
    (run,) = prepare(resolve({name: value for name, value in settings.items() if value is not None}))
    return run


UNPACKED = ("mamba", "gemma2", "gpt_oss")  # no mask keeps their texts apart


def padded(batch):
    """With a mask that transformers doesn't drop, as a plan has it: one of all ones takes no room."""
    if "position_ids" not in batch:
        batch["attention_mask"][0, -1] = 0
    return batch


@pytest.mark.parametrize("seed", [pytest.param(n, marks=[] if n < 8 else pytest.mark.slow) for n in range(80)])
def test_whatever_is_drawn_needs_what_will_be_metered_to_the_byte(seed, tmp_path, monkeypatch):
    monkeypatch.setattr(in_pieces, "SMALLEST", 64)
    run = drawn_run(seed, tmp_path)
    task = create_task(run.training, run.task, run.seed)
    monkeypatch.setattr(
        execute, "largest_micro_batches", lambda *given: list(map(padded, largest_micro_batches(*given)))
    )
    metered = _meter(run, task, {})["memory"]["peak_allocated_bytes"]
    planned = rehearsal.planned_bytes(run, task, 2**40)
    if run.method in ("blockllm", "hft", "lisa"):  # by values, or drawn at random: the worst, as far as sizes tell
        assert planned == pytest.approx(metered, rel=0.03)
    else:
        assert planned == metered, run


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


def test_a_table_explains_the_columns_that_it_has_and_what_is_not_planned(monkeypatch):
    known, unknown = rehearsed(monkeypatch), rehearsed(monkeypatch, planned_bytes=None)
    assert "needs: planned" in known and "isn't planned" not in known
    assert "needs: " not in unknown and "Memory isn't planned where" in unknown and "s / step: measured" in unknown


def test_as_many_trials_may_come_on_top_as_the_budget_exceeds_a_grid():
    plan = Study((SimpleNamespace(seeds=(0, 1)),), {"": {"lr": [1e-4, 1e-3, 1e-2]}}, 5, 2, ())
    cell = study._Cell(plan.settings[0], RUN.task, ["badam"], [RUN, replace(RUN, refused="can't")])
    assert list(study._kinds(plan, cell)) == [Kind(RUN, 2 + 3, 2)]
    assert list(study._kinds(replace(plan, budget=0), cell)) == [Kind(RUN, 2, 0)]


def test_values_that_need_more_are_planned_and_trials_on_data_of_their_own_are_forecast_by_these(monkeypatch):
    """A rank's default isn't what is tried of it, and an epoch of other data has other steps."""
    plan = Study((SimpleNamespace(seeds=(0, 1)),), {"": {"lr": [1e-4, 1e-3], "rank": [1, 64]}}, 4, 2, ())
    sample = replace(RUN, method="lora", hyperparameters=optimizers.resolve("lora"))
    tried = [optimizers.resolve("lora", **values) for values in plan.trials("lora")]
    longer = replace(sample, training=replace(TRAINING, steps=400))
    trials = [study._Trial(replace(longer, hyperparameters=values), {}) for values in tried]
    cell = study._Cell(plan.settings[0], RUN.task, ["lora"], [sample], trials)
    (kind,) = study._kinds(plan, cell)
    assert (kind.run, kind.count, [values["rank"] for values in kind.tried]) == (sample, 2 + 4, [1, 64])
    finals, apart = study._kinds(replace(plan, tuning_data="apart"), cell)
    assert (finals.run, finals.count, finals.tried) == (sample, 2, kind.tried)
    assert (apart.run.training.steps, apart.count, apart.trials, apart.tried) == (400, 4, True, kind.tried)
    monkeypatch.setattr(rehearsal, "room_bytes", lambda device: 1)  # or steps would be made
    needs = [rehearsal.rehearse(sample, evaluates=False, tried=one)["planned_bytes"] for one in (tried, tried[:1], ())]
    largest = rehearsal.rehearse(replace(sample, hyperparameters=tried[-1]), evaluates=False)["planned_bytes"]
    assert needs[0] == largest > needs[2] > needs[1]


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
