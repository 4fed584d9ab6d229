"""The levers on activations: what is planned is what is metered, and what is trained stays the same."""

from functools import partial

import gloo
import pytest
import torch
from commands import DATA
from meter_models import build, gpt2, llama, text_batch, text_loss
from plan_models import at_peak, blueprint, maxima
from test_cli import call

import optimizers
from membench.config.errors import UserError
from membench.config.options import TrainingOptions, WorkloadOptions
from membench.config.settings import resolve
from membench.planning.method import plan_method
from membench.planning.planner import method_values
from membench.planning.simulate import simulate
from membench.runs.compare import compare
from membench.training import activations, parallel
from membench.training.activations import OffloadedActivations, offloading, set_up_activations
from reports import record
from reports.parts import ACTIVATIONS


def planned_and_metered(b, method):
    """Bytes at the peak and the maxima of all parts, of fake tensors and of real ones."""
    values = method_values(b, method, {})
    made = [simulate(b, method, values, b.depth, device=d) for d in (None, "cpu")]
    return [(at_peak(one), maxima(one)) for one in made]


@pytest.mark.parametrize(("method", "dtype"), [("lora", "float32"), ("adamw", "bfloat16"), ("lomo", "float32")])
def test_a_loss_in_pieces_takes_the_bytes_that_are_planned(method, dtype, tmp_path):
    b = blueprint(tmp_path, "llama", 2, dtype=dtype, checkpointing=True, loss_chunks=8)
    planned, metered = planned_and_metered(b, method)
    assert planned == metered


def test_of_a_large_vocabulary_most_of_the_logits_are_saved(tmp_path):
    given = {"batch_size": 2, "sequence_length": 64, "checkpointing": True}
    peaks = {}
    for chunks in (1, 8):
        b = blueprint(tmp_path, "large-vocabulary", 2, **given, loss_chunks=chunks)
        planned, metered = planned_and_metered(b, "badam")
        assert planned == metered
        peaks[chunks] = metered[0][0]
    logits = 2 * 64 * 20_000 * 4
    assert peaks[1] - peaks[8] > 1.5 * logits  # without pieces: logits and their gradient at least


@pytest.mark.slow
def test_checkpointing_of_every_third_layer_is_planned_from_a_few_depths(tmp_path):
    depth = 41  # fewer layers are as quick to simulate all at once
    b = blueprint(tmp_path, "llama", depth, checkpointing=True, checkpointing_every=3)
    values = method_values(b, "badam", {})
    extended = plan_method(b, "badam", values)
    assert len(extended.depths) == 3 and sum(extended.depths) < depth
    whole = simulate(b, "badam", values, depth, device="cpu")
    assert [extended.row["peak_allocated_bytes"], *extended.row["at_peak"].values()] == at_peak(whole)


def test_the_fewer_layers_are_checkpointed_the_more_activations_are_kept(tmp_path):
    kept = []
    for given in ({}, {"checkpointing_every": 3}, {"checkpointing_every": 2}, {"checkpointing_every": 1}):
        b = blueprint(tmp_path, "llama", 6, checkpointing=bool(given), **given)
        kept.append(maxima(simulate(b, "adamw", method_values(b, "adamw", {}), 6))[1 + ACTIVATIONS])
    assert kept == sorted(kept, reverse=True) and len(set(kept)) == 4


def test_offloaded_activations_are_not_on_the_device(tmp_path):
    """With checkpointing a layer more costs its weights and gradients alone: its input waits elsewhere."""
    part, given = 1 + ACTIVATIONS, {"checkpointing": True, "loss_chunks": 4}
    growth = {}
    for offload in (False, True):
        kept = []
        for depth in (2, 3):
            b = blueprint(tmp_path, "llama", depth, **given, offload_activations=offload)
            kept.append(maxima(simulate(b, "adamw", method_values(b, "adamw", {}), depth))[part])
        growth[offload] = kept[1] - kept[0]
    assert growth == {False: 3 * 24 * 64 * 4, True: 0}


def gradients(model, loss):
    torch.manual_seed(2)
    loss(model, text_batch(0, classes=False)).backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    "options",
    [
        {"checkpointing": True, "checkpointing_every": 2},
        {"offload_activations": True},
        {"offload_activations": True, "checkpointing": True},
    ],
)
@pytest.mark.parametrize("make", [llama, gpt2])
def test_gradients_stay_the_same_to_the_last_bit(make, options):
    workload = WorkloadOptions(model="", **options)
    plain, pulled = build(make), build(make)
    set_up_activations(pulled, workload)
    loss = offloading(text_loss) if workload.offload_activations else text_loss
    expected, found = gradients(plain, text_loss), gradients(pulled, loss)
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


def test_offloading_with_a_loss_in_pieces_gives_the_same_gradients():
    plain, pulled = build(llama), build(llama)
    set_up_activations(pulled, WorkloadOptions(model="", checkpointing=True, loss_chunks=5))
    expected, found = gradients(plain, text_loss), gradients(pulled, offloading(text_loss))
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-6)


def test_weights_are_not_copied_to_the_host(monkeypatch):
    model, moved = build(llama), []
    original = activations._to_host
    monkeypatch.setattr(activations, "_to_host", lambda tensor: moved.append(tensor) or original(tensor))
    with OffloadedActivations(model):
        loss = text_loss(model, text_batch(0, classes=False))
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert len(moved) > 10 and not weights & {tensor.untyped_storage().data_ptr() for tensor in moved}
    moved.clear()
    loss.backward()
    assert not moved


def bytes_to_host(rank, *, sharded):
    model, moved = build(llama), []
    original = activations._to_host
    optimizer = parallel.place(model, "sgd", "fsdp2", optimizers.get("sgd")) if sharded else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(activations, "_to_host", lambda tensor: moved.append(tensor.nbytes) or original(tensor))
        offloading(text_loss)(model, text_batch(0, classes=False)).backward()
    assert optimizer is None or parallel.is_sharded(model)
    return sum(moved)


def test_nor_are_the_gathered_weights_of_a_sharded_model():
    alone = bytes_to_host(0, sharded=False)
    assert gloo.run(partial(bytes_to_host, sharded=True)) == [alone, alone]


def test_a_strided_tensor_comes_back_with_the_order_of_its_dimensions():
    tensor = torch.arange(24.0).view(2, 3, 4).transpose(1, 2)[:, :, :2]
    back = activations._from_host(activations._to_host(tensor))
    assert torch.equal(back, tensor) and back.stride() == (8, 1, 4)


def test_every_second_layer_is_checkpointed_from_the_first_on():
    model = build(llama)
    set_up_activations(model, WorkloadOptions(model="", checkpointing=True, checkpointing_every=2))
    assert [layer.gradient_checkpointing for layer in model.model.layers] == [True, False]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"checkpointing_every": 2}, "--checkpointing-every 2 says which layers are checkpointed: add --checkpointing"),
        ({"loss_chunks": 2}, "--loss-chunks: RobertaForSequenceClassification isn't a causal language model"),
        ({"offload_activations": True}, "--offload-activations: on a CPU they are already in host memory"),
        ({"loss_chunks": 0}, "--loss-chunks must be at least 1, not 0"),
        ({"checkpointing_every": 0}, "--checkpointing-every must be at least 1, not 0"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_runs(options, words, tmp_path):
    given = {"task": "superglue/cb", "data": DATA, "optimizers": "adamw", "device": "cpu", "out": str(tmp_path)}
    with pytest.raises(UserError, match=words):
        compare(resolve({**given, **options}))


def test_a_process_has_no_more_pieces_than_tokens_of_its_share():
    shape = {"batch_size": 4, "sequence_length": 16, "processes": 2}
    activations.check_pieces(TrainingOptions(**shape, loss_chunks=32), of_pairs=False)
    with pytest.raises(ValueError, match="--loss-chunks 33: 2 x 16 tokens have at most 32 pieces"):
        activations.check_pieces(TrainingOptions(**shape, loss_chunks=33), of_pairs=False)


@pytest.mark.parametrize(
    "given", [("plan", "--model", "llama-tiny"), ("compare", "--model", "config:llama-tiny", "--dry-run")]
)
def test_a_pair_of_answers_has_the_tokens_of_two_sequences(given):
    sizes = ("--task", "dpo", "--optimizers", "sgd", "--batch-size", "2", "--sequence-length", "128")
    code, _, said = call(*given, *sizes, "--loss-chunks", "513")
    assert code == 2 and "--loss-chunks 513: 4 x 128 tokens have at most 512 pieces" in said
    assert call(*given, *sizes, "--loss-chunks", "512")[0] == 0


def test_a_comparison_with_a_loss_in_pieces_ends_with_the_same_model_and_says_so(tmp_path, capsys):
    given = {"task": "c4", "optimizers": "adamw", "steps": 2, "batch_size": 4, "sequence_length": 32, "threads": 1}
    given |= {"quiet": True, "out": str(tmp_path), "checkpointing": True, "options": {"validation_tokens": 320}}
    assert compare(resolve(given)) == compare(resolve({**given, "loss_chunks": 4})) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "gradient checkpointing, loss in 4 pieces" in text
    runs = {run["training"]["loss_chunks"]: run for run in record.load_folder(tmp_path)}
    assert runs[1]["metrics"]["loss"] == pytest.approx(runs[4]["metrics"]["loss"], abs=1e-5)


@pytest.mark.parametrize("method", optimizers.available())
@pytest.mark.slow
def test_every_method_is_planned_with_all_levers_as_it_is_metered(method, tmp_path):
    b = blueprint(tmp_path, "llama", 4, checkpointing=True, checkpointing_every=2, loss_chunks=4)
    planned, metered = planned_and_metered(b, method)
    if method == "welore":  # its ranks depend on the weights: the plan is an upper bound
        assert planned[0][0] >= metered[0][0]
        return
    for ours, theirs in zip(planned, metered, strict=True):
        assert list(ours) == pytest.approx(list(theirs), rel=0.005)
