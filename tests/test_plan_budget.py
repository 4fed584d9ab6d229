"""What fits into a budget: searches end at the last that fits, and curves pass through what a plan of its own takes."""

import json
import random
from dataclasses import replace

import pytest
from plan_models import blueprint

from membench.config.units import parse_bytes
from membench.memory.allocator import CUDA_CONTEXT_BYTES
from membench.memory.breakdown import levels
from membench.planning import budget, planner
from membench.planning.blueprint import Blueprint
from membench.planning.budget import (
    built_in_models,
    find_limits,
    largest,
    settle,
    walk,
)
from membench.planning.extrapolate import NotAlikeError
from membench.planning.growth import Growth
from membench.planning.method import plan_method
from membench.planning.planner import method_values
from membench.planning.simulate import TooLargeError, simulate
from membench.planning.workload import Workload
from reports import plans

DEPTH = 7


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 7, 8, 9, 1000])
def test_the_search_ends_at_the_last_that_fits(limit):
    assert largest(lambda x: x <= limit, 500) == min(limit, 500)


@pytest.mark.parametrize("fitting", range(6))
def test_the_walk_finds_the_largest_from_any_start(fitting):
    expected = "abcde"[fitting - 1] if fitting else None
    for start in range(6):
        assert walk("abcde", start, lambda name: "abcde".index(name) < fitting) == expected


@pytest.mark.parametrize("start", [0, 1, 7, 8, 9, 30])
@pytest.mark.parametrize("fitting", [set(), {1}, set(range(1, 9)), set(range(1, 31)), {1, 2, 3, 4, 8, 9, 20, 21}])
def test_where_what_fits_has_gaps_the_search_still_ends_before_one_that_doesnt(start, fitting):
    found = settle(lambda x: x in fitting, start, 30)
    assert (found in fitting and (found == 30 or found + 1 not in fitting)) or (found == 0 and 1 not in fitting)


@pytest.mark.parametrize("most", [24, 25, 36, 40, 72, 512])
@pytest.mark.parametrize("length", [3, 10, 24])
def test_a_sequence_is_learned_from_three_lengths_that_the_model_has_positions_for(length, most):
    lengths = budget.learning_lengths(length, most)
    assert len(set(lengths)) == 3 and length in lengths and min(lengths) > 0 and max(lengths) <= most


def test_sizes_below_zero_tell_that_a_polynomial_has_too_few_points(tmp_path):
    b = blueprint(tmp_path, "llama", 3, attention="eager")
    values = method_values(b, "sgd", {})
    plan = plan_method(b, "sgd", values)
    attention_is_quadratic = Growth(plan, b, values, "sequence_length", (24, 48))
    with pytest.raises(NotAlikeError, match=r"\(24, 48\)"):
        attention_is_quadratic.peak_bytes(2)


QUICK = [("roberta", "sgd", {}), ("llama", "lomo", {})]  # the second makes something between its two backward passes
SLOW = [
    ("llama", "badam", {"checkpointing": True}),
    ("llama", "blockllm", {}),
    ("llama", "lisa", {"attention": "eager"}),
    ("gemma", "lora", {}),
    ("gpt2", "lomo", {}),
    ("llama", "mezo", {}),
]


@pytest.mark.parametrize(
    ("name", "method", "given"), [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]
)
def test_what_grows_by_polynomials_is_what_a_plan_of_its_own_takes_to_the_byte(name, method, given, tmp_path):
    b = blueprint(tmp_path, name, 12 if name == "gemma" else DEPTH, **given)
    values = method_values(b, method, {})
    plan = plan_method(b, method, values)
    draw = random.Random(f"{name} {method}")
    for option, points, most in (("micro_batch_size", (3, 6), 40), ("sequence_length", (24, 48, 72), 128)):
        growth = Growth(plan, b, values, option, points)
        for at in draw.sample(range(2, most), 2 if (name, method, given) in QUICK else 6):
            seen = plan_method(b.with_size(option, at), method, values)
            assert growth.peak_bytes(at) == seen.row["peak_allocated_bytes"]
            assert growth.surplus_bytes(at) == seen.surplus_bytes


@pytest.mark.slow
def test_limits_are_the_last_that_fit_and_never_beyond_the_models_positions(tmp_path, monkeypatch):
    monkeypatch.setattr(budget, "built_in_models", lambda causal: {"llama-60m": 58_000_000})
    b = blueprint(tmp_path, "llama", DEPTH)
    values = method_values(b, "sgd", {})
    plan = plan_method(b, "sgd", values)
    size = plan.total_bytes + 60 * 2**20
    limits = find_limits(plan, b, values, size)
    assert limits.model is None  # its weights alone are more than is left
    assert limits.batch > 3 and 24 < limits.sequence <= b.longest_sequence
    for name, limit in (("batch_size", limits.batch), ("sequence_length", limits.sequence)):
        here, beyond = (plan_method(b.with_workload(**{name: n}), "sgd", values) for n in (limit, limit + 1))
        assert here.fits_in(size) and not beyond.fits_in(size)
    roomy = find_limits(plan, b, values, 10 * size)
    assert roomy.sequence == b.longest_sequence == 512 and roomy.model == "llama-60m"


def test_a_card_fits_tightly_that_holds_the_peak_but_not_all_that_the_allocator_would_keep(tmp_path):
    b = blueprint(tmp_path, "large-vocabulary", 2, sequence_length=200, batch_size=8)
    made = plan_method(b, "adamw", method_values(b, "adamw", {}))
    peak, total = made.row["peak_allocated_bytes"] + CUDA_CONTEXT_BYTES, made.total_bytes
    tight = [size for size in range(peak, total, 2**20) if made.fits_in(size)]
    assert tight and made.fits_in(total) and not made.fits_in(peak - 1)
    document = planner.plan(b.workload, ["adamw"], {}, budget_bytes=tight[0])
    (row,) = document["rows"]
    assert row["fits"] and row["left_bytes"] < 0 and row["advice"] is None
    assert "yes, tightly" in plans.render(document, "table") and plans.verdict(document) == []


def test_a_model_whose_weights_would_not_fit_does_in_4_bits(tmp_path, monkeypatch):
    monkeypatch.setattr(budget, "built_in_models", lambda causal: {"llama-60m": 58_000_000, "llama-130m": 134_000_000})
    b = blueprint(tmp_path, "llama", 4)
    values = method_values(b, "qlora", {})
    larger = Blueprint(replace(b.workload, model="llama-130m"))
    size = plan_method(larger, "qlora", values).total_bytes
    assert size - CUDA_CONTEXT_BYTES < larger.parameters * 4
    assert find_limits(plan_method(b, "qlora", values), b, values, size).model == "llama-130m"


DISTILBERT = {"model_type": "distilbert", "dim": 64, "n_heads": 4, "hidden_dim": 128, "n_layers": 2, "vocab_size": 300}


@pytest.mark.parametrize(
    ("method", "given", "largest"),
    [
        ("badam", {}, "roberta-tiny"),
        ("badam", {"always_train": ("distilbert.embeddings.LayerNorm",)}, None),
        ("lora", {"targets": "q_lin"}, None),
    ],
)
def test_other_models_have_heads_of_their_own_and_those_that_a_method_refuses_do_not_fit(
    method, given, largest, tmp_path, monkeypatch
):
    monkeypatch.setattr(budget, "built_in_models", lambda causal: {"roberta-tiny": 2_000_000})
    (tmp_path / "config.json").write_text(json.dumps(DISTILBERT))
    b = Blueprint(Workload(str(tmp_path), 2, 16))
    assert b.head == ("pre_classifier", "classifier")
    values = method_values(b, method, {method: given})
    limits = find_limits(plan_method(b, method, values), b, values, 2**30)
    assert limits.model == largest and limits.batch > 2


def test_nothing_fits_where_the_weights_alone_are_too_large(tmp_path):
    b = blueprint(tmp_path, "llama", DEPTH)
    values = method_values(b, "adamw", {})
    limits = find_limits(plan_method(b, "adamw", values), b, values, CUDA_CONTEXT_BYTES + 1000)
    assert (limits.batch, limits.sequence, limits.model) == (0, 0, None)


def test_parameters_are_counted_without_values():
    assert Blueprint(Workload("llama2-70b")).parameters == 68_976_648_192
    assert Blueprint(Workload("gemma2-9b")).parameters == 9_241_705_984
    names = built_in_models(True)
    assert list(names.values()) == sorted(names.values())
    assert "roberta-base" not in names and list(names)[-1] == "llama3-70b"


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GiB", 24 * 2**30), ("24GB", 24 * 10**9), ("1.5 gib", 3 * 2**29), ("80000MB", 8 * 10**10), ("123", 123)],
)
def test_sizes_are_read(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["24GX", "GiB", "-1GB", "0GB", "1e3GB", "24 GiB of it"])
def test_what_is_no_size_is_refused_with_its_text(text):
    with pytest.raises(ValueError, match=text):
        parse_bytes(text)


def test_a_simulation_ends_early_only_if_its_peak_is_too_large(tmp_path):
    b = blueprint(tmp_path, "llama", 2)
    values = method_values(b, "adamw", {})
    whole = simulate(b, "adamw", values, 2)
    first_step = simulate(b, "adamw", values, 2, steps=1)
    peak, early = (int(levels(one.trace).sum(1).max()) for one in (whole, first_step))
    assert simulate(b, "adamw", values, 2, most_bytes=peak).trace == whole.trace
    with pytest.raises(TooLargeError):
        simulate(b, "adamw", values, 2, most_bytes=early - 1)
