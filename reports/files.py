"""Files are written whole or not at all."""

import contextlib
import os
from pathlib import Path


def write(path: Path, content: bytes) -> Path:
    """Put `content` at `path`, making its folder, all of it or none, at any moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):  # it has become the file
            temporary.unlink()
    return path
