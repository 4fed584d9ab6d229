"""Records in, tables out: memory, throughput and quality, and a summary of all three.

Runs of different set-ups never share a mean: each set-up (model, data, training, machine) has its tables, with its
conditions above them. Rows are in the same order everywhere: the reference first, then by peak memory.
"""

from collections.abc import Callable, Sequence
from typing import Any

from reports import formats, rows, studies, text, tidy
from reports.names import suggestion
from reports.record import Record
from reports.setups import Setup, group, heading

TABLES = ("summary", "memory", "throughput", "quality")
FORMATS = ("plain", "markdown", "csv", "json", "latex", "html")

_ROWS: dict[str, Callable[[Setup], list[dict[str, Any]]]] = {
    "summary": rows.summary,
    "memory": rows.memory,
    "throughput": rows.throughput,
    "quality": rows.quality,
}
_TEXTS = {"summary": text.summary, "memory": text.memory, "throughput": text.throughput, "quality": text.quality}
_WRITERS = {"plain": formats.plain, "markdown": formats.markdown, "latex": formats.latex, "html": formats.html}


def render(
    records: list[Record],
    format: str = "plain",
    tables: Sequence[str] = (),
    trials: list[Record] | None = None,
) -> str:
    """Render records (checked ones, of `record.load_folder`) as text, without a newline at the end.

    plain, markdown, latex and html (a fragment, for notebooks) round, csv and json hold raw figures with units in their
    names. Scores on benchmarks, and runs that are not ok, come in tables of their own after the others, whatever
    `tables` says.

    Args:
        records: of the runs that count.
        format: one of `FORMATS`.
        tables: some of `TABLES`; by default all, and of csv instead of them the runs, see `tidy`.
        trials: of a study's tuning: with them, even if there are none, comes what a study concludes.

    Raises:
        ValueError: there are no records, or no such format or table.
    """
    _choose("format", format, FORMATS)
    for table in tables:
        _choose("table", table, TABLES)
    if not records:
        raise ValueError("There are no records to make tables of.")
    if format == "csv" and not tables:
        return tidy.render(records)
    setups, wanted = group(records), tables or TABLES
    if format == "json":
        concluded = {} if trials is None else studies.document(records, trials)
        return formats.as_json([_document(setup, wanted) for setup in setups], **concluded)
    if format == "csv":
        return formats.as_csv(_joined(setups, wanted))
    sections = [_section(setup, wanted, compact=format == "plain") for setup in setups]
    return _WRITERS[format](sections + ([] if trials is None else studies.sections(records, trials)))


def _choose(what: str, given: str, known: Sequence[str]) -> None:
    if given not in known:
        raise ValueError(f"There is no {what} {given!r}. {suggestion(given, known)}")


def _section(setup: Setup, tables: Sequence[str], *, compact: bool) -> formats.Section:
    shown = [_TEXTS[table](setup, compact=compact) for table in tables]
    more = [text.benchmarks(setup, compact=compact), text.unfinished(setup, compact=compact)]
    told = [table for table in shown if len(table.headers) > 1]  # speeds may be of none
    return heading(setup), [*told, *(table for table in more if table)], text.remarks(setup)


def _document(setup: Setup, tables: Sequence[str]) -> dict[str, Any]:
    return {
        "conditions": setup.conditions,
        "tasks": setup.tasks,
        "seeds": setup.seeds,
        "reference": setup.reference,
        "superseded_runs": setup.superseded,
        **{table: _ROWS[table](setup) for table in tables},
        "benchmarks": rows.benchmarks(setup),
        "unfinished": rows.unfinished(setup),
    }


def _joined(setups: list[Setup], tables: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Each table's rows of all set-ups, with the conditions of theirs."""
    makers = {**{table: _ROWS[table] for table in tables}, "benchmarks": rows.benchmarks, "unfinished": rows.unfinished}
    return {
        name: [{**setup.conditions, **row} for setup in setups for row in make(setup)] for name, make in makers.items()
    }
