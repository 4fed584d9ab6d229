"""HFT: half of each category of each layer, on real model families, and AdamW on what is drawn."""

from collections import Counter

import pytest
import torch
from selective import train_selected
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    Qwen3Config,
    RobertaConfig,
)

from optimizers import HFT
from optimizers.contract import build_model, train

LAYERS = 4
SMALL = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": LAYERS, "vocab_size": 30}
GATED = {**SMALL, "intermediate_size": 32, "num_key_value_heads": 1, "head_dim": 8}
FAMILIES = {
    "roberta": lambda: AutoModelForSequenceClassification.from_config(
        RobertaConfig(**SMALL, intermediate_size=32, max_position_embeddings=20)
    ),
    "llama": lambda: AutoModelForCausalLM.from_config(LlamaConfig(**GATED)),
    "qwen3": lambda: AutoModelForCausalLM.from_config(Qwen3Config(**GATED)),
    "gpt2": lambda: AutoModelForCausalLM.from_config(
        GPT2Config(n_embd=16, n_head=2, n_layer=LAYERS, vocab_size=30, n_positions=20)
    ),
}
# by hand: the modules of a layer by category, and how many are trained (two numbers: each in half of the layers)
PARTS = {
    "roberta": (
        "encoder.layer",
        {
            ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"): [2],
            ("intermediate.dense", "output.dense"): [1],
            ("attention.output.LayerNorm", "output.LayerNorm"): [1],
        },
    ),
    "llama": (
        "model.layers",
        {
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"): [2],
            ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"): [1, 2],
            ("input_layernorm", "post_attention_layernorm"): [1],
        },
    ),
    "qwen3": (
        "model.layers",
        {
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"): [2],
            ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"): [1, 2],
            ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm"): [2],
        },
    ),
    "gpt2": (
        "transformer.h",
        {("attn.c_attn", "attn.c_proj"): [1], ("mlp.c_fc", "mlp.c_proj"): [1], ("ln_1", "ln_2"): [1]},
    ),
}


def trained_modules(model):
    """Modules all of whose own parameters require gradients; none may be trained in part."""
    trained = set()
    for name, module in model.named_modules():
        flags = {p.requires_grad for p in module.parameters(recurse=False)}
        assert len(flags) <= 1, f"{name} is trained in part"
        if flags == {True}:
            trained.add(name)
    return trained


@pytest.mark.parametrize("family", FAMILIES)
def test_half_of_each_category_of_each_layer_is_trained(family):
    model = FAMILIES[family]()
    optimizer = HFT(model, switch_every=1)
    layers, categories = PARTS[family]
    for _ in range(5):
        trained = trained_modules(model)
        for members, counts in categories.items():
            seen = []
            for i in range(LAYERS):
                names = {n for n in trained if f"{layers}.{i}." in n}
                seen.append(sum(n.endswith(f"{layers}.{i}.{member}") for n in names for member in members))
            assert sorted(seen) == sorted(counts * (LAYERS // len(counts)))
        optimizer.advance()
    in_parts = sum(len(members) for members in categories) * LAYERS
    assert len(optimizer.parts) == in_parts, "the parts aren't those listed by hand"


def test_of_an_odd_number_of_layers_one_more_trains_the_larger_half():
    model = build_model()  # three layers, each with three matrices in its MLP
    optimizer = HFT(model, switch_every=1)
    larger = Counter()
    for _ in range(30):
        trained = trained_modules(model)
        counts = [sum(n.startswith(f"layers.{i}.mlp.") for n in trained) for i in range(3)]
        assert sorted(counts) == [1, 2, 2]
        assert [sum(n.startswith(f"layers.{i}.self_attn.") for n in trained) for i in range(3)] == [2, 2, 2]
        larger.update(i for i in range(3) if counts[i] == 2)
        optimizer.advance()
    assert set(larger) == {0, 1, 2} and len(set(larger.values())) > 1  # drawn anew, and not in turns


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_final_norm_and_head_are_always_trained(family):
    model = FAMILIES[family]()
    optimizer = HFT(model)
    inside = {p for params in optimizer.parts.values() for p in params}
    outside = set(model.parameters()) - inside
    named = {name for name, p in model.named_parameters() if p in outside}
    assert named and not any(f"{PARTS[family][0]}." in name for name in named)
    for _ in range(4):
        assert outside < set(optimizer.trainable)
        optimizer.advance()


def test_each_pair_of_attention_matrices_is_as_likely_as_any_other():
    model = build_model()
    optimizer = HFT(model, switch_every=1)
    draws = 1500
    pairs = Counter()
    for _ in range(draws):
        pairs[tuple(m for m in "qkvo" if getattr(model.layers[1].self_attn, f"{m}_proj").weight.requires_grad)] += 1
        optimizer.advance()
    assert len(pairs) == 6 and all(len(pair) == 2 for pair in pairs)
    deviation = (draws * 1 / 6 * 5 / 6) ** 0.5
    assert all(abs(n - draws / 6) < 4 * deviation for n in pairs.values())


def test_hft_is_adamw_on_what_is_drawn_and_what_leaves_is_forgotten_to_the_last_bit():
    model, other = build_model(), build_model()
    optimizer = HFT(model, lr=1e-2, weight_decay=0.1, switch_every=3)
    drawn = []
    for step in range(24):
        drawn.append({n for n, p in model.named_parameters() if p.requires_grad and not n.startswith("unused")})
        train(model, optimizer, 1, start=step)
    assert len({frozenset(names) for names in drawn}) == 8

    train_selected(
        other,
        lambda step: drawn[step],
        24,
        lr=1e-2,
        weight_decay=0.1,
        forgets=lambda name, step: name not in drawn[step],
    )
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_state_is_kept_for_what_is_trained_now_and_nothing_else():
    model = build_model()
    optimizer = HFT(model, lr=1e-2, switch_every=4)
    for turn in range(6):
        train(model, optimizer, 3, start=4 * turn)
        reached = {p for p in optimizer.trainable if p not in set(model.unused.parameters())}
        assert set(optimizer.state) == reached
        assert optimizer.state_bytes() == sum(8 * p.numel() + 4 for p in reached)
        train(model, optimizer, 1, start=4 * turn + 3)


def test_without_rounds_the_first_draw_stays():
    model = build_model()
    optimizer = HFT(model, lr=1e-2)
    before = trained_modules(model)
    train(model, optimizer, 20)
    assert trained_modules(model) == before
    visited, parts, selections = optimizer.coverage_after(20)
    assert optimizer.cycle_length == 1 and 0.4 < optimizer.block_coverage == visited / parts < 0.6 and selections > 1


def test_a_cycle_is_as_long_as_it_takes_to_train_every_part():
    model = build_model()
    optimizer = HFT(model, lr=1e-2, switch_every=1)
    train(model, optimizer, optimizer.cycle_length - 1)
    assert optimizer.block_coverage < 1.0
    train(model, optimizer, 1)
    assert optimizer.block_coverage == 1.0


def test_the_seed_decides_the_draws():
    def draws(seed):
        optimizer = HFT(build_model(), seed=seed, switch_every=1)
        for _ in range(4):
            yield frozenset(trained_modules(optimizer.model))
            optimizer.advance()

    assert list(draws(1)) == list(draws(1)) != list(draws(2))


def test_torchs_own_layers_have_their_fused_projection_as_one_part():
    layer = nn.TransformerEncoderLayer(8, 2, 16)
    optimizer = HFT(nn.ModuleList([layer, nn.TransformerEncoderLayer(8, 2, 16)]))
    assert [name for name in optimizer.parts if name.startswith("0.")] == [
        "0.self_attn.in_proj_weight",
        "0.self_attn.out_proj.weight",
        "0.linear1.weight",
        "0.linear2.weight",
        "0.norm1",
        "0.norm2",
    ]
    assert optimizer.parts["0.self_attn.in_proj_weight"] == [
        layer.self_attn.in_proj_weight,
        layer.self_attn.in_proj_bias,
    ]


def test_experts_biases_of_two_dimensions_are_no_parts_but_go_with_their_matrices():
    config = GptOssConfig(**GATED, num_local_experts=4, num_experts_per_tok=2, layer_types=["full_attention"] * LAYERS)
    optimizer = HFT(AutoModelForCausalLM.from_config(config))
    mlp = {name.rpartition("mlp.")[2]: params for name, params in optimizer.parts.items() if ".0.mlp." in name}
    assert list(mlp) == ["router.weight", "experts.gate_up_proj", "experts.down_proj"]
    for name in ("gate_up_proj", "down_proj"):
        experts = optimizer.model.model.layers[0].mlp.experts
        assert mlp[f"experts.{name}"] == [getattr(experts, name), getattr(experts, f"{name}_bias")]


def test_what_is_frozen_or_always_trained_is_not_drawn():
    model = build_model()
    model.layers[0].self_attn.q_proj.requires_grad_(False)
    optimizer = HFT(model, switch_every=1, always_train=("layers.1",))
    drawable = {name.split(".")[1] for name in optimizer.parts}
    assert drawable == {"0", "2"} and "layers.0.self_attn.q_proj.weight" not in optimizer.parts
    for _ in range(5):
        assert all(p.requires_grad for p in model.layers[1].parameters())
        assert not any(p.requires_grad for p in model.layers[0].self_attn.q_proj.parameters())
        optimizer.advance()


def test_nothing_to_draw_from_is_refused():
    model = build_model()
    model.layers.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to draw from"):
        HFT(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_worst_case_is_a_possible_draw_and_none_has_more_weights(family):
    model = FAMILIES[family]()
    optimizer = HFT(model, switch_every=1)

    def weights():
        return sum(p.numel() for p in optimizer.trainable)

    sizes = []
    for _ in range(100):
        sizes.append((optimizer.selection, weights()))
        optimizer.advance()
    optimizer.worst_case()
    assert optimizer.selection in {selection for selection, _ in sizes}  # as many parts
    assert weights() >= max(size for _, size in sizes)
