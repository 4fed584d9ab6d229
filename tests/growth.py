"""Prints by how many bytes the resident memory of this process grows in two training steps of a model of 537 MB.

Run as `python growth.py METHOD`, with MALLOC_MMAP_THRESHOLD_=1048576, so that what is freed goes back to the system.
"""

import re
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import optimizers
from membench.training.loop import training_step

WIDTH, DEPTH, ROWS = 4096, 8, 512


def build_model(width: int = WIDTH, depth: int = DEPTH) -> nn.Module:
    """`depth` layers of `width` x `width` weights."""
    model = nn.Module()
    model.layers = nn.ModuleList(nn.Sequential(nn.Linear(width, width, bias=False), nn.ReLU()) for _ in range(depth))
    return model


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    x = batch["input"]
    for layer in model.layers:
        x = layer(x)
    return x.mean()


def take_steps(method: str, model: nn.Module, rows: int, width: int) -> None:
    """Two training steps that nobody meters."""
    optimizer = optimizers.create(method, model)
    for _ in range(2):
        batch = {"input": torch.randn(rows, width)}
        training_step(model, optimizer, loss, [batch], phase=lambda name: nullcontext())


def resident_bytes(field: str) -> int:
    """VmRSS (now) or VmHWM (the highest since it was reset)."""
    kilobytes = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(kilobytes[1]) * 1024


def main() -> None:
    torch.set_num_threads(1)
    take_steps(sys.argv[1], build_model(32, 2), 8, 32)  # loads what the first step loads
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = resident_bytes("VmRSS")
    take_steps(sys.argv[1], build_model(), ROWS, WIDTH)
    print(resident_bytes("VmHWM") - before)


if __name__ == "__main__":
    main()
