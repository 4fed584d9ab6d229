"""LOMO against what it must be: torch's SGD and clipping, to the last bit, with one gradient at a time."""

import sys

import lomo_optim
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from optimizers import LOMO, SGD
from optimizers.contract import build_model, loss_of, train, weights_of

STEPS = 12


def sgd(model, lr, weight_decay=0.0):
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.SGD(groups, lr=lr, weight_decay=weight_decay)


def train_with_sgd(model, clip=lambda model: None, steps=STEPS, **hyperparameters):
    optimizer = sgd(model, **hyperparameters)
    for step in range(steps):
        loss_of(model, step).backward()
        clip(model)
        optimizer.step()
        optimizer.zero_grad()


def expect_equal(model, other):
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_lomo_is_sgd_to_the_last_bit(weight_decay):
    model, other = build_model(), build_model()
    train(model, LOMO(model, lr=0.3, weight_decay=weight_decay), STEPS)
    train_with_sgd(other, lr=0.3, weight_decay=weight_decay)
    expect_equal(model, other)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("clip_norm", [0.1, 1.0, 100.0])  # clips always, sometimes, never
def test_clipped_lomo_is_clip_grad_norm_and_sgd_to_the_last_bit(clip_norm, weight_decay):
    model, other = build_model(), build_model()
    norms = []
    train(model, LOMO(model, lr=0.3, weight_decay=weight_decay, clip_norm=clip_norm), STEPS)
    train_with_sgd(
        other,
        lambda m: norms.append(nn.utils.clip_grad_norm_(m.parameters(), clip_norm).item()),
        lr=0.3,
        weight_decay=weight_decay,
    )
    expect_equal(model, other)
    clipped = sum(norm > clip_norm for norm in norms)
    assert clipped == STEPS if clip_norm == 0.1 else clipped < STEPS


def test_lomo_clipped_by_value_is_clip_grad_value_and_sgd_to_the_last_bit():
    model, other = build_model(), build_model()
    train(model, LOMO(model, lr=0.3, clip_value=0.01), STEPS)
    train_with_sgd(other, lambda m: nn.utils.clip_grad_value_(m.parameters(), 0.01), lr=0.3)
    expect_equal(model, other)


def test_a_scheduler_reaches_the_update_inside_the_backward_pass():
    model, other = build_model(), build_model()
    optimizer, reference = LOMO(model, lr=0.3), sgd(other, lr=0.3)
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1.0 / (1 + step)) for o in (optimizer, reference)]
    for step in range(STEPS):
        train(model, optimizer, 1, start=step)
        loss_of(other, step).backward()
        reference.step()
        reference.zero_grad()
        for schedule in schedules:
            schedule.step()
    expect_equal(model, other)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_both_passes_of_a_clip_see_the_same_dropout_masks(checkpointed):
    def build():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 1))

    def loss(model):
        torch.manual_seed(1)
        x = torch.ones(4, 8)
        y = checkpoint(model, x, use_reentrant=False) if checkpointed else model(x)
        return y.square().mean()

    with torch.random.fork_rng(devices=[]):
        model, other = build(), build()
        optimizer, reference = LOMO(model, lr=0.3, clip_norm=0.01), torch.optim.SGD(other.parameters(), lr=0.3)
        optimizer.backward(loss(model))
        loss(other).backward()
    nn.utils.clip_grad_norm_(other.parameters(), 0.01)
    reference.step()
    expect_equal(model, other)


@pytest.mark.parametrize("clip_norm", [None, 0.1])
def test_no_two_gradients_live_at_a_time(clip_norm):
    model = build_model()
    optimizer = LOMO(model, lr=0.1, clip_norm=clip_norm)
    alive = []
    for p in model.parameters():  # called when a gradient is there and before it is accumulated
        p.register_hook(lambda grad: alive.append(sum(q.grad is not None for q in model.parameters())))
    train(model, optimizer, 2)
    passes = 2 if clip_norm else 1
    reached = sum(1 for name, _ in model.named_parameters() if not name.startswith("unused"))
    assert alive == [0] * (2 * passes * reached)


def test_lomo_keeps_nothing():
    model = build_model()
    optimizer = LOMO(model, lr=0.1, clip_norm=1.0, weight_decay=0.1)
    train(model, optimizer, 3)
    assert optimizer.state_bytes() == 0 and optimizer.state_dict()["state"] == {}


def test_a_clip_that_was_bypassed_is_refused_before_a_weight_moves_and_training_can_go_on():
    model, other = build_model(), build_model()
    optimizer = LOMO(model, lr=0.3, clip_norm=0.1)
    before = weights_of(model)
    with pytest.raises(RuntimeError, match=r"backward\(loss\)"):
        loss_of(model, 0).backward()
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    optimizer.zero_grad()
    train(model, optimizer, 3)
    train(other, LOMO(other, lr=0.3, clip_norm=0.1), 3)
    expect_equal(model, other)


def test_a_clipped_second_backward_pass_is_refused_before_a_weight_moves():
    model = build_model()
    optimizer = LOMO(model, lr=0.3, clip_norm=0.1)
    optimizer.backward(loss_of(model, 0))
    before = weights_of(model)
    with pytest.raises(RuntimeError, match="accumulated"):
        optimizer.backward(loss_of(model, 1))
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_only_clipping_by_norm_needs_to_see_the_loss():
    needs = [LOMO(build_model(), **given).needs_loss for given in ({}, {"clip_value": 1.0}, {"clip_norm": 1.0})]
    assert needs == [False, False, True]


@pytest.mark.parametrize(
    "given",
    [{"clip_norm": 0.0}, {"clip_norm": -1.0}, {"clip_value": float("nan")}, {"clip_norm": 1.0, "clip_value": 1.0}],
)
def test_a_clip_that_makes_no_sense_is_refused(given):
    with pytest.raises(ValueError, match="clip_"):
        LOMO(build_model(), **given)


def test_low_precision_weights_are_updated_in_fp32_and_rounded_once():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Linear(64, 64, bias=False).bfloat16()
        x = torch.randn(8, 64).bfloat16()
    before = model.weight.detach().float()
    optimizer = LOMO(model, lr=0.3)
    grad = torch.autograd.grad(model(x).float().square().mean(), model.weight)[0].float()
    optimizer.backward(model(x).float().square().mean())
    assert torch.equal(model.weight, (before - 0.3 * grad).bfloat16())


def test_sgd_moves_low_precision_weights():
    # torch's fused kernel doesn't, on a CPU
    model, other = build_model(torch.bfloat16), build_model(torch.bfloat16)
    train(model, SGD(model, lr=0.25), 3)  # a rate that is exact in bf16, so that nothing but the kernel differs
    train(other, LOMO(other, lr=0.25), 3)
    expect_equal(model, other)


def python_calls(tensors):
    """How many Python functions a training step of a model with that many tensors calls."""
    model = nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(tensors)))
    optimizer = LOMO(model, lr=0.1)
    loss = model(torch.ones(1, 2)).sum()
    calls = 0

    def count(frame, event, arg):
        nonlocal calls
        calls += event == "call"

    sys.setprofile(count)
    try:
        optimizer.backward(loss)
        optimizer.step()
    finally:
        sys.setprofile(None)
    return calls


def test_the_work_grows_with_the_number_of_tensors_not_with_its_square():
    few, many = python_calls(20), python_calls(200)
    assert many < 10.5 * few


def test_lomo_agrees_with_the_authors_package():
    model, other = build_model(), build_model()
    train(model, LOMO(model, lr=0.3, clip_norm=0.5), STEPS)
    reference = lomo_optim.Lomo(other, lr=0.3, clip_grad_norm=0.5)
    for step in range(STEPS):
        loss = loss_of(other, step)
        reference.grad_norm(loss)
        reference.fused_backward(loss, 0.3)
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6, msg=name)
