"""A table: raw rows in, and columns that say what a reader sees of each."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

NOTHING = "-"
MIB, GIB = 1 << 20, 1 << 30
_LARGE, _SMALL = 1e7, 1e-3  # of scores: in between they are printed with all their digits before the point

Row = dict[str, Any]  # figures by name, units in the names
Column = tuple[str, Callable[[Row], str]]  # its header, and what stands below


@dataclass
class Table:
    """Cells as text; columns named in `left` are words, the others are figures."""

    title: str
    headers: list[str]
    cells: list[list[str]]
    left: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)


def lay_out(title: str, rows: list[Row], columns: Sequence[Column], left: set[str], notes: Sequence[str] = ()) -> Table:
    """Rows as a table; a column in which no row says anything is left out, and with it the note that explains it."""
    cells = [[show(row) for row in rows] for _, show in columns]
    said = [index for index, column in enumerate(cells) if any(cell != NOTHING for cell in column)]
    headers = [columns[index][0] for index in said]
    lines = [list(line) for line in zip(*(cells[index] for index in said), strict=True)]
    unsaid = {header for header, _ in columns} - set(headers)
    return Table(title, headers, lines, left, [note for note in notes if note.partition(":")[0] not in unsaid])


def mib(size: float) -> str:
    """Bytes in MiB, with a decimal."""
    return f"{size / MIB:,.1f}"


def budget_mib(size: float) -> str:
    """Bytes of a memory in MiB, as they were given: with a decimal only if there is one."""
    return mib(size).removesuffix(".0")


def gib(size: float) -> str:
    """Bytes in GiB, with two decimals."""
    return f"{size / GIB:,.2f}"


def size_text(size: float, largest: int = GIB) -> str:
    """`1.25 GiB`, or in MiB if that is the `largest` unit; what would be 0.00 of one is in MiB, or in bytes."""
    for unit, name in ((GIB, "GiB"), (MIB, "MiB")):
        if unit <= largest and (text := f"{size / unit:,.2f}") != "0.00":
            return f"{text} {name}"
    return f"{size:,} bytes"


def apart_text(size: float, unit: int) -> str:
    """How far two sizes are apart, in a table's unit; what would be 0.00 of it has a smaller one, and names it."""
    text = f"{size / unit:,.2f}"
    return text if text != "0.00" else size_text(size)


def score_text(value: float, like: float | None = None, *, thousands: str = "") -> str:
    """A score as it is printed, or what belongs to one `like` it: accuracies are told apart by the third decimal,
    perplexities by the second, and what is far larger or smaller by three digits that count."""
    size = math.fabs(value if like is None else like)
    if size >= _LARGE or 0 < size < _SMALL:
        return f"{value:.3g}"
    return f"{value:{thousands}.{3 if size < 10 else 2}f}"
