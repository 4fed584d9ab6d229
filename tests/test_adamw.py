"""AdamW and SGD against torch's own, and what the base class gives to every method."""

import pytest
import torch
from torch import nn
from torch.optim.sgd import sgd as torch_sgd

from optimizers import SGD, AdamW
from optimizers.contract import build_model, loss_of, train, weights_of
from optimizers.shared import arithmetic


def torch_groups(model):
    params = list(model.parameters())
    return [
        {"params": [p for p in params if p.dim() >= 2]},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]


def train_plainly(model, optimizer, steps):
    for step in range(steps):
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("in_backward", [False, True])
def test_adamw_is_torchs_fused_adamw_to_the_last_bit(in_backward):
    model, other = build_model(), build_model()
    train(model, AdamW(model, lr=1e-2, weight_decay=0.1, in_backward=in_backward), 20)
    train_plainly(other, torch.optim.AdamW(torch_groups(other), lr=1e-2, weight_decay=0.1, fused=True), 20)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sgd_is_torchs_sgd_to_the_last_bit(momentum, dtype):
    model, other = build_model(dtype), build_model(dtype)
    train(model, SGD(model, lr=0.1, weight_decay=0.1, momentum=momentum), 20)
    groups = torch_groups(other)
    train_plainly(other, torch.optim.SGD(groups, lr=0.1, weight_decay=0.1, momentum=momentum, foreach=False), 20)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_momentum_of_a_weight_that_is_reached_late_works_with_torchs_fused_kernel_as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(arithmetic, "sgd", lambda *given, fused, **more: torch_sgd(*given, fused=True, **more))
    model, other = (nn.ParameterList([torch.ones(3), torch.ones(3)]) for _ in range(2))
    optimizer, plain = SGD(model, lr=0.1, momentum=0.9), torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9)
    for step in range(6):
        for (first, second), one in ((model, optimizer), (other, plain)):
            ((step + 1) * first.sum() + ((first * second).sum() if step > 2 else 0.0)).backward()
            one.step()
            one.zero_grad()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_a_master_makes_bfloat16_weights_the_rounding_of_an_fp32_run_with_the_same_gradients():
    model, reference = build_model(torch.bfloat16), build_model(torch.bfloat16).float()
    optimizer = AdamW(model, lr=1e-3)
    plain = torch.optim.AdamW(torch_groups(reference), lr=1e-3, weight_decay=0.01, fused=True)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        for p, q in zip(model.parameters(), reference.parameters(), strict=True):
            p.grad = torch.randn(p.shape, generator=generator).bfloat16()
            q.grad = p.grad.float()
        optimizer.step()
        plain.step()
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(p, q.bfloat16())
        assert torch.equal(optimizer.state[p]["master"], q)


@pytest.mark.parametrize(("dtype", "master_weights", "expected"), [
    (torch.float32, True, 8), (torch.bfloat16, True, 12), (torch.bfloat16, False, 4),
])  # fmt: skip
def test_adamw_keeps_what_its_formula_says(dtype, master_weights, expected):
    model = build_model(dtype)
    optimizer = AdamW(model, master_weights=master_weights)
    train(model, optimizer, 3)
    reached = [p for name, p in model.named_parameters() if not name.startswith("unused")]
    assert optimizer.state_bytes() == sum(expected * p.numel() + 4 for p in reached)


def test_sgd_without_momentum_keeps_nothing():
    model = build_model()
    optimizer = SGD(model)
    train(model, optimizer, 3)
    assert optimizer.state_bytes() == 0


def test_in_backward_one_gradient_lives_at_a_time():
    model = build_model()
    optimizer = AdamW(model, in_backward=True)
    optimizer.backward(loss_of(model, 0))
    assert all(p.grad is None for p in model.parameters())


def test_a_closure_is_called_once_with_gradients_on_and_its_loss_is_given_back():
    model = build_model()
    optimizer = AdamW(model)
    before, losses = weights_of(model), []

    def closure():
        losses.append(loss_of(model, 0))
        losses[-1].backward()
        return losses[-1]

    assert optimizer.step(closure) is losses[0] and len(losses) == 1
    assert any(not torch.equal(before[name], p) for name, p in model.named_parameters())


def test_a_state_of_a_model_with_other_parameters_is_refused():
    state = AdamW(build_model()).state_dict()
    other = build_model()
    other.classifier.requires_grad_(False)
    with pytest.raises(ValueError, match="model with other parameters"):
        AdamW(other).load_state_dict(state)


def test_a_model_with_nothing_to_train_is_refused():
    with pytest.raises(ValueError, match="nothing to train"):
        AdamW(build_model().requires_grad_(False))


def test_state_bytes_count_a_storage_once_and_a_view_as_its_whole_base():
    model = build_model()
    optimizer = AdamW(model)
    base = torch.zeros(100)
    optimizer.state[model.classifier.bias] = {"view": base[:3], "again": base[3:6]}
    assert optimizer.state_bytes() == 400
