"""The library's cases: how methods are built, saved, loaded and misused; each was a fault that somebody met."""

import copy
import io
import math
import pickle
import random
import warnings
from typing import Any

import numpy
import pytest
import torch
from library import (
    description,
    every_method,
    gemma3,
    same,
    subject,
    trained,
    unlike,
)
from torch import nn

import optimizers
from membench.config.errors import UserError
from membench.training import checkpoint
from optimizers import AdamW, BAdam, MemoryEfficientOptimizer
from optimizers.contract import batch, build_model, train
from optimizers.shared.blocks import matching

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
    names = ["name"] if optimizers.get(method).expected_state is not MemoryEfficientOptimizer.expected_state else []
    for of in ("shape", "dims", "dtype", "kind", *names):
        state = copy.deepcopy(optimizer.state_dict())
        found = first_tensor(state)
        if found is None:  # it keeps nothing: whatever it is given is too much
            assert method in ("lomo", "mezo")
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
    given = {"sparsity": 0.98}  # so few entries are kept by their positions
    _, optimizer = trained("blockllm", **given)
    state = optimizer.state_dict()
    kept = next(kept for kept in state["state"].values() if "index" in kept)
    kept["index"][-1] = 10**6
    with pytest.raises(ValueError, match="index must be increasing numbers below"):
        subject("blockllm", **given).build(build_model()).load_state_dict(state)


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


@every_method
def test_hooks_of_a_user_adapt_a_state_and_act_on_what_was_loaded(method):
    _, optimizer = trained(method)
    state = copy.deepcopy(optimizer.state_dict())
    state["param_groups"] = [{"rate": group.pop("lr"), **group} for group in state["param_groups"]]
    kept, seen = copy.deepcopy(state), []
    other = subject(method).build(build_model())

    def rename(_, state):
        return {**state, "param_groups": [{**group, "lr": group["rate"]} for group in state["param_groups"]]}

    def halve(loaded):
        seen.append(sum(map(len, loaded.state.values())))
        for group in loaded.param_groups:
            group["lr"] /= 2

    other.register_load_state_dict_pre_hook(rename)
    other.register_load_state_dict_post_hook(halve)
    other.load_state_dict(state)
    assert seen == [sum(map(len, optimizer.state.values()))] and same(state, kept)
    assert [g["lr"] for g in other.param_groups] == [g["lr"] / 2 for g in optimizer.param_groups]


# ---- what a method is built on


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


# ---- what a method can be built on


@every_method
def test_l_a_model_is_asked_for_where_its_parameters_are_given(method):
    cls, model = optimizers.get(method), build_model()
    for given in (model.parameters(), list(model.parameters()), [{"params": []}], None, nn.Linear, model.state_dict()):
        with pytest.raises(TypeError, match=rf"^{cls.__name__} is built from a model, not from .*: give the model, "):
            cls(given)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'model'"):
        cls()


class Holder(nn.Module):
    """A model around one odd parameter."""

    def __init__(self, p: nn.Parameter):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.layers[0].odd = p
        self.head = nn.Linear(4, 2)


ODD = {
    "complex": (lambda: nn.Parameter(torch.zeros(4, dtype=torch.complex64)), "is complex"),
    "expanded": (lambda: nn.Parameter(torch.zeros(4, 1).expand(4, 3)), "has entries that share memory"),
    "unfolded": (lambda: nn.Parameter(torch.zeros(6).unfold(0, 3, 1)), "has entries that share memory"),
    "sparse": (lambda: nn.Parameter(torch.eye(4).to_sparse()), "is a sparse_coo tensor"),
    "float8": (lambda: nn.Parameter(torch.zeros(4, dtype=torch.float8_e4m3fn)), "has dtype torch.float8_e4m3fn"),
}
OWN = ("lora", "qlora", "welore")  # what they train is theirs, and dense
FULL = [name for name in optimizers.available() if name not in OWN]


@pytest.mark.parametrize("method", FULL)
@pytest.mark.parametrize("odd", ODD)
def test_l_a_parameter_that_no_kernel_can_update_is_refused_with_its_name(method, odd):
    make, words = ODD[odd]
    with pytest.raises(ValueError, match=rf"can't train layers\.0\.odd: it {words}"):
        optimizers.create(method, Holder(make()))


def test_l_what_is_frozen_may_be_odd():
    p = nn.Parameter(torch.zeros(4, dtype=torch.complex64), requires_grad=False)
    for method in optimizers.available():
        given = {"reduction": 0.9} if method == "welore" else {}  # of so small matrices, more than half of the rank
        optimizers.create(method, Holder(p), **given).finish()


def test_l_one_memory_for_two_parameters_and_lazy_modules_are_refused():
    model = Holder(nn.Parameter(torch.zeros(2)))
    model.layers[0].odd = nn.Parameter(model.layers[1].weight.detach().view(-1)[4:8])
    with pytest.raises(
        ValueError, match=r"layers\.1\.weight and layers\.0\.odd: they are two parameters that share memory"
    ):
        AdamW(model)
    model.layers[0].odd = model.layers[1].weight  # tied: one parameter
    AdamW(model).finish()
    with pytest.raises(ValueError, match=r"can't train 0\.weight, which has no shape yet: run a batch"):
        AdamW(nn.Sequential(nn.LazyLinear(3)))


@pytest.mark.parametrize("in_backward", [False, True])
def test_l_sparse_gradients_are_refused_at_construction_and_else_at_the_first_step(in_backward):
    class Words(nn.Module):
        def __init__(self, sparse):
            super().__init__()
            self.embed = nn.Embedding(5, 4, sparse=sparse)
            self.layers = nn.ModuleList([nn.Linear(4, 4)])

        def forward(self, x):
            return self.layers[0](nn.functional.embedding(x, self.embed.weight, sparse=True)).sum()

    with pytest.raises(ValueError, match=r"embed\.weight: it has sparse gradients: build its module with sparse=False"):
        AdamW(Words(sparse=True), in_backward=in_backward)
    BAdam(Words(sparse=True)).finish()  # doesn't train it
    model = Words(sparse=False)
    optimizer = AdamW(model, in_backward=in_backward)
    with pytest.raises(ValueError, match=r"can't use the sparse gradient of embed\.weight"):
        model(torch.tensor([1, 2])).backward()
        optimizer.step()


@every_method
def test_l_two_optimizers_on_one_model_are_one_too_many(method):
    model = build_model()
    optimizer = subject(method).build(model)
    name = type(optimizer).__name__
    with pytest.raises(ValueError, match=rf"AdamW: {name} is training this model: call its finish\(\) first|adapters"):
        optimizers.create("adamw" if method not in ("lora", "qlora") else "lora", model)
    train(model, optimizer, 2)
    optimizer.finish()
    AdamW(model).finish()


def test_l_one_that_nobody_holds_any_more_is_not_in_the_way():
    model = build_model()
    for _ in range(3):
        optimizer = AdamW(model, in_backward=True)
        optimizer.cycle = optimizer  # as a scheduler's wrapper of step() may be
        del optimizer
    train(model, AdamW(model), 1)


@pytest.mark.parametrize("method", ["badam", "blockllm", "hft", "lisa", "welore"])
def test_what_a_method_leaves_frozen_when_it_is_dropped_unfinished_is_said_once(method):
    model, optimizer = trained(method, always_train=("classifier",))
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    del optimizer
    with pytest.warns(
        UserWarning, match=rf"won't train {len(frozen)} parameters, the first being {frozen[0]}: \w+, wh"
    ):
        AdamW(model).finish()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AdamW(model).finish()


def test_what_a_user_froze_before_or_unfroze_since_is_not_said_to_be_left_frozen():
    model = build_model()
    model.embed_tokens.requires_grad_(False)
    optimizer = BAdam(model)
    del optimizer
    for part in (model.layers, model.norm, model.classifier, model.unused):
        part.requires_grad_(True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AdamW(model).finish()


@every_method
def test_l_a_value_of_another_kind_is_refused_in_a_sentence_that_names_it(method):
    """As files and command lines give them: YAML reads 1e-4 as a text, and any text is true."""
    numbers = ("lr", "weight_decay", "betas", "eps", "clip_threshold", "decay_rate", "reduction", "ns_coefficients")
    for name, default in {"lr": 1e-3, **subject(method).keywords}.items():
        flag = isinstance(default, bool)
        odd = ["1e-4"] if name in numbers else ["false", 0.5] if flag else []
        odd += [None, [0.5]] if flag or name in (*numbers, "seed", "always_train", "targets") else []
        for value in odd:
            with pytest.raises(ValueError, match=f"{name} must be ") as refusal:
                subject(method, **{name: value}).build(build_model())
            assert repr(value) in str(refusal.value)


@every_method
def test_l_copies_and_pickles_are_refused_and_those_of_the_model_work(method):
    model, optimizer = trained(method, steps=2)
    for copied in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="can't be copied or pickled, .* save its state_dict"):
            copied(optimizer)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (torch.load(file, weights_only=False), copy.deepcopy(model)):
        assert torch.equal(other(batch(0)[0]), model(batch(0)[0]))
    fresh = gemma3()
    made = optimizers.create(method, fresh, **optimizers.get(method).example)
    copy.deepcopy(fresh)  # before the first batch, when there is a hook that looks which layers are reached
    torch.save(fresh, io.BytesIO())
    made.finish()


# ---- empty parameters


@every_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_w9_a_parameter_without_entries_is_in_nobodys_way(method, dtype):
    model = build_model()
    model.layers[1].register_parameter("empty", nn.Parameter(torch.zeros(0, 4)))
    model.layers[1].register_parameter("nothing", nn.Parameter(torch.zeros(0)))
    plain = type(model.layers[1]).forward
    model.layers[1].forward = lambda x: (
        plain(model.layers[1], x) + model.layers[1].empty.sum() + model.layers[1].nothing.sum()
    )
    optimizer = subject(method, weight_decay=0.1).build(model.to(dtype))
    assert all(map(math.isfinite, train(model, optimizer, 2 * optimizer.cycle_length + 2)))


# ---- checkpoints


def test_n10_a_damaged_checkpoint_is_never_trained_on(tmp_path):
    path = tmp_path / "run--1.pt"
    model = build_model()
    optimizer = AdamW(model)
    train(model, optimizer, 1)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "progress": {"step": 1, "losses": [0.5]}}
    checkpoint.save(state, path)
    assert same(checkpoint.load(path), state)
    whole = path.read_bytes()
    generator = random.Random(0)
    for place in sorted(generator.sample(range(len(whole)), 30)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << generator.randrange(8))]) + whole[place + 1 :])
        try:
            loaded = checkpoint.load(path)
        except UserError as error:
            assert "run--1.pt" in str(error) and "remove it to start that run again" in str(error)
        else:  # a bit that means nothing, as of a file's date
            assert same(loaded, state)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"step": 1}, "wasn't written by this version of membench"),
        ([1, 2], "wasn't written by this version of membench"),
        ({"run": "run--2", "digest": "", "state": {}}, "belongs to another run, run--2"),
        ({"run": "run--1", "digest": "0" * 64, "state": {"model": torch.zeros(2)}}, "is damaged"),
    ],
)
def test_n10_what_is_no_checkpoint_of_the_run_is_named(content, words, tmp_path):
    torch.save(content, tmp_path / "run--1.pt")
    with pytest.raises(UserError, match=rf"run--1\.pt {words}.*: remove it to start that run again"):
        checkpoint.load(tmp_path / "run--1.pt")


def test_n10_the_digest_sees_values_shapes_dtypes_names_and_order():
    state = {
        "a": torch.arange(4.0),
        "b": [1, 2.0, None, "x", True],
        "c": {"d": torch.zeros(2, 2, dtype=torch.bfloat16)},
    }
    variants = [
        {**state, "a": torch.arange(4.0) * 2},
        {**state, "a": torch.arange(4.0).view(2, 2)},
        {**state, "a": torch.arange(4.0).to(torch.float64)},
        {**state, "b": [1, 2.0, None, "x", False]},
        {**state, "b": [2.0, 1, None, "x", True]},
        {"a": state["a"], "b": state["b"], "e": state["c"]},
        {**state, "c": {}, "d": torch.zeros(2, 2, dtype=torch.bfloat16)},
    ]
    digests = [checkpoint.digest(one) for one in (state, *variants)]
    assert len(set(digests)) == len(digests) and checkpoint.digest(copy.deepcopy(state)) == digests[0]


# ---- values that aren't Python's own


@every_method
def test_a_state_with_numbers_of_numpy_can_be_read_as_weights_only(method):
    rate = optimizers.get(method).example["lr"]
    given = {"lr": numpy.float64(rate), "weight_decay": numpy.float64(0.125)}
    given |= {"seed": numpy.int64(3)} if "seed" in subject(method).keywords else {}
    plainly = {key: value.item() for key, value in given.items()}
    (model, optimizer), (other, same_one) = trained(method, **given), trained(method, **plainly)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: numpy.float64(0.5))
    torch.optim.lr_scheduler.LambdaLR(same_one, lambda step: 0.5)
    assert all(type(rate) is float for rate in scheduler.base_lrs)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    same_one.load_state_dict(torch.load(file, weights_only=True))
    assert train(other, same_one, 2, start=4) == train(model, optimizer, 2, start=4)


def test_names_of_what_is_always_trained_may_be_one_text():
    model = build_model()
    assert matching(model, "classifier, embed_tokens") == matching(model, ("classifier", "embed_tokens"))
    assert len(matching(model, "classifier")) > 0
