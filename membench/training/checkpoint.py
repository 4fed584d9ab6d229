"""Checkpoints of an unfinished run: all of it or nothing on the disk, and nothing but plain data in it."""

import os
from pathlib import Path
from typing import Any

import torch

from membench.config.errors import UserError


def save(state: dict[str, Any], path: Path) -> None:
    """Write `state` (tensors and JSON) so that at any moment the file is complete or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load(path: Path) -> dict[str, Any] | None:
    """What was saved, on the CPU; None where nothing was.

    Raises:
        UserError: the file can't be read.
    """
    if not path.exists():
        return None
    try:
        return torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # a zip, a pickle or a tensor can be broken, each in its own way
        raise UserError(f"checkpoint {path} can't be read ({error}): remove it to start that run again") from error
