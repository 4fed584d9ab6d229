"""Sizes and lengths as users write them."""

import math
import re
from decimal import Decimal

_UNITS = {"": 1, "b": 1}
_UNITS |= {f"{letter}b": 1000**power for power, letter in enumerate("kmgt", 1)}
_UNITS |= {f"{letter}ib": 1024**power for power, letter in enumerate("kmgt", 1)}

SMALLEST = 2**20  # bytes of a memory that a model is to fit into


def parse_bytes(text: str) -> int:
    """Bytes of "24GiB", "24 GB", "80000MB" or a plain number.

    Raises:
        ValueError: it isn't any of these.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text, re.IGNORECASE)
    if match is None or match[2].lower() not in _UNITS:
        raise ValueError(f"{text}: give a number and a unit, such as 24GiB (2^30 bytes each) or 24GB (10^9)")
    size = float(match[1]) * _UNITS[match[2].lower()]
    if size < 1:
        raise ValueError(f"{text} is too small: give more than 0 bytes")
    if size >= 2**63:
        raise ValueError(f"{text[:60]} is more than any machine has")
    return int(size)


def parse_memory(text: str) -> int:
    """Bytes of a memory, which has a megabyte or more: a number without a unit is mostly one of gigabytes.

    Raises:
        ValueError: it isn't a size, or a smaller one.
    """
    size = parse_bytes(text)
    if size < SMALLEST:
        raise ValueError(f"{text} is only {size:,} bytes: give a unit, such as 24GiB")
    return size


def steps_of(epochs: float, examples: int, batch_size: int) -> int:
    """Updates that `epochs` of so many examples take; the last one is filled up from the next epoch.

    In decimal, as `epochs` is written: 1.1 epochs of 10 examples are 11, in binary a little more.
    """
    return math.ceil(Decimal(str(epochs)) * examples / batch_size)
