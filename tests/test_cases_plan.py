"""Cases from people who plan: counts, limits, worst draws, and models whose operations depend on values."""

import itertools
import json

import pytest
import torch
import transformers
from plan_models import at_peak, blueprint, folder, maxima
from test_cli import call
from torch._subclasses.fake_tensor import FakeTensorMode

import optimizers
from membench.commands.plan import PlanOptions, answer
from membench.config.errors import UserError
from membench.planning import planner
from membench.planning.blueprint import Blueprint
from membench.planning.budget import largest_batch
from membench.planning.formulas import facts, formula
from membench.planning.layers import ends
from membench.planning.method import plan_method
from membench.planning.planner import method_values, plan
from membench.planning.simulate import simulate
from membench.planning.workload import LOSSES, Workload
from membench.training.metering import meter_cycle
from reports import plans

# S1: what is planned counts weights


ERNIE = {"model_type": "ernie4_5_moe", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48}
ERNIE |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "moe_intermediate_size": 16}
ERNIE |= {"moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 0, "pad_token_id": 0}


@pytest.mark.parametrize("saved", ["float32", "bfloat16"])
@pytest.mark.parametrize("asked", ["float32", "bfloat16"])
def test_s1_weights_are_in_the_dtype_that_is_asked_for_whatever_the_checkpoint_has(saved, asked, tmp_path):
    config = transformers.AutoConfig.for_model(**ERNIE, dtype=saved)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == saved
    # its routers stay in fp32
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=getattr(torch, asked))
    expected = {name: tensor.dtype for name, tensor in (*loaded.named_parameters(), *loaded.named_buffers())}
    with FakeTensorMode():
        model = Blueprint(Workload(str(tmp_path), 2, 8, asked)).build(2)
    assert {name: tensor.dtype for name, tensor in (*model.named_parameters(), *model.named_buffers())} == expected
    assert len(set(expected.values())) == (1 if asked == "float32" else 2)
    b = Blueprint(Workload(str(tmp_path), 2, 8, asked))
    row = plan_method(b, "sgd", method_values(b, "sgd", {})).row
    held = sum(tensor.nbytes for tensor in (*loaded.parameters(), *loaded.buffers()))
    assert row["maximum"]["weights_bytes"] == held


@pytest.mark.parametrize(("name", "weights"), [("deepseek-v3", 671_026_404_352), ("jamba-v0.1", 51_570_323_328)])
def test_s1_weights_are_counted_not_extrapolated(name, weights, shared_data):
    assert Blueprint(Workload(str(shared_data / "configs" / name))).parameters == weights


def test_s1_the_ends_of_every_kind_of_layer_are_simulated():
    kinds = dict(zip("abcdefg", (0, 0, 0, 1, 1, 1, 1), strict=True))  # as DeepSeek V3's: dense layers, then experts
    assert ends(kinds) == {"a", "c", "d", "g"}


def test_s1_layers_that_differ_without_a_list_are_counted_and_planned_as_they_are(tmp_path):
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 1}
    latent = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
    given = {"model_type": "deepseek_v3", "first_k_dense_replace": 5, "topk_group": 1, "num_key_value_heads": 4}
    b = Blueprint(Workload(folder(tmp_path, "llama", 9, **experts, **latent, **given), 1, 8))
    assert b.depths == (9,)  # 7, 8 and 9 would do; 3, 4 and 5 are all dense
    row = plan_method(b, "sgd", method_values(b, "sgd", {})).row
    assert row["trained_weights"] == b.parameters


# N1: a limit holds

PAIRS = [("roberta", "lora"), ("gemma", "sgd")]
SLOW = [("llama", "badam"), ("gpt2", "lisa"), *itertools.product(["llama", "gpt2"], ["adamw", "lomo", "galore", "hft"])]
CASES = [*PAIRS, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in SLOW)]


@pytest.mark.parametrize(("name", "method"), CASES)
def test_n1_the_largest_batch_fits_and_one_more_does_not(name, method, tmp_path):
    b = blueprint(tmp_path, name, 2, checkpointing=True)
    values = method_values(b, method, {})
    batch = largest_batch(plan_method(b, method, values), b, values, 2**30)
    here, beyond = (plan_method(b.with_workload(batch_size=n), method, values) for n in (batch, batch + 1))
    assert here.fits_in(2**30) and not beyond.fits_in(2**30)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "method"), [("llama3.2-1b", "lisa"), ("llama3.2-1b", "badam"), ("gpt2", "adamw")])
def test_n1_the_limits_of_real_models_hold(model, method):
    b = Blueprint(Workload(model, checkpointing=True))
    values, budget = method_values(b, method, {}), 24 * 2**30
    batch = largest_batch(plan_method(b, method, values), b, values, budget)
    here, beyond = (plan_method(b.with_workload(batch_size=n), method, values) for n in (batch, batch + 1))
    assert here.fits_in(budget) and not beyond.fits_in(budget)


# N3: the worst draw is the worst


def peak(b: Blueprint, method: str, values: dict, chosen: list[int]) -> int:
    """Of one draw, metered."""
    with FakeTensorMode():
        model = b.build(b.depth)
        optimizer = optimizers.create(method, model, **values)
        optimizer._draws.take(chosen)
        optimizer._select()
        optimizer.__class__ = type(method, (type(optimizer),), {"worst_cases": 1, "worst_case": lambda self: None})
        report = meter_cycle(model, optimizer, LOSSES["model"], lambda step: [b.batch()], selections=1)
    return report["peak_allocated_bytes"]


@pytest.mark.parametrize("name", [pytest.param("gpt2", marks=pytest.mark.slow), "llama"])
def test_n3_no_draw_of_lisa_needs_more_than_is_planned(name, tmp_path):
    b = blueprint(tmp_path, name, 3, checkpointing=True)
    values = method_values(b, "lisa", {})
    planned = plan_method(b, "lisa", values).row["peak_allocated_bytes"]
    assert planned == max(peak(b, "lisa", values, [*pair]) for pair in itertools.combinations(range(3), 2))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_n3_no_draw_of_hft_needs_half_a_percent_more_than_is_planned(name, tmp_path):
    b = blueprint(tmp_path, name, 3, checkpointing=True)
    values = method_values(b, "hft", {}) | {"switch_every": 5}
    planned = plan_method(b, "hft", values).row["peak_allocated_bytes"]
    with FakeTensorMode():
        drawn = optimizers.create("hft", b.build(b.depth), **values)._draw
    assert planned >= 0.995 * max(peak(b, "hft", values, drawn(number)) for number in range(12))


# W1: what fails while planning


def test_w1_one_method_that_fails_is_refused_and_the_other_rows_go_on(tmp_path, monkeypatch):
    def fails(blueprint, method, values):
        if method == "sgd":
            raise KeyError("surprise")
        return plan_method(blueprint, method, values)

    monkeypatch.setattr(planner, "plan_method", fails)
    document = plan(Workload(folder(tmp_path, "llama", 3), 1, 8), ["sgd", "lomo"], {})
    assert [row["method"] for row in document["rows"]] == ["lomo"]
    assert "KeyError" in document["refused"]["sgd"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deberta-v3-base", "modernbert-base", "bart-base"])
def test_w1_encoders_whose_operations_depend_on_values_are_planned(name, shared_data):
    document = plan(Workload(str(shared_data / "configs" / name), 2, 16, "float32"), ["badam", "lora"], {})
    assert not document["refused"] and len(document["rows"]) == 2


BART = {"model_type": "bart", "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "vocab_size": 99}
HEADS = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
DEBERTA = {"model_type": "deberta-v2", "relative_attention": True, "position_buckets": 8, "pos_att_type": "p2c|c2p"}
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 99}


T5 = {"model_type": "t5", "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 99}
ENDS_OF_TEXTS = [{**BART, **HEADS}, {**DEBERTA, **SMALL}, {**T5, "eos_token_id": 1, "decoder_start_token_id": 0}]


@pytest.mark.parametrize("values", ENDS_OF_TEXTS, ids=["bart", "deberta", "t5"])
def test_w1_where_values_are_needed_real_steps_are_metered(values, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(values))
    row = plan(Workload(str(tmp_path), 2, 8, "float32"), ["sgd"], {})["rows"][0]
    assert row["maximum"]["gradients_bytes"] == row["maximum"]["weights_bytes"] > 0 or row["trained_weights"]
    assert row["kernels"] == "cpu"


def test_w1_where_values_are_needed_a_budget_says_what_fits_and_not_how_much_more(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**BART, **HEADS}))
    workload = Workload(str(tmp_path), 2, 8, "float32")
    document = plan(workload, ["sgd", "adamw"], {}, budget_bytes=2**30)
    assert [(row["fits"], row["limits"]) for row in document["rows"]] == [(True, None)] * 2
    said = plans.render(document, "table")
    assert "use sgd (0.50 GiB left)" in said and "What fits into" not in said and "aren't looked for there" in said
    (row,) = plan(workload, ["sgd"], {}, budget_bytes=2**29 + 1)["rows"]
    assert not row["fits"] and row["advice"] is None


def test_w1_a_model_whose_layers_are_counted_elsewhere_is_planned_as_it_is(tmp_path):
    shape = {"d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 48, "vocab_size": 99}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "funnel", "block_sizes": [3, 3], **shape}))
    b = Blueprint(Workload(str(tmp_path), 2, 8, "float32"))
    assert b.depths == (6,) and plan_method(b, "sgd", method_values(b, "sgd", {})).row["trained_weights"]


OLMOE = {"model_type": "olmoe", "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2, **SMALL}


@pytest.mark.parametrize("method", ["adamw", "muon", "sinkgd", "galore", "fira", "apollo"])
def test_w1_experts_in_float32_are_planned_without_values(method, tmp_path, capfd):
    (tmp_path / "config.json").write_text(json.dumps(OLMOE))
    b = Blueprint(Workload(str(tmp_path), 2, 8, "float32", device="cpu"))
    values = method_values(b, method, {})
    planned, metered = (simulate(b, method, values, b.depth, device=d) for d in (None, "cpu"))
    assert at_peak(planned) == at_peak(metered)
    assert not capfd.readouterr().err


def test_w1_what_is_metered_beside_a_plan_has_the_same_weights_each_time(tmp_path):
    """With some, an expert gets no tokens, and Fira one matrix more at its peak."""
    (tmp_path / "config.json").write_text(json.dumps(OLMOE))
    b = Blueprint(Workload(str(tmp_path), 1, 4, "float32", device="cpu"))
    peaks = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        peaks.append(at_peak(simulate(b, "fira", method_values(b, "fira", {}), b.depth, device="cpu")))
        drawn = torch.rand(1)
        assert torch.equal(drawn, torch.rand(1, generator=torch.Generator().manual_seed(seed)))
    assert peaks[0] == peaks[1]


CONVBERT = {"model_type": "convbert", "embedding_size": 32, "head_ratio": 2, "conv_kernel_size": 3, **SMALL}
PHI3 = {"model_type": "phi3", "num_key_value_heads": 2, "pad_token_id": 0, **SMALL}


@pytest.mark.parametrize(("method", "dtype", "given"), [
    ("sgd", "float32", CONVBERT),  # the backward pass of `unfold` leaves a small tensor in the memory of a larger one
    ("qlora", "bfloat16", PHI3),  # the tables of NF4's values aren't the step's
], ids=["convbert", "phi3"])  # fmt: skip
def test_w1_temporaries_are_planned_to_the_byte(method, dtype, given, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(given))
    b = Blueprint(Workload(str(tmp_path), 2, 8, dtype, device="cpu"))
    values = method_values(b, method, {})
    planned, metered = (simulate(b, method, values, b.depth, device=d) for d in (None, "cpu"))
    assert maxima(planned) == maxima(metered) and at_peak(planned) == at_peak(metered)


def test_w1_a_model_without_a_number_of_positions_has_no_longest_sequence_of_its_own(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "bloom", "n_layer": 2, "hidden_size": 32, "n_head": 2})
    )
    assert Blueprint(Workload(str(tmp_path))).longest_sequence is None


# W9 and T: one sentence


def test_of_a_rank_above_the_shorter_side_galores_formula_counts_what_there_is():
    known = facts(Blueprint(Workload("llama-60m")), 58_073_600)
    largest = max(min(shape) for shape in known.matrices)
    assert formula("galore", known, {"rank": 4096}) == formula("galore", known, {"rank": largest})


def test_the_heading_of_a_plan_says_in_how_many_micro_batches():
    given = ("--batch-size", "8", "--sequence-length", "16", "--optimizers", "sgd", "--model", "llama-tiny")
    assert "8 x 16 tokens in 4 micro-batches," in call("plan", *given, "--gradient-accumulation-steps", "4")[1]
    assert "micro-batches" not in call("plan", *given)[1]


def test_w9_a_budget_of_bytes_is_taken_for_a_forgotten_unit():
    with pytest.raises(UserError, match="--budget 24 is only 24 bytes: give a unit, such as 24GiB"):
        answer(PlanOptions(model="gpt2", budget="24"))


def test_w9_a_sequence_beyond_learned_positions_is_refused():
    with pytest.raises(UserError, match="4096 is too long for gpt2, which has 1024 positions"):
        answer(PlanOptions(model="gpt2", sequence_length=4096, optimizers=("sgd",)))


@pytest.mark.parametrize("name", ["lama3-8b", "llama-3-8b", "gemma-2b", "roberta-bse"])
def test_w9_a_misspelt_model_is_not_looked_for_on_the_hub(name):
    with pytest.raises(UserError, match="Did you mean 'config:"):
        answer(PlanOptions(model=name, optimizers=("sgd",)))


def test_w9_an_attention_that_a_model_lacks_is_refused_with_the_option(tmp_path):
    values = {"model_type": "bloom", "n_layer": 1, "n_head": 2, "vocab_size": 9}
    (tmp_path / "config.json").write_text(json.dumps(values))
    given = {"model": str(tmp_path), "sequence_length": 8, "optimizers": ("sgd",)}
    with pytest.raises(UserError, match=r"^--attention sdpa: transformers has .* \(bloom\): leave it out$"):
        answer(PlanOptions(**given, attention="sdpa"))
    answer(PlanOptions(**given, attention="eager"))


WRONG = [{"num_attention_heads": heads} for heads in (0, -1, 3, None, "two")]
WRONG += [{"num_hidden_layers": -1}, {"num_hidden_layers": None}, {"hidden_size": "x"}, {"vocab_size": -5}]


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_t_a_wrong_configuration_is_refused_in_a_sentence(wrong, tmp_path):
    values = {"model_type": "llama", **SMALL, **wrong}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match="."):
        answer(PlanOptions(model=str(tmp_path), sequence_length=8, optimizers=("sgd",)))


@pytest.mark.parametrize("kind", ["vit", "clip_text_model", "longt5"])
def test_w1_a_model_of_another_kind_than_is_planned_is_refused_as_in_training(kind, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    words = f"\\({kind}\\) can't be built with AutoModelForCausalLM, .*: give a causal language model such as"
    with pytest.raises(UserError, match=words):
        answer(PlanOptions(model=str(tmp_path), sequence_length=8, optimizers=("sgd",)))


def test_t_nesting_without_end_is_refused_in_a_sentence(tmp_path):
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="."):
        answer(PlanOptions(model=str(tmp_path), optimizers=("sgd",)))
