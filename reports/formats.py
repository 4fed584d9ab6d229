"""From tables to a text: for a terminal, a README, a paper, a spreadsheet or a program."""

import csv
import io
import json
import re
import textwrap
from collections.abc import Callable
from dataclasses import replace
from html import escape
from typing import Any

from tabulate import LATEX_ESCAPE_RULES, SEPARATING_LINE, DataRow, Line, TableFormat, tabulate

from reports.names import printable
from reports.table import Table

_FORMULA = ("=", "+", "-", "@", "\t", "\r")
WIDTH = 110  # of a terminal, for sentences

Section = tuple[list[str], list[Table], list[str]]  # heading, tables, remarks


def plain(sections: list[Section]) -> str:
    return "\n\n\n".join(_plain_section(_shown(section)) for section in sections)


def _shown(section: Section) -> Section:
    """A name is anybody's text, such as that of a model's folder: none ends a line or controls a terminal."""
    heading, tables, remarks = section
    return list(map(printable, heading)), list(map(_shown_table, tables)), list(map(printable, remarks))


def _shown_table(table: Table) -> Table:
    return replace(
        table,
        title=printable(table.title),
        headers=list(map(printable, table.headers)),
        cells=[list(map(printable, row)) for row in table.cells],
        left=set(map(printable, table.left)),
        notes=list(map(printable, table.notes)),
    )


def _plain_section(section: Section) -> str:
    heading, tables, remarks = section
    blocks = ["\n".join(textwrap.fill(line, WIDTH, break_long_words=False, break_on_hyphens=False) for line in heading)]
    blocks += [f"{table.title}\n{_tight_grid(table)}" for table in tables]
    notes = [textwrap.fill(note, WIDTH, subsequent_indent="  ") for note in _notes(tables, remarks)]
    return "\n\n".join([*blocks, *(["\n".join(notes)] if notes else [])])


def markdown(sections: list[Section]) -> str:
    return "\n\n".join(_markdown_section(_shown(section)) for section in sections)


def _markdown_section(section: Section) -> str:
    heading, tables, remarks = section
    blocks = [f"## {markdown_text(heading[0])}", *map(markdown_text, heading[1:])]
    for table in tables:
        blocks += [f"### {markdown_text(table.title)}", _grid(table, "pipe", markdown_text)]
    notes = "\n".join(f"- {markdown_text(note)}" for note in _notes(tables, remarks))
    return "\n\n".join([*blocks, *([notes] if notes else [])])


def markdown_text(text: str) -> str:
    """Markdown's own signs as they are: `|` would end a cell, `<` open a tag, `[` a link or a picture from anywhere;
    `&lt;` would be another sign."""
    return re.sub(r"&(?=#?\w+;)", "&amp;", re.sub(r"([\\`*_|<>#~[])", r"\\\1", text))


def html(sections: list[Section]) -> str:
    """A fragment of a page, for a notebook."""
    return "\n".join(_html_section(_shown(section)) for section in sections)


def _html_section(section: Section) -> str:
    heading, tables, remarks = section
    blocks = [f"<p>{'<br>'.join(map(escape, heading))}</p>"]
    for table in tables:
        blocks += [f"<h4>{escape(table.title)}</h4>", _grid(table, "html")]
    notes = "".join(f"<li>{escape(note)}</li>" for note in _notes(tables, remarks))
    return "\n".join([*blocks, *([f"<ul>{notes}</ul>"] if notes else [])])


def latex(sections: list[Section]) -> str:
    """Complete floats, for \\usepackage{booktabs}; a set-up's conditions are in each caption. Words alone are text."""
    return "\n\n".join(block for section in sections for block in _latex_blocks(_shown(section)))


def _latex_blocks(section: Section) -> list[str]:
    heading, tables, remarks = section
    return [_latex_float(table, section) for table in tables] or [_latex_text("\n\n".join([*heading, *remarks]))]


def _latex_text(text: str) -> str:
    escaped = "".join(LATEX_ESCAPE_RULES.get(sign, sign) for sign in text)
    return escaped.replace("±", "$\\pm$").replace("≥", "$\\geq$")


def _latex_float(table: Table, section: Section) -> str:
    sentences = [table.title + ".", ", ".join(section[0]) + ".", *table.notes, *section[2]]
    grid = _grid(table, "latex_booktabs").replace("±", "$\\pm$").replace("≥", "$\\geq$")
    grid = re.sub(r"^( *)([\[*])", r"\1{\2}", grid, flags=re.MULTILINE)  # or the row's end before it takes [...] and *
    lines = ["\\begin{table}", "\\centering", f"\\caption{{{_latex_text(' '.join(sentences))}}}", grid, "\\end{table}"]
    return "\n".join(lines)


def _grid(table: Table, style: str, escape: Callable[[str], str] = str) -> str:
    return tabulate(
        [[escape(cell) for cell in row] for row in table.cells],
        headers=[escape(header) for header in table.headers],
        tablefmt=style,
        disable_numparse=True,
        colalign=_alignment(table),
    )


def _alignment(table: Table) -> list[str]:
    return ["left" if header in table.left else "right" for header in table.headers]


def _tight_grid(table: Table) -> str:
    """tabulate's "simple" with the headers as a row among others, which spares the two blanks it pads headers with."""
    lines = [table.headers, SEPARATING_LINE, *table.cells]
    return tabulate(lines, tablefmt=_TIGHT, disable_numparse=True, colalign=_alignment(table))


_TIGHT = TableFormat(
    lineabove=None,
    linebelowheader=Line("", "-", "  ", ""),
    linebetweenrows=None,
    linebelow=None,
    headerrow=DataRow("", "  ", ""),
    datarow=DataRow("", "  ", ""),
    padding=0,
    with_header_hide=None,
)


def _notes(tables: list[Table], remarks: list[str]) -> list[str]:
    return list(dict.fromkeys([note for table in tables for note in table.notes] + remarks))


def as_json(sections: list[dict[str, Any]], **more: Any) -> str:
    return json.dumps({"setups": sections, **more}, indent=1, allow_nan=False)


def as_csv(tables: dict[str, list[dict[str, Any]]]) -> str:
    """One table, as programs read it: the first column names the one that a row is of; what that hasn't is empty."""
    text = io.StringIO()
    columns = dict.fromkeys(column for rows in tables.values() for row in rows for column in row)
    writer = csv.DictWriter(text, ["table", *columns], lineterminator="\n")
    writer.writeheader()
    for name, rows in tables.items():
        writer.writerows({"table": name, **{column: _cell(value) for column, value in row.items()}} for row in rows)
    return text.getvalue().rstrip("\n")


def _cell(value: Any) -> Any:
    return guarded(" ".join(map(str, value)) if isinstance(value, list) else value)


def guarded(value: Any) -> Any:
    """A text that is never a formula, which a spreadsheet would compute; other values as they are."""
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value
