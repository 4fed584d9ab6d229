"""The memory meter on transformers: fake tensors take the bytes of real ones, which are those that torch allocates."""

import contextlib
import gc
import os
import subprocess
import sys
from typing import Any

import growth
import peft
import pytest
import torch
from meter_models import build, gpt2, llama, roberta, text_batch, text_loss, train
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import optimizers
from membench.memory.components import classify
from membench.memory.meter import MemoryMeter
from membench.training.metering import meter_cycle
from reports.parts import FIELDS

MODELS = [roberta, llama, gpt2]
RNG_STATE = 5056  # bytes of a CPU generator's state: checkpointing saves one a segment, in host memory


def batches(make: Any) -> list[dict[str, torch.Tensor]]:
    return [text_batch(step, classes=make is roberta) for step in range(2)]


def metered(make: Any, method: str = "adamw", *, fake: bool = False, **given: Any) -> dict[str, Any]:
    """The report on a full cycle of `method`."""
    data = batches(make)
    with FakeTensorMode() if fake else contextlib.nullcontext() as mode:
        if mode is not None:
            data = [{name: mode.from_tensor(tensor) for name, tensor in batch.items()} for batch in data]
        model = build(make, **given)
        optimizer = optimizers.create(method, model)
        return meter_cycle(model, optimizer, text_loss, lambda step: [dict(data[step % 2])])


SLOW = {"bf16checkpointing", "bf16re-entrant"}  # what is kept is the same in any dtype
LEVELS = {"plain": None, "checkpointing": False, "re-entrant": True}
KINDS = [
    pytest.param(dtype, LEVELS[level], id=f"{name}-{level}", marks=pytest.mark.slow if name + level in SLOW else ())
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
    for level in LEVELS
]


@pytest.mark.parametrize(("dtype", "checkpointing"), KINDS)
@pytest.mark.parametrize("make", MODELS)
def test_fake_tensors_take_the_bytes_of_real_ones(make, dtype, checkpointing):
    given = {"dtype": dtype, "checkpointing": checkpointing}
    assert metered(make, fake=True, **given) == metered(make, **given)


@pytest.mark.parametrize("make", MODELS)
def test_a_full_cycle_of_blocks_takes_the_same_bytes_on_fake_tensors(make):
    fake, real = metered(make, "badam", fake=True), metered(make, "badam")
    assert fake == real
    assert len(real["selections"]) == 2


def allocated_by_torch(make: Any, checkpointing: bool | None) -> int:
    """The peak, above what was there before, of what torch's profiler sees being allocated when nobody meters."""
    model = build(make, checkpointing=checkpointing)
    optimizer = optimizers.create("adamw", model)
    data = batches(make)
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        train(model, optimizer, data, text_loss)
    events = profiler.profiler.kineto_results.events()
    total = peak = 0
    for event in events:
        if event.name() == "[memory]":
            total += event.nbytes()
            peak = max(peak, total)
    return peak


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "checkpointing", "re-entrant"])
@pytest.mark.parametrize("make", MODELS)
def test_the_peak_is_what_torch_allocates_when_nobody_meters(make, checkpointing):
    report = metered(make, checkpointing=checkpointing)
    inputs = sum(tensor.nbytes for tensor in batches(make)[0].values())
    before = report["maximum"]["weights_bytes"] + inputs
    missing = allocated_by_torch(make, checkpointing) - (report["peak_allocated_bytes"] - before)
    if checkpointing is None:
        assert 0 <= missing <= 100  # a kernel's scratch memory of some bytes
    else:
        assert 0 <= missing <= 4 * RNG_STATE + 100


def test_two_runs_take_identical_bytes():
    assert metered(llama, "badam", checkpointing=False) == metered(llama, "badam", checkpointing=False)


@pytest.mark.parametrize("checkpointing", [None, False], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("method", ["adamw", "badam"])
def test_metering_changes_no_weight(method, checkpointing):
    def run(meter: bool) -> nn.Module:
        model = build(roberta, checkpointing=checkpointing)
        optimizer = optimizers.create(method, model, lr=1e-3)
        torch.manual_seed(1)
        data = batches(roberta)
        if meter:
            meter_cycle(model, optimizer, text_loss, lambda step: [data[step]], selections=1)
        else:
            train(model, optimizer, data, text_loss)
        return model

    ours, plain = run(True), run(False)
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), plain.parameters(), strict=True))


def test_nothing_that_a_step_made_waits_for_the_garbage_collector():
    """If it did, the peak would hang on when Python collects."""
    model = build(llama)
    optimizer = optimizers.create("adamw", model)
    data = batches(llama)
    with MemoryMeter(model, optimizer) as meter:
        for batch in data:
            with meter.phase("forward"):
                loss = text_loss(model, batch)
            with meter.phase("backward"):
                optimizer.backward(loss)
            del loss
            events = len(meter.trace.events)
            gc.collect()
            assert len(meter.trace.events) == events


COMPONENTS = {
    roberta: {
        "roberta.embeddings.word_embeddings": "embeddings",
        "roberta.embeddings.dropout": "embeddings",
        "roberta.embeddings.LayerNorm": "norms",
        "roberta.encoder": "other",
        "roberta.encoder.layer.0": "other",
        "roberta.encoder.layer.0.attention.self.query": "attention",
        "roberta.encoder.layer.0.attention.output.dense": "attention",
        "roberta.encoder.layer.0.attention.output.LayerNorm": "norms",
        "roberta.encoder.layer.0.intermediate.dense": "mlp",
        "roberta.encoder.layer.0.output.dense": "mlp",
        "classifier.dense": "head",
        "": "head",
    },
    llama: {
        "model.embed_tokens": "embeddings",
        "model": "other",
        "model.layers.1.self_attn.q_proj": "attention",
        "model.layers.1.mlp.act_fn": "mlp",
        "model.layers.1.input_layernorm": "norms",
        "model.norm": "norms",
        "lm_head": "head",
        "": "head",
    },
    gpt2: {
        "transformer.wte": "embeddings",
        "transformer.drop": "embeddings",
        "transformer.h.1.attn.c_attn": "attention",
        "transformer.h.1.mlp.c_fc": "mlp",
        "transformer.h.1.ln_1": "norms",
        "transformer.ln_f": "norms",
        "lm_head": "head",
    },
}


@pytest.mark.parametrize("make", MODELS)
def test_components_follow_from_classes_and_tree(make):
    found = classify(build(make))
    assert {name: found[name] for name in COMPONENTS[make]} == COMPONENTS[make]


def test_adapters_belong_to_the_component_that_they_adapt():
    model = peft.get_peft_model(build(llama), peft.LoraConfig(target_modules=["q_proj", "up_proj"]))
    found = classify(model)
    layer = "base_model.model.model.layers.0"
    assert found[f"{layer}.self_attn.q_proj.lora_A.default"] == "attention"
    assert found[f"{layer}.mlp.up_proj.lora_B.default"] == "mlp"
    assert found["base_model.model.lm_head"] == found["base_model.model"] == "head"


def test_a_model_without_blocks_has_no_components_but_those_of_its_classes():
    found = classify(nn.Sequential(nn.Embedding(3, 4), nn.Linear(4, 4), nn.LayerNorm(4)))
    assert found == {"": "other", "0": "embeddings", "1": "other", "2": "norms"}


@pytest.mark.parametrize("make", MODELS)
def test_each_component_holds_its_weights_and_twice_them_as_state(make):
    report = metered(make)
    model = build(make)
    found = classify(model)
    for component, parts in report["components"].items():
        owned = [p for name, p in model.named_parameters() if found[name.rpartition(".")[0]] == component]
        buffers = [b for name, b in model.named_buffers() if found[name.rpartition(".")[0]] == component]
        assert parts["weights_bytes"] == sum(tensor.nbytes for tensor in owned + buffers)
        assert parts["optimizer_state_bytes"] == sum(2 * p.nbytes + 4 for p in owned)


def test_what_backward_makes_belongs_to_the_module_that_it_passes_through():
    """At the end of the second layer's backward: its weight's gradient and its input's, a batch of 32 x 16."""
    model = nn.Sequential(nn.Linear(8, 16, bias=False), nn.Linear(16, 4, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), foreach=False)
    x = torch.randn(32, 8)
    report = meter_cycle(model, optimizer, lambda model, batch: model(batch["x"]).sum(), lambda step: [{"x": x}])
    hidden = 32 * 16 * 4
    nothing = dict.fromkeys(FIELDS, 0)
    assert report["modules"]["0"] == nothing | {"weights_bytes": 512, "activations_bytes": hidden}
    second = {"weights_bytes": 256, "gradients_bytes": 256, "temporaries_bytes": hidden}
    assert report["modules"]["1"] == nothing | second
    assert report["modules"]["(inputs)"]["activations_bytes"] == x.nbytes


def test_what_a_module_does_between_its_children_is_its_own_in_the_backward_pass_too():
    class Between(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 16, bias=False), nn.Linear(16, 4, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x).exp())

    model = nn.Sequential(Between())
    with MemoryMeter(model) as meter:
        with meter.phase("forward"):
            loss = model(torch.randn(32, 8)).sum()
        with meter.phase("backward"):
            loss.backward()
    trace = meter.trace
    made = [(trace.modules[i], trace.sizes[i]) for i, phase in enumerate(trace.phases) if phase == "backward"]
    hidden = 32 * 16 * 4
    assert sorted(made[1:]) == [("0", hidden), ("0.first", 512), ("0.second", 256), ("0.second", hidden)]


def test_recomputed_activations_belong_to_the_modules_that_recompute_them():
    report = metered(llama, checkpointing=False)
    computed_again = {name for name, parts in report["modules"].items() if parts["activations_bytes"] and "mlp" in name}
    # The peak is in the first layer's backward, the last that is computed again: all gradients are there by then.
    assert computed_again and all(name.startswith("model.layers.0.mlp") for name in computed_again)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("method", ["adamw", "sgd", "badam"])
def test_a_real_process_grows_by_the_metered_peak(method):
    """Eight layers of 134 million weights, 537 MB in fp32: resident memory against the meter on fake tensors."""
    command = [sys.executable, growth.__file__, method]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1048576"}
    grown = int(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)
    with FakeTensorMode():
        model = growth.build_model()
        optimizer = optimizers.create(method, model)
        batch = {"input": torch.empty(growth.ROWS, growth.WIDTH)}
        report = meter_cycle(model, optimizer, growth.loss, lambda step: [batch], selections=1)
    assert report["maximum"]["weights_bytes"] >= 500e6
    assert grown == pytest.approx(report["peak_allocated_bytes"], rel=0.15)
