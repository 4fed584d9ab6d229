"""The page: one HTML file with everything in it, without a network; its script only rearranges what is there."""

import json
from collections.abc import Sequence
from typing import Any

from reports import differences
from reports.figures import count, draw
from reports.figures.curves import MOST_ROWS
from reports.page import content, explore
from reports.page.sheet import fill
from reports.record import Record
from reports.setups import Setup, group, heading

MOST_PLOTS = 56  # of all set-ups; beyond them there are tables only


def render(records: list[Record], problems: Sequence[str] = (), trials: Sequence[Record] = ()) -> str:
    """A page of records (checked ones, of `record.read`), of what could not be read, and of a study's `trials`.

    Raises:
        ValueError: there are no records.
    """
    if not records:
        raise ValueError("There are no records to make a page of.")
    setups = group(records)
    drawn = _to_draw(setups)
    return fill(
        "report.html",
        ["report.css"],
        ["common.js", "report.js"],
        overview=content.overview(records, setups),
        different=differences.between_setups(setups),
        problems=problems,
        advice=content.advice(records),
        tuning=content.tuning(trials, records),
        sections=[_section(number, setup, number in drawn) for number, setup in enumerate(setups, 1)],
        most_rows=MOST_ROWS,
    )


def _to_draw(setups: list[Setup]) -> set[int]:
    """The numbers of the set-ups that get plots: the first, and those with most runs while there is room."""
    drawn, left = {1}, MOST_PLOTS - count(setups[0])
    by_size = sorted(enumerate(setups[1:], 2), key=lambda item: -sum(map(len, item[1].rows.values())))
    for number, setup in by_size:
        if count(setup) <= left:
            drawn.add(number)
            left -= count(setup)
    return drawn


def _section(number: int, setup: Setup, drawn: bool) -> dict[str, Any]:
    return {
        "id": f"setup-{number}",
        "heading": heading(setup),
        "explore": json.dumps(explore.figures(setup)),
        "walls": content.walls(setup, draw(setup)) if drawn else None,
        **content.of(setup),
    }
