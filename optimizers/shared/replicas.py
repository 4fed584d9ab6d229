"""Replicas of a model, one per process, that stay equal without a wrapper: gradients are averaged where they are used.

Only what is trained now is sent: of BAdam's D blocks, 1 / D of what `DistributedDataParallel` would send.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, distributed
from torch._subclasses.fake_tensor import FakeTensor

BUCKET = 2**20  # values, at most, unless a single tensor has more


class Replicas:
    """The processes of a group, with a copy of the model each.

    Args:
        group: a process group of torch.distributed; None for all processes.

    Raises:
        ValueError: there is no process group, or this process isn't in it.
    """

    def __init__(self, group: Any = None):
        if not (distributed.is_available() and distributed.is_initialized()):
            raise ValueError("data_parallel() needs a process group: call torch.distributed.init_process_group() first")
        if distributed.get_rank(group) < 0:
            raise ValueError(
                "data_parallel(group): this process isn't in the group, so it would train alone: call it in the "
                "group's processes only, or give each the group that it is in"
            )
        self.group = group
        self.size = distributed.get_world_size(group)

    @torch.no_grad()
    def copy_from_first(self, tensors: Iterable[Tensor]) -> None:
        """Give all replicas the values of the first one."""
        for t in tensors if self.size > 1 else ():
            if 0 not in t.stride() or t.numel() < 2:  # the bytes of weights in 8 bits are buffers
                distributed.broadcast(t, group=self.group, group_src=0)

    @torch.no_grad()
    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its mean over the replicas."""
        for bucket in _buckets(tensors) if self.size > 1 else ():
            joined = bucket[0] if len(bucket) == 1 else torch.cat([t.reshape(-1) for t in bucket])
            distributed.all_reduce(joined, group=self.group)
            joined.div_(self.size)
            if len(bucket) > 1:
                for t, mean in zip(bucket, joined.split([t.numel() for t in bucket]), strict=True):
                    t.copy_(mean.view(t.shape))

    @torch.no_grad()
    def average_gradients(self, params: Sequence[Tensor]) -> None:
        """Average the gradients of `params`; where only some replicas have one, the others' count as zeros."""
        if self.size == 1 or not params:
            return
        trained = [p for p, used in zip(params, self._used(params), strict=True) if used]
        for p in trained:
            if p.grad is None:
                p.grad = torch.zeros_like(p, dtype=p.grad_dtype)
        self.average([p.grad for p in trained if p.grad is not None])

    def _used(self, params: Sequence[Tensor]) -> list[bool]:
        """Which of `params` have a gradient on any replica; where no value exists, in a plan, on this one."""
        here = [p.grad is not None for p in params]
        counts = torch.tensor(here, dtype=torch.int32, device=params[0].device)
        distributed.all_reduce(counts, group=self.group)
        return here if isinstance(counts, FakeTensor) else [count > 0 for count in counts.tolist()]


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours of one dtype that are sent together: a message has a cost of its own, and a bucket needs memory."""
    bucket: list[Tensor] = []
    for t in tensors:
        if bucket and (t.dtype != bucket[0].dtype or sum(map(Tensor.numel, bucket)) + t.numel() > BUCKET):
            yield bucket
            bucket = []
        bucket.append(t)
    if bucket:
        yield bucket
