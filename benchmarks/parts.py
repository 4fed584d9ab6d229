"""What a whole training step hides, measured separately."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import peers
from benchmarks.models import Size, build
from benchmarks.paired import Seconds, interleave, ratio_of
from benchmarks.side import Side, largest_difference, step_on_the_same_gradients, with_timed_hooks
from optimizers import LOMO, AdamW, BAdam, GaLore
from optimizers.shared.subspace import randomized_vectors


@dataclass(frozen=True)
class Part:
    """One number and its upper limit."""

    name: str
    value: float
    limit: float
    text: str  # the number and what it was computed from

    @property
    def holds(self) -> bool:
        return self.value <= self.limit


def galore_refresh(rows: int, columns: int, rank: int, repeats: int = 3) -> Part:
    """A new subspace for a gradient of (rows, columns), rows at most columns: ours over galore-torch's full SVD."""
    peers.import_galore()
    from galore_torch.galore_projector import GaLoreProjector

    gradient = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))

    def subspace() -> Seconds:
        return {"update": seconds(lambda: randomized_vectors(gradient, rank, True, False, (0,)))}

    def their_subspace() -> Seconds:
        return {"update": seconds(lambda: GaLoreProjector(rank).get_orthogonal_matrix(gradient, rank, "left"))}

    return _update_part(
        f"galore: a subspace of {rows} x {columns}, rank {rank}, over galore-torch's",
        interleave(lambda _: subspace(), lambda _: their_subspace(), repeats, 1),
        limit=0.1,
    )


def _update_part(name: str, taken: tuple[list[Seconds], list[Seconds]], limit: float) -> Part:
    ratio = ratio_of(*taken, "update")
    ours, theirs = (1000 * statistics.median(sample["update"] for sample in side) for side in taken)
    return Part(name, ratio.median, limit, f"{ratio} ({ours:.1f} ms against {theirs:.1f} ms)")


def seconds(work: Callable[[], object]) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def galore_exact(size: Size, steps: int = 20) -> Part:
    """The largest difference in weights with full SVDs on both sides, over two changes of subspace.

    Both get the same gradients: the sign of a singular vector is arbitrary, so if two gradients differed in their last
    bits, one could flip the moments that are kept over a change, and the other not.
    """
    settings: dict[str, Any] = {"lr": 1e-3, "eps": 1e-12}
    model, other = build(size), build(size)
    every = steps * 2 // 5
    optimizer = GaLore(model, rank=size.rank, update_every=every, svd="exact", **settings)
    ours = Side(model, optimizer, size)
    theirs = Side(other, peers.galore(other, size.rank, every, 0.25, shared_subspaces=False, **settings), size)
    for number in range(steps):
        step_on_the_same_gradients(ours, theirs, number)
    difference = largest_difference(model, other)
    name = f'galore: weights with svd="exact", {steps} steps, 2 changes, from galore-torch\'s'
    return Part(name, difference, 1e-5, f"{difference:.1e}")


class Tensors(nn.Module):
    """Many small tensors whose gradients cost next to nothing."""

    def __init__(self, count: int, width: int = 16):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weights = nn.ParameterList(torch.randn(width, width, generator=generator) for _ in range(count))

    def forward(self) -> Tensor:
        return torch.stack([weight.sum() for weight in self.weights]).mean()


def lomo_updates(count: int = 500, steps: int = 20) -> Part:
    """The update path with `count` tensors: the seconds in all hooks of a backward pass, ours over lomo-optim's."""
    model, other = Tensors(count), Tensors(count)
    ours, theirs = with_timed_hooks(LOMO)(model, lr=1e-2), peers.lomo(other, 1e-2)

    def backward(tensors: Tensors, optimizer: Any) -> Seconds:
        before = optimizer.hook_seconds
        optimizer.backward(tensors())
        optimizer.step()
        return {"update": optimizer.hook_seconds - before}

    return _update_part(
        f"lomo: the update path with {count} tensors, over lomo-optim's",
        interleave(lambda _: backward(model, ours), lambda _: backward(other, theirs), steps, 3),
        limit=0.2,
    )


def badam_backward(size: Size, checkpointing: bool, rounds: int = 3) -> Part:
    """Seconds of BAdam's backward pass, averaged over a cycle of its blocks, over AdamW's.

    At most (D + 1) / 2D of the layers' share, plus the head's, through which every backward pass runs.
    """
    model, other = build(size), build(size)
    badam, adamw = Side(model, BAdam(model, order="ascending"), size), Side(other, AdamW(other), size)
    if checkpointing:
        for side in (badam, adamw):
            side.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    depth = badam.optimizer.cycle_length
    badam.step(0), adamw.step(0)
    ratios = []
    for _ in range(depth):
        pairs = interleave(badam.step, adamw.step, rounds, 1)
        ratios.append(ratio_of(*pairs, "backward").median)
        badam.optimizer.advance()
    ratio = statistics.mean(ratios)
    share = head_share(model)
    limit = (depth + 1) / (2 * depth) * (1 - share) + share
    text = f"{ratio:.3f} (from {min(ratios):.2f}, the last block, to {max(ratios):.2f}; D = {depth})"
    name = f"badam: backward pass over a cycle, {'with' if checkpointing else 'without'} checkpointing, over AdamW's"
    return Part(name, ratio, limit, text)


def head_share(model: nn.Module) -> float:
    """The head's share of the multiplications in a pass: its share of the weights of all linear modules."""
    weights = {name: m.weight.numel() for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    return weights["lm_head"] / sum(weights.values())


def parts(size: Size, small: Size) -> dict[str, Callable[[], Part]]:
    """The measurements whose package is installed, by method and name.

    Args:
        size: the model of the races.
        small: a model for whose matrices a full SVD is fast.
    """
    full = size.width > 256
    shape = (1024, 4096, 128) if full else (64, 256, 8)
    needs = {"galore": "galore_torch", "lomo": "lomo_optim", "badam": "torch"}
    all_parts: dict[str, Callable[[], Part]] = {
        "badam.backward": lambda: badam_backward(size, checkpointing=False),
        "badam.checkpointed": lambda: badam_backward(size, checkpointing=True),
        "galore.refresh": lambda: galore_refresh(*shape),
        "galore.exact": lambda: galore_exact(small),
        "lomo.updates": lambda: lomo_updates(500 if full else 100),
    }
    return {name: part for name, part in all_parts.items() if find_spec(needs[name.partition(".")[0]])}
