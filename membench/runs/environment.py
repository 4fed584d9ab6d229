"""Where a run took place: what a reader needs to judge its times, or to repeat it."""

import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import membench
from membench.training.clock import cpu_name, device_name

_PACKAGES = ("torch", "transformers", "peft", "datasets", "evaluate", "scikit-learn")


def describe(device: torch.device, threads: int) -> dict[str, Any]:
    """Versions, device, threads and, in a git checkout, the commit."""
    return {
        "membench": membench.__version__,
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in _PACKAGES},
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "device": device.type,
        "device_name": device_name(device),
        "threads": threads,
        **_commit(Path(membench.__file__).resolve().parent.parent),
    }


def _commit(root: Path) -> dict[str, Any]:
    """The commit, and whether tracked files differ from it; both null outside a git checkout."""
    if not (root / ".git").exists():
        return {"commit": None, "dirty": None}
    head, changes = _git(root, "rev-parse", "HEAD"), _git(root, "status", "--porcelain", "--untracked-files=no")
    return {"commit": head or None, "dirty": None if changes is None else bool(changes)}


def _git(root: Path, *arguments: str) -> str | None:
    try:
        return subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):  # no git, or a folder that it doesn't trust: the commit is unknown
        return None
