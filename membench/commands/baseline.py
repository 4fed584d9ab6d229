"""Baselines for `membench check`: a folder of records, or one file with a list of them, replaced as a whole."""

import ctypes
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from membench.config.errors import UserError
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
    _check_names(place, records)
    temporary = place.with_name(f".{place.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # of a process of the same number that was killed
    try:
        _fill(temporary, records, place)
        _exchange(temporary, place)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check_names(place: Path, records: list[Record]) -> None:
    """Raises UserError where one record would take another's place."""
    name, count = Counter(made["run_id"] for made in records).most_common(1)[0] if records else ("", 0)
    if count > 1:
        raise UserError(
            f"{place}: not updated: {count} records have the run_id {name!r}, which a folder has one file of; give a "
            "baseline that ends in .json, which holds them all"
        )


def _fill(folder: Path, records: list[Record], old: Path) -> None:
    """The new folder: the records, and the old folder's other files."""
    if old.exists():
        is_record = shutil.ignore_patterns("[!.]*.json")
        _copy(old, folder, lambda at, names: is_record(at, names) if Path(at) == old else ())
    for made in records:
        record.write(made, folder)
    folder.mkdir(exist_ok=True)


def _copy(old: Path, new: Path, ignore: Callable[[Any, list[str]], Iterable[str]]) -> None:
    """Copy a folder; links stay links, whatever they lead to.

    Raises:
        UserError: a file of it can't be copied.
    """
    try:
        shutil.copytree(old, new, symlinks=True, ignore=ignore)
    except shutil.Error as error:  # of all that couldn't be
        source, _, why = error.args[0][0]
        raise UserError(f"{source} can't be copied into the new baseline: {why}") from error


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
