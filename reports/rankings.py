"""What rankings have in common: a table for each question, raw rows beside it, in every format of a report."""

from typing import NamedTuple

from reports import formats
from reports.setups import Setup
from reports.table import Row, Table


class Ranking(NamedTuple):
    """One question answered: the rows raw, and as a reader sees them."""

    heading: list[str]
    table: Table
    rows: list[Row]
    remarks: list[str]


def render(rankings: list[Ranking], name: str, format: str) -> str:
    """Rankings as plain, markdown, latex, csv or json; those of one set-up come under one heading."""
    if format == "json":
        return formats.as_json([{"heading": r.heading, name: r.rows, "remarks": r.remarks} for r in rankings])
    if format == "csv":
        return formats.as_csv({name: [{"setup": "; ".join(r.heading), **row} for r in rankings for row in r.rows]})
    sections: dict[str, formats.Section] = {}
    for ranking in rankings:
        _, tables, remarks = sections.setdefault("\n".join(ranking.heading), (ranking.heading, [], []))
        tables.append(ranking.table)
        remarks.extend(remark for remark in ranking.remarks if remark not in remarks)
    write = {"plain": formats.plain, "markdown": formats.markdown, "latex": formats.latex}[format]
    return write(list(sections.values()))


def headline(setups: list[Setup], task: str) -> tuple[str, bool]:
    """A task's metric, and whether more of it is better."""
    for setup in setups:
        for runs in setup.rows.values():
            for (name, _), run in runs.items():
                if name == task and run["headline"]:
                    return run["headline"], run["higher_is_better"] is not False
    return "score", True
