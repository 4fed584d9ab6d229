"""WeLore (arXiv 2407.11239): the rule for its ranks, the best products of a rank, and torch's AdamW on the factors."""

import random

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import GPT2Config, GPT2LMHeadModel

from optimizers import WeLore
from optimizers.contract import build_model, loss_of, weights_of
from optimizers.shared import low_rank_linear
from optimizers.shared.low_rank_linear import kept_ranks, low_rank_linears

SHAPES = [(16, 16), (8, 24), (24, 8), (12, 12), (3, 9), (1, 5), (2, 2)]


def spectra(weights):
    """Scaled to 0..1, as in the paper."""
    values = [torch.linalg.svdvals(w) for w in weights]
    return [(s - s.min()) / (s.max() - s.min()) if s.max() > s.min() else torch.ones_like(s) for s in values]


def drawn(seed):
    generator = torch.Generator().manual_seed(seed)
    scales = [torch.rand(columns, generator=generator) ** (3 * seed) for _, columns in SHAPES]
    return [torch.randn(shape, generator=generator) * scale for shape, scale in zip(SHAPES, scales, strict=True)]


@pytest.mark.parametrize("reduction", [0.1, 0.5, 0.8])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_one_threshold_drops_the_wished_share_of_all_values_and_a_matrix_that_keeps_half_stays_whole(seed, reduction):
    weights = drawn(seed)
    pooled = torch.cat(spectra(weights)).sort().values
    tau = pooled[round(reduction * len(pooled))]
    expected = []
    for s in spectra(weights):
        kept = int((s >= tau).sum())
        expected.append(kept if (len(s) - kept) / len(s) > 0.5 else None)
    assert kept_ranks(weights, reduction) == expected
    assert None in expected and (reduction == 0.1 or any(expected))


@pytest.mark.parametrize("reduction", [0.3, 0.5, 0.7, 0.95])
def test_without_values_the_ranks_need_no_less_memory_than_any_real_ones(reduction):
    def trained(ranks):
        return sum(k * sum(shape) for k, shape in zip(ranks, SHAPES, strict=True) if k is not None)

    with FakeTensorMode():
        planned = trained(kept_ranks([torch.empty(shape) for shape in SHAPES], reduction))
    assert all(trained(kept_ranks(drawn(seed), reduction)) <= planned for seed in range(8))
    total, draw = sum(map(min, SHAPES)), random.Random(0)
    for _ in range(2000):  # any ranks that lose the share, whatever the spectra
        kept = [draw.randint(1, min(shape)) for shape in SHAPES]
        if sum(kept) <= total - round(reduction * total):
            ranks = [k if 2 * k < min(shape) else None for k, shape in zip(kept, SHAPES, strict=True)]
            assert trained(ranks) <= planned


def test_the_factors_are_the_best_product_of_their_rank_and_everything_else_stays_as_it_was():
    model = build_model()
    before = weights_of(model)
    optimizer = WeLore(model, always_train=("classifier",))
    assert 0 < len(optimizer.ranks) < 21
    for name, module in low_rank_linears(model).items():
        w, k = before[f"{name}.weight"], optimizer.ranks[name]
        lost = torch.linalg.svdvals(w)[k:].square().sum()  # Eckart & Young
        torch.testing.assert_close((w - module.weight).square().sum(), lost, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(module.up.T @ module.up, module.down @ module.down.T, rtol=1e-3, atol=1e-5)
    for name, p in model.named_parameters():
        assert name in before and torch.equal(p, before[name]) or name.endswith((".up", ".down"))
        assert p.requires_grad == (name.endswith((".up", ".down")) or "norm" in name or name.startswith("classifier"))


def test_a_matrix_of_a_lower_rank_than_is_kept_has_factors_that_multiply_to_it():
    # its other singular values are rounding errors, of squares that may come out below 0
    for seed in range(200):
        torch.manual_seed(seed)
        matrix = torch.randn(2, 24).repeat(8, 1)
        for w in (matrix, matrix.t()):
            up, down = low_rank_linear._leading_factors(w, 7)
            torch.testing.assert_close(up @ down, w.double(), rtol=0, atol=1e-6)


def test_training_is_torchs_fused_adamw_on_two_linear_modules_in_a_row():
    model, reference = build_model(), build_model()
    optimizer = WeLore(model, 1e-2, 0.1)
    for name, module in low_rank_linears(model).items():
        dense = reference.get_submodule(name)
        pair = nn.Sequential(nn.Linear(*module.down.T.shape, bias=False), nn.Linear(*module.up.T.shape))
        pair[0].weight, pair[1].weight, pair[1].bias = module.down, module.up, dense.bias
        pair[0].weight, pair[1].weight = (nn.Parameter(layer.weight.detach().clone()) for layer in pair)
        reference.set_submodule(name, pair)
    flags = [p.requires_grad for name, p in model.named_parameters() if not name.endswith((".up", ".down"))]
    others = [p for name, p in reference.named_parameters() if not name.endswith((".0.weight", ".1.weight"))]
    for p, flag in zip(others, flags, strict=True):
        p.requires_grad_(flag)
    trained = [p for p in reference.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.dim() == 2], "weight_decay": 0.1},
              {"params": [p for p in trained if p.dim() == 1], "weight_decay": 0.0}]  # fmt: skip
    adamw = torch.optim.AdamW(groups, lr=1e-2, fused=True)
    for step in range(10):
        losses = [loss_of(model, step), loss_of(reference, step)]
        assert torch.equal(*losses)
        optimizer.backward(losses[0])
        losses[1].backward()
        for one in (optimizer, adamw):
            one.step()
            one.zero_grad()


def test_a_transposed_matrix_is_factorised_and_given_back_transposed():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2)).eval()
    shapes = {name: p.shape for name, p in model.named_parameters()}
    tokens = torch.randint(50, (2, 8), generator=torch.Generator().manual_seed(0))
    optimizer = WeLore(model, reduction=0.7)
    assert any(name.endswith("c_attn") for name in optimizer.ranks)
    compressed = model(tokens).logits
    finished = optimizer.finish()
    torch.testing.assert_close(finished(tokens).logits, compressed, rtol=1e-4, atol=1e-5)
    assert {name: p.shape for name, p in finished.named_parameters()} == shapes


def test_a_matrix_without_entries_is_left_as_it_is():
    model = build_model()
    model.layers[0].none = nn.Linear(0, 4)
    optimizer = WeLore(model)
    assert optimizer.ranks and "layers.0.none" not in optimizer.ranks


def test_what_it_can_not_do_is_refused_and_the_model_left_as_it_was():
    model = build_model()
    names = [name for name, _ in model.named_modules()]
    for given, words in (
        ({"reduction": 0.0}, "reduction must be above 0 and below 1, not 0.0"),
        ({"reduction": 1.0}, "reduction must be"),
        ({"reduction": 0.05}, "reduction=0.05 none of 21 matrices loses more than half of its rank"),
        ({"always_train": ("layers",)}, "linear modules in the model's layers"),
    ):
        with pytest.raises(ValueError, match=words):
            WeLore(model, **given)
    assert [name for name, _ in model.named_modules()] == names
    state = WeLore(model).state_dict()
    state["extra"]["ranks"] = {name: rank - 1 for name, rank in state["extra"]["ranks"].items()}
    with pytest.raises(ValueError, match="saved with other ranks: build the method on the weights"):
        WeLore(build_model()).load_state_dict(state)
