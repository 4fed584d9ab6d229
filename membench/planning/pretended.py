"""Ranks that a plan pretends to have: this process is the first of them, and there are no others."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from torch import distributed


@contextmanager
def pretended(ranks: int) -> Iterator[None]:
    """Within this context so many ranks train together; their collectives return at once.

    Raises:
        ValueError: this process already belongs to a group.
    """
    if ranks == 1:
        yield
        return
    if distributed.is_initialized():
        raise ValueError("a plan for several GPUs makes a process group of its own: plan before init_process_group()")
    from torch.testing._internal.distributed.fake_pg import FakeStore

    distributed.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        with warnings.catch_warnings():  # about an update in place of a model's output, which no plan makes
            warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
            yield
    finally:
        distributed.destroy_process_group()
