"""APOLLO (arXiv 2412.05270): against the authors' package, the rule written down plainly, and hand counts."""

import math

import pytest
import torch
from torch import nn

import optimizers.apollo
from optimizers import APOLLO, Fira
from optimizers.contract import build_model, loss_of, train
from optimizers.shared.matrices import layer_matrices

SHAPES = [(4, 6), (6, 4), (5, 5), (1, 6), (6, 1)]


def matrices(*shapes, dtype=torch.float32):
    """A model whose layers are bare matrices."""
    model = nn.Module()
    model.layers = nn.ModuleList(nn.Linear(columns, rows, bias=False) for rows, columns in shapes)
    return model.to(dtype)


def give_gradients(*models, seed, size=1.0):
    generator = torch.Generator().manual_seed(seed)
    for tensors in zip(*(model.parameters() for model in models), strict=True):
        g = size * torch.randn(tensors[0].shape, generator=generator)
        for p in tensors:
            p.grad = g.to(p.dtype)


@pytest.mark.parametrize("given", [
    {"rank": 2, "scale": 1.0, "scale_type": "channel"},
    {"rank": 1, "scale": 128.0, "scale_type": "tensor"},
], ids=["apollo", "mini"])  # fmt: skip
def test_with_the_same_projections_it_equals_the_authors_package(given, monkeypatch):
    ours, theirs = build_model(), build_model()
    projected = list(layer_matrices(theirs))
    rest = [p for p in theirs.parameters() if not any(p is q for q in projected)]
    settings = {"update_proj_gap": 4, "proj": "random", "proj_type": "std"}
    import apollo_torch  # it takes seconds

    peer = apollo_torch.APOLLOAdamW([{"params": projected, **given, **settings}, {"params": rest}], lr=1e-3, eps=1e-12)

    def of_the_package(rank, length, like, key):
        matrix = peer.state[projected[key[1]]]["projector"].ortho_matrix
        return matrix if matrix.shape == (rank, length) else matrix.t()

    monkeypatch.setattr(optimizers.apollo, "random_projection", of_the_package)
    optimizer = APOLLO(ours, lr=1e-3, eps=1e-12, update_every=4, **given)
    for step in range(12):
        # the package adds eps of the rest's AdamW before the bias correction: gradients are large beside it
        optimizer.backward(1000 * loss_of(ours, step))
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            q.grad = None if p.grad is None else p.grad.clone()
        peer.step()
        optimizer.step()
        optimizer.zero_grad()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5, msg=name)


def plain(p, gradients, projections, lr, eps, scale, dims, betas=(0.9, 0.999)):
    """The rule, for a matrix that isn't higher than wide or (with `dims` 1) the other way round."""
    m = v = 0.0
    before = None
    for t, (g, projection) in enumerate(zip(gradients, projections, strict=True), start=1):
        r = projection @ g if p.shape[0] < p.shape[1] else g @ projection.t()
        m, v = betas[0] * m + (1 - betas[0]) * r, betas[1] * v + (1 - betas[1]) * r**2
        s = (m / (v.sqrt() + eps)).norm(dim=dims, keepdim=True) / (r.norm(dim=dims, keepdim=True) + 1e-8)
        u = g * s
        if before is not None:
            u = u / (max(u.norm() / (before + 1e-8), 1.01) / 1.01)
        before = u.norm()
        p = p - lr * math.sqrt(1 - betas[1] ** t) / (1 - betas[0] ** t) * math.sqrt(scale) * u
    return p


@pytest.mark.parametrize("scale_type", ["channel", "tensor"])
@pytest.mark.parametrize("shape", SHAPES)
def test_an_update_is_the_rule_written_down_plainly_for_any_shape(shape, scale_type):
    model = matrices(shape)
    (p,) = model.parameters()
    start = p.detach().clone()
    optimizer = APOLLO(model, lr=0.01, eps=1e-3, rank=2, update_every=3, scale=2.0, scale_type=scale_type, seed=5)
    gradients, projections = [], []
    for step in range(7):
        give_gradients(model, seed=step, size=1.0 + step % 3)  # so that the norm grows, and shrinks
        gradients.append(p.grad)
        projections.append(optimizers.apollo.random_projection(2, min(shape), p, (5, 0, step // 3)))
        optimizer.step()
    dims = (0, 1) if scale_type == "tensor" else (0,) if shape[0] < shape[1] else (1,)
    expected = plain(start, gradients, projections, 0.01, 1e-3, 2.0, dims)
    torch.testing.assert_close(p.detach(), expected, rtol=1e-5, atol=1e-6)


def test_a_projection_is_a_function_of_seed_matrix_and_interval_with_entries_of_variance_one_over_r():
    like = torch.zeros(1)
    first = optimizers.apollo.random_projection(16, 4000, like, (0, 0, 0))
    assert first.var() == pytest.approx(1 / 16, rel=0.02) and abs(first.mean()) < 0.01
    torch.rand(3)
    assert torch.equal(first, optimizers.apollo.random_projection(16, 4000, like, (0, 0, 0)))
    for key in ((1, 0, 0), (0, 1, 0), (0, 0, 1)):
        assert not torch.equal(first, optimizers.apollo.random_projection(16, 4000, like, key))


def test_the_channels_scales_are_adams_of_the_full_gradient_times_the_root_of_r_over_m():
    # a random projection keeps norms (Johnson & Lindenstrauss), but N has r entries of size 1 in place of m
    m, n, rank = 64, 80, 4000
    model = matrices((m, n))
    start = model.layers[0].weight.detach().clone()
    optimizer = APOLLO(model, lr=0.1, rank=rank, scale=m / rank)
    gradients = []
    for step in range(5):
        give_gradients(model, seed=step)
        gradients.append(model.layers[0].weight.grad)
        optimizer.step()
    expected = plain(start, gradients, [torch.eye(m)] * 5, 0.1, 1e-6, 1.0, (0,)) - start
    moved = model.layers[0].weight.detach() - start
    assert (moved - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("given", "ranks"), [
    ({}, (2, 2, 5)),  # a quarter of the shorter side
    ({"rank": 3}, (3, 3, 3)),
    ({"scale_type": "tensor"}, (1, 1, 1)),
])  # fmt: skip
def test_it_keeps_two_moments_of_the_rank_a_norm_and_a_step_and_no_projection(given, ranks, dtype):
    model = matrices((8, 20), (20, 8), (20, 20), dtype=dtype)
    optimizer = APOLLO(model, **given)
    for step in range(2):
        give_gradients(model, seed=step)
        optimizer.step()
    assert optimizer.state_bytes() == sum(2 * 20 * rank * dtype.itemsize + 8 for rank in ranks)


def test_mini_keeps_less_than_a_hundredth_of_a_byte_for_a_weight():
    model = matrices((512, 1376), dtype=torch.bfloat16)
    optimizer = APOLLO(model, scale_type="tensor")
    give_gradients(model, seed=0)
    optimizer.step()
    assert optimizer.state_bytes() < 0.01 * 512 * 1376


def test_weight_decay_is_neither_scaled_nor_limited():
    model = matrices((4, 6))
    (p,) = model.parameters()
    before = p.detach().clone()
    p.grad = torch.zeros_like(p)
    APOLLO(model, lr=0.1, weight_decay=0.5, scale=9.0).step()
    torch.testing.assert_close(p.detach(), 0.95 * before)


@pytest.mark.parametrize("method", [APOLLO, Fira])
def test_after_a_gradient_of_zero_a_norm_may_grow_by_1_percent_from_the_one_before(method):
    model = matrices((4, 7))
    (p,) = model.parameters()
    optimizer = method(model, rank=2)
    norms = []
    for size in (1.0, 0.0, 1.0):  # an expert that has no tokens in between
        give_gradients(model, seed=0, size=size)
        optimizer.step()
        norms.append(float(optimizer.state[p]["norm"]))
    assert norms[0] > 0.0
    torch.testing.assert_close(torch.tensor(norms), norms[0] * torch.tensor([1.0, 1.0, 1.01]))


def test_state_of_another_rank_scale_type_or_seed_is_refused():
    model = build_model()
    optimizer = APOLLO(model, rank=4)
    train(model, optimizer, 1)
    for other in ({"rank": 3}, {"rank": 4, "scale_type": "tensor"}, {"rank": 4, "seed": 1}):
        with pytest.raises(ValueError, match=r"this state was saved with (rank=4|scale_type='channel'|seed=0), not"):
            APOLLO(build_model(), **other).load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("given", [{"scale": 0.0}, {"rank": 2.5}, {"scale_type": "row"}])
def test_values_out_of_range_are_refused(given):
    with pytest.raises(ValueError, match=f"{next(iter(given))} must be"):
        APOLLO(build_model(), **given)
