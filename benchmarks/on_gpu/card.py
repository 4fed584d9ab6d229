"""The device: its allocator's peaks, a simulated smaller card, and the conditions under which a number was seen."""

from __future__ import annotations

import gc
import os
import platform
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

PACKAGES = ("torch", "transformers", "accelerate", "peft", "numpy", "badam", "galore-torch", "lomo-optim")
_QUERY = (
    "name",
    "driver_version",
    "memory.total",
    "memory.reserved",
    "clocks.sm",
    "clocks.max.sm",
    "clocks.mem",
    "temperature.gpu",
)
_ALL = "{}_bytes.all.{}"  # of torch.cuda.memory_stats


class Card:
    """A GPU, or for rehearsals the CPU, which has no allocator to ask: its sizes are None."""

    def __init__(self, device: str):
        self.device = torch.device(device)
        self.on_gpu = self.device.type == "cuda"

    def settle(self) -> None:
        """Release memory that is no longer used."""
        gc.collect()
        self.wait()
        if self.on_gpu:
            torch.cuda.empty_cache()

    def wait(self) -> None:
        """Until all that was started on the device is done."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def start_peaks(self) -> None:
        """Reset the peaks: they count from here on."""
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()

    def peaks(self) -> dict[str, int | None]:
        """The allocator's peaks: as requested, rounded up to its blocks, and in whole segments."""
        names = {"requested": "requested", "allocated": "allocated", "reserved": "reserved"}
        return {f"peak_{name}_bytes": self._stat(_ALL.format(key, "peak")) for name, key in names.items()}

    def workspace_bytes(self) -> int | None:
        """What libraries hold in the allocator, with none of our tensors alive: cuBLAS's workspaces, one per thread."""
        layer = torch.nn.Linear(64, 64, dtype=torch.bfloat16, device=self.device)
        layer(torch.ones(64, 64, dtype=torch.bfloat16, device=self.device)).sum().backward()
        del layer
        self.settle()
        return self._stat(_ALL.format("requested", "current"))

    def outside_bytes(self) -> int | None:
        """The card's memory outside the allocator's segments: context, kernels, libraries."""
        if not self.on_gpu:
            return None
        free, total = torch.cuda.mem_get_info()
        return total - free - torch.cuda.memory_reserved()

    def total_bytes(self) -> int | None:
        """The card's memory; None on a CPU."""
        return torch.cuda.mem_get_info()[1] if self.on_gpu else None

    def _stat(self, name: str) -> int | None:
        return torch.cuda.memory_stats()[name] if self.on_gpu else None

    @contextmanager
    def smaller(self, total_bytes: int) -> Iterator[None]:
        """Simulate a card of `total_bytes`: the allocator may take what this process doesn't hold outside it."""
        if not self.on_gpu:
            yield
            return
        outside = self.outside_bytes() or 0
        whole = torch.cuda.get_device_properties(self.device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, (total_bytes - outside) / whole))
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)


def nvidia_smi() -> dict[str, str]:
    """What the driver says about the GPU that is used, if there is one; this needs no CUDA context in this process."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]  # a number or a UUID
    command = ["nvidia-smi", f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader", f"--id={first}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(_QUERY, (value.strip() for value in done.stdout.strip().split(",")), strict=False))


def conditions(card: Card, commit: str | None) -> dict[str, Any]:
    """What a reader must know about the machine."""
    return {
        "device": torch.cuda.get_device_name() if card.on_gpu else f"cpu ({platform.machine()})",
        "total_bytes": card.total_bytes(),
        "cpu_cores": os.cpu_count(),
        "nvidia_smi": nvidia_smi() if card.on_gpu else {},
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "versions": versions(),
        "commit": commit,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def versions() -> dict[str, str]:
    """Versions of the installed packages; torch's own string, which includes what it was built for."""
    found = {name: number for name in PACKAGES if (number := _version(name))}
    return {**found, "torch": torch.__version__}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def ceilings(card: Card, size: int = 8192, repeats: int = 10) -> dict[str, Any]:
    """The card's limits: a product of two bf16 matrices, a copy of one, and what libraries hold afterwards."""
    size = size if card.on_gpu else 64
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=card.device) for _ in range(2))
    out = torch.empty_like(a)
    product = _seconds(card, lambda: torch.matmul(a, b, out=out), repeats)
    copy = _seconds(card, lambda: out.copy_(a), repeats)
    a = b = out = None
    card.settle()
    return {
        "tflops": 2 * size**3 / product / 1e12,
        "copy_gb_per_second": 4 * size**2 / copy / 1e9,  # read and written, 2 bytes each
        "workspace_bytes": card.workspace_bytes(),
        "outside_bytes": card.outside_bytes(),
    }


def _seconds(card: Card, work: Any, repeats: int) -> float:
    for _ in range(3):
        work()
    card.wait()
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    card.wait()
    return (time.perf_counter() - start) / repeats
