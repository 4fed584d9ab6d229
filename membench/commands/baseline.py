"""Baselines for `membench check`: a folder of records, or one file with a list of them, replaced as a whole."""

import ctypes
import json
import os
import shutil
from pathlib import Path
from typing import Any

from reports import files, record

Record = dict[str, Any]

_CURRENT_FOLDER, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux


def replace(place: Path, records: list[Record]) -> None:
    """Make `place` hold these records: at any moment it has either all the old ones or all the new ones.

    A path that ends in .json is a file, any other a folder; other files in the folder stay, and so does a link.
    """
    place = Path(os.path.realpath(place))
    if place.is_file() or (not place.exists() and place.suffix == ".json"):
        files.write(place, (json.dumps(records, indent=1, allow_nan=False) + "\n").encode())
        return
    temporary = place.with_name(f".{place.name}.{os.getpid()}.tmp")
    try:
        _fill(temporary, records, place)
        _exchange(temporary, place)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _fill(folder: Path, records: list[Record], old: Path) -> None:
    """The new folder: the records, and the old folder's other files."""
    if old.exists():
        is_record = shutil.ignore_patterns("[!.]*.json")
        shutil.copytree(old, folder, ignore=lambda at, names: is_record(at, names) if Path(at) == old else ())
    for made in records:
        record.write(made, folder)
    folder.mkdir(exist_ok=True)


def _exchange(new: Path, old: Path) -> None:
    """Swap two folders in one step if the system can, or else in two steps in immediate succession."""
    if not old.exists():
        os.rename(new, old)
        return
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    places = (_CURRENT_FOLDER, os.fsencode(new), _CURRENT_FOLDER, os.fsencode(old), _EXCHANGE)
    if rename is not None and rename(*places) == 0:
        return
    aside = old.with_name(f".{old.name}.{os.getpid()}.old")
    os.rename(old, aside)
    os.rename(new, old)
    os.rename(aside, new)
