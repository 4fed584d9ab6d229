"""Files are written whole or not at all, and settings are read with one sentence where they can't be."""

import contextlib
import os
import secrets
import tomllib
from pathlib import Path
from typing import Any


def write(path: Path, content: bytes) -> Path:
    """Put `content` at `path`, making its folder, all of it or none, at any moment.

    A link stays: what it leads to is replaced. A pipe or a device is written to as it is.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        path.write_bytes(content)
        return path
    place = Path(os.path.realpath(path))
    place.parent.mkdir(parents=True, exist_ok=True)
    # a random name: a process of another machine, or another thread, may be writing the same file
    temporary = place.with_name(f".{place.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:  # no file, and no link, that somebody else has put there
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, place)
    except OSError as error:
        why = error.strerror or str(error)
        raise OSError(error.errno, f"can't be written: {why}", str(path)) from error  # a full disk names no file
    finally:
        with contextlib.suppress(FileNotFoundError):  # it has become the file
            temporary.unlink()
    return path


def read_toml(path: Path | str) -> dict[str, Any]:
    """The content of a TOML file. Raises ValueError, which names the file, where it can't be read."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))  # Windows marks its UTF-8
    except OSError as error:
        raise ValueError(f"{path}: can't be read: {error.strerror}") from error
    except RecursionError as error:
        raise ValueError(f"{path}: not valid TOML: nested too deeply") from error
    except ValueError as error:  # no TOML, no UTF-8, or a number of thousands of digits
        raise ValueError(f"{path}: not valid TOML: {error}") from error
