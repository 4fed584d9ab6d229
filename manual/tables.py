"""Tables as markdown, and rows of tables that other pages have."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

ROOT = Path(__file__).resolve().parent.parent


def markdown(rows: Sequence[Sequence[Any]], headers: Sequence[str]) -> str:
    """A table; what a cell holds is text, and a bar in it is no border."""
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in rows]
    return tabulate(cells, headers, tablefmt="pipe", disable_numparse=True)


def sections(page: str, heading: str) -> list[str]:
    """What is below each heading of that name of a page in the repository, up to the next of level 2."""
    _, *rest = (ROOT / page).read_text(encoding="utf-8").split(f"\n{heading}\n")
    return [below.split("\n## ")[0] for below in rest]


def section(page: str, heading: str) -> str:
    """What is below the only heading of that name."""
    (below,) = sections(page, heading)
    return below


def found(page: str, heading: str, first: str) -> Iterator[dict[str, str]]:
    """Rows below `heading` of a page in the repository whose first cell is `first`, by the columns' heads."""
    head: list[str] = []
    for line in "\n\n".join(sections(page, heading)).splitlines():
        cells = [cell.strip().replace("\\_", "_") for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            head = []
        elif not head:
            head = cells
        elif cells[0].strip("`") == first:
            yield dict(zip(head, cells, strict=True))
