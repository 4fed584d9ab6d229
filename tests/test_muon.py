"""Muon (https://kellerjordan.github.io/posts/muon): against torch's own, singular values and hand counts."""

import pytest
import torch
from torch import nn

from optimizers import AdamW, Muon
from optimizers.contract import TinyTransformer, build_model, loss_of, train
from optimizers.muon import orthogonalize_
from optimizers.shared.matrices import layer_matrices

SHAPES = [(5, 5), (4, 9), (9, 4), (1, 6), (6, 1)]


def matrices(*shapes):
    """A model whose layers are bare matrices."""
    model = nn.Module()
    model.layers = nn.ModuleList(nn.Linear(columns, rows, bias=False) for rows, columns in shapes)
    return model


def update(optimizer, model, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
    optimizer.step()


@pytest.mark.parametrize("given", [
    {},
    {"weight_decay": 0.0, "nesterov": False},
    {"adjust_lr_fn": "match_rms_adamw", "momentum": 0.8},
    {"ns_steps": 3, "ns_coefficients": (2.0, -1.5, 0.5)},
], ids=str)  # fmt: skip
def test_matrices_of_layers_are_updated_as_by_torchs_muon_to_the_last_bit(given):
    ours, theirs = matrices(*SHAPES), matrices(*SHAPES)
    theirs.load_state_dict(ours.state_dict())
    muon, reference = Muon(ours, lr=0.02, **given), torch.optim.Muon(theirs.parameters(), lr=0.02, **given)
    for step in range(20):
        update(muon, ours, step)
        update(reference, theirs, step)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p, q)
        assert torch.equal(muon.state[p]["momentum_buffer"], reference.state[q]["momentum_buffer"])


def test_a_transformer_is_trained_as_by_torchs_muon_and_torchs_adamw_to_the_last_bit():
    ours, theirs = build_model(), build_model()
    inside = set(layer_matrices(theirs))
    rest = [p for p in theirs.parameters() if p not in inside]
    peers = [
        torch.optim.Muon(inside, lr=0.02, weight_decay=0.05),
        torch.optim.AdamW(
            [
                {"params": [p for p in rest if p.dim() >= 2], "weight_decay": 0.05},
                {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
            ],
            lr=3e-3,
            fused=True,
        ),
    ]
    train(ours, Muon(ours, lr=0.02, weight_decay=0.05, adamw_lr=3e-3), 20)
    for step in range(20):
        loss_of(theirs, step).backward()
        for peer in peers:
            peer.step()
            peer.zero_grad()
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), theirs.parameters(), strict=True))


@pytest.mark.parametrize("shape", [(24, 24), (16, 40), (40, 16)])
def test_the_iteration_brings_all_singular_values_near_one_and_keeps_the_vectors(shape):
    g = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, s, vh = torch.linalg.svd(g, full_matrices=False)
    x = orthogonalize_(g.bfloat16(), (3.4445, -4.7750, 2.0315), 5).float()
    values = u.T @ x @ vh.T  # near the identity: 0.7 to 1.2 is where these coefficients lead (the post's figure)
    significant = s / s.norm() > 0.01
    assert ((values.diagonal()[significant] - 0.95).abs() < 0.35).all()
    assert (values - values.diagonal().diag()).abs().max() < 0.05


@pytest.mark.parametrize("shape", [(16, 40), (40, 16)])
def test_match_rms_adamw_makes_steps_as_large_as_adamws(shape):
    model = matrices(shape)
    before = model.layers[0].weight.detach().clone()
    update(Muon(model, lr=1.0, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"), model, 0)
    rms = (model.layers[0].weight - before).square().mean().sqrt()
    assert 0.14 < rms < 0.25  # 0.2 at singular values of 1 (arXiv 2502.16982, Section 2.2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_keeps_a_momentum_for_the_layers_matrices_and_two_moments_for_the_rest(dtype):
    model = build_model(dtype)
    optimizer = Muon(model)
    train(model, optimizer, 2)
    inside = set(layer_matrices(model))
    reached = [p for name, p in model.named_parameters() if not name.startswith("unused")]
    kept = [dtype.itemsize * p.numel() if p in inside else 2 * dtype.itemsize * p.numel() + 4 for p in reached]
    assert optimizer.state_bytes() == sum(kept)
    assert {t.dtype for p in inside for t in optimizer.state[p].values()} == {dtype}


def test_the_momentum_of_a_low_precision_model_is_not_normalised_in_place():
    model = matrices((4, 6)).bfloat16()
    optimizer = Muon(model, momentum=0.5, nesterov=False)
    update(optimizer, model, 0)
    (p,) = model.parameters()
    torch.testing.assert_close(optimizer.state[p]["momentum_buffer"], 0.5 * p.grad)


def test_everything_else_has_the_rate_of_adamw_and_a_schedule_scales_both():
    model = TinyTransformer()
    model.layers[0].table = nn.Embedding(9, 16)
    optimizer = Muon(model, lr=0.02, adamw_lr=1e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    optimizer.step()
    scheduler.step()
    rates = {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert len(rates) == len(list(model.parameters()))
    for name, p in model.named_parameters():
        inner = name.startswith("layers.") and p.dim() == 2 and "table" not in name
        assert rates[p] == (0.01 if inner else 5e-4), name


def test_with_no_matrix_left_in_the_layers_it_is_adamw():
    ours, theirs = build_model(), build_model()
    for model in (ours, theirs):
        for p in layer_matrices(model):
            p.requires_grad_(False)
    train(ours, Muon(ours, adamw_lr=1e-2, weight_decay=0.01), 5)
    train(theirs, AdamW(theirs, lr=1e-2, weight_decay=0.01), 5)
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), theirs.parameters(), strict=True))


@pytest.mark.parametrize(
    "given", [{"momentum": 1.0}, {"momentum": -0.1}, {"ns_coefficients": (1.0, 2.0)}, {"adamw_lr": 0.0}]
)
def test_values_out_of_range_are_refused(given):
    with pytest.raises(ValueError, match=f"{next(iter(given))} must be"):
        Muon(build_model(), **given)
