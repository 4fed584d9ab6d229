"""A published table beside its plan: part by part, with the relative error."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from membench.planning.blueprint import Blueprint
from membench.planning.planner import Job, carry_out, method_values
from membench.planning.workload import Workload
from reports import formats, published
from reports.parts import FIELDS, TEMPORARIES
from reports.table import Row


def compare(name: str, format: str) -> str:
    """The comparison with the published table `name`, as a table, as markdown or as JSON; "list" names the tables.

    Raises:
        ValueError: there is no such table, or its set-up can't be planned.
    """
    if name == "list":
        return "\n".join(published.planned())
    table = published.load(name)
    if "plan" not in table:
        known = ", ".join(published.planned())
        raise ValueError(
            f"{name} can't be planned: {' '.join(table['notes']) or 'it is not about memory.'} Try {known}"
        )
    rows = figures(table)
    if format == "json":
        return json.dumps({"name": name, "unit": table["unit"], "rows": rows}, indent=1, allow_nan=False)
    section = published.comparison(table, *_lines(rows, table))
    return formats.markdown([section]) if format == "markdown" else formats.plain([section])


def figures(table: published.Published) -> list[Row]:
    """One row per figure: label, figure, published, planned, error; `then`, `then_error`: with that time's software."""
    settings, unit = table["plan"], published.UNITS[table["unit"]]
    rows = [row for row in table["rows"] if "plan" in row]
    now = _plan(rows, settings, {})
    then = _plan(rows, settings, _changes(settings)) if "then" in settings else [None] * len(rows)
    return [
        _figure(row, number, unit, settings, here, before)
        for row, here, before in zip(rows, now, then, strict=True)
        for number, figure in enumerate(settings["figures"])
        if figure
    ]


def _changes(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings["then"].items() if key != "why"}


def _plan(rows: list[Row], settings: Mapping[str, Any], changes: Mapping[str, Any]) -> list[Row]:
    """The plan of each row, with the table's set-up and the row's own."""
    fields = Workload.__dataclass_fields__
    base = Workload(**{key: value for key, value in settings.items() if key in fields})
    jobs = []
    for row in rows:
        workload = replace(base, **{**changes, **row["plan"].get("setup", {})})
        method, given = row["plan"]["method"], row["plan"].get("set", {})
        jobs.append(Job(workload, method, method_values(Blueprint(workload), method, {method: given})))
    made = list(carry_out(jobs))
    for one in made:
        if one.plan is None:
            raise ValueError(one.refused)
    return [one.plan.row for one in made if one.plan is not None]


def _figure(row: Row, number: int, unit: int, settings: Mapping[str, Any], now: Row, then: Row | None) -> Row:
    figure, value = settings["figures"][number], row["values"][number]
    planned = _bytes(now, figure, settings) / unit
    before = None if then is None else _bytes(then, figure, settings) / unit
    exempt = figure in row["plan"].get("exempt", [])
    return {
        "label": row["label"],
        "figure": figure,
        "published": value,
        "planned": planned,
        "error": _error(planned, value),
        "then": before,
        "then_error": None if before is None else _error(before, value),
        "exempt": exempt,
    }


def _bytes(row: Row, figure: str, settings: Mapping[str, Any]) -> int:
    """A part at its own maximum, as papers print it; a total in the sense of the table's."""
    if figure != "total":
        return row["maximum"][f"{figure}_bytes"]
    if settings["total"] == "sum_of_maxima":
        return sum(size for field, size in row["maximum"].items() if field != FIELDS[TEMPORARIES])
    return row[settings["total"]]


def _error(planned: float, value: Any) -> float | None:
    """Relative error; None if the paper prints no number."""
    return planned / value - 1 if isinstance(value, int | float) and value else None


def _lines(rows: list[Row], table: published.Published) -> tuple[list[list[str]], list[str], list[str]]:
    settings = table["plan"]
    headers = ["", "figure", f"published, {table['unit']}", "planned", "error"]
    notes = ["Parts at their own maximum; planned with today's libraries."]
    if "then" in settings:
        headers += ["then", "error then"]
        notes.append(f"then: with the software of the time; {settings['then']['why']}.")
    lines = []
    for row in rows:
        line = [row["label"], row["figure"], str(row["published"]), f"{row['planned']:.2f}", _percent(row["error"])]
        if "then" in settings:
            line += [f"{row['then']:.2f}", _percent(row["then_error"])]
        lines.append(line)
    return lines, headers, notes


def _percent(error: float | None) -> str:
    return "-" if error is None else f"{error:+.1%}"
