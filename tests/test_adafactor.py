"""Adafactor (arXiv 1804.04235): against the two packages whose rules go by its name, a plain one, and hand counts."""

import math

import pytest
import torch
import transformers
from torch import nn

from optimizers import Adafactor
from optimizers.contract import build_model, loss_of
from optimizers.shared import factored

SHAPES = [(6, 9), (9, 6), (1, 5), (5, 1), (7,), (), (3, 4, 5), (2, 3, 4, 5)]


class Holder(nn.Module):
    """Tensors of any shape."""

    def __init__(self, shapes=SHAPES, scale=1.0, dtype=torch.float32):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        weights = (scale * torch.randn(shape, generator=generator) for shape in shapes)
        self.weights = nn.ParameterList(nn.Parameter(weight.to(dtype)) for weight in weights)


def update(optimizer, model, seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = (scale * torch.randn(p.shape, generator=generator)).to(p.dtype)
    optimizer.step()


def groups(model, weight_decay):
    params = list(model.parameters())
    return [
        {"params": [p for p in params if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]


def of_transformers(model, lr, weight_decay=0.0, **given):
    settings = {"relative_step": False, "scale_parameter": False, **given}
    return transformers.Adafactor(groups(model, weight_decay), lr=lr, **settings)


def of_torch(model, lr, weight_decay=0.0, **given):
    names = {"decay_rate": "beta2_decay", "clip_threshold": "d"}
    settings = {names.get(name, name): value for name, value in given.items()}
    return torch.optim.Adafactor(groups(model, weight_decay), lr=lr, **settings)


PEERS = {"transformers": of_transformers, "torch": of_torch}


@pytest.mark.parametrize("rule", PEERS)
@pytest.mark.parametrize("given", [{}, {"weight_decay": 0.1}, {"decay_rate": -0.5, "clip_threshold": 2.0}], ids=str)
@pytest.mark.parametrize("size", [10.0, 1e-6])  # of gradients: the second one lets eps_1 of torch's rule show
def test_each_rule_is_its_packages_to_rounding_on_tensors_of_any_shape(rule, given, size):
    ours, theirs = Holder(), Holder()
    optimizer, peer = Adafactor(ours, lr=0.01, rule=rule, **given), PEERS[rule](theirs, lr=0.01, **given)
    for step in range(30):
        update(optimizer, ours, step, size)
        update(peer, theirs, step, size)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rule", PEERS)
def test_a_transformer_ends_with_the_packages_weights(rule):
    ours, theirs = build_model(), build_model()
    optimizer, peer = Adafactor(ours, lr=3e-3, rule=rule), PEERS[rule](theirs, lr=3e-3)
    for step in range(20):
        optimizer.zero_grad()
        optimizer.backward(loss_of(ours, step))
        # the gradient of a bias of keys is rounding noise alone, and a step is of one size whatever the gradient's is
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            q.grad = None if p.grad is None else p.grad.clone()
        optimizer.step()
        peer.step()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6, msg=name)


def test_by_torchs_rule_steps_shrink_with_the_weights_and_with_time():
    sizes = []
    for scale in (1.0, 10.0):
        model = Holder([(40, 50)], scale)
        optimizer = Adafactor(model, lr=1.0, rule="torch")
        for step in range(4):
            before = model.weights[0].detach().clone()
            update(optimizer, model, step)
            sizes.append(((model.weights[0].detach() - before).norm() / before.norm()).item())
    for relative in (sizes[:4], sizes[4:]):  # the update's own RMS is at most 1, and near it
        for step, size in enumerate(relative, start=1):
            assert size == pytest.approx(1 / math.sqrt(step), rel=0.1)


@pytest.mark.parametrize("rule", PEERS)
def test_a_chunk_at_a_time_gives_the_same_weights(rule, monkeypatch):
    whole, cut = Holder(), Holder()
    for model, chunk in ((whole, 2**24), (cut, 7)):
        monkeypatch.setattr(factored, "CHUNK", chunk)
        optimizer = Adafactor(model, lr=0.1, weight_decay=0.1, rule=rule)
        for step in range(5):
            update(optimizer, model, step)
    for p, q in zip(whole.parameters(), cut.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rule", PEERS)
def test_low_precision_weights_are_updated_in_fp32_and_rounded_once(rule):
    low, exact = Holder(dtype=torch.bfloat16), Holder()
    for p, q in zip(low.parameters(), exact.parameters(), strict=True):
        q.data.copy_(p)
    update(Adafactor(low, lr=0.1, weight_decay=0.1, rule=rule), low, 0)
    generator = torch.Generator().manual_seed(0)
    for q in exact.parameters():
        q.grad = torch.randn(q.shape, generator=generator).bfloat16().float()
    Adafactor(exact, lr=0.1, weight_decay=0.1, rule=rule).step()
    for p, q in zip(low.parameters(), exact.parameters(), strict=True):
        assert torch.equal(p, q.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_keeps_a_value_for_each_row_and_column_and_for_each_entry_of_a_vector(dtype):
    model = Holder(dtype=dtype)
    optimizer = Adafactor(model)
    update(optimizer, model, 0)
    values = (6 + 9) + (9 + 6) + (1 + 5) + (5 + 1) + 7 + 1 + 3 * (4 + 5) + 2 * 3 * (4 + 5)
    assert optimizer.state_bytes() == 4 * values


def test_the_gradients_are_left_as_they_are():
    model = Holder()
    optimizer = Adafactor(model)
    update(optimizer, model, 0)
    generator = torch.Generator().manual_seed(0)
    assert all(torch.equal(p.grad, torch.randn(p.shape, generator=generator)) for p in model.parameters())


@pytest.mark.parametrize(
    "given",
    [{"decay_rate": 0.0}, {"decay_rate": -math.inf}, {"clip_threshold": 0.0}, {"eps": (1e-30,)}, {"eps": (-1.0, 0.1)}],
)
def test_values_out_of_range_are_refused(given):
    with pytest.raises(ValueError, match=f"{next(iter(given))} must be"):
        Adafactor(build_model(), **given)
