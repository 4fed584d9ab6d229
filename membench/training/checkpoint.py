"""Checkpoints of an unfinished run: written all or nothing, and only with plain data.

A file names its run and holds a digest of its content, so that a run never continues from a damaged file or another
run's.
"""

import hashlib
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from membench.config.errors import UserError, explain

UNWRITTEN = "checkpoint {path} can't be written ({why}): make room there, or give --checkpoint-every 0"
WAY_OUT = "remove it to start that run again"


def save(state: dict[str, Any], path: Path) -> None:
    """Write `state` (tensors and JSON) so that at any moment the file is either complete or absent.

    Args:
        state: of a run.
        path: named after the run.

    Raises:
        UserError: it can't be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    content = {"run": path.stem, "digest": digest(state), "state": state}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch's writer makes a RuntimeError of a full disk
        with suppress(OSError):  # there is none, or its folder is a file
            temporary.unlink()
        why = (isinstance(error, OSError) and error.strerror) or explain(error)
        raise UserError(UNWRITTEN.format(path=path, why=why)) from error


def load(path: Path) -> dict[str, Any] | None:
    """What was saved, on the CPU; None if nothing was.

    Raises:
        UserError: the file can't be read, is damaged, or belongs to another run.
    """
    if not path.exists():
        return None
    try:
        saved = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # a zip, a pickle or a tensor can be broken, each in a different way
        raise UserError(f"checkpoint {path} can't be read ({error}): {WAY_OUT}") from error
    if not isinstance(saved, dict) or saved.keys() != {"run", "digest", "state"}:
        raise UserError(f"checkpoint {path} wasn't written by this version of membench: {WAY_OUT}")
    if saved["run"] != path.stem:
        raise UserError(f"checkpoint {path} belongs to another run, {saved['run']}: {WAY_OUT}")
    if saved["digest"] != digest(saved["state"]):
        raise UserError(f"checkpoint {path} is damaged: {WAY_OUT}")
    return saved["state"]


def digest(state: Any) -> str:
    """A hash of tensors and JSON, one by one in order."""
    content = hashlib.sha256()
    for piece in _pieces(state):
        content.update(piece)
    return content.hexdigest()


def _pieces(value: Any) -> Iterator[Any]:
    if torch.is_tensor(value):
        yield f"{value.dtype}{tuple(value.shape)}".encode()
        yield value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    elif isinstance(value, dict):
        yield b"{"
        for key, item in value.items():
            yield repr(key).encode()
            yield from _pieces(item)
        yield b"}"
    elif isinstance(value, list | tuple):
        yield b"["
        for item in value:
            yield from _pieces(item)
        yield b"]"
    else:
        yield repr(value).encode()
