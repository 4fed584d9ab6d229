"""Optimizers of torch's kind are methods by their path; a method with other defaults is one of its own name."""

import json

import plan_models
import pytest
import torch
from commands import DATA

import membench
import optimizers
from optimizers.contract import CHECKS, Subject, build_model, loss_of, train, weights_of

# Which values it refuses, beside a bad lr, is an optimizer's own affair.
PROMISES = [check for check in CHECKS if check.__name__ != "refuses_bad_values"]
RATES = {"torch.optim:NAdam": 3e-3, "torch.optim:RMSprop": 3e-3, "torch.optim:Muon": 0.02}


@pytest.mark.parametrize(
    "path", [pytest.param(path, marks=pytest.mark.slow if "NAdam" in path else ()) for path in RATES]
)
@pytest.mark.parametrize("check", PROMISES, ids=lambda check: check.__name__)
def test_a_stock_optimizer_keeps_the_contract(path, check):
    check(Subject(optimizers.get(path), {"lr": RATES[path]}))


@pytest.mark.parametrize("name, keywords", [("Adafactor", {}), ("SGD", {"momentum": 0.9}), ("NAdam", {"eps": 1e-6})])
def test_a_stock_optimizer_moves_weights_as_it_does_alone(name, keywords):
    ours, theirs = build_model(), build_model()
    train(ours, optimizers.create(f"torch.optim:{name}", ours, lr=0.01, weight_decay=0.1, **keywords), 5)
    groups = [
        {"params": [p for p in theirs.parameters() if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in theirs.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    alone = getattr(torch.optim, name)(groups, lr=0.01, **keywords)
    for step in range(5):
        loss_of(theirs, step).backward()
        alone.step()
        alone.zero_grad()
    for name, weight in weights_of(ours).items():
        assert torch.equal(weight, theirs.get_parameter(name)), name


class Numbered(torch.optim.SGD):
    """SGD whose step is scaled by a number that the constructor gives each tensor, as authors' packages keep seeds."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, lr=lr)
        for number, p in enumerate(p for group in self.param_groups for p in group["params"]):
            self.state[p]["number"] = number

    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    state["steps"] = state.get("steps", 0) + 1
                    p.data.add_(p.grad, alpha=-group["lr"] * state.get("number", 0) / state["steps"])


def test_what_an_optimizer_keeps_from_its_construction_on_is_used_and_saved():
    path = f"{__name__}:Numbered"
    ours, theirs = build_model(), build_model()
    method = optimizers.create(path, ours, lr=0.01)
    groups = [[p for p in theirs.parameters() if p.dim() >= 2], [p for p in theirs.parameters() if p.dim() < 2]]
    alone = Numbered([{"params": params} for params in groups], lr=0.01)
    saved = method.state_dict()
    for start in (0, 2):
        method.load_state_dict(saved)
        train(ours, method, 2, start=start)
        saved = method.state_dict()
    for step in range(4):
        loss_of(theirs, step).backward()
        alone.step()
        alone.zero_grad()
    for name, weight in weights_of(ours).items():
        assert torch.equal(weight, theirs.get_parameter(name)), name


def test_an_optimizer_of_matrices_gets_those_of_the_layers_and_adamw_the_rest():
    model, ours = build_model(), build_model()
    method = optimizers.create("torch.optim:Muon", ours, lr=0.02, weight_decay=0.1, adamw_lr=1e-2)
    assert [group["lr"] for group in method.param_groups] == [0.02, 1e-2, 1e-2]
    own = optimizers.create("muon", model, lr=0.02, weight_decay=0.1, adamw_lr=1e-2)
    train(ours, method, 3)
    train(model, own, 3)
    for name, weight in weights_of(ours).items():
        assert torch.equal(weight, model.get_parameter(name)), name


def test_what_needs_a_closure_or_refuses_a_value_says_so_in_a_sentence():
    with pytest.raises(ValueError, match="LBFGS needs a closure"):
        optimizers.create("torch.optim:LBFGS", build_model())
    with pytest.raises(ValueError, match=r"RMSprop has no hyper-parameter 'alhpa'\. Did you mean 'alpha'"):
        optimizers.resolve("torch.optim:RMSprop", alhpa=1)
    with pytest.raises(ValueError, match="Invalid alpha"):
        optimizers.create("torch.optim:RMSprop", build_model(), alpha=-1.0)


def test_a_configuration_is_the_method_with_other_defaults():
    method = optimizers.get("badam:switch_every=7:order=ascending")
    assert issubclass(method, optimizers.BAdam)
    values = optimizers.resolve("badam:switch_every=7:order=ascending")
    assert (values["switch_every"], values["order"]) == (7, "ascending")
    assert {**values, "switch_every": 100, "order": "random"} == optimizers.resolve("badam")
    assert optimizers.resolve("badam:switch_every=7", switch_every=8)["switch_every"] == 8
    assert (
        method(build_model()).extra_state()
        == optimizers.create("badam:switch_every=7:order=ascending", build_model()).extra_state()
    )
    with pytest.raises(ValueError, match=r"badam has no hyper-parameter 'swich_every'\. Did you mean 'switch_every'"):
        optimizers.get("badam:swich_every=7")
    with pytest.raises(ValueError, match="twice"):
        optimizers.get("badam:switch_every=7:switch_every=8")


def test_configurations_of_a_method_are_rows_of_their_own(tmp_path):
    rows = ["badam", "badam:switch_every=1", "torch.optim:SGD:momentum=0.9"]
    runs = membench.compare(
        rows,
        task="superglue/cb",
        data=DATA,
        out=tmp_path,
        reference=False,
        hyperparameters={"badam": {"weight_decay": 0.5}},
        learning_rate=1e-3,
        steps=2,
        batch_size=4,
        threads=1,
        quiet=True,
    )
    assert [run["method"] for run in runs] == rows and {run["status"] for run in runs} == {"ok"}
    values = [run["hyperparameters"] for run in runs]
    assert [v.get("switch_every") for v in values] == [100, 1, None]  # the method's, and the row's own
    assert values[0]["weight_decay"] == values[1]["weight_decay"] == 0.5
    assert values[2]["momentum"] == 0.9 and values[2]["lr"] == 1e-3
    assert len({run["run_id"] for run in runs}) == 3
    assert all(json.loads((tmp_path / f"{run['run_id']}.json").read_text()) == run for run in runs)


def test_stock_optimizers_and_configurations_are_planned(tmp_path):
    rows = ["torch.optim:RMSprop", "lora:rank=2", "lora:rank=4"]
    plan = membench.plan(plan_models.folder(tmp_path, "llama", 2), rows, sequence_length=8)
    assert list(plan.rows) == rows and not plan.refused
    small, large = (plan.rows[row].maximum["optimizer_state_bytes"] for row in rows[1:])
    steps = 4 * 7 * 2 * 2  # bytes of a count a factor: two factors of seven matrices in each of two layers
    assert large - steps == 2 * (small - steps)
    assert plan.rows["lora:rank=2"].formula == "2M + 36rM/m"
