"""The races of `benchmarks.race`, on the GPU."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict
from importlib.util import find_spec
from typing import Any

from benchmarks.measure import run
from benchmarks.models import Size
from benchmarks.races import IN_HOOKS, RACES

PACKAGES = {name: race.package for name, race in RACES.items()}
FIRST = ("badam", "adamw", "lora", "galore", "lomo")  # the most important


def names(methods: Collection[str]) -> list[str]:
    """The races of `methods`, by name."""
    known = [name for name in RACES if name in methods or name.partition("-")[0] in methods]
    return sorted(known, key=lambda name: FIRST.index(name) if name in FIRST else len(FIRST))


def installed(method: str) -> bool:
    """Can the peer be imported?"""
    return find_spec(PACKAGES[method]) is not None


def race(method: str, size: Size, steps: int) -> dict[str, Any]:
    """Ours over the peer's; for a method that updates inside the backward pass only whole steps are timed."""
    result = run(method, RACES[method], size, steps, warm_up=3)
    return {
        "dtype": size.dtype,
        "peer": result.race.peer,
        "update_ratio": None if IN_HOOKS in result.race.notes else asdict(result.update),
        "step_ratio": asdict(result.step),
        "our_peak_bytes": result.our_peak_bytes,
        "their_peak_bytes": result.their_peak_bytes,
        "largest_difference": result.difference,
        "same_work": result.race.update_limit is not None,
    }
