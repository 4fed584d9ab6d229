"""Rows from tables with a header: .csv, where quotes delimit cells, and .tsv, where they are plain text."""

import csv
import io
from collections import Counter
from collections.abc import Iterator

from tasks.data.rows import Row, RowError, mend

Cells = tuple[int, list[str]]  # the number of the line on which they begin

DELIMITERS = ",;\t|"  # the first that is in the header; semicolons are of locales with decimal commas
LONGEST_CELL = 2**31 - 1  # characters; Python's own limit is 131,072


def of_csv(where: str, text: str) -> Iterator[Row | RowError]:
    """The rows of a table separated by one of `DELIMITERS`, or errors for other lines. Blank lines are skipped.

    Raises:
        ValueError: the header can't be read or has a name twice.
    """
    return _rows(where, _quoted(where, text))


def of_tsv(where: str, text: str) -> Iterator[Row | RowError]:
    """The same for a table separated by tabs: every line is a row, whatever it contains."""
    lines = enumerate(text.split("\n" if "\n" in text else "\r"), 1)  # the second as Excel for the Mac writes them
    return _rows(where, ((number, line.removesuffix("\r").split("\t")) for number, line in lines if line.strip()))


def _rows(where: str, table: Iterator[Cells | RowError]) -> Iterator[Row | RowError]:
    header: list[str] = []
    for cells in table:
        if isinstance(cells, RowError) and header:
            yield cells
        elif isinstance(cells, RowError):
            raise cells
        elif not header:
            header = _header(f"{where}, line {cells[0]}", cells[1])
        elif _names(cells[1]) == header:  # of concatenated files
            yield RowError(f"{where}, line {cells[0]}", "it is the header again")
        else:
            yield _row(f"{where}, line {cells[0]}", header, cells[1])


def _header(where: str, cells: list[str]) -> list[str]:
    names = _names(cells)
    for name, count in Counter(names).items():
        if count > 1 and name:
            raise ValueError(f"{where}: the header has {count} columns {name!r}: give each its own name")
    return names


def _names(cells: list[str]) -> list[str]:
    return [cell.strip().lstrip("\ufeff") for cell in cells]  # each file may begin with a byte-order mark


def _row(where: str, header: list[str], cells: list[str]) -> Row | RowError:
    if len(cells) != len(header):
        return RowError(
            where, f"the number of cells differs from the header's {len(header)} columns", f": {len(cells)}"
        )
    value, count = mend({name: cell for name, cell in zip(header, cells, strict=True) if name})
    return Row(where, value, mended=count)


def _quoted(where: str, text: str) -> Iterator[Cells | RowError]:
    """Rows of cells; after one that can't be read, reading continues on the line after that row's first."""
    csv.field_size_limit(LONGEST_CELL)
    lines = list(io.StringIO(text, newline=""))
    delimiter = next((one for one in DELIMITERS if one in lines[0]), ",")
    start = 0  # the line on which the current row begins
    while start < len(lines):
        later = map(lines.__getitem__, range(start, len(lines)))
        begin, reader = start, csv.reader(later, delimiter=delimiter, strict=True)
        try:
            for cells in reader:
                if any(cells):
                    yield start + 1, cells
                start = begin + reader.line_num  # a quoted cell may span lines
        except csv.Error as error:
            yield RowError(f"{where}, line {start + 1}", "not a valid row of a table", f" ({error})")
            start += 1
