"""The records of a study as the repository keeps them: one file, compact, readable by `membench report` as it is."""

import json
from pathlib import Path
from typing import Any

from reports import files
from reports.record import Record, read

POINTS = 30  # of a history, besides those with a score or a gradient's norm
DIGITS = 6  # of a loss, a time or a rate in a history


def pack(folders: list[Path], place: Path, points: int = POINTS) -> Path:
    """Write all records of `folders` into one file, their histories thinned to about that many points.

    Raises:
        ValueError: a folder is missing, or holds what is no record.
    """
    records: list[Record] = []
    for folder in folders:
        found = read(folder)
        if found.problems:
            raise ValueError(found.problems[0])
        records += found.records
    lines = ",\n".join(json.dumps(_thinned(one, points), separators=(",", ":"), allow_nan=False) for one in records)
    return files.write(place, f"[\n{lines}\n]\n".encode())


def unpack(place: Path) -> list[Record]:
    """The records of such a file; none if there is no file.

    Raises:
        ValueError: one isn't what the schema says.
    """
    if not place.exists():
        return []
    found = read(place)
    if found.problems:
        raise ValueError(found.problems[0])
    return found.records


def _thinned(record: Record, points: int) -> Record:
    history = record["history"]
    every = max(1, len(history) // points)
    last = len(history) - 1
    kept = [one for n, one in enumerate(history) if n % every == 0 or n == last or _says_more(one)]
    return {**record, "history": [{key: _rounded(value) for key, value in one.items()} for one in kept]}


def _says_more(entry: dict[str, Any]) -> bool:
    return entry.get("metrics") is not None or entry.get("gradient_norm") is not None


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value
