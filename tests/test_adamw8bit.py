"""AdamW with 8-bit moments: against bitsandbytes, against AdamW, and its bytes; also as states of other methods."""

import copy

import pytest
import torch
from bitsandbytes_kernels import torch_kernels
from torch import nn

from membench.memory.meter import MemoryMeter
from membench.planning.blueprint import Blueprint
from membench.planning.fake import QuickFakeTensorMode
from membench.planning.workload import Workload
from optimizers import HFT, LISA, AdamW, AdamW8bit, BAdam, GaLore
from optimizers.contract import build_model, train
from optimizers.shared import in_pieces, quantized

BLOCK = 256


def build(dtype=torch.float32):
    """Two tensors in 8 bits, of which one ends within a block, and two that are too small."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 67)).to(dtype)


def gradients(model, step):
    """Random ones, of sizes that differ from tensor to tensor and within each."""
    generator = torch.Generator().manual_seed(step)
    for scale, p in enumerate(model.parameters()):
        drawn = torch.randn(p.shape, generator=generator) * torch.randn(p.shape, generator=generator).exp()
        p.grad = (10.0**-scale * drawn).to(p.dtype)


def run(model, optimizer, steps):
    for step in range(steps):
        gradients(model, step)
        optimizer.step()
        optimizer.zero_grad()
    return model


def bytes_in_8bit(*counts):
    return sum(2 * count + 8 * -(-count // BLOCK) if count >= 4096 else 8 * count for count in counts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fifty_steps_are_those_of_bitsandbytes(dtype, monkeypatch):
    kernels = torch_kernels() or pytest.skip("bitsandbytes isn't installed")
    import bitsandbytes
    from bitsandbytes.backends.cpu import ops

    def exact(values, code, magnitudes, codes, size):  # in place of the coarse kernel that it has for a CPU
        found, largest = kernels["quantize_blockwise"](values.float(), code, size)
        codes.copy_(found)
        magnitudes.copy_(largest)

    monkeypatch.setattr(ops, "_quant_blockwise_fp32_direct", exact)
    ours, theirs = build(dtype), build(dtype)
    run(ours, AdamW8bit(ours, 1e-3, 0.0), 50)
    run(theirs, bitsandbytes.optim.AdamW8bit(theirs.parameters(), lr=1e-3, weight_decay=0.0), 50)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        # the last block of 91 is scaled by a division there and by the reciprocal here
        difference = (p - q).abs().max().item()
        assert difference == 0.0 if p.numel() % BLOCK == 0 and p.numel() >= 4096 else difference < 1e-6, p.shape


def test_it_follows_adamw_in_full_precision():
    exact, ours = build(), build()
    start = copy.deepcopy(exact)
    run(exact, AdamW(exact, 1e-3, 0.1), 50)
    run(ours, AdamW8bit(ours, 1e-3, 0.1), 50)
    for p, q, before in zip(exact.parameters(), ours.parameters(), start.parameters(), strict=True):
        if p.dim() == 1:
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)  # moments in fp32
        else:
            error, moved = (p - q).pow(2).mean().sqrt(), (p - before).pow(2).mean().sqrt()
            assert 0.0 < error < 0.05 * moved


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_keeps_two_bytes_a_weight_and_eight_a_block(dtype):
    model = build(dtype)
    optimizer = AdamW8bit(model)
    run(model, optimizer, 1)
    counts = [p.numel() for p in model.parameters()]
    assert optimizer.state_bytes() == bytes_in_8bit(*counts)
    model = build(dtype)
    masters = AdamW8bit(model, master_weights=True)
    run(model, masters, 1)
    more = 4 * sum(counts) if dtype is torch.bfloat16 else 0
    assert masters.state_bytes() == bytes_in_8bit(*counts) + more


def test_llama3_8b_takes_2_03_bytes_a_weight():
    b = Blueprint(Workload("llama3-8b"))
    with QuickFakeTensorMode():
        model = b.build(1)
        optimizer = AdamW8bit(model)
        for p in model.parameters():
            optimizer.adamw.init_state(optimizer.state[p], p)
        counts = [p.numel() for p in model.parameters()]
        assert optimizer.state_bytes() == bytes_in_8bit(*counts)
    matrices = [count for count in counts if count >= 4096 and count != 4096]
    assert bytes_in_8bit(*matrices) == 2.03125 * sum(matrices) and sum(matrices) > 1.2e9


@pytest.mark.parametrize("master_weights", [False, True])
def test_a_tensor_that_is_not_contiguous_is_updated_as_its_copy(master_weights):
    model, other = build(torch.bfloat16), build(torch.bfloat16)
    model[0].weight.data = model[0].weight.t().contiguous().t()
    assert not model[0].weight.is_contiguous()
    run(model, AdamW8bit(model, 1e-2, master_weights=master_weights), 3)
    run(other, AdamW8bit(other, 1e-2, master_weights=master_weights), 3)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("rounded", [False, True])
def test_an_update_in_pieces_is_that_of_the_whole_and_holds_a_piece_at_a_time(rounded, monkeypatch):
    model, other = build(torch.bfloat16), build(torch.bfloat16)
    run(model, AdamW8bit(model, 1e-2), 3)
    monkeypatch.setattr(quantized, "PIECE", 1024)
    optimizer = AdamW8bit(other, 1e-2, stochastic_rounding=rounded)
    run(other, optimizer, 3)
    assert rounded or all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))
    gradients(other, 3)
    with MemoryMeter(other, optimizer) as meter, meter.phase("update"):
        optimizer.step()
    assert meter.report()["maximum"]["temporaries_bytes"] < 40 * 1024


def test_resuming_continues_the_random_numbers():
    straight, paused = build(torch.bfloat16), build(torch.bfloat16)
    optimizer = AdamW8bit(straight, 1e-4, stochastic_rounding=True)
    run(straight, optimizer, 6)
    first = AdamW8bit(paused, 1e-4, stochastic_rounding=True)
    run(paused, first, 3)
    resumed = build(torch.bfloat16)
    resumed.load_state_dict(paused.state_dict())
    second = AdamW8bit(resumed, 1e-4, stochastic_rounding=True)
    second.load_state_dict(first.state_dict())
    for step in range(3, 6):
        gradients(resumed, step)
        second.step()
    assert all(torch.equal(p, q) for p, q in zip(straight.parameters(), resumed.parameters(), strict=True))


# ---- as states of other methods


def test_blocks_keep_their_moments_in_8_bits(monkeypatch):
    monkeypatch.setattr(in_pieces, "SMALLEST", 64)
    for method, given in ((BAdam, {}), (LISA, {"layers": 1}), (HFT, {})):
        model = build_model()
        optimizer = method(model, 1e-2, states="8bit", **given)
        train(model, optimizer, 2)
        trained = [p for p in optimizer.trainable if p in optimizer.state]
        expected = sum(
            2 * p.numel() + 8 * -(-p.numel() // BLOCK) if p.numel() >= 64 else 8 * p.numel() for p in trained
        )
        assert optimizer.state_bytes() == expected > 0, method.__name__


def test_galores_moments_in_8_bits_are_of_the_subspace(monkeypatch):
    monkeypatch.setattr(in_pieces, "SMALLEST", 64)
    model = build_model()
    optimizer = GaLore(model, 1e-2, rank=4, states="8bit")
    train(model, optimizer, 2)
    state = optimizer.state[model.layers[0].mlp.up_proj.weight]  # (32, 16)
    assert state["exp_avg"].dtype is torch.uint8 and state["exp_avg"].shape == (32, 4)
    assert state["exp_avg_magnitudes"].shape == (1,) and state["right"].shape == (4, 16)


def test_sgd_has_no_moments_to_keep_in_8_bits():
    with pytest.raises(ValueError, match="states='8bit' is for AdamW's moments"):
        BAdam(build_model(), inner="sgd", states="8bit")
