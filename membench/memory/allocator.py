"""A model of PyTorch's CUDA caching allocator (c10/cuda/CUDACachingAllocator.cpp): what a trace would reserve on a GPU.

The rules, with default settings: a request is rounded up to 512 bytes. One of at most 1 MiB is served from segments of
2 MiB, a larger one below 10 MiB from segments of 20 MiB, and any other gets a segment of its size, rounded up to 2 MiB.
The smallest free block that is large enough is used (of equal ones, that at the lowest address); the remainder becomes
a separate block if it is at least 512 bytes (small requests) or more than 1 MiB (others). A freed block is merged with
free neighbours in its segment. Segments are kept; where the GPU has no room for another, those that are wholly free are
given back first (`release_cached_blocks`).
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

_SMALL_UNITS = SMALL_REQUEST_BYTES // ROUND_BYTES
_ADDRESS_BITS = 56  # of units: more than any trace has
_ADDRESS = (1 << _ADDRESS_BITS) - 1

# What a CUDA process holds besides its tensors: the context, loaded kernels, cuBLAS's workspace. It depends on the GPU
# and the driver; this is a round figure for data-centre GPUs of 2020 to 2024.
CUDA_CONTEXT_BYTES = 512 * MIB


Block = tuple[int, int, bool]  # address, units, is it small?


class NoRoomError(Exception):
    """The GPU has no room for a segment, whatever is given back."""


class CachingAllocator:
    """Serves requests as PyTorch would on a GPU with `room_bytes` for it; `reserved_bytes` is what its segments take.

    A search replays traces thousands of times, so blocks are plain tuples, and free ones are found by where they start
    and end. Addresses and sizes are in units of `ROUND_BYTES`. Segments don't touch each other, so neighbours are of
    one segment.
    """

    def __init__(self, room_bytes: int | None = None) -> None:
        self.reserved_bytes = 0
        self._room_bytes = room_bytes
        self._segments: dict[int, int] = {}  # their units, by address
        self.small: list[int] = []  # free blocks, sorted: units and address in one number
        self.large: list[int] = []
        self._free: dict[int, int] = {}  # their units, by address
        self._ending: dict[int, int] = {}  # their addresses, by where they end
        self._end = 0

    def allocate(self, size: int) -> Block:
        """Allocate a block of at least `size` bytes.

        Raises:
            NoRoomError: there isn't as much.
        """
        units = -(-size // ROUND_BYTES) or 1
        is_small = units <= _SMALL_UNITS
        pool = self.small if is_small else self.large
        place = bisect_left(pool, units << _ADDRESS_BITS)
        if place < len(pool):
            key = pool.pop(place)
            whole, address = key >> _ADDRESS_BITS, key & _ADDRESS
            del self._free[address], self._ending[address + whole]
        else:
            whole, address = self._reserve(segment_bytes(units * ROUND_BYTES)), self._end
            self._segments[address] = whole
            self._end += whole + 1  # a gap
        rest = whole - units
        if not (rest if is_small else rest > _SMALL_UNITS):
            return address, whole, is_small
        insort(pool, rest << _ADDRESS_BITS | address + units)
        self._free[address + units] = rest
        self._ending[address + whole] = address + units
        return address, units, is_small

    def _reserve(self, size: int) -> int:
        """Take a segment from the GPU; its units."""
        room = self._room_bytes
        if room is not None and self.reserved_bytes + size > room:
            self._give_back(self.small)
            self._give_back(self.large)
            if self.reserved_bytes + size > room:
                raise NoRoomError
        self.reserved_bytes += size
        return size // ROUND_BYTES

    def _give_back(self, pool: list[int]) -> None:
        """Return the segments of which nothing is used."""
        kept = []
        for key in pool:
            units, address = key >> _ADDRESS_BITS, key & _ADDRESS
            if self._segments.get(address) != units:
                kept.append(key)
                continue
            del self._segments[address], self._free[address], self._ending[address + units]
            self.reserved_bytes -= units * ROUND_BYTES
        pool[:] = kept

    def free(self, block: Block) -> None:
        """Free a block, merging it with its free neighbours."""
        address, units, is_small = block
        pool, end = self.small if is_small else self.large, address + units
        after = self._free.pop(end, None)
        if after is not None:
            del pool[bisect_left(pool, after << _ADDRESS_BITS | end)]
            end += after
        before = self._ending.pop(address, None)
        if before is not None:
            del pool[bisect_left(pool, address - before << _ADDRESS_BITS | before)]
            address = before
        insort(pool, end - address << _ADDRESS_BITS | address)
        self._free[address] = end - address
        self._ending[end] = address


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
    _serve(allocator, events, sizes)
    return allocator.reserved_bytes


def has_room(events: Iterable[int], sizes: Sequence[int], room_bytes: int) -> bool:
    """Do these events pass on a GPU with so much room, perhaps only since unused segments are given back?"""
    try:
        _serve(CachingAllocator(room_bytes), events, sizes)
    except NoRoomError:
        return False
    return True


def _serve(allocator: CachingAllocator, events: Iterable[int], sizes: Sequence[int]) -> None:
    allocate, free = allocator.allocate, allocator.free
    blocks: dict[int, Block] = {}
    for event in events:
        if event < 0:
            free(blocks.pop(~event))
        else:
            blocks[event] = allocate(sizes[event])
