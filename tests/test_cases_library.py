"""The library's cases: how methods are built, saved, loaded and misused; each was a fault that somebody met."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

import optimizers
from optimizers import MemoryEfficientOptimizer
from optimizers.contract import Subject, build_model, train

every_method = pytest.mark.parametrize("method", optimizers.available())


def subject(method: str, **more: Any) -> Subject:
    cls = optimizers.get(method)
    return Subject(cls, {**cls.example, **more})


def trained(method: str, steps: int = 4, **more: Any) -> tuple[nn.Module, MemoryEfficientOptimizer]:
    model = build_model()
    optimizer = subject(method, **more).build(model)
    train(model, optimizer, steps)
    return model, optimizer


# ---- state is checked before it is used


def damaged(state: dict[str, Any], change: Any) -> dict[str, Any]:
    state = copy.deepcopy(state)
    change(state)
    return state


def without(*path: Any) -> Any:
    def change(state: Any) -> None:
        for key in path[:-1]:
            state = state[key]
        del state[path[-1]]

    return change


def put(value: Any, *path: Any) -> Any:
    def change(state: Any) -> None:
        for key in path[:-1]:
            state = state[key]
        state[path[-1]] = value

    return change


def first_tensor(state: dict[str, Any]) -> tuple[int, str] | None:
    found = [(i, k) for i, kept in state["state"].items() for k, v in kept.items() if torch.is_tensor(v) and v.dim()]
    return found[0] if found else None


MALFORMED = {
    "extra-is-none": put(None, "extra"),
    "extra-is-a-list": put([], "extra"),
    "no-extra-entry": lambda state: [
        state["extra"].pop(key) for key in sorted(state["extra"].keys() - {"method", "tensors", "steps_done"})
    ],
    "no-param-groups": without("param_groups"),
    "param-groups-are-none": put(None, "param_groups"),
    "no-group": put([], "param_groups"),
    "a-group-too-few": lambda state: state["param_groups"].pop(),
    "a-group-is-a-number": put(3, "param_groups", 0),
    "no-lr": without("param_groups", 0, "lr"),
    "lr-is-a-word": put("fast", "param_groups", 0, "lr"),
    "no-params": without("param_groups", 0, "params"),
    "no-names": without("param_groups", 0, "param_names"),
    "other-names": put(["x"], "param_groups", 0, "param_names"),
    "no-state": without("state"),
    "state-is-a-list": put([], "state"),
    "state-of-a-stranger": put({"x": torch.zeros(2)}, "state", 999),
    "state-of-a-name": put({}, "state", "nobody.weight"),
    "state-is-a-number": put(7, "state", 0),
}


def same(one: Any, other: Any) -> bool:
    if torch.is_tensor(one):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@every_method
def test_l_a_malformed_state_is_refused_in_a_sentence_and_changes_nothing(method):
    model, optimizer = trained(method)
    before, selected = copy.deepcopy(optimizer.state_dict()), [p.requires_grad for p in model.parameters()]
    for fault, change in MALFORMED.items():
        bad = damaged(before, change)
        if same(bad, before):  # it has no such entry
            continue
        with pytest.raises(ValueError) as refusal:
            optimizer.load_state_dict(bad)
        assert 20 < len(str(refusal.value)) < 400 and "\n" not in str(refusal.value), fault
        assert same(optimizer.state_dict(), before), fault
        assert [p.requires_grad for p in model.parameters()] == selected, fault


@every_method
def test_l_state_of_other_shapes_dtypes_or_names_is_refused(method):
    more = {"momentum": 0.9} if method == "sgd" else {}
    _, optimizer = trained(method, **more)
    fresh = subject(method, **more).build(build_model())
    unchanged = copy.deepcopy(fresh.state_dict())
    names = ["name"] if "expected_state" in vars(optimizers.get(method)) else []
    for of in ("shape", "dims", "dtype", "kind", *names):
        state = copy.deepcopy(optimizer.state_dict())
        found = first_tensor(state)
        if found is None:  # it keeps nothing: whatever it is given is too much
            assert method == "lomo"
            state["state"][0] = {"exp_avg": torch.zeros(3)}
            state["extra"]["tensors"] = 1
        else:
            number, key = found
            kept = state["state"][number]
            value = kept.pop(key)
            kept["momentum_of_old" if of == "name" else key] = {
                "shape": value.new_zeros(*value.shape[:-1], value.shape[-1] + 1),
                "dims": value.new_zeros(*value.shape, 2),
                "dtype": value.to(torch.float64),
                "kind": 1,
            }.get(of, value)
        with pytest.raises(ValueError, match="this state (doesn't fit|is damaged|holds)"):
            fresh.load_state_dict(state)
        assert same(fresh.state_dict(), unchanged)


@every_method
def test_l_a_state_of_a_model_of_the_same_names_and_another_width_is_refused(method, monkeypatch):
    more = {"momentum": 0.9} if method == "sgd" else {}
    _, optimizer = trained(method, steps=1, **more)
    monkeypatch.setattr("optimizers.contract.WIDTH", 24)
    wider = subject(method, **more).build(build_model())
    if optimizer.state:
        with pytest.raises(ValueError, match="this state"):
            wider.load_state_dict(optimizer.state_dict())


def test_l_positions_beyond_a_tensor_are_refused():
    _, optimizer = trained("blockllm")
    state = optimizer.state_dict()
    kept = next(kept for kept in state["state"].values() if "index" in kept)
    kept["index"][-1] = 10**6
    with pytest.raises(ValueError, match="index isn't of rising positions below"):
        subject("blockllm").build(build_model()).load_state_dict(state)


@pytest.mark.parametrize(
    ("method", "entry", "value"),
    [
        ("badam", "visit", 1.5),
        ("badam", "blocks", ["layers.0"]),
        ("lisa", "drawn", [99]),
        ("lisa", "number", "one"),
        ("hft", "visited", ["x"]),
        ("blockllm", "chosen", [10**6]),
        ("blockllm", "norms", []),
        ("blockllm", "probed", [-1]),
        ("galore", "rank", 5),
        ("lora", "variant", "dora"),
    ],
)
def test_l_a_methods_own_json_is_checked_and_the_optimizer_stays_as_it_was(method, entry, value):
    model, optimizer = trained(method)
    before = copy.deepcopy(optimizer.state_dict())
    other, undisturbed = trained(method)
    with pytest.raises(ValueError, match="this state"):
        optimizer.load_state_dict({**before, "extra": {**before["extra"], entry: value}})
    assert same(optimizer.state_dict(), before)
    assert train(model, optimizer, 4, start=4) == train(other, undisturbed, 4, start=4)


# ---- what a method is built on


def description(model: nn.Module) -> dict[str, Any]:
    parts = {
        name: (type(m), list(m._modules), list(m._parameters), sorted(vars(m))) for name, m in model.named_modules()
    }
    hooks = {
        name: [len(value) for key, value in sorted(vars(m).items()) if key.endswith("hooks")]
        for name, m in model.named_modules()
    }
    parameters = {
        name: (
            id(p),
            p.requires_grad,
            p.grad is None,
            p.grad_dtype,
            len(p._post_accumulate_grad_hooks or ()),
            p.detach().clone(),
        )
        for name, p in model.named_parameters()
    }
    return {"parts": parts, "hooks": hooks, "parameters": parameters}


def unlike(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    return [key for key in before if not same(before[key], after[key])]


FAILING: list[tuple[str, dict[str, Any]]] = [
    *((name, {"lr": -1.0}) for name in optimizers.available()),
    *((name, {"always_train": ("nobody",)}) for name in ("badam", "blockllm", "lisa", "hft", "lora")),
    ("badam", {"order": "sideways"}),
    ("lisa", {"layers": 9}),
    ("lora", {"targets": ("q_proj", "nobody")}),
    ("galore", {"svd": "quick"}),
]


@pytest.mark.parametrize(("method", "given"), FAILING, ids=[f"{m}-{'-'.join(g)}" for m, g in FAILING])
def test_w6_a_constructor_that_raises_leaves_the_model_as_it_found_it(method, given):
    model = build_model(torch.bfloat16)
    model.embed_tokens.weight.requires_grad_(False)
    model.norm.weight.grad = torch.ones_like(model.norm.weight)
    before = description(model)
    with pytest.raises(ValueError):
        optimizers.create(method, model, **given)
    assert not unlike(before, description(model))


@every_method
def test_w6_whatever_fails_late_in_a_constructor_leaves_no_trace_either(method, monkeypatch):
    cls = optimizers.get(method)

    class Fails(cls):  # type: ignore[misc,valid-type]
        def __init__(self, model, **given):
            super().__init__(model, **given)
            model.norm.weight.data = torch.zeros(16)
            model.stranger = nn.Linear(2, 2)
            raise KeyError("late")

    model = build_model(torch.bfloat16)
    before = description(model)
    with pytest.raises(KeyError):
        Fails(model, **cls.example)
    assert not unlike(before, description(model))
    subject(method).build(model)  # and nothing stands in the way of a second try
