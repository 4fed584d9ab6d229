"""Published figures as data: one TOML file a table, with source and set-up; the docs have a page of all of them."""

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reports import formats
from reports.names import suggestion
from reports.table import Table

FOLDER = Path(__file__).parent / "published"
KINDS = {"memory": "Memory", "time": "Time", "quality": "Quality", "noise": "Noise"}
UNITS = {"GB": 10**9, "GiB": 2**30}

Published = dict[str, Any]

_REQUIRED = {"title": str, "source": str, "kind": str, "setup": str, "columns": list, "rows": list}


def names() -> list[str]:
    """The tables there are."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load(name: str) -> Published:
    """A table: title, source, kind, setup, columns, rows (each {label, values}), notes and, where planned, `plan`.

    Raises:
        ValueError: there is no such table, or its file is malformed.
    """
    if name not in names():
        raise ValueError(f"there is no published table {name!r}. {suggestion(name, names())}")
    table = tomllib.loads((FOLDER / f"{name}.toml").read_text(encoding="utf-8"))
    _check(name, table)
    return {"notes": [], **table}


def _check(name: str, table: Published) -> None:
    for key, kind in _REQUIRED.items():
        if not isinstance(table.get(key), kind):
            raise ValueError(f"published/{name}.toml: {key} must be a {kind.__name__}")
    if table["kind"] not in KINDS:
        raise ValueError(f"published/{name}.toml: kind must be one of {', '.join(KINDS)}, not {table['kind']!r}")
    for row in table["rows"]:
        if len(row["values"]) != len(table["columns"]):
            raise ValueError(f"published/{name}.toml: {row['label']} needs {len(table['columns'])} values")


def planned() -> list[str]:
    """The tables that `membench plan --against` can put beside a plan."""
    return [name for name in names() if "plan" in load(name)]


def page() -> str:
    """The page of the docs: every table, by kind."""
    parts = [_PREFACE]
    for kind, title in KINDS.items():
        tables = [(name, load(name)) for name in names()]
        parts += [f"# {title}", *(_section(name, table) for name, table in tables if table["kind"] == kind)]
    return "\n\n".join(parts) + "\n"


_PREFACE = """<!-- Generated from reports/published/*.toml by `python -m reports.published`; edit those. -->

What the papers and others print, with the set-up that it holds for. The commands below a table put it beside a plan, or
make it again."""


def _section(name: str, table: Published) -> str:
    unit = f", {table['unit']}" if "unit" in table else ""
    heading = [table["title"], f"{table['source']}. {table['setup']}{unit}."]
    headers = ["", *table["columns"]]
    cells = [[row["label"], *map(_text, row["values"])] for row in table["rows"]]
    body = formats.markdown([(heading, [Table(name, headers, cells, {""})], table["notes"])])
    commands = [f"    membench plan --against {name}"] if "plan" in table else []
    commands += [f"    membench reproduce {name}"] if table.get("reproduced") else []
    return body + ("\n\n" + "\n".join(commands) if commands else "")


def _text(value: Any) -> str:
    return str(value) if value != "" else "-"


def write_page(path: Path) -> None:
    """Write the page."""
    path.write_text(page(), encoding="utf-8")


def comparison(table: Published, lines: Sequence[Sequence[str]], headers: Sequence[str], notes: Sequence[str]) -> tuple:
    """A comparison as a section for `reports.formats`."""
    heading = [table["title"], f"{table['source']}. {table['setup']}."]
    shown = Table("Published and planned", list(headers), [list(line) for line in lines], {"", "figure"})
    return heading, [shown], [*notes, *table["notes"]]


if __name__ == "__main__":
    write_page(Path(__file__).parent.parent / "docs" / "published.md")
