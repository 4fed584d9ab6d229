"""What takes long to make and never changes: kept on the disk under a digest of all that it depends on.

In $XDG_CACHE_HOME/membench, else ~/.cache/membench. Where nothing can be written there, things are made anew each time.
"""

import functools
import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

Arrays = tuple[np.ndarray, ...]


def folder() -> Path:
    """Where it is kept; may not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "membench"


def digest(*parts: str) -> str:
    """Names what depends on `parts` and on nothing else."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def arrays(key: str, count: int, make: Callable[[], Arrays]) -> Arrays:
    """`count` arrays, memory-mapped where they are kept: data larger than memory can be read in parts."""
    paths = [folder() / f"{key}.{index}.npy" for index in range(count)]
    if not all(path.exists() for path in paths):
        made = make()
        kept = [_keep(path, functools.partial(np.save, arr=array)) for path, array in zip(paths, made, strict=True)]
        if not all(kept):
            return made
    return tuple(np.load(path, mmap_mode="r") for path in paths)


def text(key: str, make: Callable[[], str]) -> str:
    """A text."""
    path = folder() / f"{key}.txt"
    if path.exists():
        return path.read_text(encoding="utf-8")
    made = make()
    _keep(path, lambda file: file.write(made.encode()))
    return made


def _keep(path: Path, write: Callable) -> bool:
    """Written in whole or not at all, also by several processes at once; false where that isn't possible."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
    except OSError:
        return False
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
        os.replace(temporary, path)
    except OSError:
        Path(temporary).unlink(missing_ok=True)
        return False
    return True
