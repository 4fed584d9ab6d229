"""Memory is metered on the same inputs for every method, those that need most; and it is what a plan says."""

import json

import pytest
import torch
import transformers
from architectures import ARCHITECTURES
from letters import folder, labelled, letters
from plan_models import maxima

import optimizers
import tasks
from membench.config.run import Run, Training
from membench.planning.blueprint import Blueprint
from membench.planning.fake import QuickFakeTensorMode
from membench.planning.simulate import simulate
from membench.planning.workload import Workload, model_loss
from membench.training import execute
from membench.training.build import method_values
from membench.training.loop import largest_micro_batches
from membench.training.metering import meter_cycle
from tasks.c4.task import Pretraining
from tasks.instruct.task import Tuning
from tasks.models.batches import padded
from tasks.models.language import KIND

FAMILIES = {  # a task of each, its model, and options of its own
    "superglue/rte": ("config:roberta-tiny", {}),
    "superglue/copa": ("config:roberta-tiny", {}),
    "classify": ("config:roberta-tiny", {}),
    "c4": ("config:llama-tiny", {}),
    "instruct": ("config:llama-tiny", {}),
    "instruct, packed": ("config:llama-tiny", {"packing": True}),
}
QUICK = [(family, ("badam", "lora")[number % 2]) for number, family in enumerate(FAMILIES)]
ALL = [(family, method) for family in FAMILIES for method in ("adamw", "badam", "lora", "lomo")]
PAIRS = [pytest.param(*pair, marks=[] if pair in QUICK else pytest.mark.slow) for pair in ALL]


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def make(family, method="adamw", *, seed=0, data="demo", **given):
    """A run of a family's task, and the task."""
    model, options = FAMILIES[family]
    shape = {"steps": 2, "batch_size": 2, "sequence_length": 96, "weights": "random", "model": model} | given
    training = Training(data=data, options=options, **shape)
    values = optimizers.resolve(method)
    run = Run(
        run_id="r",
        task=family.partition(",")[0],
        method=method,
        seed=seed,
        hyperparameters=values,
        training=training,
        device="cpu",
        threads=1,
        environment={},
    )
    return run, execute.create_task(training, run.task, seed)


def build_fake(task):
    """The model of a task; `task.build_model` would convert its weights, which fake ones don't allow."""
    if isinstance(task, Pretraining | Tuning):
        return task.language.source._new(KIND, {})
    return task.classifier.source._new(task.classifier.kind, task.classifier._settings)


def fake_peaks(run, task):
    """What the same steps need on tensors without values."""
    (batch,) = largest_micro_batches(task, run.training, torch.device("cpu"))
    values = method_values(run, execute.build_model(run, task))
    with QuickFakeTensorMode() as mode:
        model = build_fake(task).train()
        inputs = {key: mode.from_tensor(value) for key, value in batch.items()}
        optimizer = optimizers.create(run.method, model, **values)
        return meter_cycle(model, optimizer, task.loss, lambda step: [inputs])


@pytest.mark.parametrize(("family", "method"), PAIRS)
def test_s7_planned_equals_metered_on_the_batches_of_every_family(family, method):
    run, task = make(family, method)
    metered, planned = execute._meter(run, task, {})["memory"], fake_peaks(run, task)
    if family == "c4":  # a mask of ones is left out, which a plan can't see: it is that of a batch with padding
        assert metered["peak_allocated_bytes"] <= planned["peak_allocated_bytes"]
        task.largest_batch = lambda: padded(task.batch(0))
        metered = execute._meter(run, task, {})["memory"]
    assert metered["peak_allocated_bytes"] == planned["peak_allocated_bytes"] > 0
    assert metered["at_peak"] == planned["at_peak"] and metered["maximum"] == planned["maximum"]


@pytest.mark.parametrize("family", ["superglue/rte", "classify", "instruct"])
def test_s7_the_command_plans_what_a_comparison_meters(family, tmp_path):
    data = "demo"
    if family == "classify":  # of two classes, as a plan takes it
        data = str(tmp_path / "a.jsonl")
        rows = [{"text": f"museum {n} " * (n % 60 + 1), "label": n % 2} for n in range(60)]
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run, task = make(family, "lora", data=data)
    metered = execute._meter(run, task, {})["memory"]
    blueprint = Blueprint(Workload(run.training.model.removeprefix("config:"), 2, 96, "float32", device="cpu"))
    values = method_values(run, execute.build_model(run, task))
    planned = maxima(simulate(blueprint, "lora", values, blueprint.depth))
    assert planned == [metered["peak_allocated_bytes"], *metered["maximum"].values()]


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_s7_token_types_are_planned_for_the_encoders_whose_batches_have_them(name, tmp_path):
    model = folder(tmp_path / "model", ARCHITECTURES[name].build().base_model, letters())
    data = labelled(tmp_path / "a.jsonl", [f"{'abcdefghij'[n % 10] * (1 + n % 30)}" for n in range(40)])
    run, task = make("classify", data=data, model=model, sequence_length=16)
    assert ("token_type_ids" in task.batch(0)) == (name == "bert")
    metered = execute._meter(run, task, {})["memory"]
    blueprint = Blueprint(Workload(model, 2, 16, "float32", device="cpu"))
    planned = maxima(simulate(blueprint, "adamw", method_values(run, execute.build_model(run, task)), blueprint.depth))
    assert planned == [metered["peak_allocated_bytes"], *metered["maximum"].values()]


ODD_TOKENS = {
    "qwen3": {"pad_token_id": 0, "num_key_value_heads": 2},  # without biases padding has no gradients
    "bart": {"eos_token_id": 2, "d_model": 16, "encoder_attention_heads": 2, "decoder_attention_heads": 2},
    "gemma3_text": {"bos_token_id": 1, "eos_token_id": [1, 3], "image_token_index": 4, "num_key_value_heads": 2},
}


@pytest.mark.parametrize("kind", ODD_TOKENS)
def test_s7_steps_that_are_metered_beside_a_plan_are_on_words_that_give_every_weight_a_gradient(kind, tmp_path):
    sizes = {"vocab_size": 6, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    config = {"model_type": kind, **sizes, "num_hidden_layers": 2, **ODD_TOKENS[kind]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    blueprint = Blueprint(Workload(str(tmp_path), 4, 16, "float32", device="cpu"))
    batch, model = blueprint.batch("cpu"), blueprint.build(2)
    words = batch["input_ids"][:, : -1 if kind == "bart" else None]
    read = [number for name, number in config.items() if name.endswith(("token_id", "token_index"))]
    special = {n for number in read for n in (number if isinstance(number, list) else [number])}
    assert not special & set(words.flatten().tolist())
    assert len(words.unique()) > 1
    model_loss(model, batch).backward()
    assert all(p.grad.any() for p in model.parameters() if p.dim() > 1)
    assert torch.equal(blueprint.batch("cpu")["input_ids"], batch["input_ids"])


@pytest.mark.parametrize("family", ["classify", "instruct"])
def test_s7_the_peak_is_that_of_every_seed_and_of_every_order_of_the_data(family, tmp_path):
    """Of texts that nearly all fill the sequence, the few that don't decide; the first batches may have none."""
    long = [" ".join(f"museum{n + m}" for m in range(90)) for n in range(300)]
    rows = [{"text": text, "label": n % 2} for n, text in enumerate(long)]
    if family == "instruct":
        rows = [{"instruction": f"Say {n}.", "output": text} for n, text in enumerate(long)]
    short = {"text": "no", "label": 0} if family == "classify" else {"instruction": "Say no.", "output": "No."}
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, *[short] * 9]))
    peaks, masks = set(), []
    for seed in range(3):
        run, task = make(family, "lora", seed=seed, data=str(tmp_path / "a.jsonl"))
        masks += [bool(task.batch(step)["attention_mask"].all()) for step in range(2)]
        peaks.add(execute._meter(run, task, {})["memory"]["peak_allocated_bytes"])
    assert len(peaks) == 1 and any(masks)  # though a run's own first batches are of both kinds


def test_s7_no_step_of_a_training_needs_more_than_is_metered():
    run, task = make("instruct", "lora")
    model = execute.build_model(run, task)
    values = method_values(run, model)
    optimizer = optimizers.create("lora", model, **values)
    real = meter_cycle(model, optimizer, task.loss, lambda step: [task.batch(step)], steps_per_selection=8)
    assert real["peak_allocated_bytes"] == execute._meter(run, task, {})["memory"]["peak_allocated_bytes"]


def test_s7_micro_batches_are_counted_one_by_one():
    run, task = make("superglue/rte", gradient_accumulation_steps=2, batch_size=4)
    parts = largest_micro_batches(task, run.training, torch.device("cpu"))
    assert len(parts) == 2 and parts[0]["input_ids"].shape == (2, 96)
    assert parts[0]["input_ids"].data_ptr() != parts[1]["input_ids"].data_ptr()


class Uneven:
    """A task that doesn't know its largest batch: the third is longer, the fifth as long and padded."""

    def batch(self, step):
        length = 8 if step in (2, 4) else 4
        mask = torch.ones(1, length, dtype=torch.long)
        if step == 4:
            mask[0, -1] = 0
        return {"input_ids": torch.full((1, length), step), "attention_mask": mask}


@pytest.mark.parametrize("method", ["adamw", "badam"])
def test_s7_of_a_model_that_drops_layers_at_random_a_step_with_all_of_them_is_metered(method):
    batch = ARCHITECTURES["llama"].batch()

    def peak(layerdrop):
        config = {"hidden_size": 32, "ffn_dim": 48, "num_attention_heads": 4, "vocab_size": 40, "dropout": 0.0}
        model = transformers.OPTForCausalLM(transformers.OPTConfig(**config, num_hidden_layers=3, layerdrop=layerdrop))
        optimizer = optimizers.create(method, model.train(), **optimizers.get(method).example)
        report = meter_cycle(model, optimizer, lambda model, one: model(**one, use_cache=False).loss, lambda _: [batch])
        assert model.model.decoder.layerdrop == layerdrop
        return report["peak_allocated_bytes"]

    assert {peak(0.9) for _ in range(3)} == {peak(0.0)}


def test_s7_of_a_task_of_ones_own_the_largest_of_the_first_batches_is_taken():
    training = Training(model="x", steps=9, batch_size=1, sequence_length=8)
    (batch,) = largest_micro_batches(Uneven(), training, torch.device("cpu"))
    assert batch["input_ids"][0, 0] == 4
    assert not isinstance(Uneven(), tasks.HasLargestBatch)
