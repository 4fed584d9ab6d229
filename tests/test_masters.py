"""fp32 masters: a low-precision model trains as the fp32 one does, and is its rounding at every step."""

import pytest
import torch

import optimizers
from optimizers.contract import Subject, build_model

STEPS = 12
METHODS = [name for name in optimizers.available() if "master_weights" in optimizers.resolve(name)]
ONE_CHOICE = {"switch_every": 1000, "patience": 1000}  # what a method leaves loses its master, by design


def subject(method, **given):
    cls, known = optimizers.get(method), optimizers.resolve(method)
    fixed = {key: value for key, value in ONE_CHOICE.items() if key in known}
    return Subject(cls, {**cls.example, **fixed, "master_weights": True, **given})


def step(optimizer, gradients):
    """A step with these gradients, by parameter, of what is trained now; the loss doesn't matter."""
    optimizer.backward(torch.zeros((), requires_grad=True))
    for p, gradient in gradients.items():
        p.grad = gradient if p.requires_grad else None
    optimizer.step()
    optimizer.zero_grad()


def ones(model):
    return {p: torch.ones_like(p) for p in model.parameters()}


def test_there_are_methods_with_masters():
    assert {"adamw", "sgd", "badam", "blockllm", "lisa", "hft", "lora"} <= set(METHODS)


@pytest.mark.parametrize("method", METHODS)
def test_with_masters_bfloat16_weights_are_the_rounding_of_an_fp32_training_with_the_same_gradients(method):
    low, full = build_model(torch.bfloat16), build_model(torch.bfloat16).float()
    # small rates: most updates are below one unit in the last place of bfloat16, and must add up
    rate = subject(method).hyperparameters["lr"] / 30
    ours, reference = subject(method, lr=rate).build(low), subject(method, lr=rate, master_weights=False).build(full)
    with torch.no_grad():
        for p, q in zip(low.parameters(), full.parameters(), strict=True):  # what a method added is random
            q.copy_(p)
    start = [p.detach().clone() for p in low.parameters()]
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        gradients = [torch.randn(p.shape, generator=generator).bfloat16() for p in low.parameters()]
        step(ours, dict(zip(low.parameters(), gradients, strict=True)))
        step(reference, {p: g.float() for p, g in zip(full.parameters(), gradients, strict=True)})
    pairs = list(zip(low.parameters(), full.parameters(), strict=True))
    assert all(torch.equal(p, q.bfloat16()) for p, q in pairs)
    assert any(not torch.equal(p, before) for p, before in zip(low.parameters(), start, strict=True))
    masters = [p for p in ours.state if "master" in ours.state[p]]
    assert masters and all(ours.state[p]["master"].dtype == torch.float32 for p in masters)


@pytest.mark.parametrize("method", [method for method in METHODS if method != "adamw8bit"])
def test_without_masters_all_that_is_kept_a_bfloat16_weight_is_bfloat16(method):
    model = build_model(torch.bfloat16)
    optimizer = subject(method, master_weights=False).build(model)
    step(optimizer, ones(model))
    matrices = {p: state for p, state in optimizer.state.items() if p.dim() > 1}
    kept = [(t, p) for p, state in matrices.items() for t in state.values() if torch.is_tensor(t)]
    assert all(t.dtype in (torch.bfloat16, torch.int32, torch.uint8) for t, p in kept if 4 * t.numel() > p.numel())
    assert not any("master" in state for state in optimizer.state.values())


DECAYED = [
    method
    for method in optimizers.available()
    if "weight_decay" in optimizers.resolve(method) and not optimizers.get(method).adds_parameters
]


def decay(method, dtype, steps=5):
    """How far `weight_decay` shrinks a layer's matrices beside steps that don't depend on them, summed up."""

    def trained(weight_decay):
        model = build_model(dtype)
        exact = {"master_weights": False} if "master_weights" in optimizers.resolve(method) else {}
        optimizer = Subject(optimizers.get(method), {"lr": 1e-2, "weight_decay": weight_decay, **exact}).build(model)
        generator = torch.Generator().manual_seed(0)
        size = 0.01 if method == "mezo" else 1.0  # its steps grow with the number of weights
        for _ in range(steps):
            pairs = [(p, torch.randn(p.shape, generator=generator).to(dtype)) for p in model.parameters()]
            optimizer.ask(lambda pairs=pairs: sum((p * g).sum(dtype=torch.float32) for p, g in pairs) * size)
            optimizer.step()
            optimizer.zero_grad()
        return {name: p.detach().double() for name, p in model.named_parameters() if p.dim() == 2 and "layers" in name}

    start, without, with_decay = build_model(dtype), trained(0.0), trained(0.1)
    return sum(((without[n] - with_decay[n]) * start.get_parameter(n)).sum() for n in without).item()


@pytest.mark.parametrize("method", DECAYED)
def test_a_weight_decay_far_below_bfloat16s_last_bit_comes_with_the_steps(method):
    assert 0.5 < decay(method, torch.bfloat16) / decay(method, torch.float32) < 1.5


@pytest.mark.parametrize("method", METHODS)
def test_fp32_weights_need_no_master(method):
    model = build_model()
    optimizer = subject(method).build(model)
    step(optimizer, ones(model))
    assert not any("master" in state for state in optimizer.state.values())
