"""The model of the caching allocator follows the rules of c10/cuda/CUDACachingAllocator.cpp, worked out by hand."""

import random

import pytest

from membench.memory.allocator import (
    _ADDRESS_BITS,
    MIB,
    ROUND_BYTES,
    CachingAllocator,
    estimate_reserved_bytes,
    has_room,
)
from membench.memory.trace import Trace
from reports.parts import TEMPORARIES


def trace_of(*steps: int | str) -> Trace:
    """A trace from steps: a number allocates so many bytes; a string frees an allocation, "0" the first of them."""
    trace = Trace()
    for step in steps:
        if isinstance(step, str):
            trace.free(int(step))
        else:
            trace.allocate(step, TEMPORARIES, "forward", "")
    return trace


def reserved_mib(*steps: int | str) -> float:
    return estimate_reserved_bytes(trace_of(*steps)) / MIB


@pytest.mark.parametrize(
    "request_bytes, segment_mib",
    [
        (1, 2),
        (MIB, 2),  # the largest small request
        (MIB + 1, 20),
        (10 * MIB - 512, 20),
        (10 * MIB, 10),  # from here on a segment of its own, in steps of 2 MiB
        (10 * MIB + 1, 12),
        (128256 * 4096 * 2, 1002),
    ],
)
def test_a_first_request_reserves_a_segment_of_its_class(request_bytes, segment_mib):
    assert reserved_mib(request_bytes) == segment_mib


def test_small_requests_are_packed_in_steps_of_512_bytes():
    assert reserved_mib(*[1] * 4096) == 2
    assert reserved_mib(*[513] * 2049) == 4  # 1024 bytes each: 2048 of them fill a segment


def test_small_and_large_requests_do_not_share_segments():
    assert reserved_mib(2 * MIB, 512) == 22
    assert reserved_mib(2 * MIB, MIB) == 22  # 1 MiB is small still


def test_a_large_segment_is_split_while_more_than_1_mib_is_left():
    assert reserved_mib(8 * MIB, 8 * MIB, 4 * MIB) == 20
    assert reserved_mib(8 * MIB, 8 * MIB, 5 * MIB) == 40


def test_a_remainder_of_exactly_1_mib_stays_with_its_block():
    # Twice 9.5 MiB leave 1 MiB of the segment, which is not split off.
    half = 9 * MIB + MIB // 2
    allocator = CachingAllocator()
    allocator.allocate(half)
    second = allocator.allocate(half)
    assert second[1] * ROUND_BYTES == half + MIB
    assert allocator.reserved_bytes == 20 * MIB


def test_the_smallest_block_that_fits_is_taken():
    # Free are 12 and 14 MiB: 11 MiB go into the first, so 13 MiB still find the second.
    assert reserved_mib(14 * MIB, 12 * MIB, "0", "1", 11 * MIB, 13 * MIB) == 26


def test_a_freed_block_is_reused_and_reserved_memory_never_shrinks():
    assert reserved_mib(30 * MIB, "0", 30 * MIB, "1") == 30
    assert reserved_mib(30 * MIB, "0", 32 * MIB) == 62


def test_neighbours_in_a_segment_merge_when_both_are_free():
    # 6 + 6 + 6 MiB in 20 MiB: with the first two free, 9 MiB fit where they were.
    assert reserved_mib(6 * MIB, 6 * MIB, 6 * MIB, "0", "1", 9 * MIB) == 20
    assert reserved_mib(6 * MIB, 6 * MIB, 6 * MIB, "1", "0", 9 * MIB) == 20
    # The first and the third are no neighbours; the third merges with the 2 MiB that are left, which is too little.
    assert reserved_mib(6 * MIB, 6 * MIB, 6 * MIB, "0", "2", 9 * MIB) == 40


def test_segments_do_not_merge():
    assert reserved_mib(10 * MIB, 10 * MIB, "0", "1", 20 * MIB) == 40


def passes(room_mib: float, *steps: int | str) -> bool:
    trace = trace_of(*steps)
    return has_room(trace.events, trace.sizes, int(room_mib * MIB))


def test_segments_that_are_wholly_free_are_given_back_where_there_is_no_room_for_another():
    steps = (12 * MIB, "0", 20 * MIB)  # 12 MiB are kept as long as there is room
    assert reserved_mib(*steps) == 32
    assert passes(20, *steps) and not passes(18, *steps)
    used = (12 * MIB, 12 * MIB, "0", 20 * MIB)
    assert passes(32, *used) and not passes(30, *used)


def test_a_segment_of_which_a_part_is_used_is_not_given_back():
    steps = (8 * MIB, 8 * MIB, "0", 12 * MIB)  # two blocks of one segment of 20 MiB
    assert reserved_mib(*steps) == 32
    assert passes(32, *steps) and not passes(30, *steps)


def test_without_pressure_room_changes_nothing():
    generator = random.Random(3)
    steps: list[int | str] = [generator.choice([700, 2 * MIB, 15 * MIB]) for _ in range(60)]
    steps += [str(number) for number in range(0, 60, 2)] + [9 * MIB] * 8
    most = reserved_mib(*steps)
    assert passes(most, *steps)
    peak = sum(step for step in steps if isinstance(step, int)) - sum(
        step for step in steps[0:60:2] if isinstance(step, int)
    )
    assert not passes(peak / MIB - 2, *steps)


def test_blocks_never_overlap_and_all_free_leaves_whole_segments():
    generator = random.Random(0)
    allocator, live = CachingAllocator(), []
    for _ in range(3000):
        if live and generator.random() < 0.5:
            allocator.free(live.pop(generator.randrange(len(live))))
        else:
            live.append(allocator.allocate(generator.choice([100, 5000, MIB, 3 * MIB, 11 * MIB])))
        spans = sorted((address, address + units) for address, units, _ in live)
        assert all(end <= start for (_, end), (start, _) in zip(spans, spans[1:], strict=False))
    for block in live:
        allocator.free(block)
    sizes, starts = zip(*(divmod(key, 1 << _ADDRESS_BITS) for key in allocator.small + allocator.large), strict=True)
    assert sum(sizes) * ROUND_BYTES == allocator.reserved_bytes
    assert {size * ROUND_BYTES for size in sizes} == {2 * MIB, 20 * MIB, 12 * MIB}  # whole segments
    assert len(set(starts)) == len(starts)


def test_traces_larger_than_any_machine_are_served():
    """A petabyte each, so that addresses are beyond 2^40 units; freed neighbours of different segments don't merge."""
    petabyte = 2**50
    sizes = [petabyte + 512, petabyte, 3 * petabyte, petabyte]
    assert reserved_mib(*sizes, "0", "1", "2", "3", 3 * petabyte) == (6 * petabyte + 2 * MIB) / MIB
