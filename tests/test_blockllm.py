"""BlockLLM against its algorithm: which tensors, which entries, when anew."""

import itertools
import math
import random

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from optimizers import AdamW, BlockLLM, blockllm
from optimizers.contract import build_model, loss_of, train, weights_of
from optimizers.shared import partial
from optimizers.shared.blockllm_rules import PaperRule, ReleaseRule
from optimizers.shared.largest import largest_entries
from optimizers.shared.row_groups import largest_groups


def chosen_of(optimizer):
    return [optimizer._pool[i] for i in optimizer.rule.chosen]


def trained_of(optimizer, p):
    """Which entries of the flattened `p` are trained; a mask."""
    state = optimizer.state.get(p, {})
    if "index" in state:
        return torch.zeros(p.numel(), dtype=torch.bool).index_fill_(0, state["index"].long(), True)
    return state["exp_avg_sq"].isfinite().flatten() if state else torch.zeros(p.numel(), dtype=torch.bool)


def test_with_no_sparsity_blockllm_is_adamw_to_the_last_bit():
    model, other = build_model(), build_model()
    train(model, BlockLLM(model, lr=1e-2, sparsity=0.0, train_embeddings=True, patience=1000), 20)
    train(other, AdamW(other, lr=1e-2), 20)
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name


@pytest.mark.parametrize("sparsity", [0.5, 0.95])
def test_exactly_the_budget_of_entries_is_kept_and_they_have_the_largest_gradients(sparsity):
    model, other = build_model(), build_model()
    optimizer = BlockLLM(model, sparsity=sparsity)
    loss_of(other, 0).backward()
    gradients = dict(zip(model.parameters(), [p.grad for p in other.parameters()], strict=True))
    train(model, optimizer, 1)

    budget = round((1 - sparsity) * sum(p.numel() for layer in model.layers for p in layer.parameters()))
    kept, left = [], []
    for p in chosen_of(optimizer):
        mask = trained_of(optimizer, p)
        kept.append(gradients[p].abs().flatten()[mask])
        left.append(gradients[p].abs().flatten()[~mask])
    assert sum(k.numel() for k in kept) == budget
    assert torch.cat(kept).min() >= torch.cat(left).max()


def test_a_weight_that_layers_share_counts_once():
    model = build_model()
    for layer in model.layers[1:]:
        layer.mlp.up_proj.weight = model.layers[0].mlp.up_proj.weight
    optimizer = BlockLLM(model, lr=1e-2, sparsity=0.5, patience=1)
    budget = round(0.5 * sum(p.numel() for p in model.layers.parameters()))
    choices = 0
    for step in range(12):
        train(model, optimizer, 1, start=step)
        if optimizer.state:  # empty at a step that ends with a new choice
            assert sum(trained_of(optimizer, p).sum() for p in chosen_of(optimizer)) == budget
        else:
            choices += 1
    assert choices > 1


@pytest.mark.parametrize(
    ("dtype", "form"), [(torch.float32, "marks"), (torch.float32, "index"), (torch.bfloat16, "marks")]
)
def test_only_the_kept_entries_move_until_the_next_choice(dtype, form, monkeypatch):
    if form == "index":
        monkeypatch.setattr(blockllm, "marks_are_smaller", lambda *_: False)
    model = build_model(dtype)
    optimizer = BlockLLM(model, lr=1e-2, patience=100)
    before = weights_of(model)
    train(model, optimizer, 12)
    assert any(("index" in state) == (form == "index") for state in optimizer.state.values())
    for name, p in model.named_parameters():
        moved = (p != before[name]).flatten()
        trained = trained_of(optimizer, p)
        assert torch.equal(moved, trained) if dtype is torch.float32 else not (moved & ~trained).any(), name


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.0)])
def test_marked_and_gathered_entries_are_trained_alike(betas, monkeypatch):
    given = {"lr": 1e-2, "weight_decay": 0.3, "betas": betas}
    marked, gathered = build_model(torch.float64), build_model(torch.float64)
    optimizer = BlockLLM(marked, **given)
    train(marked, optimizer, 12)
    assert not any("index" in state for state in optimizer.state.values())
    monkeypatch.setattr(blockllm, "marks_are_smaller", lambda *_: False)
    train(gathered, BlockLLM(gathered, **given), 12)
    for p, q in zip(marked.parameters(), gathered.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("dtype", "bytes_an_entry"), [(torch.float32, 12), (torch.bfloat16, 16)])
def test_after_many_choices_the_state_is_what_the_formula_says(dtype, bytes_an_entry):
    model = build_model(dtype)
    optimizer = BlockLLM(model, lr=1e-2, sparsity=0.9, patience=2, always_train=("classifier",))
    for turn in range(30):
        train(model, optimizer, 1, start=turn)
        optimizer.advance()
    train(model, optimizer, 1, start=30)
    dense = sum(p.numel() * (bytes_an_entry - 4) + 4 for p in model.classifier.parameters())
    kept = [p for p in chosen_of(optimizer) if optimizer.state.get(p)]
    entries = optimizer.rule.budget * bytes_an_entry
    marks = sum(p.numel() for p in kept) * (bytes_an_entry - 4)
    assert optimizer.state_bytes() == min(entries, marks) + 4 * len(kept) + dense


def test_a_tensor_chosen_late_trains_and_all_tensors_get_their_turn():
    model = build_model()
    optimizer = BlockLLM(model, lr=1e-3, sparsity=0.9)
    for step in range(len(optimizer._pool)):  # probes go through all tensors
        train(model, optimizer, 1, start=step)
    for turn in range(40):
        optimizer.advance()
        before = weights_of(model)
        train(model, optimizer, 1, start=turn)
        assert any(not torch.equal(before[n], p) for n, p in model.named_parameters() if p in optimizer.state)
    assert optimizer.block_coverage > 0.5


def test_probes_go_through_all_tensors_and_a_probed_tensor_is_measured_but_not_updated():
    model = build_model()
    optimizer = BlockLLM(model, lr=1e-2, sparsity=0.95, probe=2, patience=1000)
    before = weights_of(model)
    names = {p: name for name, p in model.named_parameters()}
    probed = set()
    for step in range(len(optimizer._pool) // 2 + 2):
        probed |= set(optimizer._probed)
        train(model, optimizer, 1, start=step)
    unchosen = set(range(len(optimizer._pool))) - set(optimizer.rule.chosen)
    assert probed == unchosen == set(optimizer.rule.norms)
    for i in unchosen:
        p = optimizer._pool[i]
        assert torch.equal(before[names[p]], p)


def test_probes_come_in_another_order_each_time_round_which_the_seed_decides():
    def rounds(seed):
        model = build_model()
        optimizer = BlockLLM(model, sparsity=0.95, patience=1000, seed=seed)
        unchosen = len(optimizer._pool) - len(optimizer.rule.chosen)
        seen = []
        for step in range(2 * unchosen):
            seen += optimizer._probed
            train(model, optimizer, 1, start=step)
        return seen[:unchosen], seen[unchosen:]

    first, second = rounds(0)
    assert sorted(first) == sorted(second) == sorted(set(first)) and first != second
    assert first != sorted(first) and rounds(0) == (first, second) != rounds(1)


def test_a_probed_norm_is_that_of_the_gradient():
    model, other = build_model(), build_model()
    optimizer = BlockLLM(model)
    (probed,) = optimizer._probed
    train(model, optimizer, 1)
    loss_of(other, 0).backward()
    place = [p is optimizer._pool[probed] for p in model.parameters()].index(True)
    expected = list(other.parameters())[place].grad.norm().item()
    assert optimizer.rule.norms[probed] == pytest.approx(expected, rel=1e-6)


def test_it_must_see_the_loss():
    model = build_model()
    optimizer = BlockLLM(model)
    loss_of(model, 0).backward()
    with pytest.raises(RuntimeError, match=r"call optimizer\.backward\(loss\)"):
        optimizer.step()


def test_with_accumulation_it_sees_the_mean_over_micro_batches():
    model = build_model()
    optimizer = BlockLLM(model, patience=5)
    losses = [loss_of(model, i) for i in range(4)]
    for loss in losses:
        optimizer.backward(loss / 4)
    optimizer.step()
    assert optimizer.rule.losses == pytest.approx([sum(loss.item() for loss in losses) / 4])


@pytest.mark.parametrize("owner", ["model", "optimizer"])
def test_the_loss_of_a_step_that_was_skipped_does_not_count(owner):
    model = build_model()
    optimizer = BlockLLM(model)
    optimizer.backward(1e3 * loss_of(model, 0))
    (model if owner == "model" else optimizer).zero_grad()
    loss = loss_of(model, 1)
    optimizer.backward(loss)
    optimizer.step()
    assert optimizer.rule.losses == [loss.item()]


def test_the_first_choice_is_random_and_a_function_of_the_seed():
    def first(seed):
        return BlockLLM(build_model(), seed=seed).rule.chosen

    assert first(1) == first(1)
    assert len({tuple(first(seed)) for seed in range(8)}) > 3


def test_the_worst_case_probes_the_largest_of_the_others_until_tensors_are_chosen_again():
    model = build_model()
    optimizer = BlockLLM(model, sparsity=0.9, probe=2)
    optimizer.worst_case()
    sizes = [p.numel() for p in optimizer._pool]
    for step in range(3):
        others = sorted(set(range(len(sizes))) - set(optimizer.rule.chosen), key=lambda i: (-sizes[i], i))
        assert optimizer._probed == others[:2]
        train(model, optimizer, 1, start=step)
    optimizer.advance()
    turns = set()
    for step in range(3):
        turns |= set(optimizer._probed)
        train(model, optimizer, 1, start=step)
    assert len(turns) > 2


def test_the_worst_case_has_the_largest_tensor_last_when_positions_of_the_others_are_held():
    optimizer = BlockLLM(build_model(), sparsity=0.3)
    for number in range(optimizer.worst_cases):
        optimizer.worst_case(number)
        sizes = [optimizer._pool[i].numel() for i in optimizer.rule.chosen]
        assert min(sizes) < sizes[-1] == max(sizes)


def test_without_values_every_tensor_has_an_entry_and_the_last_ones_have_the_rest():
    with FakeTensorMode():
        tensors = [torch.empty(10), torch.empty(4, 5), torch.empty(30)]
        assert [len(positions) for positions in largest_entries(tensors, 25)] == [1, 1, 23]
        assert [len(positions) for positions in largest_entries(tensors, 41)] == [1, 10, 30]
        assert [len(positions) for positions in largest_entries(tensors, 2)] == [1, 1, 0]


def test_the_worst_case_holds_the_largest_tensors():
    optimizer = BlockLLM(build_model(), sparsity=0.9)
    optimizer.worst_case()
    assert {p.numel() for p in chosen_of(optimizer)} == {max(p.numel() for p in optimizer._pool)}


class TestPaperRule:
    def test_the_choice_is_by_norm_over_one_plus_the_times_chosen_until_the_budget_is_reached(self):
        rule = PaperRule([10, 10, 10, 70], sparsity=0.85, patience=1, update_every=1)  # budget 15
        rule.norms = {0: 4.0, 1: 3.0, 2: 2.0, 3: 1.0}
        assert rule.choose() == [0, 1]
        rule.take([0, 1])
        rule.norms[2] = 2.5
        assert rule.choose() == [2, 0]  # 4 / 2, 3 / 2, 2.5 / 1, 1 / 1
        rule.take([0])
        assert rule.choose() == [2, 1]  # 4 / 3, 3 / 2, 2.5 / 1, 1 / 1

    def test_a_tensor_without_a_norm_ranks_last(self):
        rule = PaperRule([10, 10, 10], sparsity=0.5, patience=1, update_every=1)
        rule.norms = {2: 1e-9, 1: 1e-8}
        assert rule.choose() == [1, 2]

    def test_a_new_choice_is_due_when_the_loss_is_not_below_the_mean_of_the_last_m(self):
        rule = PaperRule([1], sparsity=0.5, patience=3, update_every=1)
        rule.take([0])
        assert [rule.is_time(loss) for loss in (9.0, 6.0, 3.0)] == [False, False, False]  # too few to compare with
        assert not rule.is_time(5.9)  # mean of 9, 6, 3 is 6
        assert rule.is_time(5.0)  # mean of 6, 3, 5.9 is 4.97
        rule.take([0])
        assert not rule.is_time(99.0)  # the history began anew

    def test_a_loss_that_stays_the_same_has_stalled_from_the_first_time_that_there_are_enough_to_compare(self):
        rule = PaperRule([1], sparsity=0.5, patience=4, update_every=1)
        rule.take([0])
        assert [rule.is_time(0.5) for _ in range(6)] == [False] * 4 + [True] * 2

    def test_losses_older_than_the_patience_do_not_count(self):
        rule = PaperRule([1], sparsity=0.5, patience=2, update_every=1)
        rule.take([0])
        assert [rule.is_time(loss) for loss in (100.0, 1.0, 2.0, 1.6)] == [False, False, False, True]  # mean of 1, 2

    @pytest.mark.parametrize("seed", range(30))
    def test_the_fullest_choice_has_the_most_weights_of_all_orders(self, seed):
        draw = random.Random(seed)
        sizes = [draw.choice([1, 2, 3, 5, 6, 8, 10, 60]) * draw.choice([1, 4]) for _ in range(draw.randint(2, 6))]
        rule = PaperRule(sizes, sparsity=draw.choice([0.3, 0.6, 0.9]), patience=1, update_every=1)
        most = max(sum(sizes[i] for i in rule.first(order)) for order in itertools.permutations(range(len(sizes))))
        largest = sorted(range(len(sizes)), key=lambda i: -sizes[i])
        fullest = rule.fullest(largest)
        assert sum(sizes[i] for i in rule.first(fullest)) == most and len(set(fullest)) == len(fullest)

    def test_the_fullest_choice_of_a_large_model_takes_no_time(self):
        layer = [16_777_216] * 2 + [4_194_304] * 2 + [58_720_256] * 3 + [4096] * 2
        rule = PaperRule(layer * 32, sparsity=0.95, patience=1, update_every=1)
        largest = sorted(range(len(rule.sizes)), key=lambda i: -rule.sizes[i])
        chosen = rule.fullest(largest)
        filled = sum(rule.sizes[i] for i in chosen[:-1])
        assert rule.budget == 348_979_200 and filled == 83 * 4_194_304 + 64 * 4096  # no more multiples, and all norms
        assert rule.sizes[chosen[-1]] == 58_720_256


class TestReleaseRule:
    def test_the_first_choice_is_a_share_of_the_tensors_and_never_empty(self):
        assert ReleaseRule([1] * 10, 0.75, 1, 1).first(range(10)) == [0, 1]
        assert ReleaseRule([1] * 10, 0.95, 1, 1).first(range(10)) == [0]

    def test_the_choice_is_by_norm_over_exp_of_frequency_up_to_the_first_tensor_that_reaches_the_budget(self):
        rule = ReleaseRule([50, 30, 20, 1], sparsity=0.45, patience=1, update_every=1)  # budget 55
        rule.norms = {0: 2.5, 1: 2.0, 2: 3.0, 3: 0.1}
        rule.steps, rule.shares = 2, [0.9, 0.1, 0.0, 0.0]
        assert 2.5 / math.exp(0.9 / 2) < 2.0 / math.exp(0.1 / 2)
        assert rule.choose() == [2, 1]  # the third reaches it; that the fourth would fit doesn't matter

    def test_where_too_few_norms_are_known_others_are_added_at_random_until_the_budget_is_reached(self):
        rule = ReleaseRule([10, 10, 10, 10], sparsity=0.25, patience=1, update_every=1)  # budget 30
        rule.norms = {2: 1.0}
        assert rule.choose([3, 2, 0, 1]) == [2, 3, 0]

    def test_a_tensor_larger_than_the_budget_leaves_the_choice_to_the_others_or_is_taken_alone(self):
        rule = ReleaseRule([86, 5, 5, 4], sparsity=0.875, patience=1, update_every=1)  # budget 12
        rule.norms = {0: 3.0, 1: 2.0, 2: 1.0}
        assert rule.choose() == [1, 2]
        rule = ReleaseRule([90, 80], sparsity=0.875, patience=1, update_every=1)
        rule.norms = {0: 1.0, 1: 2.0}
        assert rule.choose() == [1]

    def test_a_new_choice_is_due_at_multiples_of_update_every_when_the_last_losses_are_above_the_mean_of_all(self):
        rule = ReleaseRule([1], sparsity=0.5, patience=2, update_every=4)
        rule.take([0])
        assert [rule.is_time(loss) for loss in (1.0, 1.0, 2.0, 2.0)] == [False, False, False, True]
        assert [rule.is_time(loss) for loss in (0.1, 0.1, 0.1, 0.1)] == [False] * 4


# ---- whole rows in place of entries


def rows_trained(optimizer, p, rows=3):
    groups = optimizer.state[p]["groups"].tolist() if "groups" in optimizer.state.get(p, {}) else []
    return [row for group in groups for row in range(group * rows, min(group * rows + rows, len(p)))]


def test_the_groups_of_rows_with_the_largest_mean_squares_are_trained_and_fill_the_budget():
    model, other = build_model(), build_model()
    optimizer = BlockLLM(model, sparsity=0.6, rows=3)
    loss_of(other, 0).backward()
    gradients = dict(zip(model.parameters(), [p.grad for p in other.parameters()], strict=True))
    train(model, optimizer, 1)
    kept, left, trained = [], [], 0
    for p in chosen_of(optimizer):
        for start in range(0, len(p), 3):
            part = gradients[p][start : start + 3]
            inside = start in rows_trained(optimizer, p)
            (kept if inside else left).append((part.square().mean().item(), part.numel()))
            trained += part.numel() * inside
    weakest, strongest = min(kept)[0], max(left)
    assert weakest >= strongest[0]
    budget = round(0.4 * sum(p.numel() for layer in model.layers for p in layer.parameters()))
    assert budget - strongest[1] < trained <= budget


def test_groups_of_rows_are_compared_where_layers_lie_on_several_devices():
    grads = [torch.ones(6, 4, device=device) for device in ("meta", "cpu")]
    assert largest_groups(grads, 2, 24) == [[0, 1, 2], []]


def test_only_these_rows_move_and_as_by_adamw_on_them_alone():
    model, other = build_model(), build_model()
    optimizer = BlockLLM(model, lr=1e-2, weight_decay=0.1, patience=100, rows=3)
    before = weights_of(model)
    optimizer.backward(loss_of(model, 0))
    optimizer.step()
    rows = {p: rows_trained(optimizer, p) for p in chosen_of(optimizer)}
    assert any(rows.values())
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        decay = 0.1 if p.dim() >= 2 else 0.0
        part = q.detach()[rows.get(p, [])].requires_grad_()
        reference = torch.optim.AdamW([part], lr=1e-2, weight_decay=decay, fused=True)
        for step in range(5):
            if rows.get(p):
                if step:
                    p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
                part.grad = p.grad[rows[p]].clone()
                reference.step()
                if step:
                    group = optimizer.param_groups[0 if p.dim() >= 2 else 1]
                    with torch.no_grad():
                        optimizer.update([p], [p.grad], group)
        if rows.get(p):
            assert torch.equal(p[rows[p]], part)
    for name, p in model.named_parameters():
        moved = (p != before[name]).flatten(1).any(1) if p.dim() > 1 else p != before[name]
        assert set(moved.nonzero().flatten().tolist()) <= set(rows.get(p, []))


@pytest.mark.parametrize(("dtype", "bytes_a_weight"), [(torch.float32, 8), (torch.bfloat16, 12)])
def test_rows_are_kept_without_positions(dtype, bytes_a_weight):
    model = build_model(dtype)
    optimizer = BlockLLM(model, lr=1e-2, sparsity=0.6, rows=3)
    train(model, optimizer, 3)
    expected = 0
    for p in chosen_of(optimizer):
        rows = rows_trained(optimizer, p)
        expected += bytes_a_weight * len(rows) * p[0].numel()
        expected += (4 * len(optimizer.state[p]["groups"]) + 4) if rows else 0
    assert optimizer.state_bytes() == expected


def test_with_no_sparsity_and_rows_it_is_adamw_to_the_last_bit():
    model, other = build_model(), build_model()
    train(model, BlockLLM(model, lr=1e-2, sparsity=0.0, train_embeddings=True, patience=1000, rows=3), 10)
    train(other, AdamW(other, lr=1e-2), 10)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_rows_of_whole_tensors_are_refused():
    with pytest.raises(ValueError, match="rows=3 needs rule='paper'"):
        BlockLLM(build_model(), rule="release", rows=3)


def test_entries_gathered_in_pieces_are_the_same_to_the_last_bit(monkeypatch):
    results = []
    for piece in (2**18, 7):
        monkeypatch.setattr(partial, "PIECE", piece)
        model = build_model(torch.bfloat16)
        train(model, BlockLLM(model, lr=1e-2, sparsity=0.6, patience=2), 8)
        results.append(weights_of(model))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_a_probed_gradient_is_gone_before_the_update():
    model = build_model()
    optimizer = BlockLLM(model, lr=1e-2)
    optimizer.backward(loss_of(model, 0))
    probed = [optimizer._pool[i] for i in optimizer._probed]
    assert probed and all(p.grad is not None for p in probed)
    optimizer.step()
    assert all(p.grad is None for p in probed)
