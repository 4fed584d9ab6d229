"""Adam-mini (arXiv 2406.16793): against the authors' package, AdamW, and blocks counted by hand."""

import adam_mini
import pytest
import torch
import transformers
from architectures import ARCHITECTURES
from torch import nn
from transformers.models.qwen2_vl import modeling_qwen2_vl as qwen2_vl

from optimizers import AdamMini, AdamW
from optimizers.contract import build_model, train
from optimizers.shared.dense_blocks import Partition, partitions


def llama(**given):
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    kind = transformers.Qwen3Config if "head_dim" in given else transformers.LlamaConfig
    config = kind(**shape, **{"num_key_value_heads": 2, "vocab_size": 40, "initializer_range": 0.2, **given})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(config)


def give_gradients(*models, seed):
    generator = torch.Generator().manual_seed(seed)
    for tensors in zip(*(model.parameters() for model in models), strict=True):
        g = torch.randn(tensors[0].shape, generator=generator)
        for p in tensors:
            p.grad = g.clone()


@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_a_llama_is_trained_as_by_the_authors_package(key_heads, weight_decay):
    ours, theirs = llama(num_key_value_heads=key_heads), llama(num_key_value_heads=key_heads)
    optimizer = AdamMini(ours, lr=0.01, weight_decay=weight_decay, betas=(0.9, 0.95))
    peer = adam_mini.Adam_mini(
        theirs.named_parameters(),
        lr=0.01,
        betas=(0.9, 0.95),
        weight_decay=weight_decay,
        dim=32,
        n_heads=4,
        n_kv_heads=key_heads,
        verbose=False,
    )
    for step in range(20):
        give_gradients(ours, theirs, seed=step)
        optimizer.step()
        peer.step()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6, msg=name)


def test_where_each_weight_is_a_block_it_is_adamw():
    ours, theirs = build_model(), build_model()
    for model in (ours, theirs):
        for name, p in model.named_parameters():
            p.requires_grad_(name.endswith("bias"))
    for optimizer in (AdamMini(ours, lr=0.01), AdamW(theirs, lr=0.01)):
        for step in range(5):
            give_gradients(optimizer.model, seed=step)
            optimizer.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


def blocks(model, layer):
    """Blocks of each tensor of a layer, by name."""
    found = partitions(model)
    return {name: found[p].blocks for name, p in model.get_submodule(layer).named_parameters()}


def test_heads_are_those_of_the_model_and_not_the_width_by_their_number():
    # as Qwen 3: heads of 16 in a model of width 32 that has 4 of them
    found = blocks(llama(head_dim=16), "model.layers.0")
    assert found["self_attn.q_proj.weight"] == 4 and found["self_attn.k_proj.weight"] == 2
    assert found["self_attn.v_proj.weight"] == 2 * 16 and found["self_attn.o_proj.weight"] == 32
    assert found["self_attn.q_norm.weight"] == 1 and found["input_layernorm.weight"] == 1
    assert found["mlp.gate_proj.weight"] == 48 and found["mlp.down_proj.weight"] == 32


@pytest.mark.parametrize(("name", "matrices"), [
    ("llama", {"self_attn.q_proj": 4, "self_attn.k_proj": 2, "self_attn.v_proj": 16, "mlp.down_proj": 32}),
    ("bert", {"attention.self.query": 4, "attention.self.key": 4, "attention.self.value": 32,
              "attention.output.dense": 32, "intermediate.dense": 48}),
    ("distilbert", {"attention.q_lin": 4, "attention.k_lin": 4, "attention.v_lin": 32, "ffn.lin1": 48}),
    # queries, keys and values in one matrix: 4 heads, 4 heads, 32 neurons; GPT-2's outputs are its columns
    ("gpt2", {"attn.c_attn": 4 + 4 + 32, "attn.c_proj": 32, "mlp.c_fc": 48}),
    ("gpt-neox", {"attention.query_key_value": 4 + 4 + 32, "mlp.dense_4h_to_h": 32}),
])  # fmt: skip
def test_blocks_are_those_counted_by_hand(name, matrices):
    architecture = ARCHITECTURES[name]
    model = architecture.build()
    found = blocks(model, f"{architecture.layers}.1")
    assert {part: found[f"{part}.weight"] for part in matrices} == matrices
    for part, count in found.items():
        if part.endswith("bias"):
            assert count == model.get_submodule(f"{architecture.layers}.1").get_parameter(part).numel()
        elif "norm" in part.lower():
            assert count == 1
    embeddings = model.get_input_embeddings().weight
    assert partitions(model)[embeddings].blocks == len(embeddings)


def test_whatever_a_family_calls_its_queries_and_keys_they_are_cut_by_head():
    small = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "num_hidden_layers": 1}
    relative = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "share_att_key": False}
    with torch.device("meta"):
        deberta = transformers.DebertaV2Model(transformers.DebertaV2Config(**small, **relative, vocab_size=40))
        longformer = transformers.LongformerModel(
            transformers.LongformerConfig(**small, attention_window=4, vocab_size=40)
        )
        speech = transformers.Wav2Vec2BertModel(transformers.Wav2Vec2BertConfig(**small))
        sight = qwen2_vl.VisionAttention(qwen2_vl.Qwen2VLVisionConfig(embed_dim=32, num_heads=4))
        crossed = transformers.GPT2Model(
            transformers.GPT2Config(n_embd=32, n_head=4, n_layer=1, add_cross_attention=True)
        )
    found = blocks(deberta, "encoder.layer.0.attention.self")
    for part in ("query_proj", "key_proj", "pos_query_proj", "pos_key_proj"):
        assert found[f"{part}.weight"] == 4 and found[f"{part}.bias"] == 32
    assert found["value_proj.weight"] == 32
    found = blocks(longformer, "encoder.layer.0.attention.self")
    assert found["query_global.weight"] == found["key_global.weight"] == 4 and found["value_global.weight"] == 32
    cross_attention = crossed.h[0].crossattention
    assert partitions(crossed)[cross_attention.q_attn.weight].runs == ((4, 8),)
    assert partitions(crossed)[cross_attention.c_attn.weight].runs == ((4, 8), (32, 1))  # keys and values
    found = blocks(speech, "encoder.layers.0.self_attn")
    assert partitions(sight)[sight.qkv.weight].blocks == 4 + 4 + 32
    assert found["linear_q.weight"] == found["linear_k.weight"] == 4 and found["linear_v.weight"] == 32


def test_attention_of_torch_has_heads_too_and_a_convolution_its_channels():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(32, 4), "conv": nn.Conv2d(3, 5, 2)})
    model["back"] = nn.ConvTranspose2d(3, 5, 2)  # its weight is (in, out, height, width)
    apart = model["apart"] = nn.MultiheadAttention(32, 4, kdim=16, vdim=24)
    found = partitions(model)
    assert found[model["attention"].in_proj_weight].blocks == 4 + 4 + 32
    assert found[apart.q_proj_weight].blocks == found[apart.k_proj_weight].blocks == 4
    assert found[apart.v_proj_weight].blocks == 32
    assert found[model["conv"].weight].blocks == found[model["back"].weight].blocks == 5
    g = torch.randn(3, 5, 2, 2)
    torch.testing.assert_close(found[model["back"].weight].mean_squares(g), g.square().mean((0, 2, 3)))


def test_a_tensor_without_entries_has_no_blocks():
    model = nn.ModuleDict({"attention": nn.Linear(0, 4), "mlp": nn.Linear(4, 0)})
    assert [partition.blocks for partition in partitions(model).values()] == [4, 4, 0, 0]
    AdamMini(model).step()


def test_a_bias_is_one_whatever_follows_in_its_name():
    unit = nn.GRU(6, 5)
    found = partitions(unit)
    assert found[unit.bias_ih_l0].blocks == found[unit.bias_hh_l0].blocks == 3 * 5


@pytest.mark.parametrize(("partition", "shape"), [
    (Partition((1,), ((3, 2),)), (6, 5)),
    (Partition((0,), ((2, 2), (3, 1))), (4, 7)),  # outputs are columns
    (Partition((1,), ((2, 2), (1, 1)), repeats=3), (15, 4)),
    (Partition((), ((1, 6),)), (6,)),
    (Partition((), ((6, 1),)), (6,)),
    (Partition((2,), ((6, 1),)), (2, 3, 4)),
], ids=str)  # fmt: skip
def test_means_and_their_spread_are_those_of_a_loop_over_the_blocks(partition, shape):
    g = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    outputs = [d for d in range(len(shape)) if d not in partition.averaged]
    rows = g.permute(*outputs, *partition.averaged).reshape(-1, *(shape[d] for d in partition.averaged))
    expected, spread, start = [], torch.empty(len(rows)), 0
    for _ in range(partition.repeats):
        for count, size in partition.runs:
            for _ in range(count):
                expected.append(rows[start : start + size].square().mean())
                spread[start : start + size] = expected[-1]
                start += size
    means = partition.mean_squares(g)
    assert start == len(rows) and len(means) == partition.blocks
    torch.testing.assert_close(means, torch.stack(expected))
    full = partition.spread(means, g.shape).expand(shape).permute(*outputs, *partition.averaged)
    torch.testing.assert_close(full.reshape(len(rows), -1)[:, 0], spread)


@pytest.mark.parametrize(("dtype", "master_weights", "of_a_weight"), [
    (torch.float32, True, 4), (torch.bfloat16, True, 8), (torch.bfloat16, False, 2),
])  # fmt: skip
def test_it_keeps_a_first_moment_and_a_number_for_each_block(dtype, master_weights, of_a_weight):
    model = build_model(dtype)
    optimizer = AdamMini(model, master_weights=master_weights)
    train(model, optimizer, 2)
    count = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("unused"))
    # no head is known of: a block is a neuron, a token, a norm or an entry of a bias
    layer = 4 * 16 + 2 * 32 + 16 + (4 * 16 + 2 * 32 + 16) + 2 * (1 + 16)
    number = 20 + 3 * layer + (1 + 16) + (3 + 3)
    assert optimizer.state_bytes() == of_a_weight * count + 4 * number


def test_a_master_makes_bfloat16_weights_the_rounding_of_an_fp32_run_with_the_same_gradients():
    low, exact = build_model(torch.bfloat16), build_model(torch.bfloat16).float()
    optimizer, reference = AdamMini(low, lr=1e-3), AdamMini(exact, lr=1e-3)
    for step in range(5):
        give_gradients(exact, seed=step)
        for p, q in zip(low.parameters(), exact.parameters(), strict=True):
            p.grad = q.grad.bfloat16()
            q.grad = p.grad.float()
        optimizer.step()
        reference.step()
    assert all(torch.equal(p, q.bfloat16()) for p, q in zip(low.parameters(), exact.parameters(), strict=True))
