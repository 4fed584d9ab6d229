"""What every method promises, as checks that you can run on a method of your own.

    from optimizers.contract import CHECKS, Subject

    @pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
    def test_my_method_keeps_the_contract(check):
        check(Subject(MyMethod, {"lr": 1e-2}))

Each check raises an AssertionError that says which promise is broken.
"""

from __future__ import annotations

import copy
import functools
import gc
import inspect
import io
import json
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from optimizers.base import MemoryEfficientOptimizer

VOCABULARY, WIDTH, LAYERS, CLASSES = 20, 16, 3, 3


class Attention(nn.Module):
    """One head of self-attention."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:  # (batch, length, width)
        return self.o_proj(F.scaled_dot_product_attention(self.q_proj(x), self.k_proj(x), self.v_proj(x)))


class MLP(nn.Module):
    """A gated feed-forward network."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.down_proj = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """A pre-norm transformer layer."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(), MLP()
        self.input_layernorm, self.post_attention_layernorm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class TinyTransformer(nn.Module):
    """A transformer that classifies sequences, small enough to train in a second."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)
        self.classifier = nn.Linear(WIDTH, CLASSES)
        self.unused = nn.ModuleDict({"probe": nn.Linear(WIDTH, WIDTH)})  # never called: its gradients stay None

    def forward(self, tokens: Tensor) -> Tensor:  # (batch, length) -> (batch, classes)
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.classifier(self.norm(x).mean(1))


def build_model(dtype: torch.dtype = torch.float32) -> TinyTransformer:
    """The model that the checks train; its initial weights are always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return TinyTransformer().to(dtype)


@functools.cache
def batch(step: int) -> tuple[Tensor, Tensor]:
    """Tokens (16, 6) and labels (16,): most but not all tokens of a sequence are of the kind its class prefers."""
    generator = torch.Generator().manual_seed(step)
    labels = torch.randint(CLASSES, (16,), generator=generator)
    tokens = torch.randint(VOCABULARY, (16, 6), generator=generator)
    telling = torch.rand(16, 6, generator=generator) < 0.5
    return torch.where(telling, labels[:, None] + CLASSES * (tokens // CLASSES // 2), tokens), labels


@dataclass
class Subject:
    """A method under test, and hyper-parameters with which it learns on a tiny model.

    `always_train=("classifier",)` is added for methods that have that keyword, as the tasks do.
    """

    method: type[MemoryEfficientOptimizer]
    hyperparameters: dict[str, Any] = field(default_factory=dict)

    def build(self, model: nn.Module, **more: Any) -> MemoryEfficientOptimizer:
        head = {"always_train": ("classifier",)} if "always_train" in self.keywords else {}
        return self.method(model, **{**head, **self.hyperparameters, **more})  # type: ignore[arg-type]

    @property
    def keywords(self) -> dict[str, Any]:
        """Constructor keywords and their defaults."""
        parameters = list(inspect.signature(self.method).parameters.values())[1:]
        return {p.name: p.default for p in parameters}


def loss_of(model: nn.Module, step: int) -> Tensor:
    tokens, labels = batch(step)
    return F.cross_entropy(model(tokens).float(), labels)


def train(model: nn.Module, optimizer: MemoryEfficientOptimizer, steps: int, start: int = 0) -> list[float]:
    """The one training loop; returns the losses."""
    losses = []
    for step in range(start, start + steps):
        loss = optimizer.ask(functools.partial(loss_of, model, step))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of weights and buffers, which weights in few bits are."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(before: dict[str, Tensor], model: nn.Module) -> set[str]:
    now = model.state_dict()
    return {name for name, tensor in before.items() if not torch.equal(tensor, now[name])}


def is_an_optimizer_of_the_models_parameters(subject: Subject) -> None:
    model = build_model()
    optimizer = subject.build(model)
    assert isinstance(optimizer, torch.optim.Optimizer)
    members = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(members) == len(set(members)) > 0, "a parameter is in two groups, or no group has any"
    assert set(members) <= set(model.parameters()), "a group has a parameter that is not the model's"


def describes_itself(subject: Subject) -> None:
    for name in ("summary", "paper", "trains", "keeps"):
        assert getattr(subject.method, name), f"{subject.method.__name__}.{name} is empty"
    for name in subject.method.added_later:
        default = subject.keywords.get(name, inspect.Parameter.empty)
        assert default is not inspect.Parameter.empty, (
            f"added_later names {name!r}, which isn't a keyword with a default"
        )
    assert "Args:" in (subject.method.__doc__ or ""), "the docstring doesn't list the arguments"


def the_loss_falls(subject: Subject) -> None:
    model = build_model()
    optimizer, losses = subject.build(model), []
    for start in (0, 50, 100):  # most methods need 50 steps
        losses += train(model, optimizer, 50, start=start)
        first, last = sum(losses[:10]), sum(losses[-10:])
        if last < 0.7 * first:
            return
    raise AssertionError(f"the loss only went from {first / 10:.3f} to {last / 10:.3f}")


def follows_a_scheduler(subject: Subject) -> None:
    model = build_model()
    optimizer = subject.build(model)
    rate = [1.0]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: rate[0])
    train(model, optimizer, 2)
    before = state_of(model)
    rate[0] = 0.0
    scheduler.step()
    optimizer.load_state_dict(optimizer.state_dict())  # replaces the group dicts
    train(model, optimizer, 5, start=2)
    assert not changed(before, model), "weights moved at a learning rate of 0"
    rate[0] = 1.0
    scheduler.step()
    train(model, optimizer, 2, start=7)
    assert changed(before, model), "no weight moved when the learning rate came back"


def resumes_to_the_last_bit(subject: Subject) -> None:
    _resumes(subject, torch.float32, (1, 5), 9)


def resumes_to_the_last_bit_in_bfloat16(subject: Subject) -> None:
    _resumes(subject, torch.bfloat16, (5,), 8)  # low-precision arithmetic is slow on a CPU


def _resumes(subject: Subject, dtype: torch.dtype, pauses: Sequence[int], steps: int) -> None:
    straight = build_model(dtype)
    optimizer = subject.build(straight)
    expected: list[float] = []
    revived = {}
    for pause in pauses:
        expected += train(straight, optimizer, pause - len(expected), start=len(expected))
        revived[pause] = _revive(subject, dtype, straight, optimizer)
        _same_position(optimizer, revived[pause][1])
    expected += train(straight, optimizer, steps - len(expected), start=len(expected))
    for pause, (resumed, second) in revived.items():
        losses = train(resumed, second, steps - pause, start=pause)
        assert losses == expected[pause:], f"losses differ after resuming at step {pause} in {dtype}"
        assert not changed(state_of(straight), resumed), f"weights differ after resuming at {pause} in {dtype}"
        _same_state(optimizer, second)


def _revive(
    subject: Subject, dtype: torch.dtype, model: nn.Module, optimizer: MemoryEfficientOptimizer
) -> tuple[nn.Module, MemoryEfficientOptimizer]:
    """A new model and optimizer, then restored from a file."""
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    revived = build_model(dtype)
    again = subject.build(revived)
    revived.load_state_dict(saved["model"])
    again.load_state_dict(saved["optimizer"])
    return revived, again


def _same_position(one: MemoryEfficientOptimizer, other: MemoryEfficientOptimizer) -> None:
    assert other.selection == one.selection, f"{other.selection} is selected after loading, not {one.selection}"
    assert other.block_coverage == one.block_coverage, "what was trained so far is forgotten"
    assert other.extra_state() == one.extra_state(), "extra_state differs after loading"


def _same_state(one: MemoryEfficientOptimizer, other: MemoryEfficientOptimizer) -> None:
    state_of_one, state_of_other = one.state_dict()["state"], other.state_dict()["state"]
    assert state_of_one.keys() == state_of_other.keys(), "the state is for other parameters"
    for index, state in state_of_one.items():
        assert state.keys() == state_of_other[index].keys(), "the state has other entries"
        for key, value in state.items():
            there = state_of_other[index][key]
            same = (
                torch.equal(value, there) and value.dtype == there.dtype if torch.is_tensor(value) else value == there
            )
            assert same, f"state {key!r} differs"


def leaves_a_state_that_it_loads_as_it_is(subject: Subject) -> None:
    # the caller may load the same state again, or save it
    model, other = build_model(), build_model()
    optimizer, again = subject.build(model), subject.build(other)
    train(model, optimizer, 5)
    state = optimizer.state_dict()
    saved = copy.deepcopy(state)
    again.load_state_dict(state)
    train(other, again, 4, start=5)
    again.advance()
    train(other, again, 1, start=9)
    for key, value in state.items():
        assert _equal(value, saved[key]), f"further training changed {key!r} in the state that was loaded"


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_equal(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_equal, one, other))
    return torch.equal(one, other) if torch.is_tensor(one) else one == other


def refuses_the_state_of_another(subject: Subject) -> None:
    state = subject.build(build_model()).state_dict()
    state["extra"] = {**state["extra"], "method": "SomebodyElse"}
    _refuses(lambda: subject.build(build_model()).load_state_dict(state), "the state of another method")


def keeps_every_tensor_in_state(subject: Subject) -> None:
    model = build_model()
    optimizer = subject.build(model)
    train(model, optimizer, 8)
    known = {id(t) for t in (*model.parameters(), *model.buffers())}
    known |= {id(t) for state in optimizer.state.values() for t in state.values()}
    for name, value in vars(optimizer).items():
        if name not in ("model", "state", "param_groups"):
            strangers = [t for t in _tensors_in(value) if t.numel() and id(t) not in known]
            assert not strangers, f"attribute {name!r} holds a tensor that is not in state"
    assert set(optimizer.state) <= {p for g in optimizer.param_groups for p in g["params"]}
    json.dumps(optimizer.extra_state())


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if torch.is_tensor(value):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _tensors_in(key)
            yield from _tensors_in(item)
    elif isinstance(value, list | tuple | set | frozenset):
        for item in value:
            yield from _tensors_in(item)
    elif type(value).__module__.split(".")[0] not in ("torch", "builtins") and vars_of(value):
        yield from _tensors_in(vars_of(value))


def vars_of(value: Any) -> dict[str, Any]:
    return value.__dict__ if isinstance(getattr(value, "__dict__", None), dict) and not callable(value) else {}


def never_changes_its_groups(subject: Subject) -> None:
    model = build_model()
    optimizer = subject.build(model)
    before = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    train(model, optimizer, 8)
    optimizer.advance()
    assert [[id(p) for p in group["params"]] for group in optimizer.param_groups] == before


def never_moves_what_was_frozen(subject: Subject) -> None:
    model = build_model()
    frozen = {name: p for name, p in model.named_parameters() if name.startswith(("embed", "layers.1.mlp.up"))}
    for p in frozen.values():
        p.requires_grad_(False)
    before = {name: p.detach().clone() for name, p in frozen.items()}
    optimizer = subject.build(model)
    for turn in range(optimizer.cycle_length + 1):
        train(model, optimizer, 2, start=2 * turn)
        assert not any(p.requires_grad for p in frozen.values()), "a frozen parameter requires gradients"
        optimizer.advance()
    optimizer.finish()
    now = dict(model.named_parameters())
    for name, value in before.items():
        assert not now[name].requires_grad, f"{name} was frozen and requires gradients after finish()"
        assert torch.allclose(now[name], value, rtol=0, atol=0), f"{name} was frozen and moved"


def trains_what_it_selects_and_nothing_else(subject: Subject) -> None:
    model = build_model()
    optimizer = subject.build(model)
    for turn in range(optimizer.cycle_length):
        before = state_of(model)
        trainable = _trainable(model)
        if optimizer.needs_loss or not optimizer.in_backward:
            assert {id(p) for p in optimizer.trainable} == {id(p) for p in model.parameters() if p.requires_grad}
        train(model, optimizer, 1, start=turn)
        moved = changed(before, model)
        assert moved, f"selection {turn} ({optimizer.selection}) trains nothing"
        assert moved <= trainable, f"{moved - trainable} moved without being selected"
        optimizer.advance()


def _trainable(model: nn.Module) -> set[str]:
    """Names of what requires gradients, and of the buffers beside it: the bytes of a weight in few bits."""
    names = set()
    for path, module in model.named_modules():
        own = [name for name, p in module.named_parameters(recurse=False) if p.requires_grad]
        beside = [name for name, _ in module.named_buffers(recurse=False)] if own else []
        names |= {f"{path}.{name}".lstrip(".") for name in (*own, *beside)}
    return names


def refuses_a_state_that_does_not_fit(subject: Subject) -> None:
    model = build_model()
    optimizer = subject.build(model)
    train(model, optimizer, 4)
    state = optimizer.state_dict()
    other = subject.build(build_model())
    before = copy.deepcopy(other.state_dict())
    kept = [
        (i, key) for i, saved in state["state"].items() for key, t in saved.items() if torch.is_tensor(t) and t.dim()
    ]
    for number, key in kept[:1]:  # a fused kernel would write beyond what is too short
        short = {**state["state"][number], key: state["state"][number][key][:0]}
        bad = {**state, "state": {**state["state"], number: short}}
        what = f"a state whose {key!r} has another shape (see expected_state)"
        _refuses(functools.partial(other.load_state_dict, bad), what)
    for missing in (
        "state",
        "param_groups",
        *(["extra"] if state["extra"].keys() - {"method", "tensors", "steps_done"} else []),
    ):
        bad = {**state, missing: {"method": state["extra"]["method"]} if missing == "extra" else None}
        _refuses(functools.partial(other.load_state_dict, bad), f"a state without its {missing!r}")
    assert _equal(other.state_dict(), before), "a state that was refused left something behind"


def leaves_the_model_as_it_was_when_it_refuses(subject: Subject) -> None:
    model = build_model(torch.bfloat16)
    model.embed_tokens.weight.requires_grad_(False)
    before, names = _described(model), list(model.state_dict())
    _refuses(lambda: _fails_late(subject)(model), "a constructor that raises", KeyError)
    assert _described(model) == before and list(model.state_dict()) == names, (
        "a constructor that raised changed the model"
    )
    subject.build(model).finish()


def _described(model: nn.Module) -> list[Any]:
    modules = [(type(module), len(module._forward_pre_hooks), sorted(vars(module))) for module in model.modules()]
    hooks = [len(p._post_accumulate_grad_hooks or ()) for p in model.parameters()]
    return [*modules, *hooks, *((id(p), p.requires_grad, p.grad_dtype) for p in model.parameters())]


def _fails_late(subject: Subject) -> Callable[[nn.Module], Any]:
    class Late(subject.method):  # type: ignore[name-defined,misc]
        def __init__(self, model: nn.Module, **given: Any):
            super().__init__(model, **given)
            raise KeyError("late")

    Late.__name__ = subject.method.__name__
    return lambda model: Late(model, **subject.hyperparameters)


def refuses_what_is_no_model_and_a_model_in_training(subject: Subject) -> None:
    model = build_model()
    parameters: Any = model.parameters()
    _refuses(lambda: subject.build(parameters), "a model's parameters in place of the model", TypeError)
    optimizer = subject.build(model)
    _refuses(lambda: subject.build(model), "a model that another method is training")
    _refuses(lambda: copy.deepcopy(optimizer), "to be copied without its model", TypeError)
    optimizer.finish()


def says_what_the_finished_model_will_be(subject: Subject) -> None:
    model = build_model()
    optimizer = subject.build(model)
    losses = train(model, optimizer, 3)
    now = {name: t.clone() for name, t in optimizer.finished_state_dict().items()}
    plain = optimizer.finish().state_dict()
    assert now.keys() == plain.keys() and all(torch.equal(t, plain[name]) for name, t in now.items())
    other = build_model()
    again = subject.build(other)
    undisturbed = train(other, again, 1)
    again.finished_state_dict()
    assert undisturbed + train(other, again, 2, start=1) == losses, "looking at the finished model changed the training"


def finishes_with_a_plain_model(subject: Subject) -> None:
    model = build_model()
    model.embed_tokens.weight.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    classes = {name: type(module) for name, module in model.named_modules()}
    optimizer = subject.build(model)
    train(model, optimizer, 5)
    expected = model(batch(0)[0])
    plain = optimizer.finish()
    assert {name: p.requires_grad for name, p in plain.named_parameters()} == before, "requires_grad is not restored"
    assert {name: type(module) for name, module in plain.named_modules()} == classes, "modules are not restored"
    assert torch.allclose(plain(batch(0)[0]), expected, atol=1e-5), "the finished model computes something different"
    for name, module in plain.named_modules():
        assert not module._forward_pre_hooks and not module._forward_hooks, f"a hook is left on {name or 'the model'}"
    for name, p in plain.named_parameters():
        assert p.grad is None and not p._post_accumulate_grad_hooks, f"a gradient or a hook is left on {name}"
    _refuses(lambda: optimizer.step(), "step() after finish()", RuntimeError)


def refuses_bad_values(subject: Subject) -> None:
    bad: list[dict[str, Any]] = [{"lr": -1.0}, {"lr": float("nan")}, {"lr": float("inf")}]
    for name, default in subject.keywords.items():
        if name in ("weight_decay", "lr"):
            bad.append({name: -0.1})
        elif isinstance(default, str):
            bad.append({name: "nonsense"})
        elif isinstance(default, int) and not isinstance(default, bool) and name != "seed":
            bad += [{name: 0}, {name: -1}]
        elif name == "betas":
            bad += [{name: (1.0, 0.9)}, {name: (0.9, -0.1)}]
        elif name == "always_train":
            bad.append({name: ("no_such_part",)})
    for given in bad:
        _refuses(functools.partial(subject.build, build_model(), **given), f"{given}")


def _refuses(call: Callable[[], Any], what: str, error: type[Exception] = ValueError) -> None:
    try:
        call()
    except error:
        return
    raise AssertionError(f"{what} is not refused")


def takes_its_own_state_back_at_the_start(subject: Subject) -> None:
    # what accelerate does when it prepares an optimizer
    model, other = build_model(), build_model()
    optimizer, plain = subject.build(model), subject.build(other)
    optimizer.load_state_dict(optimizer.state_dict())
    assert train(model, optimizer, 6) == train(other, plain, 6)


def leaves_global_randomness_alone(subject: Subject) -> None:
    before = torch.get_rng_state()
    model = build_model()
    optimizer = subject.build(model)
    train(model, optimizer, 8)
    optimizer.advance()
    assert torch.equal(torch.get_rng_state(), before), "the global generator was used"


def updates_in_backward_as_in_step(subject: Subject) -> None:
    if "in_backward" not in subject.keywords:
        return
    model, other = build_model(), build_model()
    train(model, subject.build(model, in_backward=True), 10)
    train(other, subject.build(other, in_backward=False), 10)
    assert not changed(state_of(model), other), "updates inside the backward pass give other weights"


def refuses_accumulation_in_backward(subject: Subject) -> None:
    model = build_model()
    optimizer = subject.build(model, **({"in_backward": True} if "in_backward" in subject.keywords else {}))
    if optimizer.in_backward:
        optimizer.backward(loss_of(model, 0))
        _refuses(lambda: optimizer.backward(loss_of(model, 1)), "a second backward pass before step()", RuntimeError)


def rounds_at_random_with_the_right_mean(subject: Subject) -> None:
    """One step with small updates to bf16 weights, with many different draws."""
    if "stochastic_rounding" not in subject.keywords:
        return
    lr = 1e-3 * subject.method.example["lr"]
    start = weights_of(build_model(torch.bfloat16))
    nearest, _ = _one_step_in_bf16(subject, lr=lr, stochastic_rounding=False)
    draws = [_one_step_in_bf16(subject, draw, lr=lr, stochastic_rounding=True)[0] for draw in range(DRAWS)]
    lost = {name for name, p in nearest.items() if torch.equal(p, start[name])}
    kept = {name for draw in draws for name in lost if not torch.equal(draw[name], start[name])}
    assert kept, "no draw keeps an update that rounding to the nearest loses"
    if "master_weights" in subject.keywords:
        _, masters = _one_step_in_bf16(subject, lr=lr, stochastic_rounding=False, master_weights=True)
        error = noise = 0.0
        for name, (master, places) in masters.items():
            unit = torch.ldexp(torch.ones_like(master), torch.frexp(master).exponent - 8)  # to the next number in bf16
            mean = torch.stack([draw[name].float().flatten()[places] for draw in draws]).mean(0)
            update = master - start[name].float().flatten()[places]
            share = (master / unit).frac().abs()
            error += ((mean - master) / unit * update.sign()).sum().item()
            noise += (share * (1 - share)).sum().item() / DRAWS
        assert noise > 0.0 and abs(error) < 5 * noise**0.5, f"the mean is off by {error / noise**0.5:.1f} deviations"


DRAWS = 24


def _one_step_in_bf16(
    subject: Subject, draw: int = 0, **more: Any
) -> tuple[dict[str, Tensor], dict[str, tuple[Tensor, Tensor]]]:
    """The weights afterwards, and the fp32 masters, flattened, with their positions in the weights if known."""
    masters = {} if "master_weights" not in subject.keywords else {"master_weights": False}
    model = build_model(torch.bfloat16)
    optimizer = subject.build(model, **{**masters, **more})
    optimizer._steps_done = draw
    train(model, optimizer, 1)
    name_of: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    kept = {}
    for p, state in optimizer.state.items():
        places = state.get("index", torch.arange(p.numel()))
        if "master" in state and state["master"].numel() == len(places):
            kept[name_of[p]] = (state["master"].flatten(), places)
    return weights_of(model), kept


def runs_on_fake_tensors(subject: Subject) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = TinyTransformer()
        optimizer = subject.build(model)
        optimizer.worst_case()
        tokens, labels = torch.zeros(16, 6, dtype=torch.long), torch.zeros(16, dtype=torch.long)
        for step in range(1 + min(optimizer.cycle_length, 2)):
            optimizer.ask(lambda: F.cross_entropy(model(tokens), labels))
            optimizer.step()
            optimizer.zero_grad()
            if step:  # two steps on the first selection: the second one finds its state there
                optimizer.advance()
        optimizer.state_bytes()


def frees_the_model_when_nobody_needs_it(subject: Subject) -> None:
    for more in [{}, {"in_backward": True}] if "in_backward" in subject.keywords else [{}]:
        model = build_model()
        optimizer = subject.build(model, **more)
        train(model, optimizer, 2)
        known = weakref.ref(model)
        del model, optimizer
        gc.collect()
        assert known() is None, "the method keeps a model alive that nothing else refers to"


CHECKS: list[Callable[[Subject], None]] = [
    is_an_optimizer_of_the_models_parameters,
    describes_itself,
    the_loss_falls,
    follows_a_scheduler,
    resumes_to_the_last_bit,
    resumes_to_the_last_bit_in_bfloat16,
    leaves_a_state_that_it_loads_as_it_is,
    refuses_the_state_of_another,
    keeps_every_tensor_in_state,
    never_changes_its_groups,
    never_moves_what_was_frozen,
    trains_what_it_selects_and_nothing_else,
    refuses_a_state_that_does_not_fit,
    leaves_the_model_as_it_was_when_it_refuses,
    refuses_what_is_no_model_and_a_model_in_training,
    says_what_the_finished_model_will_be,
    finishes_with_a_plain_model,
    refuses_bad_values,
    takes_its_own_state_back_at_the_start,
    leaves_global_randomness_alone,
    updates_in_backward_as_in_step,
    refuses_accumulation_in_backward,
    rounds_at_random_with_the_right_mean,
    runs_on_fake_tensors,
    frees_the_model_when_nobody_needs_it,
]
