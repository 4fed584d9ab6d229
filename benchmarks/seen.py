"""`python -m benchmarks.seen FILE...`: take the JSONs of races into races.json, and make README's table of it.

A race that is taken again replaces the one before.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.races import RACES

HERE = Path(__file__).resolve().parent
TAKEN, README = HERE / "races.json", HERE / "README.md"
BEGIN, END = (
    "<!-- Generated from races.json by `python -m benchmarks.seen`. -->\n",
    "<!-- End of what is generated. -->\n",
)
HEAD = ("method", "update time", "step time", "peak memory", "largest difference", "outcome")

Document = dict[str, Any]  # what `race --json` writes


def main(files: Sequence[str]) -> int:
    """Take the races of `files`; returns 0."""
    taken = documents()
    for file in files:
        new = json.loads(Path(file).read_text(encoding="utf-8"))
        taken = [left for one in taken if (left := _without(one, names(new)))["races"]] + [new]
    lines = ",\n".join(json.dumps(one, separators=(",", ":")) for one in sorted(taken, key=names))
    TAKEN.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    README.write_text(renewed(README.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


def documents() -> list[Document]:
    """Those taken so far."""
    found: list[Document] = json.loads(TAKEN.read_text(encoding="utf-8")) if TAKEN.exists() else []
    return found


def names(document: Document) -> tuple[str, ...]:
    """The races of a document."""
    return tuple(race["method"] for race in document["races"])


def _without(document: Document, methods: Sequence[str]) -> Document:
    """What is left of it without these methods' races, and without what was measured apart of them."""
    races = [race for race in document["races"] if race["method"] not in methods]
    parts = [part for part in document["parts"] if part["name"].partition(":")[0] not in methods]
    return {**document, "races": races, "parts": parts}


def renewed(page: str) -> str:
    """README with the table of today's races."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{_table(documents())}\n\n{END}{after}"


def _table(found: Sequence[Document]) -> str:
    rows = [HEAD, ("---",) * len(HEAD), *(row for document in found for row in _rows(document))]
    parts = [f"- {part['name']}: {part['text']}, at most {part['limit']:.3g}" for one in found for part in one["parts"]]
    return "\n".join([*(f"| {' | '.join(row)} |" for row in rows), *(["", *parts] if parts else [])])


def _rows(document: Document) -> Iterator[tuple[str, ...]]:
    for one in document["races"]:
        race = RACES[one["method"]]
        times = (_ratio(one["update_ratio"]), _ratio(one["step_ratio"]))
        difference = "-" if race.same_weights is None else f"{one['largest_difference']:.1e}"
        outcome = f"lost: {'; '.join(one['lost'])}" if one["lost"] else "held"
        outcome = "no race" if race.update_limit is None else outcome
        yield f"`{one['method']}`", *times, f"{one['memory_ratio']:.3f}", difference, outcome


def _ratio(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
