"""The kernels of bitsandbytes in plain torch, and what they gave for a few numbers, for where it isn't installed.

They agree with its CUDA kernels; its CPU kernel for 8 bits is coarser. `python tests/bitsandbytes_kernels.py` writes
the file anew, with the bitsandbytes that is installed (0.50.2).
"""

import importlib.util
import json
from pathlib import Path
from unittest import mock

import torch

GOLDEN = Path(__file__).with_name("bitsandbytes_kernels.json")


def torch_kernels():
    """Its functions by the name of the operation, as `backends/default/ops.py` registers them; None without it."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return None
    import bitsandbytes
    from bitsandbytes import _ops

    found = {}

    def capture(name, backend):
        return lambda function: found.setdefault(name.removeprefix("bitsandbytes::"), function)

    with mock.patch.object(_ops, "register_kernel", capture):
        path = Path(bitsandbytes.__file__).parent / "backends" / "default" / "ops.py"
        spec = importlib.util.spec_from_file_location("bitsandbytes.backends.default.again", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return found


def golden():
    """For "nf4", "signed" and "unsigned": numbers, and the codes, magnitudes and values that they become."""
    read = json.loads(GOLDEN.read_text())
    return {name: {key: torch.tensor(values) for key, values in entry.items()} for name, entry in read.items()}


def write_golden():
    from bitsandbytes.functional import create_dynamic_map

    kernels = torch_kernels()
    torch.manual_seed(0)
    numbers = (torch.randn(256) * torch.randn(256).mul(2).exp()).bfloat16().float()
    packed, magnitudes = kernels["quantize_4bit"](numbers, 64, "nf4", torch.uint8)
    values = kernels["dequantize_4bit"](packed, magnitudes, 64, "nf4", numbers.shape, torch.float32)
    found = {"nf4": (numbers, packed.flatten(), magnitudes, values)}
    for name, given in (("signed", numbers), ("unsigned", numbers.abs())):
        table = create_dynamic_map(name == "signed")
        codes, magnitudes = kernels["quantize_blockwise"](given, table, 256)
        values = kernels["dequantize_blockwise"](codes, magnitudes, table, 256, torch.float32)
        found[name] = (given, codes, magnitudes, values)
    keys = ("numbers", "codes", "magnitudes", "values")
    entries = {name: dict(zip(keys, map(as_list, tensors), strict=True)) for name, tensors in found.items()}
    GOLDEN.write_text(json.dumps(entries))


def as_list(t):
    """Nine digits are enough for a number in fp32."""
    return [float(f"{x:.9g}") if t.is_floating_point() else x for x in t.tolist()]


if __name__ == "__main__":
    write_golden()
