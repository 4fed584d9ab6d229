"""AdaLomo against its formulas, written out plainly, and against the authors' package."""

import math

import lomo_optim
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from optimizers import AdaLomo
from optimizers.contract import build_model, loss_of, train, weights_of
from optimizers.shared import factored


def random(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Plain:
    """Algorithm 1 on one matrix or vector, in double precision, nothing saved on memory."""

    def __init__(self, weight, lr, weight_decay=0.0, eps=(1e-30, 1e-3), threshold=1.0):
        self.w, self.lr, self.decay, self.eps, self.threshold = weight.double(), lr, weight_decay, eps, threshold
        self.t = 0
        self.moments = []

    def step(self, gradient):
        g = gradient.double()
        self.t += 1
        beta = 1.0 - self.t**-0.8
        square = g**2 + self.eps[0]
        means = [square.mean(1), square.mean(0)] if g.dim() == 2 else [square]
        old = self.moments or [torch.zeros_like(m) for m in means]
        self.moments = [beta * m + (1 - beta) * new for m, new in zip(old, means, strict=True)]
        if g.dim() == 2:
            row, column = self.moments
            v = torch.outer(row, column) / row.mean()
        else:
            (v,) = self.moments
        u = g / v.sqrt()
        u /= max(1.0, u.square().mean().sqrt().item() / self.threshold)
        rate = self.lr * max(self.eps[1], self.w.square().mean().sqrt().item())
        self.w = self.w * (1 - rate * (self.decay if g.dim() == 2 else 0.0)) - rate * u


class Holder(nn.Module):
    """A model whose gradients are whatever it is given."""

    def __init__(self, *weights):
        super().__init__()
        self.weights = nn.ParameterList(weights)

    def loss(self, *gradients):
        return sum((w * g).sum() for w, g in zip(self.weights, gradients, strict=True))


def step(model, optimizer, *gradients):
    optimizer.backward(model.loss(*gradients))
    optimizer.step()


def expect_close(model, other):
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        if not name.endswith("k_proj.bias"):  # softmax cancels it: its gradient is rounding noise, at any scale
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("chunk", [7, 64, 2**20])  # a row at a time, a few rows, all at once
@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
def test_adalomo_follows_its_formulas(weight_decay, chunk, monkeypatch):
    monkeypatch.setattr(factored, "CHUNK", chunk)
    weights = [random(20, 30, scale=0.1), random(30, seed=1), random(5, 4, seed=2, scale=1e-5)]
    model = Holder(*(w.clone() for w in weights))
    optimizer = AdaLomo(model, lr=0.1, weight_decay=weight_decay)
    plain = [Plain(w, 0.1, weight_decay) for w in weights]
    for t in range(20):
        gradients = [random(*w.shape, seed=100 * t + i, scale=10.0 ** (t % 3)) for i, w in enumerate(weights)]
        step(model, optimizer, *gradients)
        for one, gradient in zip(plain, gradients, strict=True):
            one.step(gradient)
    for weight, one in zip(model.weights, plain, strict=True):
        torch.testing.assert_close(weight.double(), one.w, rtol=1e-5, atol=1e-7)


def test_adalomo_agrees_with_the_authors_package(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)  # it can't do without a GPU otherwise
    model, other = build_model(), build_model()
    train(model, AdaLomo(model, lr=0.03), 12)
    reference = lomo_optim.AdaLomo(other, lr=0.03)
    for t in range(12):
        reference.fused_backward(loss_of(other, t), 0.03)
    expect_close(model, other)


@pytest.mark.parametrize("scale", [1e-3, 1e3, 2.0**20])
def test_the_scale_of_the_loss_does_not_matter(scale):
    model, other = build_model(), build_model()
    train(model, AdaLomo(model, lr=0.03), 10)
    optimizer = AdaLomo(other, lr=0.03)
    for t in range(10):
        optimizer.backward(scale * loss_of(other, t))
        optimizer.step()
    expect_close(model, other)


def test_a_step_moves_a_matrix_by_the_rate_times_its_rms():
    weight = random(20, 30, scale=0.1)
    model = Holder(weight.clone())
    # rank one, so that the factors are exact: the update is the sign of the gradient, of RMS 1
    step(model, AdaLomo(model, lr=0.01), torch.outer(random(20, seed=1), random(30, seed=2)))
    moved = (model.weights[0] - weight).abs()
    torch.testing.assert_close(moved, torch.full_like(moved, 0.01 * weight.square().mean().sqrt()), rtol=1e-4, atol=0)


def test_weights_of_zero_move_by_the_rate_times_the_second_eps():
    model = Holder(torch.zeros(20))
    step(model, AdaLomo(model, lr=0.5), random(20))
    torch.testing.assert_close(model.weights[0].abs(), torch.full((20,), 0.5 * 1e-3))


def test_the_state_is_a_row_and_a_column_for_a_matrix():
    model = Holder(random(20, 30), random(7), random(()))
    optimizer = AdaLomo(model, lr=0.1)
    step(model, optimizer, random(20, 30, seed=1), random(7, seed=2), random((), seed=3))
    sizes = [(len(s["row"]), len(s["column"])) for s in (optimizer.state[p] for p in model.weights)]
    assert sizes == [(20, 30), (7, 1), (1, 1)]
    assert optimizer.state_bytes() == 4 * (20 + 30 + 7 + 1 + 1 + 1)


@pytest.mark.parametrize(
    ("shape", "factors"), [((4, 16, 32), (64, 32)), ((64, 32, 3, 3), (64, 288)), ((2, 3, 5, 7), (30, 7))]
)
def test_a_tensor_of_more_dimensions_is_the_matrix_with_the_smallest_factors(shape, factors):
    weight, gradient = random(*shape), random(*shape, seed=1)
    model, matrix = Holder(weight.clone()), Holder(weight.reshape(factors).clone())
    one, other = AdaLomo(model, lr=0.1), AdaLomo(matrix, lr=0.1)
    step(model, one, gradient)
    step(matrix, other, gradient.reshape(factors))
    assert {key: value.shape for key, value in one.state[model.weights[0]].items() if key != "step"} == {
        "row": (factors[0],),
        "column": (factors[1],),
    }
    torch.testing.assert_close(model.weights[0].reshape(factors), matrix.weights[0])


def test_the_layout_in_memory_does_not_matter():
    weight, gradient = random(8, 4, 3, 3), random(8, 4, 3, 3, seed=1)
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        model = Holder(weight.clone().to(memory_format=layout))
        step(model, AdaLomo(model, lr=0.1), gradient.to(memory_format=layout))
        results.append(model.weights[0].contiguous())
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_low_precision_weights_are_updated_in_fp32_and_rounded_once(weight_decay):
    weight, gradient = random(20, 30, scale=0.1).bfloat16(), random(20, 30, seed=1).bfloat16()
    model = Holder(weight.clone())
    optimizer = AdaLomo(model, lr=0.1, weight_decay=weight_decay)
    step(model, optimizer, gradient)
    plain = Plain(weight, 0.1, weight_decay)
    plain.step(gradient)
    assert {value.dtype for value in optimizer.state[model.weights[0]].values() if torch.is_tensor(value)} == {
        torch.float32
    }
    assert (model.weights[0] == plain.w.bfloat16()).float().mean() > 0.99  # but for values half-way between two


def test_a_parameter_that_is_first_reached_late_starts_with_its_own_first_step():
    late, fresh = Holder(torch.ones(4), random(5, 6)), Holder(random(5, 6))
    optimizer = AdaLomo(late, lr=0.1)
    for t in range(4):
        optimizer.backward((late.weights[0] * random(4, seed=t)).sum())
        optimizer.step()
    gradient = random(5, 6, seed=9)
    step(late, optimizer, random(4), gradient)
    step(fresh, AdaLomo(fresh, lr=0.1), gradient)
    assert torch.equal(late.weights[1], fresh.weights[0])


class Largest(TorchDispatchMode):
    """Notes the bytes of the largest storage that an operation makes."""

    def __init__(self, known):
        super().__init__()
        self.known = {t.untyped_storage()._cdata for t in known}
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, list | tuple) else [result]:
            if torch.is_tensor(t) and t.untyped_storage()._cdata not in self.known:
                self.bytes = max(self.bytes, t.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_temporary_is_larger_than_a_chunk(dtype, monkeypatch):
    monkeypatch.setattr(factored, "CHUNK", 2**20)
    p, g = nn.Parameter(torch.ones(3000, 1000, dtype=dtype)), torch.ones(3000, 1000, dtype=dtype)
    optimizer = AdaLomo(Holder(p), lr=0.1, weight_decay=0.1)
    with torch.no_grad(), Largest([p, g]) as largest:
        optimizer.update([p], [g], optimizer.param_groups[0])
    assert largest.bytes <= 4 * factored.CHUNK < 4 * p.numel()


def test_no_two_gradients_live_at_a_time():
    model = build_model()
    optimizer = AdaLomo(model, lr=0.03)
    alive = []
    for p in model.parameters():
        p.register_hook(lambda grad: alive.append(sum(q.grad is not None for q in model.parameters())))
    train(model, optimizer, 2)
    assert alive and not any(alive)


@pytest.mark.parametrize(
    "given",
    [{"decay_rate": 0.0}, {"decay_rate": -math.inf}, {"clip_threshold": 0.0}, {"eps": (1e-30,)}, {"eps": (-1.0, 0.1)}],
)
def test_values_out_of_range_are_refused(given):
    with pytest.raises(ValueError, match=next(iter(given))):
        AdaLomo(build_model(), **given)


def test_a_learning_rate_of_zero_moves_nothing():
    model = build_model()
    before = weights_of(model)
    train(model, AdaLomo(model, lr=0.0, weight_decay=0.1), 2)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
