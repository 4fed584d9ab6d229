"""Numbers in few bits: the nearest value, the bytes of bitsandbytes, and no more memory than is said."""

import subprocess
import sys

import pytest
import torch
from bitsandbytes_kernels import golden, torch_kernels
from torch._subclasses.fake_tensor import FakeTensorMode

from membench.memory.meter import MemoryMeter
from optimizers.shared import nf4, quantized
from optimizers.shared.quantized import PIECE, SIGNED, UNSIGNED, pieces

CODEBOOKS = {"signed": (SIGNED, 256), "unsigned": (UNSIGNED, 256), "nf4": (nf4.NF4, 64)}
PER_CODEBOOK = pytest.mark.parametrize("name", CODEBOOKS)


def numbers(count, *, of_one_sign=False):
    """Of many sizes, with a block of zeros and one of equal numbers."""
    generator = torch.Generator().manual_seed(count)
    drawn = torch.randn(count, generator=generator) * torch.randn(count, generator=generator).mul(2).exp()
    drawn[:256], drawn[256:512] = 0.0, 0.3
    return drawn.abs() if of_one_sign else drawn


def values_of(codebook):
    return codebook.values.on(torch.empty(0))


@PER_CODEBOOK
def test_a_number_becomes_the_nearest_value_times_the_largest_magnitude_of_its_block(name):
    codebook, size = CODEBOOKS[name]
    given = numbers(6 * 256 + 77, of_one_sign=name == "unsigned")
    codes, magnitudes = codebook.quantize_(given.clone(), size)
    restored = codebook.dequantize(codes, magnitudes, size)
    for block, start in enumerate(range(0, given.numel(), size)):
        part = given[start : start + size].double()
        assert magnitudes[block] == part.abs().max()
        distances = (part[:, None] - values_of(codebook).double() * magnitudes[block].double()).abs()
        nearest = distances.min(1).values
        ours = (part - restored[start : start + size].double()).abs()
        torch.testing.assert_close(ours, nearest, rtol=1e-5, atol=1e-6 * magnitudes[block].item())


@PER_CODEBOOK
def test_a_value_of_the_codebook_comes_back_as_it_is_and_boundaries_go_to_the_lower_one(name):
    codebook, size = CODEBOOKS[name]
    values = values_of(codebook)
    boundaries = (values[:-1] + values[1:]) / 2
    for given, expected in ((values, range(len(values))), (boundaries, range(len(boundaries)))):
        for number, place in zip(given, expected, strict=True):
            codes, _ = codebook.quantize_(torch.stack([torch.ones(()), number]), size)
            assert codes[1] == place


@PER_CODEBOOK
def test_at_most_one_boundary_lies_among_numbers_that_start_alike(name):
    values = values_of(CODEBOOKS[name][0])
    boundaries = (values[:-1] + values[1:]) / 2
    lowest, highest = torch.from_numpy(quantized._ends_of_cells())
    finite = highest.isfinite() & (highest < 1e38)
    inside = torch.bucketize(highest, boundaries) - torch.bucketize(lowest, boundaries)
    assert finite.sum() > 100_000 and inside[finite].max() == 1


def test_the_dynamic_maps_are_those_of_the_paper():
    for codebook, positive in ((SIGNED, 128), (UNSIGNED, 255)):
        values = values_of(codebook)
        assert len(values.unique()) == 256 and (values > 0).sum() == positive and 0.0 in values and values.max() == 1.0
    assert torch.equal(values_of(SIGNED)[:127].flip(0), -values_of(SIGNED)[128:255])  # 1 has no opposite


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_has_diverged_stays_so(bad):
    given = torch.ones(512)
    given[3] = bad
    for codebook, size in CODEBOOKS.values():
        restored = codebook.dequantize(*codebook.quantize_(given.clone(), size), size)
        assert not restored[:size].isfinite().all() and torch.equal(restored[256:], given[256:])


def test_pieces_cover_a_tensor_and_without_values_one_stands_for_all():
    whole = torch.empty(2 * PIECE + 100)
    assert [(piece.start, piece.stop) for piece in pieces(whole)] == [
        (0, PIECE),
        (PIECE, 2 * PIECE),
        (2 * PIECE, 2 * PIECE + 100),
    ]
    with FakeTensorMode():
        assert list(pieces(torch.empty(2 * PIECE + 100))) == [slice(0, PIECE)]
        assert list(pieces(torch.empty(100))) == [slice(0, 100)]


# ---- NF4


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("shape", [(64, 64), (200, 77), (3, 5)])
def test_nf4_takes_the_bytes_that_are_said(shape, double):
    count = torch.Size(shape).numel()
    torch.manual_seed(0)
    packed = nf4.quantize(torch.randn(shape), double=double)
    blocks = -(-count // 64)
    assert packed["codes"].nbytes == -(-count // 2)
    rest = sum(t.nbytes for name, t in packed.items() if name != "codes")
    assert rest == (blocks + 4 * -(-blocks // 256) + 4 if double else 4 * blocks)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nf4_in_pieces_is_nf4_of_the_whole(dtype, double, monkeypatch):
    torch.manual_seed(0)
    weight = torch.randn(120, 77).to(dtype)
    expected = nf4.quantize(weight, double=double)
    dense = nf4.dequantize(expected, weight.shape, dtype)
    assert (dense.float() - weight.float()).abs().max() < 0.16 * weight.abs().max().float() and dense.dtype == dtype
    monkeypatch.setattr(quantized, "PIECE", 512)
    packed = nf4.quantize(weight, double=double)
    for name, tensor in expected.items():
        # the blocks of magnitudes are the same, if their pieces are of whole blocks
        assert torch.equal(packed[name], tensor), name
    assert torch.equal(nf4.dequantize(packed, weight.shape, dtype), dense)


def test_quantising_and_dequantising_hold_a_piece_at_a_time_beside_what_they_give():
    model = torch.nn.Linear(4096, 1024, bias=False)
    meter = MemoryMeter(model)
    with meter, meter.phase("update"):
        packed = nf4.quantize(model.weight, double=True)
        nf4.dequantize(packed, model.weight.shape, torch.bfloat16)
    count = model.weight.numel()
    report = meter.report()
    assert report["peak_allocated_bytes"] - report["at_peak"]["weights_bytes"] < 3 * count + 24 * PIECE
    assert count == 64 * PIECE


# ---- against bitsandbytes


@pytest.fixture
def kernels():
    """Its kernels in plain torch."""
    return torch_kernels() or pytest.skip("bitsandbytes isn't installed: see the test of what it gave")


@PER_CODEBOOK
def test_what_bitsandbytes_gave_comes_out_to_the_byte(name):
    given = golden()[name]
    if name == "nf4":
        packed = nf4.quantize(given["numbers"], double=False)
        codes, magnitudes = packed["codes"], packed["magnitudes"]
        values = nf4.dequantize(packed, given["numbers"].shape, torch.float32)
    else:
        codebook, size = CODEBOOKS[name]
        codes, magnitudes = codebook.quantize_(given["numbers"].clone(), size)
        values = codebook.dequantize(codes, magnitudes, size)
    assert codes.tolist() == given["codes"].tolist()
    assert torch.equal(magnitudes, given["magnitudes"]) and torch.equal(values, given["values"])


@pytest.mark.parametrize("shape", [(200, 64), (13, 77)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nf4_is_that_of_bitsandbytes_to_the_byte(shape, dtype, kernels):
    torch.manual_seed(0)
    weight = (0.02 * torch.randn(shape)).to(dtype)
    codes, magnitudes = kernels["quantize_4bit"](weight, 64, "nf4", torch.uint8)
    single = nf4.quantize(weight, double=False)
    assert torch.equal(single["codes"], codes.flatten()) and torch.equal(single["magnitudes"], magnitudes)
    theirs = kernels["dequantize_4bit"](codes, magnitudes, 64, "nf4", weight.shape, dtype)
    assert torch.equal(nf4.dequantize(single, weight.shape, dtype), theirs)
    mean, double = magnitudes.mean(), nf4.quantize(weight, double=True)
    codes_of_magnitudes, largest = kernels["quantize_blockwise"](magnitudes - mean, values_of(SIGNED), 256)
    assert torch.equal(double["magnitudes"], codes_of_magnitudes) and torch.equal(double["mean"], mean)
    assert torch.equal(double["magnitudes_of_magnitudes"], largest)


@pytest.mark.parametrize("signed", [True, False])
def test_the_dynamic_map_is_that_of_bitsandbytes_to_the_byte(signed, kernels):
    from bitsandbytes.functional import create_dynamic_map

    codebook = SIGNED if signed else UNSIGNED
    assert torch.equal(values_of(codebook), create_dynamic_map(signed))
    given = numbers(40 * 256, of_one_sign=not signed)
    codes, magnitudes = codebook.quantize_(given.clone(), 256)
    their_codes, their_magnitudes = kernels["quantize_blockwise"](given, values_of(codebook), 256)
    assert torch.equal(codes, their_codes) and torch.equal(magnitudes, their_magnitudes)
    theirs = kernels["dequantize_blockwise"](their_codes, their_magnitudes, values_of(codebook), 256, torch.float32)
    assert torch.equal(codebook.dequantize(codes, magnitudes, 256), theirs)


DIGEST = """
import hashlib, torch
from optimizers.shared import affine, nf4, quantized, subspace
numbers = torch.linspace(-1.0, 2.0, 6000, dtype=torch.float32, device="cpu").view(60, 100)
tensors = [
    *subspace.randomized_vectors(numbers.sin(), 2, True, True, (0, 1)),
    *nf4.quantize(numbers, double=True).values(),
    *affine.quantize(numbers, 4).values(),
    nf4.dequantize(nf4.quantize(numbers, double=True), numbers.shape, numbers.dtype),
    *quantized.UNSIGNED.quantize_(numbers.flatten(), 256),
]
digest = hashlib.sha256(b"".join(t.contiguous().numpy().tobytes() for t in tensors)).hexdigest()
"""
DEFAULTS = "import torch; torch.set_default_dtype(torch.float64); torch.set_default_device('meta')"


def test_neither_values_nor_subspaces_depend_on_the_default_dtype_and_device():
    here: dict[str, str] = {}
    exec(DIGEST, here)
    command = [sys.executable, "-c", f"{DEFAULTS}\n{DIGEST}\nprint(digest)"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == here["digest"]
