"""The advice below a plan: every option that it names really makes the method fit."""

import pytest
from plan_models import blueprint, folder

from membench.memory.allocator import CUDA_CONTEXT_BYTES
from membench.planning import advice, cards
from membench.planning import budget as budgets
from membench.planning.advice import advise
from membench.planning.blueprint import Blueprint
from membench.planning.budget import find_limits
from membench.planning.method import plan_method
from membench.planning.planner import method_values, plan
from membench.planning.workload import Workload
from reports import plans


@pytest.fixture(autouse=True)
def no_other_models(monkeypatch):
    monkeypatch.setattr(budgets, "built_in_models", lambda causal: {})  # to plan them takes long


MODELS = ["large-vocabulary", "gpt2", "llama"]
METHODS = ["sgd", "lisa"]


@pytest.mark.parametrize("model", [MODELS[0], *(pytest.param(name, marks=pytest.mark.slow) for name in MODELS[1:])])
def test_every_option_that_the_advice_names_makes_the_method_fit(model, tmp_path):
    b = blueprint(tmp_path, model, 2, batch_size=4, sequence_length=64)
    named = 0
    for method in METHODS:
        values = method_values(b, method, {})
        made = plan_method(b, method, values)
        total = made.total_bytes
        for budget in (total - 2**20, total - made.row["peak_allocated_bytes"] // 4, total // 2):
            found = advise(made, b, values, budget)
            if found is None:
                continue
            named += 1
            other = b.with_workload(**found.workload) if found.workload else b
            again = plan_method(other, method, {**values, **found.values}).total_bytes
            assert again == found.estimated_total_bytes <= budget and found.left_bytes == budget - again
            assert found.options
            if method == "sgd" and budget == total - 2**20 and model == "large-vocabulary":
                assert found.options == ["--loss-chunks 8"]  # the cheapest is enough
    assert named >= 3


def test_where_weights_are_what_is_too_much_those_in_8_bits_are_advised(tmp_path):
    wide = folder(tmp_path, "llama", 1, hidden_size=1024, intermediate_size=4096)
    b = Blueprint(Workload(wide, 1, 8, checkpointing=True, loss_chunks=8))
    values = method_values(b, "galore", {"galore": {"in_backward": True, "states": "8bit", "rank": 4}})
    made = plan_method(b, "galore", values)
    found = advise(made, b, values, made.total_bytes - 2**22)
    assert found is not None and found.values == {"weights": "8bit"}
    assert found.without == ["the weights of the layers' linear modules are rounded to 8 bits"]


def test_an_option_that_a_method_refuses_is_left_out_of_several_that_help_together(tmp_path):
    b = blueprint(tmp_path, "large-vocabulary", 2, batch_size=4, sequence_length=256)
    values = method_values(b, "lomo", {})  # updates inside the backward pass: it can't accumulate
    ways = [{"loss_chunks": 8}, {"checkpointing": True}, {"loss_chunks": 8, "checkpointing": True}]
    totals = [plan_method(b.with_workload(**way), "lomo", values).total_bytes for way in ways]
    assert totals[2] < min(totals[:2])
    found = advise(plan_method(b, "lomo", values), b, values, totals[2])
    assert found is not None and "gradient_accumulation_steps" not in found.workload and len(found.options) > 1


def test_where_options_exclude_each_other_either_may_be_what_makes_the_method_fit(tmp_path, monkeypatch):
    """Updates inside the backward pass leave no gradients, but activations are what is too much here."""
    monkeypatch.setattr(advice, "LEVERS", advice.LEVERS[:3])
    b = blueprint(tmp_path, "large-vocabulary", 2, batch_size=8, sequence_length=200)
    values = method_values(b, "sgd", {})
    split = b.with_workload(loss_chunks=8, gradient_accumulation_steps=8)
    budget = plan_method(split, "sgd", values).total_bytes
    found = advise(plan_method(b, "sgd", values), b, values, budget)
    assert found.options == ["--loss-chunks 8", "--gradient-accumulation-steps 8"]


@pytest.mark.parametrize("gpus", [1, 64])  # whose buffers are most of what each of many has
def test_an_option_that_values_leave_out_at_its_default_is_advised_and_lessens_what_gpus_gather(gpus, tmp_path):
    model = folder(tmp_path, "llama", 3, hidden_size=512, intermediate_size=2048)
    b = Blueprint(Workload(model, 1, 8, "float32", gpus=gpus, device="cpu"))
    values = method_values(b, "lora", {})
    assert "base" not in values  # as in the ids of runs
    budget = plan_method(b, "lora", {**values, "base": "nf4"}).total_bytes
    assert advise(plan_method(b, "lora", values), b, values, budget).options == ["--set lora.base=nf4"]


def test_what_makes_a_method_fit_tightly_is_said_where_nothing_else_does(tmp_path, monkeypatch):
    monkeypatch.setattr(advice, "LEVERS", advice.LEVERS[:1])
    b = blueprint(tmp_path, "large-vocabulary", 2, batch_size=8, sequence_length=200)
    values = method_values(b, "adamw", {})
    chunked = plan_method(b.with_workload(loss_chunks=8), "adamw", values)
    least = chunked.row["peak_allocated_bytes"] + CUDA_CONTEXT_BYTES
    budget = next(size for size in range(least, chunked.total_bytes, 2**20) if chunked.fits_in(size))
    document = plan(b.workload, ["adamw"], {}, budget_bytes=budget)
    assert document["rows"][0]["advice"]["left_bytes"] == budget - chunked.total_bytes < 0
    said = plans.render(document, "table")
    assert "adamw would fit with --loss-chunks 8 (tightly)." in said and "tightly: only since" in said


def test_the_advice_says_what_to_use_what_would_fit_with_which_option_and_what_nothing_helps():
    def row(method, left, advice=None, chunked=None):
        limits = {"batch": 3, "in_chunks": chunked}
        return {"method": method, "fits": left > 0, "left_bytes": left, "limits": limits, "advice": advice}

    options = {"options": ["--set galore.in_backward=true"], "without": ["no accumulation"], "left_bytes": 2**30}
    chunked = {"loss_chunks": 8, "batch": 7}
    rows = [row("badam", 2**30, chunked=chunked), row("galore", -(2**30), options), row("lora", 2**31)]
    document = {"budget_bytes": 24 * 2**30, "context_bytes": 2**29, "setup": {"gpus": 1, "strategy": "fsdp2"}}
    assert plans.advice({**document, "rows": [*rows, row("adamw", -(2**33))]}) == [
        "On 24.00 GiB use lora (2.00 GiB left, batch 3), badam (1.00 GiB left, batch 3, 7 with --loss-chunks 8).",
        "galore would fit with --set galore.in_backward=true (1.00 GiB left; no accumulation).",
        "No option tried makes these fit: adamw (8.00 GiB missing).",
    ]
    assert plans.advice({**document, "rows": [row("mezo", 2**28)]}) == [
        "On 24.00 GiB use mezo (0.25 GiB left, batch 3).",
        "Where less than 0.50 GiB is left, count on running out: kernels and the context may take more.",
    ]
    assert plans.advice({"budget_bytes": None, "rows": rows}) == []


def test_a_few_sequences_are_more_in_loss_chunks_and_both_are_planned(tmp_path):
    b = blueprint(tmp_path, "large-vocabulary", 2, batch_size=1)
    values = method_values(b, "badam", {})
    budget = plan_method(b.with_workload(batch_size=3), "badam", values).total_bytes
    limits = find_limits(plan_method(b, "badam", values), b, values, budget)
    assert 3 <= limits.batch < limits.in_chunks["batch"]
    chunked = b.with_workload(loss_chunks=limits.in_chunks["loss_chunks"])
    totals = [
        plan_method(chunked.with_workload(batch_size=limits.in_chunks["batch"] + more), "badam", values).total_bytes
        for more in (0, 1)
    ]
    assert totals[0] <= budget < totals[1]


def test_micro_batches_are_planned_and_must_be_equal(tmp_path):
    b = blueprint(tmp_path, "large-vocabulary", 2, batch_size=4)
    whole, split = (
        plan(Workload(b.workload.model, 4, 24, "float32", gradient_accumulation_steps=parts), ["sgd"], {})["rows"][0]
        for parts in (1, 4)
    )
    assert split["at_peak"]["activations_bytes"] < whole["at_peak"]["activations_bytes"] / 2
    with pytest.raises(ValueError, match="--batch-size 4 can't be split into 3 equal micro-batches"):
        plan(Workload(b.workload.model, 4, 24, gradient_accumulation_steps=3), ["sgd"], {})


def test_a_sequence_beyond_the_models_positions_is_refused(tmp_path):
    b = blueprint(tmp_path, "llama", 2)
    with pytest.raises(ValueError, match="--sequence-length 513 is more than the 512 positions"):
        plan(Workload(b.workload.model, 1, 513), ["sgd"], {})


@pytest.mark.parametrize("text", ["rtx4090", "RTX 4090", "NVIDIA GeForce RTX 4090"])
def test_a_card_is_known_by_its_name_however_it_is_written(text):
    assert cards.budget_bytes(text) == int(23.64 * 2**30)


def test_cards_are_in_order_of_memory_have_a_source_and_hold_less_than_their_name_says():
    sizes = [card.usable_bytes for card in cards.CARDS]
    assert sizes == sorted(sizes) and all(" in " in card.source for card in cards.CARDS)
    known = {card.name: card.usable_bytes for card in cards.CARDS}
    for name, size in (("a100-40g", 40), ("a100-80g", 80), ("h100", 80), ("rtx3090", 24), ("t4", 16)):
        assert size * 10**9 * 0.95 < known[name] < size * 2**30
    assert cards.smallest(known["a100-80g"] + 1, "bfloat16") == "h100" and cards.smallest(2**40, "float32") is None
    # of Turing, whose tensor cores don't multiply bf16
    assert [cards.smallest(12 * 2**30, dtype) for dtype in ("float32", "bfloat16")] == ["t4", "a10"]


def test_an_unknown_card_is_refused_with_the_nearest_name():
    with pytest.raises(ValueError, match="a100: no card is called so. Did you mean 'a100-40g'"):  # not 'a10'
        cards.budget_bytes("a100")
    with pytest.raises(ValueError, match="rtx4091: no card is called so. Did you mean 'rtx4090'"):
        cards.budget_bytes("rtx4091")
