"""Fira (arXiv 2410.01623): against the authors' package, the rule written down plainly, and GaLore."""

import math

import pytest
import torch
from torch import nn

from optimizers import APOLLO, Fira, GaLore
from optimizers.contract import build_model, loss_of
from optimizers.shared.matrices import layer_matrices
from optimizers.shared.subspace import exact_vectors


def matrix(rows, columns):
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Linear(columns, rows, bias=False)])
    return model


def gradient(shape, step):
    """Gradients whose norm grows and shrinks."""
    return (1.0 + step % 3) * torch.randn(shape, generator=torch.Generator().manual_seed(step))


def test_with_alpha_1_and_exact_svd_it_equals_the_authors_package_over_two_subspace_changes():
    fira = pytest.importorskip("fira")
    ours, theirs = build_model(), build_model()
    projected = list(layer_matrices(theirs))
    rest = [p for p in theirs.parameters() if not any(p is q for q in projected)]
    settings = {"rank": 4, "update_proj_gap": 4, "alpha": 1.0, "proj_type": "std"}
    peer = fira.FiraAdamW([{"params": projected, **settings}, {"params": rest}], lr=1e-3, eps=1e-12)
    optimizer = Fira(ours, lr=1e-3, eps=1e-12, rank=4, update_every=4, svd="exact")
    for step in range(12):
        optimizer.backward(1000 * loss_of(ours, step))  # the package adds eps before the bias correction
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            q.grad = None if p.grad is None else p.grad.clone()
        peer.step()
        optimizer.step()
        optimizer.zero_grad()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5, msg=name)


def plain(w, gradients, projections, lr, alpha, decay, idle=0, betas=(0.9, 0.999), eps=1e-8):
    """The rule for a matrix with fewer rows than columns, after `idle` steps with gradients of zero."""
    m = v = None if not idle else torch.zeros(())
    before = None
    w = (1 - lr * decay) ** idle * w
    for t, (g, projection) in enumerate(zip(gradients, projections, strict=True), start=1 + idle):
        r = projection.T @ g
        m = (1 - betas[0]) * r if m is None else betas[0] * m + (1 - betas[0]) * r
        v = (1 - betas[1]) * r**2 if v is None else betas[1] * v + (1 - betas[1]) * r**2
        correction = math.sqrt(1 - betas[1] ** t) / (1 - betas[0] ** t)
        n = m / (v.sqrt() + eps * math.sqrt(1 - betas[1] ** t))
        s = (g - projection @ r) * (n.norm(dim=0) / r.norm(dim=0))
        if before is not None and s.norm() > 1.01 * before:
            s = s * (1.01 * before / s.norm())
        before = s.norm()
        w = (1 - lr * decay) * w - lr * correction * (alpha * projection @ n + s)
    return w


@pytest.mark.parametrize("shape", [(4, 7), (7, 4), (5, 5)])
def test_an_update_is_the_rule_written_down_plainly_for_any_shape_and_alpha(shape):
    model = matrix(*shape)
    p = model.layers[0].weight
    start = p.detach().clone()
    optimizer = Fira(model, lr=0.01, weight_decay=0.1, rank=2, update_every=3, scale=0.5, svd="exact")
    gradients = [gradient(shape, step) for step in range(8)]
    for g in gradients:
        p.grad = g.clone()
        optimizer.step()
        assert torch.equal(p.grad, g)
    tall = shape[0] >= shape[1]
    vectors = [exact_vectors(gradients[t - t % 3], 2, True, True) for t in range(8)]
    projections = [vh.T if tall else u for u, vh in vectors]
    start, gradients = (start.T, [g.T for g in gradients]) if tall else (start, gradients)
    expected = plain(start, gradients, projections, 0.01, 0.5, 0.1)
    torch.testing.assert_close(p.detach(), expected.T if tall else expected, rtol=1e-4, atol=1e-6)


def test_after_gradients_of_zero_the_growth_is_that_of_adams_step():
    """An expert that had no tokens: Adam counted these steps, and its bias correction isn't growth."""
    model = matrix(4, 7)
    p = model.layers[0].weight
    start = p.detach().clone()
    optimizer = Fira(model, lr=0.01, rank=2, svd="exact")
    gradients = [gradient((4, 7), 0) for _ in range(10)]
    for g in [torch.zeros(4, 7)] * 20 + gradients:
        p.grad = g.clone()
        optimizer.step()
    projections = [exact_vectors(gradients[0], 2, True, False)[0]] * len(gradients)
    torch.testing.assert_close(p.detach(), plain(start, gradients, projections, 0.01, 1.0, 0.0, idle=20))


def test_at_full_rank_nothing_is_left_out_so_that_it_is_galore():
    weights = []
    for method in (Fira, GaLore):
        model = matrix(4, 7)
        with torch.no_grad():
            model.layers[0].weight.copy_(gradient((4, 7), 100))
        optimizer = method(model, lr=0.01, rank=99, scale=1.0)
        for step in range(5):
            model.layers[0].weight.grad = gradient((4, 7), step)
            optimizer.step()
        weights.append(model.layers[0].weight.detach())
    torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-6)


def test_its_state_is_not_galores_nor_apollos():
    state = Fira(build_model(), rank=4).state_dict()
    for other in (GaLore(build_model(), rank=4), APOLLO(build_model(), rank=4)):
        with pytest.raises(ValueError, match="saved by Fira"):
            other.load_state_dict(state)
