"""A plan from a few depths is, event by event, what the full depth does."""

import dataclasses
from typing import Any

import pytest
from plan_models import MODELS, blueprint

import optimizers
from membench.memory.breakdown import find_peaks, summarize
from membench.memory.meter import MemoryMeter
from membench.planning import method as planning
from membench.planning import passes
from membench.planning.blueprint import Blueprint
from membench.planning.deepen import deepen, tells
from membench.planning.extrapolate import NotAlikeError, weights
from membench.planning.layers import simulated_depths
from membench.planning.method import least_peak, plan_method
from membench.planning.planner import method_values
from membench.planning.simulate import simulate
from membench.planning.workload import loss_function

DEPTH = 12
UNALIKE = {"hft", "blockllm"}  # a draw of parts, or a budget in weights: no two depths choose alike
OTHERS = sorted(set(optimizers.available()) - {"adamw", "lisa"})
WHOLE = [name for name in optimizers.available() if name not in UNALIKE]


def at_full_depth(b: Blueprint, method: str, values: dict[str, Any]) -> planning.Plan:
    """The plan from a simulation of the model's own depth."""
    whole = simulate(b, method, values, b.depth)
    return planning._plan(method, whole, [whole], "cpu", 0)


QUICK = [("gpt2", "adamw", False), ("llama", "lisa", True)]
ALL = [(name, method, checkpointing) for name in MODELS for method in WHOLE for checkpointing in (False, True)]
CASES = [pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow) for case in ALL]
DEEPER = {"badam": 28, "lisa": 30}  # where selections are, the first layers alike lie further in


@pytest.mark.parametrize(("name", "method", "checkpointing"), CASES)
def test_a_few_depths_tell_each_event_of_the_models_own(name, method, checkpointing, tmp_path):
    """Hence the peak, its parts and modules, what is reserved, and which selection needs most."""
    depth = DEEPER.get(method, DEPTH) * (3 if name == "gemma" else 1)
    b = blueprint(tmp_path, name, depth, checkpointing=checkpointing)
    values = method_values(b, method, {})
    plan, full = plan_method(b, method, values), at_full_depth(b, method, values)
    assert len(plan.depths) == 3 and sum(plan.depths) < depth and full.depths == (depth,)
    told, real = plan.simulation, full.simulation
    trained = [mark for mark in real.trace.selections if mark[1] in real.trained]
    assert told.trace == dataclasses.replace(real.trace, selections=trained)
    assert (told.trained, told.of_gradients) == (real.trained, real.of_gradients)
    assert plan.row == full.row and plan.modules == full.modules
    assert list(plan.row["components"]) == list(full.row["components"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "given",
    [
        {"gpus": 2},
        {"gpus": 2, "checkpointing": True},
        {"batch_size": 4, "gradient_accumulation_steps": 2},
        {"task": "dpo"},
        {"loss_chunks": 4},
        {"offload_activations": True},
        {"checkpointing": True, "checkpointing_every": 2},
    ],
    ids=str,
)
def test_they_do_so_for_every_way_to_train(given, tmp_path):
    b = blueprint(tmp_path, "llama", 36, **given)
    planned, told = 0, 0
    for method in WHOLE:
        values = method_values(b, method, {})
        try:
            plan = plan_method(b, method, values)
        except ValueError:  # a way in which this method can't train
            continue
        planned, told = planned + 1, told + (len(plan.depths) == 3)
        full = at_full_depth(b, method, values)
        assert plan.row == full.row and plan.modules == full.modules, method
    assert planned >= len(WHOLE) - 3
    assert told >= planned - 2  # with two ranks, GaLore's subspaces and Fira's are shared out over two layers


def test_they_do_so_where_a_method_makes_something_of_all_gradients_between_two_backward_passes(tmp_path):
    b = blueprint(tmp_path, "llama", DEPTH)
    values = method_values(b, "lomo", {"lomo": {"clip_norm": 1.0}})
    plan, full = plan_method(b, "lomo", values), at_full_depth(b, "lomo", values)
    assert len(plan.depths) == 3
    assert plan.simulation.trace == full.simulation.trace and plan.row == full.row


@pytest.mark.parametrize("layers", [1, 3])
def test_they_do_so_however_many_layers_are_selected(layers, tmp_path):
    b = blueprint(tmp_path, "llama", 60, checkpointing=True)
    values = method_values(b, "lisa", {"lisa": {"layers": layers}})
    plan, full = plan_method(b, "lisa", values), at_full_depth(b, "lisa", values)
    assert len(plan.depths) == 3
    assert plan.row == full.row and plan.modules == full.modules


def test_another_size_of_what_was_planned_is_told_by_two_depths(tmp_path):
    b = blueprint(tmp_path, "llama", 28)
    values = method_values(b, "badam", {})
    plan = plan_method(b, "badam", values)
    for size in ({"batch_size": 5}, {"sequence_length": 40}):
        other = b.with_workload(**size)
        again = plan_method(other, "badam", values)
        assert again.depths == plan.depths[1:]
        assert again.row == at_full_depth(other, "badam", values).row
    assert len(plan_method(b.with_workload(gpus=2), "badam", values).depths) == 3
    assert len(plan_method(b, "badam", {**values, "states": "8bit"}).depths) == 3


@pytest.mark.parametrize("method", sorted(UNALIKE))
def test_where_depths_are_not_alike_the_full_depth_is_simulated(method, tmp_path):
    b = blueprint(tmp_path, "llama", DEPTH)
    values = method_values(b, method, {})
    plan = plan_method(b, method, values)
    assert plan.depths == (DEPTH,)
    assert plan.row == at_full_depth(b, method, values).row


def test_where_shallow_models_have_fewer_worst_cases_the_full_depth_is_simulated(tmp_path, monkeypatch):
    b = blueprint(tmp_path, "llama", DEPTH)
    monkeypatch.setattr(planning, "trained_weights", lambda blueprint, method, values, depth: [1] * depth)
    assert plan_method(b, "lisa", method_values(b, "lisa", {})).depths == (DEPTH,)


def test_no_more_layers_are_simulated_than_the_model_has(tmp_path):
    b = blueprint(tmp_path, "llama", 8)
    plan = plan_method(b, "adamw", method_values(b, "adamw", {}))
    assert b.depths == (2, 3, 4) and plan.depths == (8,)


def simulations(path, *depths):
    b = blueprint(path, "llama", DEPTH)
    return [simulate(b, "adamw", method_values(b, "adamw", {}), depth) for depth in depths]


def changed(simulation, at, **fields):
    """With other values of one allocation."""
    trace = simulation.trace
    lists = {
        name: [*getattr(trace, name)[:at], value, *getattr(trace, name)[at + 1 :]] for name, value in fields.items()
    }
    return dataclasses.replace(simulation, trace=dataclasses.replace(trace, **lists))


def test_a_third_depth_shows_where_two_do_not_tell_the_others(tmp_path):
    two, three, four = simulations(tmp_path, 2, 3, 4)
    assert tells(two, three, four)
    for at in range(0, len(four.trace.sizes), 97):
        assert not tells(two, three, changed(four, at, sizes=four.trace.sizes[at] + 1))
        assert not tells(two, changed(three, at % len(three.trace.sizes), phases="nowhere"), four)
    with pytest.raises(NotAlikeError, match="something that a shallower one doesn't"):
        deepen(two, dataclasses.replace(four, depth=3, trace=simulations(tmp_path, 5)[0].trace, layers=[]), 12)


@pytest.mark.parametrize("method", ["adamw", "badam", "blockllm"])
def test_a_plan_of_the_full_depth_is_the_meters_own_report(method, tmp_path):
    b = blueprint(tmp_path, "llama", 3)
    values = method_values(b, method, {})
    plan = plan_method(b, method, values)
    simulation = simulate(b, method, values, 3, whole_cycle=True)
    report = summarize(simulation.trace, simulation.component)
    for key in ("peak_allocated_bytes", "at_peak", "maximum", "peak_phase", "peak_selection", "peak_module"):
        assert plan.row[key] == report[key]
    assert plan.row["peak_reserved_bytes"] == report["estimated_reserved_bytes"]


def test_a_cycle_that_leaves_state_behind_is_gone_through_in_full(tmp_path, monkeypatch):
    from optimizers.badam import BAdam

    class Hoarder(BAdam):
        """BAdam that never drops the moments of the block that it leaves."""

        def advance(self) -> None:
            kept = dict(self.state)
            super().advance()
            self.state.update(kept)

    monkeypatch.setitem(optimizers.registry._METHODS, "hoarder", Hoarder)
    b = blueprint(tmp_path, "llama", 6)
    plan = plan_method(b, "hoarder", {})
    assert plan.depths == (6,)
    layers = sum(p.numel() for p in b.source.skeleton(b.kind).model.layers.parameters())
    assert plan.simulation.leaves_state
    again = plan_method(b.with_workload(batch_size=4), "hoarder", {})
    assert again.row["maximum"]["optimizer_state_bytes"] == plan.row["maximum"]["optimizer_state_bytes"]
    assert plan.row["maximum"]["optimizer_state_bytes"] >= 8 * layers


def test_simulated_depths_grow_by_the_same_layers_and_end_on_those_of_the_model():
    assert simulated_depths("a" * 32) == (2, 3, 4)
    assert simulated_depths("ab" * 13) == (4, 6, 8)
    assert simulated_depths("ab" * 13 + "a") == (3, 5, 7)
    assert simulated_depths("aaaaab" * 4 + "aa") == (8, 14, 20)
    assert simulated_depths("abbb" * 8) == (8, 12, 16)
    assert simulated_depths("a" * 3 + "b" * 58) == (5, 6, 7)  # DeepSeek V3: three dense layers, then experts
    assert simulated_depths("a" * 4) == (4,)
    assert simulated_depths("a" * 31 + "b") == (32,)
    assert simulated_depths("abc" * 2) == (6,)


def test_interpolation_is_exact_in_whole_numbers():
    assert weights((1, 2, 3), 10).apply([1, 4, 9]) == 100
    assert weights((3, 5), 32).apply([10, 14]) == 68


class PlainMeter(MemoryMeter):
    """Sees operations as any other meter does."""

    of_gradients: set[int] = set()

    def __init__(self, model, optimizer, fake):
        super().__init__(model, optimizer)


def test_the_short_way_through_the_cache_changes_nothing(tmp_path, monkeypatch):
    from torch._subclasses.fake_tensor import FakeTensorMode

    from membench.planning import kernels
    from membench.planning import simulate as module

    b = blueprint(tmp_path, "llama", 2, checkpointing=True, dtype="bfloat16", device="cuda")
    for method in ("galore", "lora"):
        values = method_values(b, method, {})
        quick = simulate(b, method, values, 2).trace
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "QuickFakeTensorMode", lambda on_gpu: FakeTensorMode())
            patch.setattr(module, "FakeMeter", PlainMeter)
            patch.setattr(module, "RepeatedLoss", lambda loss, *_: loss)
            plain = simulate(b, method, values, 2).trace
        assert dataclasses.asdict(quick) == dataclasses.asdict(plain)


TWO = [("adamw", {}), ("badam", {"in_backward": True})]  # the second acts within the passes, on one block after another
MORE = [*TWO, ("galore", {"in_backward": True}), ("lora", {}), ("lisa", {}), ("adalomo", {}), ("blockllm", {})]
REPEATED = [
    ({"checkpointing": True}, TWO),
    ({"checkpointing": True, "gpus": 3}, TWO),  # shards of several gradients lie in one allocation
    ({}, MORE),
    ({"offload_activations": True}, MORE),
    ({"task": "dpo"}, MORE),
    ({"gpus": 8}, MORE),
]


@pytest.mark.parametrize(
    ("given", "methods"), [*REPEATED[:2], *(pytest.param(*case, marks=pytest.mark.slow) for case in REPEATED[2:])]
)
def test_passes_repeated_from_notes_leave_the_trace_that_real_ones_do(given, methods, tmp_path, monkeypatch):
    from membench.planning import simulate as module

    b = blueprint(tmp_path, "llama", 2, dtype="bfloat16", **given)
    for method, values in methods:
        chosen = method_values(b, method, {method: values})
        made = [simulate(b, method, chosen, 2) for _ in range(2)]  # the second one without any real pass
        with monkeypatch.context() as patch:
            patch.setattr(module, "RepeatedLoss", lambda loss, *_: loss)
            made.append(simulate(b, method, chosen, 2))
        first, *others = map(dataclasses.asdict, made)
        assert others == [first, first]


class Scaled(optimizers.get("sgd")):
    """SGD with a backward pass of its own."""

    def backward(self, loss):
        super().backward(loss * 2)


def test_a_users_own_backward_pass_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(passes, "_known", {})
    b, name = blueprint(tmp_path, "llama", 2), f"{__name__}:{Scaled.__name__}"
    alone = simulate(b, name, method_values(b, name, {}), 2)
    simulate(b, "sgd", method_values(b, "sgd", {}), 2)
    assert simulate(b, name, method_values(b, name, {}), 2).trace == alone.trace
    assert "backward" in alone.trace.phases


def test_notes_of_weights_in_4_bits_serve_no_others(tmp_path, monkeypatch):
    monkeypatch.setattr(passes, "_known", {})
    b = blueprint(tmp_path, "llama", 2)
    values = [method_values(b, "qlora", {"qlora": {"double_quantization": double}}) for double in (True, False)]
    _, after = (simulate(b, "qlora", given, 2) for given in values)
    passes._known.clear()
    assert after.trace == simulate(b, "qlora", values[1], 2).trace


def test_notes_are_made_once_for_all_methods_that_act_on_nothing_but_gradients(tmp_path, monkeypatch):
    from membench.planning import simulate as module

    b = blueprint(tmp_path, "llama", 2)
    made = []

    def counting(workload):
        return lambda model, batch: made.append(method) or loss_function(workload)(model, batch)

    monkeypatch.setattr(passes, "_known", {})
    monkeypatch.setattr(module, "loss_function", counting)
    for method in ("lomo", "sgd", "adamw", "mezo"):  # the first acts as gradients are accumulated, the last on losses
        simulate(b, method, method_values(b, method, {"lomo": {"clip_norm": None}}), 2)
    assert {name: made.count(name) for name in made if name != "mezo"} == {"lomo": 1}  # of two steps of each


BOUNDED = [(method, gpus) for method in optimizers.available() for gpus in (1, 8) if (method, gpus) != ("mezo", 8)]
QUICKLY = [("adamw", 1), ("lisa", 8), ("galore", 8)]


@pytest.mark.parametrize(
    ("method", "gpus"), [pytest.param(*one, marks=[] if one in QUICKLY else pytest.mark.slow) for one in BOUNDED]
)
@pytest.mark.parametrize("in_backward", [False, True])
def test_a_shallow_model_never_says_that_the_full_depth_takes_more_than_it_does(method, gpus, in_backward, tmp_path):
    """Not even where its layers are all gathered at once."""
    b = blueprint(tmp_path, "llama", DEPTH, checkpointing=True, gpus=gpus)
    values = method_values(b, method, {})
    if in_backward and "in_backward" not in values:
        pytest.skip("it has no such option")
    full, *shallow = (
        simulate(b, method, values | {"in_backward": in_backward} if in_backward else values, depth)
        for depth in (DEPTH, 2, 3)
    )
    peak = least_peak(full, DEPTH)
    assert peak == max(find_peaks(full.trace)[0])[0]
    for one in shallow:
        assert least_peak(one, one.depth) < least_peak(one, DEPTH) <= peak
