"""A model of PyTorch's CUDA caching allocator (c10/cuda/CUDACachingAllocator.cpp): what a trace would reserve on a GPU.

The rules, with default settings: a request is rounded up to 512 bytes. One of at most 1 MiB is served from segments of
2 MiB, a larger one below 10 MiB from segments of 20 MiB, and any other gets a segment of its size, rounded up to 2 MiB.
The smallest free block that is large enough is used (of equal ones, that at the lowest address); the remainder becomes
a separate block if it is at least 512 bytes (small requests) or more than 1 MiB (others). A freed block is merged with
free neighbours in its segment. Segments are never returned (the real allocator does so only when the GPU is full), so
the reserved memory only grows.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence

from membench.memory.trace import Trace
from reports.table import MIB

ROUND_BYTES = 512
SMALL_REQUEST_BYTES = MIB
SMALL_SEGMENT_BYTES = 2 * MIB
LARGE_SEGMENT_BYTES = 20 * MIB
OWN_SEGMENT_BYTES = 10 * MIB
ROUND_SEGMENT_BYTES = 2 * MIB
_ADDRESS_BITS = 64

# What a CUDA process holds besides its tensors: the context, loaded kernels, cuBLAS's workspace. It depends on the GPU
# and the driver; this is a round figure for data-centre GPUs of 2020 to 2024.
CUDA_CONTEXT_BYTES = 512 * MIB


class Block:
    """A piece of a segment: allocated, or free and in its pool."""

    __slots__ = ("address", "free", "next", "pool", "previous", "size")

    def __init__(self, address: int, size: int, pool: Pool, previous: Block | None = None, next: Block | None = None):
        self.address, self.size, self.pool = address, size, pool
        self.previous, self.next = previous, next
        self.free = False


class Pool:
    """The free blocks for small or for large requests, sorted by size and address."""

    def __init__(self) -> None:
        self._keys: list[int] = []  # size and address in one number, which is quick to compare
        self._blocks: dict[int, Block] = {}

    def add(self, block: Block) -> None:
        """Add a block, which is then free."""
        block.free = True
        key = block.size << _ADDRESS_BITS | block.address
        insort(self._keys, key)
        self._blocks[key] = block

    def remove(self, block: Block) -> None:
        """Remove a block, which is then no longer free."""
        block.free = False
        key = block.size << _ADDRESS_BITS | block.address
        del self._keys[bisect_left(self._keys, key)]
        del self._blocks[key]

    def take(self, size: int) -> Block | None:
        """Take the smallest free block of at least `size` bytes; None if there is none."""
        place = bisect_left(self._keys, size << _ADDRESS_BITS)
        if place == len(self._keys):
            return None
        block = self._blocks.pop(self._keys.pop(place))
        block.free = False
        return block


class CachingAllocator:
    """Serves requests as PyTorch would on an otherwise empty GPU; `reserved_bytes` is what its segments take."""

    def __init__(self) -> None:
        self.reserved_bytes = 0
        self._small, self._large = Pool(), Pool()

    def allocate(self, size: int) -> Block:
        """Allocate a block of at least `size` bytes."""
        size = max(-(-size // ROUND_BYTES) * ROUND_BYTES, ROUND_BYTES)
        pool = self._small if size <= SMALL_REQUEST_BYTES else self._large
        block = pool.take(size) or self._new_segment(size, pool)
        remaining = block.size - size
        if remaining >= ROUND_BYTES if pool is self._small else remaining > SMALL_REQUEST_BYTES:
            self._split(block, size)
        return block

    def free(self, block: Block) -> None:
        """Free a block, merging it with its free neighbours."""
        pool = block.pool
        for neighbour in (block.previous, block.next):
            if neighbour is not None and neighbour.free:
                pool.remove(neighbour)
                first, second = sorted((block, neighbour), key=lambda piece: piece.address)
                block = _merge(first, second)
        pool.add(block)

    def _new_segment(self, size: int, pool: Pool) -> Block:
        segment = Block(self.reserved_bytes, segment_bytes(size), pool)
        self.reserved_bytes += segment.size
        return segment

    def _split(self, block: Block, size: int) -> None:
        rest = Block(block.address + size, block.size - size, block.pool, previous=block, next=block.next)
        if block.next is not None:
            block.next.previous = rest
        block.size, block.next = size, rest
        block.pool.add(rest)


def segment_bytes(size: int) -> int:
    """How much is requested from the driver when no free block holds `size` bytes."""
    if size <= SMALL_REQUEST_BYTES:
        return SMALL_SEGMENT_BYTES
    if size < OWN_SEGMENT_BYTES:
        return LARGE_SEGMENT_BYTES
    return -(-size // ROUND_SEGMENT_BYTES) * ROUND_SEGMENT_BYTES


def estimate_reserved_bytes(trace: Trace) -> int:
    """What PyTorch would have reserved on a GPU at the end of the trace, which is also its maximum."""
    return reserved_bytes(trace.events, trace.sizes)


def reserved_bytes(events: Iterable[int], sizes: Sequence[int]) -> int:
    """The same for a trace's events with these sizes of the allocations."""
    allocator = CachingAllocator()
    blocks: dict[int, Block] = {}
    for event in events:
        if event < 0:
            allocator.free(blocks.pop(~event))
        else:
            blocks[event] = allocator.allocate(sizes[event])
    return allocator.reserved_bytes


def _merge(first: Block, second: Block) -> Block:
    first.size += second.size
    first.next = second.next
    if second.next is not None:
        second.next.previous = first
    return first
