"""The races of `benchmarks.race`, on the GPU."""

from __future__ import annotations

from dataclasses import asdict
from importlib.util import find_spec
from typing import Any

from benchmarks.measure import run
from benchmarks.models import Size
from benchmarks.races import IN_HOOKS, RACES

PACKAGES = {name: race.package for name, race in RACES.items()}


def installed(method: str) -> bool:
    """Is there a race of it whose peer can be imported?"""
    return method in PACKAGES and find_spec(PACKAGES[method]) is not None


def race(method: str, size: Size, steps: int) -> dict[str, Any]:
    """Ours over the peer's; of a method that updates inside the backward pass only whole steps have a time."""
    result = run(method, RACES[method], size, steps, warm_up=3)
    return {
        "peer": result.race.peer,
        "update_ratio": None if IN_HOOKS in result.race.notes else asdict(result.update),
        "step_ratio": asdict(result.step),
        "our_peak_bytes": result.our_peak_bytes,
        "their_peak_bytes": result.their_peak_bytes,
        "largest_difference": result.difference,
        "same_work": result.race.update_limit is not None,
    }
