"""Checkpoints of an unfinished run: all of it or nothing on the disk, and nothing but plain data in it.

A file names its run and holds a digest of its content, so that neither a damaged one nor another run's is trained on.
"""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from membench.config.errors import UserError


def save(state: dict[str, Any], path: Path) -> None:
    """Write `state` (tensors and JSON) so that at any moment the file is complete or not there.

    Args:
        state: of a run.
        path: named after the run.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        torch.save({"run": path.stem, "digest": digest(state), "state": state}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load(path: Path) -> dict[str, Any] | None:
    """What was saved, on the CPU; None where nothing was.

    Raises:
        UserError: the file can't be read, is damaged, or is another run's.
    """
    if not path.exists():
        return None
    remove = "remove it to start that run again"
    try:
        saved = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # a zip, a pickle or a tensor can be broken, each in its own way
        raise UserError(f"checkpoint {path} can't be read ({error}): {remove}") from error
    if not isinstance(saved, dict) or saved.keys() != {"run", "digest", "state"}:
        raise UserError(f"checkpoint {path} isn't one that this version of membench wrote: {remove}")
    if saved["run"] != path.stem:
        raise UserError(f"checkpoint {path} is of another run, {saved['run']}: {remove}")
    if saved["digest"] != digest(saved["state"]):
        raise UserError(f"checkpoint {path} is damaged, its content isn't what was written: {remove}")
    return saved["state"]


def digest(state: Any) -> str:
    """A hash of tensors and JSON, one by one in their order."""
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
