"""SinkGD (arXiv 2502.06742): against its algorithm written down plainly, its fixed point, and hand counts."""

import math

import pytest
import torch
from torch import nn

from optimizers import SinkGD
from optimizers.contract import build_model, train
from optimizers.shared.matrices import layer_matrices

SHAPES = [(5, 5), (4, 9), (9, 4), (1, 6), (6, 1)]


def matrices(*shapes, dtype=torch.float32):
    """A model whose layers are bare matrices."""
    model = nn.Module()
    model.layers = nn.ModuleList(nn.Linear(columns, rows, bias=False) for rows, columns in shapes)
    return model.to(dtype)


def steps_of(gradients, size=1.0, dtype=torch.float32, **given):
    """What one update with `gradients` takes away from the weights."""
    model = matrices(*(g.shape for g in gradients), dtype=dtype)
    for p, g in zip(model.parameters(), gradients, strict=True):
        nn.init.zeros_(p)
        p.grad = (size * g).to(dtype)
    SinkGD(model, lr=1.0, scale=1.0, **given).step()
    return [-p.detach() for p in model.parameters()]


def random(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def plain(x, iterations):
    """Algorithm 3."""
    m, n = x.shape
    for _ in range(iterations):
        x = math.sqrt(n) * x / x.norm(dim=1, keepdim=True)
        x = math.sqrt(m) * x / x.norm(dim=0, keepdim=True)
    return x


@pytest.mark.parametrize("iterations", [1, 5])
def test_a_step_is_the_papers_algorithm_for_any_shape(iterations):
    gradients = [random(shape) for shape in SHAPES]
    for g, step in zip(gradients, steps_of(gradients, iterations=iterations), strict=True):
        torch.testing.assert_close(step, plain(g, iterations), rtol=1e-5, atol=1e-5)


def test_after_many_iterations_all_rows_and_all_columns_are_of_one_size():
    (step,) = steps_of([random((7, 12))], iterations=200)
    torch.testing.assert_close(step.norm(dim=1), torch.full((7,), math.sqrt(12)), rtol=1e-4, atol=0)
    torch.testing.assert_close(step.norm(dim=0), torch.full((12,), math.sqrt(7)), rtol=1e-4, atol=0)


@pytest.mark.parametrize("size", [1e-25, 1e12])
def test_the_step_does_not_depend_on_the_size_of_the_gradient(size):
    gradients = [random((7, 12))]
    torch.testing.assert_close(steps_of(gradients, size), steps_of(gradients), rtol=1e-4, atol=1e-5)


def test_rows_and_columns_of_zeros_do_not_move_and_spoil_nothing():
    g = random((6, 8))
    g[2], g[:, 5] = 0.0, 0.0
    (step,) = steps_of([g])
    assert step.isfinite().all() and not step[2].any() and not step[:, 5].any()
    assert not steps_of([torch.zeros(3, 4)])[0].any()


def test_a_low_precision_gradient_is_normalised_in_fp32():
    g = random((6, 8)).bfloat16()
    (step,) = steps_of([g], dtype=torch.bfloat16)
    torch.testing.assert_close(step, plain(g.float(), 5).bfloat16())


def test_weight_decay_is_not_scaled():
    model = matrices((4, 6))
    (p,) = model.parameters()
    before = p.detach().clone()
    p.grad = torch.zeros_like(p)
    SinkGD(model, lr=0.1, weight_decay=0.5, scale=0.01).step()
    torch.testing.assert_close(p.detach(), 0.95 * before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_keeps_nothing_for_the_layers_matrices_and_two_moments_for_the_rest(dtype):
    model = build_model(dtype)
    optimizer = SinkGD(model)
    train(model, optimizer, 2)
    inside = set(layer_matrices(model))
    rest = [p for name, p in model.named_parameters() if p not in inside and not name.startswith("unused")]
    assert optimizer.state_bytes() == sum(2 * dtype.itemsize * p.numel() + 4 for p in rest)
    assert not inside & optimizer.state.keys()


@pytest.mark.parametrize("given", [{"scale": 0.0}, {"adamw_lr": -1.0}, {"iterations": 1.5}])
def test_values_out_of_range_are_refused(given):
    with pytest.raises(ValueError, match=f"{next(iter(given))} must be"):
        SinkGD(build_model(), **given)
