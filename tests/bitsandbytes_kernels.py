"""The kernels of bitsandbytes in plain torch, which agree with its CUDA kernels where its CPU kernel is coarser."""

import importlib.util
from pathlib import Path

import pytest


def torch_kernels(monkeypatch):
    """Its functions by the name of the operation, as `backends/default/ops.py` registers them."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    from bitsandbytes import _ops

    found = {}

    def capture(name, backend):
        return lambda function: found.setdefault(name.removeprefix("bitsandbytes::"), function)

    with monkeypatch.context() as patched:
        patched.setattr(_ops, "register_kernel", capture)
        path = Path(bitsandbytes.__file__).parent / "backends" / "default" / "ops.py"
        spec = importlib.util.spec_from_file_location("bitsandbytes.backends.default.again", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return found
