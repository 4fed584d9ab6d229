"""The results of the races, as text and as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from tabulate import tabulate

from benchmarks.measure import Result
from benchmarks.parts import Part

HEADER = ("method", "peer", "update time", "step time", "peak memory", "MB", "largest difference", "")
CAPTION = """\
Ours over theirs: below 1 ours is better. Model {model}, {threads} threads.
Times: the median ratio of {steps} pairs of steps, alternating in one process after {warm_up} to warm up, with its 95 %
confidence interval. Memory: the peak by our meter, in separate steps.
Difference: the largest of any weight after all steps from the same start."""


def render(results: list[Result], measured: list[Part], settings: dict[str, Any]) -> str:
    """The tables, and below them what was lost and what one must know to read them."""
    lines = []
    if results:
        table = tabulate([row(result) for result in results], HEADER, disable_numparse=True)
        lines += [CAPTION.format(**settings), "", table]
    if measured:
        rows = [(part.name, part.text, f"{part.limit:.3g}", verdict(part.holds)) for part in measured]
        lines += ["", tabulate(rows, ("measured apart", "seen", "at most", ""), disable_numparse=True)]
    lost = [f"{result.method}: {text}" for result in results for text in result.lost()]
    notes = [f"{result.method}: {note}" for result in results for note in result.race.notes]
    for title, texts in (("Lost:", lost), ("Notes:", notes)):
        lines += ["", title, *(f"- {text}" for text in texts)] if texts else []
    return "\n".join(lines)


def row(result: Result) -> tuple[str, ...]:
    """A row of the table: one race."""
    megabytes = f"{result.our_peak_bytes / 1e6:.1f} / {result.their_peak_bytes / 1e6:.1f}"
    same = "-" if result.race.same_weights is None else f"{result.difference:.1e}"
    outcome = "no race" if result.race.update_limit is None else verdict(not result.lost())
    times = (str(result.update), str(result.step))
    return (result.method, result.race.peer, *times, f"{result.memory:.3f}", megabytes, same, outcome)


def verdict(holds: bool) -> str:
    """The outcome of a race, as text."""
    return "held" if holds else "LOST"


def as_json(results: list[Result], measured: list[Part], settings: dict[str, Any]) -> dict[str, Any]:
    """The results, the separate measurements and the settings, for JSON."""
    races = [
        {
            "method": result.method,
            "peer": result.race.peer,
            "update_ratio": asdict(result.update),
            "step_ratio": asdict(result.step),
            "memory_ratio": result.memory,
            "our_peak_bytes": result.our_peak_bytes,
            "their_peak_bytes": result.their_peak_bytes,
            "largest_difference": result.difference,
            "lost": result.lost(),
            "notes": list(result.race.notes),
        }
        for result in results
    ]
    return {**settings, "torch": torch.__version__, "races": races, "parts": [asdict(part) for part in measured]}
