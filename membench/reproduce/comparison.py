"""Ours beside the paper's, figure by figure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from membench.memory.allocator import CUDA_CONTEXT_BYTES
from membench.reproduce.needs import Need
from membench.reproduce.recipes import Column, Recipe, Target
from membench.training.clock import PHASES
from reports import formats, published
from reports.parts import FIELDS, TEMPORARIES
from reports.setups import score
from reports.table import NOTHING, Row, Table

Record = dict[str, Any]


@dataclass(frozen=True)
class Figure:
    """What stands in a table.

    Attributes:
        of: its value, from a record that is ok.
        planned: its value, from a row of a plan; None for what isn't planned.
        is_size: bytes, to be shown in the table's unit.
        points: differences are points, of a share; otherwise percent.
    """

    of: Callable[[Record], float | None]
    planned: Callable[[Row], float] | None = None
    is_size: bool = False
    points: bool = False


def _maximum(field: str) -> Figure:
    return Figure(lambda record: record["memory"]["maximum"][field], lambda row: row["maximum"][field], is_size=True)


def _sum(maximum: Mapping[str, int]) -> int:
    return sum(size for field, size in maximum.items() if field != FIELDS[TEMPORARIES])


def _process(record: Record) -> int:
    """What a process takes on a GPU; on a CPU, which has no such allocator, the peak of its tensors."""
    memory = record["memory"]
    reserved = memory["peak_reserved_bytes"]
    return memory["peak_allocated_bytes"] if reserved is None else reserved + CUDA_CONTEXT_BYTES


def _seconds(phase: str) -> Figure:
    return Figure(lambda record: record["time"][f"{phase}_seconds"])


def _tokens_per_second(record: Record) -> float:
    """Of a median step: neither the first ones, which load kernels, nor rare ones, which choose a subspace, count."""
    tokens = record["history"][-1]["tokens"] / record["training"]["steps"]
    return tokens / sum(record["time"][f"{phase}_seconds"] for phase in PHASES)


FIGURES = {
    **{part: _maximum(f"{part}_bytes") for part in ("weights", "gradients", "optimizer_state")},
    "estimated_total_bytes": Figure(_process, lambda row: row["estimated_total_bytes"], is_size=True),
    "sum_of_maxima": Figure(
        lambda record: _sum(record["memory"]["maximum"]), lambda row: _sum(row["maximum"]), is_size=True
    ),
    **{f"{phase}_seconds": _seconds(phase) for phase in PHASES},
    "tokens_per_second": Figure(_tokens_per_second),
    "score": Figure(score, points=True),
    "perplexity": Figure(lambda record: record["metrics"]["perplexity"]),
}


@dataclass(frozen=True)
class Result:
    """A run with its record; None if it wasn't made, as it doesn't fit."""

    need: Need
    record: Record | None


def figures(recipe: Recipe, results: Sequence[Result]) -> list[Row]:
    """A row per figure: table, over, label, column, unit, published, planned, ours, difference, points."""
    by_place = {(one.need.label, one.need.part.name): one for one in results}
    return [row for target in recipe.targets for row in _rows(target, published.load(target.table), by_place)]


def _rows(target: Target, table: published.Published, results: Mapping[tuple[str, str], Result]) -> list[Row]:
    values = {row["label"]: dict(zip(table["columns"], row["values"], strict=True)) for row in table["rows"]}
    made = []
    for label in dict.fromkeys(label for label, _ in results):
        theirs = values.get(target.labels.get(label, label))
        for column in target.columns if theirs and label != target.over else ():
            if (label, column.part) in results:
                made.append(_row(target, table, column, values, results, label))
    return made


def _row(
    target: Target,
    table: published.Published,
    column: Column,
    values: Mapping[str, Mapping[str, Any]],
    results: Mapping[tuple[str, str], Result],
    label: str,
) -> Row:
    figure = FIGURES[column.figure]
    unit = published.UNITS[table["unit"]] if figure.is_size else 1
    theirs: Any = values[target.labels.get(label, label)][column.name]
    one = results[label, column.part]
    ours, planned = _ours(figure, one, unit), _planned(figure, one, unit)
    if target.over is not None:
        reference = results.get((target.over, column.part))
        theirs = _ratio(theirs, values[target.labels.get(target.over, target.over)][column.name])
        ours = _ratio(ours, _ours(figure, reference, unit) if reference and _made_alike(one, reference) else None)
    return {
        "table": target.table,
        "over": target.over,
        "label": label,
        "column": column.name,
        "unit": table["unit"] if figure.is_size else None,
        "published": theirs,
        "planned": planned,
        "ours": ours,
        "difference": _difference(ours, theirs, figure.points),
        "points": figure.points,
    }


def _made_alike(one: Result, other: Result) -> bool:
    """Were both made on the same kind of device? A folder's may come from several, with other times."""
    devices = [result.record["environment"].get("device_name") for result in (one, other) if result.record]
    return len(set(devices)) == 1


def _ours(figure: Figure, one: Result, unit: int) -> float | None:
    if one.record is None or one.record["status"] != "ok":
        return None
    value = figure.of(one.record)
    return None if value is None else value / unit


def _planned(figure: Figure, one: Result, unit: int) -> float | None:
    return None if figure.planned is None or one.need.plan is None else figure.planned(one.need.plan) / unit


def _ratio(value: Any, reference: Any) -> float | None:
    return value / reference if _is_number(value) and _is_number(reference) and reference else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _difference(ours: float | None, theirs: Any, points: bool) -> float | None:
    """Ours minus theirs in points of a hundred, or relative; None if either is no number."""
    if ours is None or not _is_number(theirs):
        return None
    return 100 * (ours - theirs) if points else ours / theirs - 1 if theirs else None


def render(name: str, recipe: Recipe, results: Sequence[Result], remarks: Sequence[str]) -> str:
    """The comparison as text; `remarks` come before the notes of recipe and paper."""
    table = published.load(name)
    rows = figures(recipe, results)
    tables = [
        _table(target, [row for row in rows if (row["table"], row["over"]) == (target.table, target.over)])
        for target in recipe.targets
    ]
    heading = [table["title"], f"{table['source']}. {table['setup']}.", *_machines(results)]
    notes = [
        *remarks,
        *map(_why, filter(_is_missing, results)),
        *_mixed(recipe, results),
        *recipe.notes,
        *table["notes"],
    ]
    return formats.plain([(heading, tables, notes)])


def _table(target: Target, rows: Sequence[Row]) -> Table:
    unit = next((f", {row['unit']}" for row in rows if row["unit"]), "")
    over = f", over {target.over}'s" if target.over else ""
    plans = any(row["planned"] is not None for row in rows)
    headers = ["", "figure", f"published{unit}", *(["planned"] if plans else []), "ours", "difference"]
    cells = [
        [row["label"], row["column"], _text(row["published"]), *([_text(row["planned"])] if plans else [])]
        + [_text(row["ours"]), _change(row)]
        for row in rows
    ]
    return Table(f"Published ({target.table}) and ours{over}", headers, cells, {"", "figure"})


def _text(value: Any) -> str:
    if value is None or value == "":
        return NOTHING
    return (
        f"{value:,.3g}"
        if isinstance(value, float) and abs(value) < 1
        else f"{value:,.2f}"
        if _is_number(value)
        else value
    )


def _change(row: Row) -> str:
    if row["difference"] is None:
        return NOTHING
    return f"{row['difference']:+.1f} points" if row["points"] else f"{row['difference']:+.1%}"


def _machines(results: Sequence[Result]) -> list[str]:
    """Where ours were made, in a line."""
    known = _devices(results)
    return [f"Ours: {', '.join(known)}."] if known else []


def _devices(results: Sequence[Result]) -> list[str]:
    names = [one.record["environment"].get("device_name") for one in results if one.record]
    return list(dict.fromkeys(name for name in names if name))


def _mixed(recipe: Recipe, results: Sequence[Result]) -> list[str]:
    """That some ratios are left out, and what helps."""
    if len(_devices(results)) < 2 or not any(target.over for target in recipe.targets):
        return []
    return ["Ours are of several devices: no ratio between them is shown. Give another --out to make all on one."]


def _is_missing(one: Result) -> bool:
    return one.record is None or one.record["status"] != "ok"


def _why(one: Result) -> str:
    name = " ".join(filter(None, (one.need.label, one.need.part.name)))
    if one.record is not None:
        return f"{name}: {one.record['status'].replace('_', ' ')}: {one.record['error']}"
    assert one.need.plan is not None
    size = one.need.plan["estimated_total_bytes"]
    return f"{name}: not run, it needs {size / 1e9:.1f} GB by plan, more than this machine's card has."
