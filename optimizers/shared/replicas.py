"""Replicas of a model, one per process, that stay equal without a wrapper: gradients are averaged where they are used.

Only what is trained now is sent: of BAdam's D blocks, 1 / D of what `DistributedDataParallel` would send.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import get_gradient_edge

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
        self._late: dict[int, set[Tensor]] = {}  # by backward pass: parameters with a gradient on some replicas only

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
        used = self.anywhere([p.grad is not None for p in params], params[0].device)
        trained = [p for p, here_or_there in zip(params, used, strict=True) if here_or_there]
        for p in trained:
            if p.grad is None:
                p.grad = torch.zeros_like(p, dtype=p.grad_dtype)
        self.average([p.grad for p in trained if p.grad is not None])

    def anywhere(self, here: Sequence[bool], device: torch.device) -> list[bool]:
        """Whether each is true on any replica; where no value exists, in a plan, on this one."""
        counts = self._counts(here, device) if self.size > 1 else None
        return list(here) if counts is None else [count > 0 for count in counts]

    def _counts(self, here: Sequence[bool], device: torch.device) -> list[int] | None:
        """On how many replicas each is true; None where no value exists, in a plan."""
        counts = torch.tensor(here, dtype=torch.int32, device=device)
        distributed.all_reduce(counts, group=self.group)
        return None if isinstance(counts, FakeTensor) else counts.tolist()

    def comes_late(self, p: nn.Parameter, params: Iterable[nn.Parameter], act: Callable[[nn.Parameter], None]) -> bool:
        """Within a backward pass: does `p`, one of `params`, get a gradient on some replicas only?

        An expert without tokens has none, nor a layer that is dropped at random. A replica that waited there for the
        others would be sent another parameter's gradient. So at the end of the pass `act` is called with each such
        parameter, in one order on all replicas, where it has no gradient with one of zeros.
        """
        if self.size == 1:
            return False
        number = torch._C._current_graph_task_id()  # type: ignore[attr-defined]
        if number not in self._late:
            trained = [q for q in params if q.requires_grad]
            comes = [torch._C._will_engine_execute_node(get_gradient_edge(q).node) for q in trained]  # type: ignore[attr-defined]
            counts = self._counts(comes, p.device) or [self.size] * len(trained)
            late = [q for q, count in zip(trained, counts, strict=True) if 0 < count < self.size]

            def finish() -> None:
                del self._late[number]
                for q in late:
                    if q.grad is None:
                        q.grad = torch.zeros_like(q, dtype=q.grad_dtype)
                    act(q)

            self._late[number] = set(late)
            torch.autograd.Variable._execution_engine.queue_callback(finish)
        return p in self._late[number]


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
