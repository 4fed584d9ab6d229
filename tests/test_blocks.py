"""Blocks come from a model's own lists of layers, whatever the family calls them."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrize import register_parametrization
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification
from transformers.models.auto.configuration_auto import AutoConfig

from optimizers import create
from optimizers.contract import TinyTransformer, build_model
from optimizers.shared.blocks import GRANULARITIES, find_layers, matching, shuffled, split_into_blocks, train_only

SMALL = {"hidden_size": 16, "num_attention_heads": 2, "vocab_size": 50, "intermediate_size": 32}
FAMILIES = {
    "roberta": (AutoModelForSequenceClassification, {**SMALL, "num_hidden_layers": 3}, "roberta.encoder.layer"),
    "llama": (AutoModelForCausalLM, {**SMALL, "num_hidden_layers": 3, "num_key_value_heads": 1}, "model.layers"),
    "gpt2": (AutoModelForCausalLM, {"n_embd": 16, "n_head": 2, "n_layer": 3, "vocab_size": 50}, "transformer.h"),
}


def build(family):
    auto, values, prefix = FAMILIES[family]
    with torch.device("meta"):
        return auto.from_config(AutoConfig.for_model(family, **values)), prefix


@pytest.mark.parametrize("family", FAMILIES)
def test_each_layer_of_a_family_is_a_block_with_all_its_parameters(family):
    model, prefix = build(family)
    blocks = split_into_blocks(model)
    assert list(blocks) == [f"{prefix}.{i}" for i in range(3)]
    for name, params in blocks.items():
        assert params == list(model.get_submodule(name).parameters())


@pytest.mark.parametrize("granularity", ["layer", "sublayer", "matrix"])
@pytest.mark.parametrize("family", FAMILIES)
def test_with_embeddings_the_blocks_partition_the_model(family, granularity):
    model, _ = build(family)
    members = [p for params in split_into_blocks(model, granularity, embeddings=True).values() for p in params]
    assert len(members) == len(set(members)) == len(list(model.parameters()))


def test_roberta_large_with_its_head_left_out_has_24_blocks():
    config = AutoConfig.for_model("roberta", hidden_size=64, num_hidden_layers=24, num_attention_heads=4, vocab_size=50)
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config)
    assert len(split_into_blocks(model, leave_out=matching(model, ["classifier"]))) == 24


def test_an_encoder_decoder_gives_the_layers_of_both_stacks():
    config = AutoConfig.for_model("t5", d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, vocab_size=50)
    with torch.device("meta"):
        model = AutoModelForSeq2SeqLM.from_config(config)
    assert list(split_into_blocks(model)) == [f"{stack}.block.{i}" for stack in ("encoder", "decoder") for i in (0, 1)]


def test_half_layers_of_a_llama_are_attention_and_mlp_each_with_the_norm_before_it():
    model, _ = build("llama")
    names = {p: name for name, p in model.named_parameters()}
    blocks = split_into_blocks(model, "sublayer")
    assert list(blocks)[:2] == ["model.layers.0.attention", "model.layers.0.mlp"]
    parts = {names[p].split(".")[3] for p in blocks["model.layers.0.attention"]}
    assert parts == {"self_attn", "input_layernorm"}
    parts = {names[p].split(".")[3] for p in blocks["model.layers.0.mlp"]}
    assert parts == {"mlp", "post_attention_layernorm"}


def norms_of_halves(model, layer):
    """The names of the norms in the two half-layers."""
    blocks = split_into_blocks(model, "sublayer")
    names = {p: name.removeprefix(f"{layer}.") for name, p in model.named_parameters()}
    halves = ([names[p] for p in blocks[f"{layer}.{half}"]] for half in ("attention", "mlp"))
    return [[name for name in half if "norm" in name and name.endswith("weight")] for half in halves]


def test_dropouts_beside_the_norms_are_not_divided_up_with_them():
    torchs = nn.ModuleList([nn.TransformerEncoderLayer(8, 2, 16)])
    assert norms_of_halves(torchs, "0") == [["norm1.weight"], ["norm2.weight"]]
    config = AutoConfig.for_model(
        "gpt_neox", hidden_size=16, num_attention_heads=2, num_hidden_layers=1, intermediate_size=32, vocab_size=30
    )
    model = AutoModelForCausalLM.from_config(config)
    halves = norms_of_halves(model, "gpt_neox.layers.0")
    assert halves == [["input_layernorm.weight"], ["post_attention_layernorm.weight"]]


def test_half_layers_of_a_t5_are_attention_and_the_rest_though_they_are_in_a_list():
    config = AutoConfig.for_model("t5", d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, vocab_size=50)
    with torch.device("meta"):
        model = AutoModelForSeq2SeqLM.from_config(config)
    assert norms_of_halves(model, "encoder.block.0") == [["layer.0.layer_norm.weight"], ["layer.1.layer_norm.weight"]]
    crossed = norms_of_halves(model, "decoder.block.0")
    assert crossed == [["layer.0.layer_norm.weight", "layer.1.layer_norm.weight"], ["layer.2.layer_norm.weight"]]


def test_half_layers_of_a_roberta_are_attention_and_the_rest():
    model, _ = build("roberta")
    blocks = split_into_blocks(model, "sublayer")
    attention = model.roberta.encoder.layer[0].attention
    assert blocks["roberta.encoder.layer.0.attention"] == list(attention.parameters())
    assert len(blocks) == 6


def test_single_matrices_are_blocks_with_their_biases():
    blocks = split_into_blocks(build_model(), "matrix")
    assert len(blocks) == 3 * 7
    assert all(sum(p.dim() == 2 for p in params) == 1 for params in blocks.values())


def test_frozen_parameters_are_in_no_block():
    model = build_model()
    model.layers[1].requires_grad_(False)
    assert list(split_into_blocks(model)) == ["layers.0", "layers.2"]


def test_tied_weights_are_in_one_block():
    model = TinyTransformer()
    model.lm_head = nn.Linear(16, 20, bias=False)
    model.lm_head.weight = model.embed_tokens.weight
    blocks = split_into_blocks(model, embeddings=True)
    assert model.lm_head.weight in blocks["embeddings"] and all(p is not model.lm_head.weight for p in blocks["head"])


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_what_layers_share_is_in_the_block_of_the_first(granularity):
    model = TinyTransformer()
    for layer in model.layers[1:]:
        layer.mlp.up_proj.weight = layer.mlp.gate_proj.weight = model.layers[0].mlp.up_proj.weight
    blocks = split_into_blocks(model, granularity)
    members = [p for params in blocks.values() for p in params]
    assert len(members) == len(set(members)) and set(members) == set(model.layers.parameters())
    (owner,) = (name for name, params in blocks.items() if any(p is model.layers[2].mlp.up_proj.weight for p in params))
    assert owner.startswith("layers.0")


def test_a_sequential_serves_where_there_is_no_list_and_nothing_is_an_error_with_the_way_out():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    assert list(find_layers(model)) == ["0", "2"]
    with pytest.raises(ValueError, match=r"Linear has no layers .* nn\.ModuleList"):
        split_into_blocks(nn.Linear(2, 2))


class LowRank(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.up, self.down = nn.Parameter(torch.zeros(len(weight), 1)), nn.Parameter(torch.ones(1, weight.shape[1]))

    def forward(self, weight):
        return weight + self.up @ self.down


class WithHeads(nn.Module):
    """A body in a sequence, and two heads in a list."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(3)))
        self.heads = nn.ModuleList([nn.Linear(8, 2, bias=False), nn.Linear(8, 3, bias=False)])


@pytest.mark.parametrize("method", ["badam", "blockllm", "lisa", "lora", "galore", "muon"])
def test_a_sequential_that_outweighs_the_lists_is_said_not_to_be_of_layers(method):
    words = r"only heads\.0 and the like \(40 weights\) .*; body\.0 and .* an nn\.Sequential \(192 weights\)"
    with pytest.warns(UserWarning, match=words):
        create(method, WithHeads()).finish()


def test_a_list_of_single_modules_is_of_layers_unless_another_has_layers_with_parts():
    model = build_model()
    layers = [f"layers.{n}" for n in range(3)]
    model.projections = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))  # as Gemma 3n has
    assert list(find_layers(model)) == layers
    model.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
    assert list(find_layers(model)) == [*layers, *(f"projections.{n}" for n in range(3))]
    model.projections, model.layers = nn.ModuleList([nn.Sequential(nn.Linear(2, 2))]), model.projections
    with pytest.warns(UserWarning, match=r"only projections\.0 .*; layers\.0 and .* nn\.ModuleList \(816 "):
        split_into_blocks(model)


@pytest.mark.parametrize("change", ["frozen", "small", "around"])
def test_a_sequential_of_heads_or_around_all_of_the_model_is_nothing_to_speak_of(change):
    model = WithHeads()
    if change == "frozen":
        model.body.requires_grad_(False)
    elif change == "small":
        model.body, model.heads = nn.Sequential(nn.Linear(8, 2)), nn.ModuleList(model.body)
    else:  # its embeddings may outweigh its layers
        model = nn.Sequential(build_model(), nn.Linear(3, 2))
        model[0].embed_tokens = nn.Embedding(9999, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert split_into_blocks(model)


def test_parametrizations_which_are_lists_too_are_parts_of_their_layers():
    model = build_model()
    plain = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    for module in (model.classifier, model.layers[0].mlp.up_proj, plain[0]):
        register_parametrization(module, "weight", LowRank(module.weight))
    assert list(find_layers(model)) == ["layers.0", "layers.1", "layers.2"]
    assert list(find_layers(plain)) == ["0", "2"]
    assert split_into_blocks(plain)["0"] == list(plain[0].parameters())


def test_a_pattern_matches_parts_of_a_name_and_one_that_matches_nothing_is_an_error():
    model = build_model()
    assert matching(model, ["classifier"]) == [model.classifier.weight, model.classifier.bias]
    assert matching(model, ["*layernorm.weight"]) == [
        norm.weight for layer in model.layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)
    ]
    with pytest.raises(ValueError, match="'clasifier' matches no trainable parameter"):
        matching(model, ["clasifier"])


def test_training_only_some_parameters_frees_the_gradients_of_the_others():
    model = build_model()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    active = list(model.layers[0].parameters())
    train_only(model.parameters(), active)
    for p in model.parameters():
        assert p.requires_grad == (p.grad is not None) == any(p is a for a in active)


def test_an_order_is_a_function_of_its_key_alone():
    assert shuffled(10, 3, 1) == shuffled(10, 3, 1)
    assert shuffled(10, 3, 1) != shuffled(10, 3, 2)
    assert sorted(shuffled(10, 3, 1)) == list(range(10))
