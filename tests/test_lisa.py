"""LISA against AdamW on what is drawn, and the promise that its state never grows."""

import itertools
import math
from collections import Counter

import pytest
import torch
from plan_models import blueprint
from selective import train_selected
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    LlamaConfig,
    RobertaConfig,
)

from membench.memory.meter import MemoryMeter
from optimizers import LISA, AdamW
from optimizers.contract import build_model, loss_of, train, weights_of


class Stack(nn.Module):
    """Many small layers between an embedding and a head."""

    def __init__(self, layers):
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(layers))
        self.head = nn.Linear(4, 2)

    def forward(self, tokens):
        x = self.embedding(tokens)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return self.head(x)


def stack(layers=32):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Stack(layers)


def train_stack(model, optimizer, steps):
    for step in range(steps):
        tokens = torch.arange(5) if step % 2 else torch.arange(5).flip(0)
        optimizer.backward(F.cross_entropy(model(tokens), torch.tensor([0, 1, 0, 1, 1])))
        optimizer.step()
        optimizer.zero_grad()


def expect_equal(model, other):
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name


@pytest.mark.parametrize("reset", ["none", "sampled"])
@pytest.mark.parametrize("in_backward", [False, True])
def test_with_all_layers_lisa_is_adamw_to_the_last_bit(reset, in_backward):
    model, other = build_model(), build_model()
    train(model, LISA(model, lr=1e-2, layers=3, switch_every=4, reset=reset, in_backward=in_backward), 20)
    train(other, AdamW(other, lr=1e-2), 20)
    expect_equal(model, other)


@pytest.mark.parametrize("reset", ["sampled", "all", "none"])
def test_lisa_is_adamw_on_what_is_drawn_with_a_state_that_is_reset_to_the_last_bit(reset):
    model, other = build_model(), build_model()
    optimizer = LISA(model, lr=1e-2, weight_decay=0.1, layers=2, switch_every=3, reset=reset)
    drawn = []
    for step in range(24):
        drawn.append(optimizer.selection.split(", "))
        train(model, optimizer, 1, start=step)

    names = [name for name, _ in other.named_parameters() if not name.startswith("unused")]

    def selected(step):
        return {n for n in names if not n.startswith("layers") or n.startswith(tuple(f"{d}." for d in drawn[step]))}

    def forgets(name, step):
        if reset == "all":
            return step % 3 == 0
        return reset == "sampled" and name not in selected(step)

    train_selected(other, selected, 24, lr=1e-2, weight_decay=0.1, forgets=forgets)
    expect_equal(model, other)


def test_of_32_layers_the_state_after_50_intervals_is_as_large_as_after_the_first():
    model = stack()
    optimizer = LISA(model, lr=1e-3, layers=2, switch_every=20)
    sizes = []
    for _ in range(50):
        train_stack(model, optimizer, 19)
        sizes.append(optimizer.state_bytes())
        train_stack(model, optimizer, 1)
    trained = 5 * 4 + 2 * (4 * 4 + 4) + (4 * 2 + 2)  # embedding, two layers, head
    tensors = 1 + 2 * 2 + 2
    assert set(sizes) == {8 * trained + 4 * tensors}


def test_without_a_reset_the_state_grows_to_that_of_adamw():
    model, other = stack(), stack()
    optimizer = LISA(model, lr=1e-3, layers=2, switch_every=1, reset="none")
    full = AdamW(other)
    train_stack(other, full, 1)
    train_stack(model, optimizer, optimizer.cycle_length)
    assert optimizer.state_bytes() == full.state_bytes()


def test_a_layer_changes_from_when_it_is_first_drawn_and_not_before():
    model = stack(8)
    optimizer = LISA(model, lr=1e-3, layers=1, switch_every=2)
    start = weights_of(model)
    seen = set()
    for _ in range(optimizer.cycle_length):
        seen.add(optimizer.selection)
        train_stack(model, optimizer, 2)
        for i in range(8):
            changed = not torch.equal(start[f"layers.{i}.weight"], model.layers[i].weight)
            assert changed == (f"layers.{i}" in seen)
    assert len(seen) == 8


def test_layers_are_drawn_uniformly_without_repetition():
    draws = 4000
    optimizer = LISA(stack(8), layers=3)
    counts = Counter()
    for _ in range(draws):
        drawn = optimizer.selection.split(", ")
        assert len(set(drawn)) == 3
        counts.update(drawn)
        optimizer.advance()
    deviation = math.sqrt(draws * 3 / 8 * 5 / 8)  # of a binomial count
    assert len(counts) == 8 and all(abs(n - draws * 3 / 8) < 4 * deviation for n in counts.values())


def test_the_draws_are_a_function_of_the_seed_and_the_interval():
    def selections(seed, disturb):
        optimizer = LISA(stack(), seed=seed)
        for _ in range(10):
            if disturb:
                torch.rand(3)
            yield optimizer.selection
            optimizer.advance()

    with torch.random.fork_rng(devices=[]):
        assert list(selections(1, False)) == list(selections(1, True)) != list(selections(2, False))


def test_a_draw_lasts_k_steps():
    model = stack()
    optimizer = LISA(model, switch_every=5)
    seen = []
    for _ in range(20):
        seen.append(optimizer.selection)
        train_stack(model, optimizer, 1)
    assert [list(dict.fromkeys(seen[i : i + 5])) for i in range(0, 20, 5)] == [[seen[i]] for i in range(0, 20, 5)]
    assert len(set(seen)) == 4


def test_coverage_counts_layers_that_were_trained_and_a_cycle_is_as_long_as_it_takes_to_draw_all():
    model = stack(8)
    optimizer = LISA(model, layers=2, switch_every=1)
    assert optimizer.block_coverage == 0.0
    train_stack(model, optimizer, 1)
    assert optimizer.block_coverage == 2 / 8
    train_stack(model, optimizer, optimizer.cycle_length - 2)
    visited, blocks, selections = optimizer.coverage_after(optimizer.cycle_length - 1)
    assert optimizer.block_coverage == visited / blocks < 1.0 and selections == optimizer.cycle_length
    train_stack(model, optimizer, 1)
    assert optimizer.block_coverage == 1.0
    assert optimizer.coverage_after(selections)[:2] == (8, 8)


SMALL = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 4, "vocab_size": 30}
FAMILIES = {
    "roberta": lambda: AutoModelForSequenceClassification.from_config(
        RobertaConfig(**SMALL, intermediate_size=32, max_position_embeddings=20)
    ),
    "llama": lambda: AutoModelForCausalLM.from_config(LlamaConfig(**SMALL, intermediate_size=32)),
    "gpt2": lambda: AutoModelForCausalLM.from_config(
        GPT2Config(n_embd=16, n_head=2, n_layer=4, vocab_size=30, n_positions=20)
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_everything_outside_the_layers_is_always_trained(family):
    model = FAMILIES[family]()
    optimizer = LISA(model, layers=1)
    inside = {p for params in optimizer.blocks.values() for p in params}
    outside = set(model.parameters()) - inside
    assert len(optimizer.blocks) == 4 and outside
    for _ in range(6):
        assert outside < set(optimizer.trainable)
        assert len(set(optimizer.trainable) - outside) == len(inside) // 4
        optimizer.advance()


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_frozen_embeddings_cut_the_backward_pass_at_the_lowest_layer_drawn_and_the_head_can_be_trained():
    model = FAMILIES["roberta"]()
    optimizer = LISA(model, layers=2, train_embeddings=False, always_train=("classifier",))
    reached = set()
    for i, layer in enumerate(model.roberta.encoder.layer):
        layer.register_full_backward_hook(lambda *_, i=i: reached.add(i))
    for _ in range(6):
        reached.clear()
        loss = model(input_ids=torch.ones(2, 5, dtype=torch.long), labels=torch.zeros(2, dtype=torch.long)).loss
        optimizer.backward(loss)
        lowest = min(int(name.rpartition(".")[2]) for name in optimizer.selection.split(", "))
        assert reached == set(range(lowest, 4))
        names = {name for name, p in model.named_parameters() if p.grad is not None}
        assert any(name.startswith("classifier") for name in names)
        assert not any("embeddings" in name for name in names)
        optimizer.step()
        optimizer.advance()


def test_more_layers_than_the_model_has_are_refused():
    with pytest.raises(ValueError, match="layers must be at most 3, .* not 4"):
        LISA(build_model(), layers=4)


def peak_of_two_steps(optimizer, loss_at):
    with MemoryMeter(optimizer.model, optimizer) as meter:
        for step in range(2):
            with meter.phase("forward"):
                loss = loss_at(step)
            with meter.phase("backward"):
                optimizer.backward(loss)
            with meter.phase("update"):
                optimizer.step()
                optimizer.zero_grad()
            del loss
    return meter.report()["peak_allocated_bytes"]


def peak_bytes(worst, seed, **given):
    model = build_model()
    optimizer = LISA(model, layers=2, always_train=("classifier",), seed=seed, **given)
    if worst:
        optimizer.worst_case()
    return optimizer.selection, peak_of_two_steps(optimizer, lambda step: loss_of(model, step))


@pytest.mark.parametrize("train_embeddings", [False, True])
def test_the_worst_case_has_the_peak_of_all_selections(train_embeddings):
    seeds = {LISA(build_model(), layers=2, seed=seed).selection: seed for seed in range(20)}
    assert len(seeds) == 3  # pairs of three layers
    peaks = dict(peak_bytes(False, seed, train_embeddings=train_embeddings) for seed in seeds.values())
    assert peak_bytes(True, 0, train_embeddings=train_embeddings)[1] == max(peaks.values())


class Mixed(Stack):
    """A first layer that is smaller than the others."""

    def __init__(self):
        super().__init__(1)
        self.layers.extend(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4)) for _ in range(3))


@pytest.mark.parametrize(("rows", "furthest"), [(1, False), (500, True)])
def test_of_unequal_layers_the_worst_case_is_the_largest_or_goes_back_furthest(rows, furthest):
    def peak(choose):
        model = Mixed()
        optimizer = LISA(model, layers=2, train_embeddings=False)
        choose(optimizer)
        peak = peak_of_two_steps(optimizer, lambda step: model(torch.arange(5).repeat(rows)).square().mean())
        return peak, "layers.0" in optimizer.selection

    def training(pair):
        return lambda optimizer: (optimizer._draws.take(pair), optimizer._select())

    every = [peak(training(pair)) for pair in itertools.combinations(range(4), 2)]
    cases = LISA(Mixed(), layers=2, train_embeddings=False).worst_cases
    found = max((peak(lambda one, n=n: one.worst_case(n)) for n in range(cases)), key=lambda one: one[0])
    assert found == (max(size for size, _ in every), furthest)


@pytest.mark.parametrize(("name", "layers", "in_backward"), [("llama", 1, False), ("gpt2", 2, True)])
def test_where_only_some_layers_are_recomputed_the_worst_cases_have_the_peak_of_all(
    name, layers, in_backward, tmp_path
):
    """The activations of the others are there."""
    b = blueprint(tmp_path, name, 5, checkpointing=True, checkpointing_every=2)
    values = {"layers": layers, "train_embeddings": False, "in_backward": in_backward}

    def peak(choose):
        torch.manual_seed(0)
        model = b.build(b.depth)
        optimizer = LISA(model, **values)
        choose(optimizer)
        return peak_of_two_steps(optimizer, lambda step: model(**b.batch("cpu")).loss)

    cases = range(LISA(b.build(b.depth), **values).worst_cases)
    every = [
        peak(lambda one, drawn=drawn: (one._draws.take(drawn), one._select()))
        for drawn in itertools.combinations(range(b.depth), layers)
    ]
    assert max(peak(lambda one, n=n: one.worst_case(n)) for n in cases) == max(every)


def test_the_worst_case_without_a_reset_is_the_full_state():
    model, other = stack(), stack()
    optimizer, full = LISA(model, reset="none"), AdamW(other)
    optimizer.worst_case()
    train_stack(model, optimizer, 1)
    train_stack(other, full, 1)
    assert optimizer.state_bytes() == full.state_bytes()
