"""One tidy table of records: a row a run, a column for each field that holds a single value, by its path.

`pandas.read_csv(file, float_precision="round_trip")` gives back the very figures. What is unknown is empty, a list is
JSON, and the history, which isn't a single value, is left out.
"""

import csv
import io
import json
from collections.abc import Iterator
from typing import Any

from reports.formats import guarded
from reports.record import Record


def render(records: list[Record]) -> str:
    """The table as CSV, without a newline at the end; columns in the order in which records have them."""
    rows = [dict(_flat(record, "")) for record in sorted(records, key=lambda record: record["run_id"])]
    text = io.StringIO()
    writer = csv.DictWriter(text, dict.fromkeys(column for row in rows for column in row), lineterminator="\n")
    writer.writerow({column: guarded(column) for column in writer.fieldnames})
    writer.writerows(rows)
    return text.getvalue().rstrip("\n")


def _flat(value: dict[str, Any], path: str) -> Iterator[tuple[str, Any]]:
    for name, item in value.items():
        if isinstance(item, dict):
            yield from _flat(item, f"{path}{name}.")
        elif path or name != "history":
            yield f"{path}{name}", json.dumps(item) if isinstance(item, list) else guarded(item)
