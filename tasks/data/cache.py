"""A disk cache for what takes long to compute and never changes, keyed by a digest of everything it depends on.

In $XDG_CACHE_HOME/membench, else ~/.cache/membench. If that isn't writable, everything is recomputed each time; so is
what has changed since it was written, which the digest at the end of each file tells.
"""

import functools
import hashlib
import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

Arrays = tuple[np.ndarray, ...]

_DIGEST_BYTES = hashlib.sha256().digest_size


def folder() -> Path:
    """The cache's folder; may not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "membench"


def digest(*parts: str) -> str:
    """A name for something that depends on `parts` and nothing else."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def arrays(key: str, count: int, make: Callable[[], Arrays]) -> Arrays:
    """`count` arrays, memory-mapped if cached: data larger than memory can be read in parts."""
    paths = [folder() / f"{key}.{index}.npy" for index in range(count)]
    with suppress(OSError, ValueError, EOFError):  # not there, or damaged
        return _mapped(paths)
    made = make()
    kept = [_keep(path, functools.partial(np.save, arr=array)) for path, array in zip(paths, made, strict=True)]
    return _mapped(paths) if all(kept) else made


def _mapped(paths: Sequence[Path]) -> Arrays:
    for path in paths:
        content = np.memmap(path, np.uint8, "r")
        if hashlib.sha256(content[:-_DIGEST_BYTES].data).digest() != content[-_DIGEST_BYTES:].tobytes():
            raise ValueError(f"{path}: damaged")
    return tuple(np.load(path, mmap_mode="r") for path in paths)


def text(key: str, make: Callable[[], str]) -> str:
    """A cached text."""
    (letters,) = arrays(key, 1, lambda: (np.frombuffer(make().encode(), np.uint8),))
    return letters.tobytes().decode()


def _keep(path: Path, write: Callable) -> bool:
    """Write all or nothing, even with several processes at once; False if that isn't possible."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
    except OSError:
        return False
    try:
        with os.fdopen(handle, "w+b") as file:
            write(file)
            file.seek(0)
            file.write(hashlib.file_digest(file, "sha256").digest())
            file.flush()
            os.fsync(file.fileno())  # or a machine that loses power may keep the name without the content
        os.replace(temporary, path)
    except OSError:
        Path(temporary).unlink(missing_ok=True)
        return False
    return True
