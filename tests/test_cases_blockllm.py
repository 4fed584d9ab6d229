"""BlockLLM's cases: the release's rule as its authors wrote it, and entries chosen without a hidden workspace."""

import random

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from optimizers import AdaLomo, BlockLLM
from optimizers.adalomo import _initial_state, _update_one
from optimizers.contract import build_model, train
from optimizers.shared.blockllm_rules import ReleaseRule
from optimizers.shared.factored import CHUNK
from optimizers.shared.largest import largest_entries

# ---- BlockLLM


class ReleasesHistory:
    """When the authors' package chooses anew, written from its description: `set_loss`, then `step`."""

    def __init__(self, patience: int, every: int):
        self.patience, self.every, self.step, self.history = patience, every, 0, []

    def chooses(self, loss: float) -> bool:
        self.step += 1
        if self.step == 1:  # it returns at once
            return False
        self.history.append(loss)
        if len(self.history) <= self.patience or self.step % self.every:
            return False
        if sum(self.history) / len(self.history) < sum(self.history[-self.patience :]) / self.patience:
            self.history = []
            return True
        return False


def choices(rule: ReleaseRule, losses: list[float]) -> list[int]:
    found = []
    for step, loss in enumerate(losses, 1):
        if rule.is_time(loss):
            found.append(step)
            rule.take([0])
    return found


def test_n2_the_releases_rule_forgets_its_losses_at_each_choice():
    losses = [1.0] * 20 + [2.0] * 10 + [1.5] * 10 + [1.6] * 60
    assert choices(ReleaseRule([1], sparsity=0.5, patience=5, update_every=5), losses) == [25]


@pytest.mark.parametrize("seed", range(20))
def test_n2_the_release_chooses_when_its_authors_code_does(seed):
    generator = random.Random(seed)
    patience, every = generator.randint(1, 9), generator.randint(1, 9)
    losses = [generator.choice([1.0, 1.5, 2.0, 2.5]) + generator.randint(0, 3) * step / 64 for step in range(200)]
    rule, reference = ReleaseRule([1, 2], 0.5, patience, every), ReleasesHistory(patience, every)
    assert choices(rule, losses) == [step for step, loss in enumerate(losses, 1) if reference.chooses(loss)]
    state = rule.state()
    again = ReleaseRule([1, 2], 0.5, patience, every)
    again.load_state(state)
    assert choices(again, losses) == choices(rule, losses)


def test_n2_frequencies_are_shares_that_sum_to_one_and_the_first_choice_is_not_counted():
    rule = ReleaseRule([1] * 4, sparsity=0.5, patience=1, update_every=1)
    rule.take([0, 1])
    assert rule.shares == [0.25] * 4
    rule.steps = 10
    rule.take([2, 3])
    expected = [0.25] * 4
    for i in (2, 3):  # each one added, then all divided by their sum
        expected[i] += 1.0
        expected = [share / sum(expected) for share in expected]
    assert rule.shares == pytest.approx(expected) and sum(rule.shares) == pytest.approx(1.0)


def test_n2_the_release_probes_a_tensor_for_twenty_steps_and_none_at_first():
    model = build_model()
    optimizer = BlockLLM(model, rule="release", sparsity=0.9, probe=2)
    probed = []
    for step in range(65):
        probed.append(tuple(optimizer._probed))
        train(model, optimizer, 1, start=step)
    assert probed[:20] == [()] * 20
    for start in (20, 40):
        assert len(set(probed[start : start + 20])) == 1 and 1 <= len(probed[start]) <= 2
    assert probed[20] != probed[40]
    optimizer.advance()
    assert optimizer._probed == []


@pytest.mark.parametrize("piece", [7, 2**20])
@pytest.mark.parametrize("seed", range(12))
def test_n8_the_largest_entries_are_those_of_topk_without_its_workspace(seed, piece, monkeypatch):
    monkeypatch.setattr("optimizers.shared.largest.PIECE", piece)
    generator = torch.Generator().manual_seed(seed)
    shapes = [torch.randint(1, 9, (dims,), generator=generator).tolist() for dims in (seed % 4, 2, 1)]
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    tensors = [t.round() if seed % 3 == 1 else t.bfloat16() if seed % 3 == 2 else t for t in tensors]
    tensors = [t.t() if t.dim() == 2 else t for t in tensors]
    magnitudes = torch.cat([t.abs().flatten().float() for t in tensors])
    for count in {1, len(magnitudes) // 3 + 1, len(magnitudes)}:
        found = list(largest_entries(tensors, count))
        assert all((positions.diff() > 0).all() and positions.dtype == torch.int32 for positions in found)
        kept = torch.cat([t.abs().flatten().float()[i.long()] for t, i in zip(tensors, found, strict=True)])
        assert torch.equal(kept.sort().values, magnitudes.topk(count).values.sort().values)


class Operations(TorchDispatchMode):
    """The names of all operations, and the most bytes that one gives."""

    def __init__(self):
        super().__init__()
        self.names, self.most = set(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.names.add(function.overloadpacket.__name__)
        if torch.is_tensor(result) and not function.is_view:
            self.most = max(self.most, result.numel() * result.element_size())
        return result


def test_n8_choosing_entries_sorts_nothing_and_no_temporary_is_larger_than_a_piece(monkeypatch):
    monkeypatch.setattr("optimizers.shared.largest.PIECE", 1000)
    tensor = torch.randn(200, 100)
    with Operations() as seen:
        (positions,) = largest_entries([tensor], 500)
    assert len(positions) == 500 and not seen.names & {"topk", "sort", "argsort", "kthvalue"}
    assert seen.most <= 8 * 2049  # the histogram


def test_n8_adalomo_says_how_large_its_temporaries_are(monkeypatch):
    assert CHUNK * 4 == 64 << 20 and "no temporary is larger than 64 MiB" in AdaLomo.__doc__
    monkeypatch.setattr("optimizers.shared.factored.CHUNK", 4000)
    weight, grad = torch.randn(200, 100), torch.randn(200, 100)
    with Operations() as seen:
        _update_one(_initial_state(weight) | {"step": 1}, weight, grad, ADALOMO)
    assert seen.most == 4000 * 4


ADALOMO = {"lr": 0.1, "decay_rate": -0.8, "eps": (1e-30, 1e-3), "clip_threshold": 1.0, "weight_decay": 0.0}
