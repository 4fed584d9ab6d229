"""GaLore (arXiv 2403.03507): against the authors' package, AdamW, singular values and hand counts."""

import argparse
import inspect
import time

import galore_torch
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from optimizers import GaLore
from optimizers.contract import TinyTransformer, build_model, loss_of, train
from optimizers.galore import PROJECTIONS
from optimizers.shared import affine, quantized
from optimizers.shared.matrices import layer_matrices
from optimizers.shared.projections import add_back, kept_subspace, project
from optimizers.shared.subspace import exact_vectors, randomized_vectors

SHAPES = [(3, 7), (7, 3), (5, 5), (1, 6), (6, 1)]


def matrices(*shapes):
    """A model whose layers are bare matrices."""
    model = nn.Module()
    model.layers = nn.ModuleList(nn.Linear(columns, rows, bias=False) for rows, columns in shapes)
    return model


def update(optimizer, params, grads):
    for p, g in zip(params, grads, strict=True):
        p.grad = g.clone()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_exact_svd_equals_the_authors_package_over_two_subspace_changes(projection, weight_decay):
    ours, theirs = build_model(), build_model()
    # The package adds eps before the bias correction and decays after the step: neither is to show here, so the loss,
    # and with it the smallest gradient, is large, and the rate small.
    settings = {"lr": 1e-3, "weight_decay": weight_decay, "eps": 1e-12}
    galore = GaLore(ours, **settings, rank=4, update_every=8, scale=0.5, projection=projection, svd="exact")
    projected = list(layer_matrices(theirs))
    rest = [p for p in theirs.parameters() if not any(p is q for q in projected)]
    reference = galore_torch.GaLoreAdamW(
        [
            {"params": projected, "rank": 4, "update_proj_gap": 8, "scale": 0.5, "proj_type": projection},
            {"params": [p for p in rest if p.dim() >= 2]},
            {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
        ],
        **settings,
        no_deprecation_warning=True,
    )
    for step in range(20):
        galore.backward(1000 * loss_of(ours, step))
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            q.grad = None if p.grad is None else p.grad.clone()
        galore.step()
        reference.step()
        galore.zero_grad()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert (p - q).abs().max() < 1e-5, name


@pytest.mark.parametrize("svd", ["randomized", "exact"])
@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (5, 5)])
def test_full_rank_is_adamw_where_the_subspace_is_no_rotation(svd, shape):
    # The first gradient is diagonal, so its singular vectors are the axes, up to order and sign, and Adam doesn't see
    # order and sign: every later gradient may be anything.
    ours, reference = matrices(shape), matrices(shape)
    reference.load_state_dict(ours.state_dict())
    galore = GaLore(ours, lr=0.01, weight_decay=0.1, rank=99, scale=1.0, svd=svd)
    adamw = torch.optim.AdamW(reference.parameters(), lr=0.01, weight_decay=0.1)
    diagonal = torch.zeros(shape)
    diagonal.diagonal().copy_(torch.arange(1.0, min(shape) + 1))
    for step in range(10):
        g = diagonal if step == 0 else torch.randn(shape, generator=torch.Generator().manual_seed(step))
        update(galore, list(ours.parameters()), [g])
        update(adamw, list(reference.parameters()), [g])
    torch.testing.assert_close(ours.layers[0].weight, reference.layers[0].weight, rtol=0, atol=1e-5)


def gradients_of_a_language_model(steps):
    """Gradients of the layers' matrices of a transformer that learns Python, at the start and after `steps`."""
    text = torch.frombuffer(bytearray(inspect.getsource(argparse).encode("ascii", "ignore")), dtype=torch.uint8).long()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        embedding, head = nn.Embedding(128, 128), nn.Linear(128, 128)
        layers = nn.ModuleList(
            nn.TransformerEncoderLayer(128, 4, 512, dropout=0.0, batch_first=True, norm_first=True) for _ in range(2)
        )
    adam = torch.optim.AdamW([*embedding.parameters(), *layers.parameters(), *head.parameters()], lr=1e-3)
    mask = nn.Transformer.generate_square_subsequent_mask(64)
    for step in range(steps + 1):
        starts = torch.randint(len(text) - 65, (16, 1), generator=torch.Generator().manual_seed(step))
        tokens = text[starts + torch.arange(65)]  # (16, 65)
        x = embedding(tokens[:, :-1])
        for layer in layers:
            x = layer(x, src_mask=mask, is_causal=True)
        adam.zero_grad()
        F.cross_entropy(head(x).flatten(0, 1), tokens[:, 1:].flatten()).backward()
        if step in (0, steps):
            yield from (p.grad.clone() for p in layers.parameters() if p.dim() == 2)
        adam.step()


def test_the_randomized_subspace_holds_nearly_all_the_energy_of_the_exact_one_on_a_transformers_gradients():
    gradients = list(gradients_of_a_language_model(steps=15))
    assert {tuple(g.shape) for g in gradients} == {(384, 128), (128, 128), (512, 128), (128, 512)}
    for number, g in enumerate(gradients):
        values = torch.linalg.svdvals(g).square()
        for rank in (2, 4, 8, 32, 64, 127, 128):
            exact = values[:rank].sum()
            u, vh = randomized_vectors(g, rank, True, True, (0, 0, number))
            for low_rank in (u.t() @ g, g @ vh.t(), u.t() @ g @ vh.t()):
                assert low_rank.square().sum() >= 0.9999 * exact, (tuple(g.shape), rank)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 3, 100])
@pytest.mark.parametrize("vectors", ["exact", "randomized"])
def test_bases_are_orthonormal_for_any_shape_and_rank_and_even_for_a_gradient_of_lower_rank(shape, rank, vectors):
    k = min(rank, *shape)
    for g in (torch.randn(shape), torch.ones(shape), torch.zeros(shape)):
        arguments = (g, k, True, True) if vectors == "exact" else (g, k, True, True, (0,))
        u, vh = (exact_vectors if vectors == "exact" else randomized_vectors)(*arguments)
        assert u.shape == (shape[0], k) and vh.shape == (k, shape[1])
        torch.testing.assert_close(u.t() @ u, torch.eye(k), rtol=0, atol=1e-5)
        torch.testing.assert_close(vh @ vh.t(), torch.eye(k), rtol=0, atol=1e-5)


def test_gradients_with_rows_of_zeros_have_a_subspace_too():
    idle = torch.Generator().manual_seed(0)
    for key in range(40):  # LAPACK's eigh in fp32 raises or returns NaN for several of these
        g = torch.randn(64, 64, generator=idle) * (torch.rand(64, 1, generator=idle) < 0.2)
        u, _ = randomized_vectors(g, 64, True, False, (key,))
        torch.testing.assert_close(u @ (u.t() @ g), g, rtol=0, atol=1e-4)


@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("svd", ["exact", "randomized"])
@pytest.mark.parametrize("rank", [2, 100])
def test_every_projection_trains_any_shape_at_any_rank(projection, svd, rank):
    model = matrices(*SHAPES)
    targets = [torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) for p in model.parameters()]
    for p in model.parameters():
        nn.init.zeros_(p)
    optimizer = GaLore(model, lr=0.05, rank=rank, update_every=10, scale=1.0, projection=projection, svd=svd)
    distances = []
    for _ in range(80):
        grads = [p.detach() - target for p, target in zip(model.parameters(), targets, strict=True)]
        distances.append([g.norm().item() for g in grads])
        update(optimizer, list(model.parameters()), grads)
    assert all(last < 0.8 * first for first, last in zip(distances[0], distances[-1], strict=True)), distances[-1]


# values kept of a matrix (8, 20), of one (20, 8) and of one (8, 8) at rank 3: projection and two moments
KEPT = {
    "std": (8 * 3 + 2 * 3 * 20, 8 * 3 + 2 * 20 * 3, 8 * 3 + 2 * 8 * 3),
    "reverse_std": (20 * 3 + 2 * 8 * 3, 20 * 3 + 2 * 3 * 8, 8 * 3 + 2 * 3 * 8),
    "left": (8 * 3 + 2 * 3 * 20, 20 * 3 + 2 * 3 * 8, 8 * 3 + 2 * 3 * 8),
    "right": (20 * 3 + 2 * 8 * 3, 8 * 3 + 2 * 20 * 3, 8 * 3 + 2 * 8 * 3),
    "full": (28 * 3 + 2 * 9, 28 * 3 + 2 * 9, 16 * 3 + 2 * 9),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("svd", ["exact", "randomized"])
@pytest.mark.parametrize("projection", PROJECTIONS)
def test_state_is_projection_and_two_moments_in_the_weights_dtype_and_no_byte_more(projection, svd, dtype):
    model = matrices((8, 20), (20, 8), (8, 8)).to(dtype)
    optimizer = GaLore(model, rank=3, projection=projection, svd=svd)
    update(optimizer, list(model.parameters()), [torch.randn_like(p) for p in model.parameters()])
    for p, values in zip(model.parameters(), KEPT[projection], strict=True):
        tensors = {key: t for key, t in optimizer.state[p].items() if torch.is_tensor(t) and key != "step"}
        assert {t.dtype for t in tensors.values()} == {dtype}
        assert sum(t.untyped_storage().nbytes() for t in tensors.values()) == values * dtype.itemsize
    assert optimizer.state_bytes() == sum(KEPT[projection]) * dtype.itemsize + 3 * 4  # and the steps


def test_only_matrices_of_the_layers_are_projected():
    model = TinyTransformer()
    model.layers[0].table = nn.Embedding(9, 16)
    optimizer = GaLore(model, lr=1e-2, rank=2)
    loss = loss_of(model, 0) + model.layers[0].table.weight.sum()
    optimizer.backward(loss)
    optimizer.step()
    for name, p in model.named_parameters():
        if p in optimizer.state:
            inner = name.startswith("layers.") and p.dim() == 2 and "table" not in name
            assert inner == (optimizer.state[p]["exp_avg"].shape != p.shape), name
            assert inner == bool({"left", "right"} & optimizer.state[p].keys()), name


def test_each_matrix_counts_its_own_updates_to_the_next_subspace():
    model = matrices((4, 6), (4, 6))
    first, second = model.parameters()
    optimizer = GaLore(model, rank=2, update_every=3)
    chosen = {first: [], second: []}
    for step in range(9):
        before = {p: optimizer.state[p].get("left") for p in chosen}
        params = [first] if step in (0, 4) else [first, second]
        update(optimizer, params, [torch.randn(4, 6) for _ in params])
        for p in params:
            if optimizer.state[p]["left"] is not before[p]:
                chosen[p].append(step)
    assert chosen == {first: [0, 3, 6], second: [1, 5, 8]}


def test_moments_stay_as_they_are_on_a_change_of_subspace():
    model = matrices((4, 6))
    (p,) = model.parameters()
    optimizer = GaLore(model, rank=2, update_every=1, betas=(0.9, 0.99))
    update(optimizer, [p], [torch.randn(4, 6)])
    old = {key: optimizer.state[p][key].clone() for key in ("left", "exp_avg", "exp_avg_sq")}
    g = torch.randn(4, 6)
    update(optimizer, [p], [g])
    state = optimizer.state[p]
    assert (state["left"] - old["left"]).abs().max() > 0.1
    low_rank = state["left"].t() @ g
    torch.testing.assert_close(state["exp_avg"], 0.9 * old["exp_avg"] + 0.1 * low_rank)
    torch.testing.assert_close(state["exp_avg_sq"], 0.99 * old["exp_avg_sq"] + 0.01 * low_rank.square())


def test_weight_decay_is_not_scaled_by_alpha():
    model = matrices((4, 6))
    (p,) = model.parameters()
    before = p.detach().clone()
    update(GaLore(model, lr=0.1, weight_decay=0.5, rank=2, scale=0.25), [p], [torch.zeros(4, 6)])
    torch.testing.assert_close(p.detach(), 0.95 * before)


def test_eps_is_added_after_the_bias_correction_as_in_torch():
    ours, reference = matrices((1, 1)), matrices((1, 1))
    reference.load_state_dict(ours.state_dict())
    galore = GaLore(ours, lr=0.1, eps=0.1, rank=1, scale=1.0)
    adamw = torch.optim.AdamW(reference.parameters(), lr=0.1, eps=0.1, weight_decay=0.0)
    for g in (0.3, -0.2, 0.1):
        update(galore, list(ours.parameters()), [torch.tensor([[g]])])
        update(adamw, list(reference.parameters()), [torch.tensor([[g]])])
    torch.testing.assert_close(ours.layers[0].weight, reference.layers[0].weight, rtol=0, atol=1e-6)


def test_the_random_start_is_a_function_of_seed_update_and_matrix():
    g = torch.randn(64, 80)  # a flat spectrum, so that the start shows in the result

    def bases(seed):
        model = matrices((64, 80), (64, 80))
        optimizer = GaLore(model, rank=2, update_every=1, seed=seed)
        found = []
        for _ in range(2):
            torch.rand(1)
            update(optimizer, list(model.parameters()), [g, g])
            found += [optimizer.state[p]["left"].clone() for p in model.parameters()]
        return found

    first, again, other = bases(0), bases(0), bases(1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    different = [*first, *other]
    assert all(not torch.equal(a, b) for i, a in enumerate(different) for b in different[:i])


@pytest.mark.parametrize("svd", ["exact", "randomized"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_spoils_the_weights_as_adamws_and_raises_nothing(svd, value):
    model = matrices((30, 40))
    (p,) = model.parameters()
    g = torch.randn(30, 40)
    g[3, 4] = value
    update(GaLore(model, rank=2, svd=svd), [p], [g])
    assert not p.isfinite().all()


def test_state_of_another_rank_or_projection_is_refused():
    model = build_model()
    optimizer = GaLore(model, rank=4)
    train(model, optimizer, 1)
    for other in ({"rank": 3}, {"rank": 4, "projection": "left"}):
        with pytest.raises(ValueError, match=r"this state was saved with (rank=4|projection='std'), not (3|'left')"):
            GaLore(build_model(), **other).load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("given", [{"scale": 0.0}, {"scale": float("nan")}, {"rank": 2.5}, {"projection": "both"}])
def test_values_out_of_range_are_refused(given):
    with pytest.raises(ValueError, match=f"{next(iter(given))} must be"):
        GaLore(build_model(), **given)


@pytest.mark.slow
def test_a_new_subspace_takes_a_tenth_of_the_authors_packages_time_at_most():
    from galore_torch.galore_projector import GaLoreProjector

    def seconds(choose):
        start = time.perf_counter()
        choose()
        return time.perf_counter() - start

    g = torch.randn(1024, 4096)
    ours = min(seconds(lambda: randomized_vectors(g, 128, True, False, (0,))) for _ in range(5))
    assert ours <= 0.1 * seconds(lambda: GaLoreProjector(128).get_orthogonal_matrix(g, 128, "left"))


def test_the_subspace_is_as_good_where_the_gram_matrix_costs_too_much_to_form():
    # at rank 1 of a matrix with a long shorter side, A A^T is applied by two products
    u, v = (torch.linalg.qr(torch.randn(300, 20)).Q for _ in range(2))
    g = u @ torch.diag(0.7 ** torch.arange(20.0)) @ v.t()
    left, right = randomized_vectors(g, 1, True, True, (0,))
    assert (left.t() @ u[:, :1]).abs() > 0.9999 and (right @ v[:, :1]).abs() > 0.9999


# ---- Q-GaLore (2407.08296)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(24, 64), (7, 37)])
def test_few_bits_are_those_of_the_authors_formula_and_take_their_bytes(shape, bits):
    torch.manual_seed(0)
    numbers = torch.randn(shape)
    packed = affine.quantize(numbers, bits)
    flat = numbers.flatten()
    restored = affine.dequantize(packed, bits, numbers.shape, torch.float32).flatten()
    for number, group in enumerate(flat.split(256)):
        scale = (group.max() - group.min()) / (2**bits - 1)
        zero = -torch.round(group.min() / scale)
        codes = torch.clamp(torch.round(group / scale) + zero, 0, 2**bits - 1)
        torch.testing.assert_close(restored[256 * number :][: len(group)], (codes - zero) * scale)
    count, groups = flat.numel(), -(-flat.numel() // 256)
    assert sum(t.nbytes for t in packed.values()) == (count if bits == 8 else -(-count // 2)) + 5 * groups


def test_a_group_of_one_sign_is_not_clipped():
    numbers = torch.linspace(5.0, 6.0, 256)
    restored = affine.dequantize(affine.quantize(numbers, 8), 8, numbers.shape, torch.float32)
    torch.testing.assert_close(restored, numbers, rtol=0, atol=6.0 / 255)


def test_quantising_in_pieces_is_quantising_the_whole(monkeypatch):
    torch.manual_seed(0)
    numbers = torch.randn(40, 77)
    expected = affine.quantize(numbers, 4)
    restored = affine.dequantize(expected, 4, numbers.shape, torch.bfloat16)
    monkeypatch.setattr(quantized, "PIECE", 512)
    packed = affine.quantize(numbers, 4)
    assert all(torch.equal(packed[name], tensor) for name, tensor in expected.items())
    assert torch.equal(affine.dequantize(packed, 4, numbers.shape, torch.bfloat16), restored)


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_a_projection_in_4_bits_takes_half_a_byte_a_value_and_projects_nearly_the_same(projection):
    torch.manual_seed(0)
    shapes = ((8, 20), (20, 8))
    grads = [torch.randn(shape) for shape in shapes]
    seen = []
    for bits in (None, 4):
        model = matrices(*shapes)
        optimizer = GaLore(model, 1e-2, rank=3, projection=projection, projection_bits=bits)
        params = list(model.parameters())
        update(optimizer, params, grads)
        kept = [kept_subspace(optimizer.state[p], bits, p, 3) for p in params]
        seen.append([project(g, subspace) for g, subspace in zip(grads, kept, strict=True)])
    for exact, rough in zip(*seen, strict=True):
        assert 0.0 < (exact - rough).norm() < 0.2 * exact.norm()
    for p in params:
        for side, length in (("left", p.shape[0]), ("right", p.shape[1])):
            if side in optimizer.state[p]:
                held = sum(optimizer.state[p][key].nbytes for key in (side, f"{side}_scales", f"{side}_zeros"))
                assert held == -(-3 * length // 2) + 5


@pytest.mark.parametrize(("turn", "expected"), [(0.0, [0, 2, 4, 6, 8, 10, 14, 22, 38]), (1.0, list(range(0, 40, 2)))])
def test_a_subspace_that_is_stable_is_kept_for_twice_as_long_each_time(turn, expected):
    """After five cosines of .4 on average; the leading direction of the gradients stays, or turns by 90 degrees."""
    torch.manual_seed(0)
    model = matrices((6, 9))
    (p,) = model.parameters()
    optimizer = GaLore(model, 0.0, rank=2, update_every=2, lazy=True)
    chosen = []
    for step in range(40):
        before = optimizer.state[p].get("left")
        g = 0.01 * torch.randn(6, 9)
        g[int(turn * step) % 6] += (-1.0) ** step  # a leading vector may come with either sign
        update(optimizer, [p], [g])
        if optimizer.state[p]["left"] is not before:
            chosen.append(step)
    assert chosen == expected
    assert len(optimizer.state[p]["cosines"]) == 5


def test_without_lazy_nothing_is_remembered_of_earlier_subspaces():
    model = matrices((6, 9))
    (p,) = model.parameters()
    optimizer = GaLore(model, rank=2, update_every=1)
    for _ in range(3):
        update(optimizer, [p], [torch.randn(6, 9)])
    assert not {"cosines", "interval"} & optimizer.state[p].keys()


def test_a_state_that_does_not_say_when_it_is_due_goes_on_as_it_was():
    """As it was saved before all said it."""
    weights = []
    for said in (True, False):
        torch.manual_seed(0)
        model = matrices((6, 9))
        (p,) = model.parameters()
        optimizer = GaLore(model, rank=2, update_every=3)
        for step in range(8):
            if step == 4 and not said:
                saved = optimizer.state_dict()
                del saved["state"][0]["due"]
                optimizer.load_state_dict(saved)
            update(optimizer, [p], [torch.randn(6, 9)])
        weights.append(p.detach().clone())
    assert torch.equal(*weights)


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_weights_rounded_at_random_are_on_average_those_of_fp32(projection):
    torch.manual_seed(0)
    shape = (8, 20)
    exact = matrices(shape).bfloat16()
    wide = matrices(shape)
    wide.load_state_dict(exact.state_dict())
    grad = torch.randn(shape).bfloat16()
    draws = []
    for draw in range(200):
        model = matrices(shape).bfloat16()
        model.load_state_dict(exact.state_dict())
        optimizer = GaLore(model, 1e-4, 0.1, rank=3, projection=projection, stochastic_rounding=True)
        optimizer._steps_done = draw
        update(optimizer, list(model.parameters()), [grad])
        draws.append(next(model.parameters()).detach().float())
    subspace = {side: optimizer.state[next(iter(optimizer.state))][side] for side in ("left", "right")
                if side in optimizer.state[next(iter(optimizer.state))]}  # fmt: skip
    step = project(grad, subspace).sign()  # Adam's first, but for eps
    (p,) = wide.parameters()
    add_back(p.data, -step.float(), {side: v.float() for side, v in subspace.items()}, 1 - 1e-5, 0.25e-4)
    unit = torch.ldexp(torch.ones(shape), torch.frexp(p.detach()).exponent - 8)
    error = ((torch.stack(draws).mean(0) - p.detach()) / unit).abs()
    assert error.max() < 5 * (0.25 / 200) ** 0.5 and (torch.stack(draws).std(0) > 0).float().mean() > 0.5


def test_projections_of_other_bits_and_states_of_other_bits_are_refused():
    with pytest.raises(ValueError, match="projection_bits must be 4, 8 or None, not 3"):
        GaLore(matrices((4, 6)), projection_bits=3)
    state = GaLore(matrices((4, 6)), projection_bits=4).state_dict()
    with pytest.raises(ValueError, match="this state was saved with projection_bits=4, not None"):
        GaLore(matrices((4, 6))).load_state_dict(state)
