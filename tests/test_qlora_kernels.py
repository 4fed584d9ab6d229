"""NF4 weights restored by bitsandbytes' kernel are those of torch; what it can't do is left to torch, or refused."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from optimizers import LoRA, QLoRA
from optimizers.contract import build_model, train, weights_of
from optimizers.registry import in_use
from optimizers.shared import nf4

ROOT = Path(__file__).resolve().parents[1]
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float64: torch.int64}
DTYPES = list(BITS)[:3]


@pytest.fixture
def installed():
    pytest.importorskip("bitsandbytes")


class Calls(TorchDispatchMode):
    """Counts what runs of bitsandbytes."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.namespace == "bitsandbytes"
        return func(*args, **(kwargs or {}))


def both(packed, shape, dtype):
    """The bits by torch and by bitsandbytes, and whether its kernel was called."""
    with Calls() as calls:
        ours, theirs = (nf4.dequantize(packed, torch.Size(shape), dtype, kernels) for kernels in nf4.KERNELS)
    assert ours.shape == theirs.shape == shape and ours.dtype is theirs.dtype is dtype
    return ours.view(BITS[dtype]), theirs.view(BITS[dtype]), calls.count


def every_byte(magnitudes):
    """Each byte with each of 128 magnitudes, and the numbers that they stand for in fp64."""
    codes = torch.arange(256, dtype=torch.uint8).repeat_interleave(32)[:, None].expand(-1, 128).t().reshape(-1)
    packed = {"codes": codes.contiguous(), "magnitudes": magnitudes.repeat_interleave(256)}
    nibbles = torch.stack([codes >> 4, codes & 15], 1).flatten().int()
    return packed, nf4.VALUES.double()[nibbles] * packed["magnitudes"].double().repeat_interleave(64)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_byte_becomes_the_same_bits(dtype, installed):
    magnitudes = torch.logspace(-35, 35, 126)
    packed, exact = every_byte(torch.cat([magnitudes, torch.tensor([0.0, -1e-5])]))
    ours, theirs, calls = both(packed, exact.shape, dtype)
    assert torch.equal(ours, theirs) and calls == 1
    assert torch.equal(theirs, exact.float().to(dtype).view(BITS[dtype]))  # a product in fp32, rounded once


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(200, 64), (12, 80), (20, 48), (24, 40), (3, 64 * 257)]
)  # rows of whole blocks, and others
def test_a_weight_of_whole_blocks_becomes_the_same_bits(shape, dtype, double, installed):
    torch.manual_seed(0)
    ours, theirs, calls = both(nf4.quantize(0.02 * torch.randn(shape), double=double), shape, dtype)
    assert torch.equal(ours, theirs) and calls == 1


@pytest.mark.parametrize(
    ("shape", "dtype", "of_magnitudes"),
    [
        ((13, 77), torch.float32, torch.float32),
        ((10, 10), torch.bfloat16, torch.float32),
        ((64, 64), torch.float64, torch.float32),
        ((64, 64), torch.float32, torch.bfloat16),  # the model was converted
    ],
)
def test_what_its_kernel_cant_restore_is_restored_by_torch(shape, dtype, of_magnitudes, installed):
    torch.manual_seed(0)
    packed = nf4.quantize(torch.randn(shape), double=False)
    packed["magnitudes"] = packed["magnitudes"].to(of_magnitudes)
    ours, theirs, calls = both(packed, shape, dtype)
    assert torch.equal(ours, theirs) and calls == 0


def test_only_below_two_to_the_minus_126_its_bf16_may_be_zero_and_ours_is_then_the_nearest(installed):
    packed, exact = every_byte(torch.logspace(-42, -37, 128))
    ours, theirs, _ = both(packed, exact.shape, torch.bfloat16)
    differs = ours != theirs
    assert not theirs[differs].bitwise_and(0x7FFF).any() and exact[differs].abs().lt(2.0**-126).all()
    small = exact.abs() < 2.0**-127  # apart by 2 ** -133
    nearest = exact[small].float().double().mul(2.0**133).round().mul(2.0**-133)
    assert small.any() and torch.equal(ours.view(torch.bfloat16)[small].double(), nearest)


@pytest.mark.parametrize("variant", ["lora", "dora", "pissa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_is_the_same_to_the_last_bit_and_goes_on_from_the_others_state(dtype, variant, installed):
    made = {}
    for first, second in (("torch", "torch"), ("torch", "bitsandbytes"), ("bitsandbytes", "torch")):
        (model, optimizer), (resumed, after) = (
            (model, LoRA(model, 1e-2, rank=4, variant=variant, base="nf4", kernels=kernels))
            for kernels in (first, second)
            for model in [build_model(dtype)]
        )
        losses = train(model, optimizer, 4)
        resumed.load_state_dict(model.state_dict())
        after.load_state_dict(optimizer.state_dict())
        losses += train(resumed, after, 4)
        made[first, second] = losses, weights_of(after.finish())
    (losses, weights), *others = made.values()
    for their_losses, theirs in others:
        assert their_losses == losses and theirs.keys() == weights.keys()
        assert all(torch.equal(theirs[name], weight) for name, weight in weights.items())


def test_its_kernel_restores_each_matrix_of_a_step_and_of_the_end(installed):
    model = build_model()
    optimizer = QLoRA(model, kernels="bitsandbytes")
    with Calls() as calls:
        train(model, optimizer, 1)
    matrices = 7 * len(model.layers)
    assert matrices < calls.count <= 2 * matrices  # no gradient goes through the first layer's own
    with Calls() as calls:
        optimizer.finish()
    assert calls.count == matrices


# ---- what is refused


def test_without_the_package_it_is_refused_before_the_model_is_changed(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as if it weren't installed
    model = build_model()
    names = list(model.state_dict())
    for build in (
        lambda: QLoRA(model, kernels="bitsandbytes"),
        lambda: LoRA(model, base="nf4", kernels="bitsandbytes"),
    ):
        with pytest.raises(
            ValueError, match=r"^kernels='bitsandbytes' can't .*pip install .*, or use kernels='torch'$"
        ):
            build()
    assert list(model.state_dict()) == names
    QLoRA(model, kernels="torch")


@pytest.mark.parametrize("arguments", [["plan", "--model", "gpt2"], ["compare", "--task", "superglue/cb"]])
def test_without_the_package_a_command_ends_with_code_2_and_a_sentence(arguments, tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['bitsandbytes'] = None\n")  # in children too
    done = subprocess.run(
        [sys.executable, "-m", "membench", *arguments, "--optimizers", "qlora", "--set", "qlora.kernels=bitsandbytes"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and not done.stdout
    assert re.search(r"^error: .*kernels='bitsandbytes' can't .*pip install .*kernels='torch'\n\Z", done.stderr, re.M)


@pytest.mark.parametrize(
    ("kernel", "told"),
    [
        (lambda codes, magnitudes, block, kind, shape, dtype: torch.zeros(shape, dtype=dtype), "other values on cpu"),
        (lambda *given: exec("raise RuntimeError('no native library\\nand more')"), "no native library"),
    ],
)
def test_a_kernel_that_restores_other_values_or_none_is_refused(kernel, told, installed, monkeypatch):
    import bitsandbytes  # noqa: F401

    monkeypatch.setattr(torch.ops.bitsandbytes, "dequantize_4bit", kernel)
    with pytest.raises(ValueError, match=rf"^kernels='bitsandbytes' can't be used here \({told}\): .*torch'$"):
        QLoRA(build_model(), kernels="bitsandbytes")


def test_on_full_weights_it_is_refused_since_it_would_do_nothing():
    with pytest.raises(ValueError, match="kernels='bitsandbytes' is for base='nf4'"):
        LoRA(build_model(), kernels="bitsandbytes")
    with pytest.raises(ValueError, match="kernels must be one of torch, bitsandbytes, not 'triton'"):
        QLoRA(build_model(), kernels="triton")


def test_runs_from_before_the_option_keep_their_identity():
    assert "kernels" not in in_use("qlora", {"kernels": "torch"}) | in_use("lora", {"kernels": "torch"})
    assert in_use("qlora", {"kernels": "bitsandbytes"}) == {"kernels": "bitsandbytes"}
