"""Wall-clock seconds of the phases of a training step, of what device they are, and the peaks of its process."""

import platform
import resource
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

PHASES = ("forward", "backward", "update")
_WARM_UP = 3  # steps that the medians of long enough runs leave out
_TASKS = Path("/proc/self/task")  # Linux tells of each thread how long it has been ready to run without running


class Clock:
    """Seconds of every phase of every step; on an accelerator, it synchronises before reading the time."""

    def __init__(self, device: torch.device):
        self._device = device
        self.steps: dict[str, list[float]] = {name: [] for name in PHASES}
        self._current = dict.fromkeys(PHASES, 0.0)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time what happens within this context, in addition to what this step already spent in phase `name`."""
        start = self._now()
        yield
        self._current[name] += self._now() - start

    def end_step(self) -> float:
        """Close the current step; returns its seconds."""
        seconds = sum(self._current.values())
        for name, spent in self._current.items():
            self.steps[name].append(spent)
        self._current = dict.fromkeys(PHASES, 0.0)
        return seconds

    def medians(self) -> dict[str, float | None]:
        """`forward_seconds` etc., medians per step; the first steps are left out if there are enough others."""
        return {f"{name}_seconds": _median(spent) for name, spent in self.steps.items()}

    def spread(self) -> dict[str, float | int | None]:
        """`timed_steps`, those that medians are over, and `step_spread`: the distance between the quartiles of a step's
        seconds, as a share of their median."""
        whole = _after_warm_up([sum(parts) for parts in zip(*self.steps.values(), strict=True)])
        if len(whole) < 2:
            return {"timed_steps": len(whole), "step_spread": None}
        low, middle, high = statistics.quantiles(whole, method="inclusive")
        return {"timed_steps": len(whole), "step_spread": (high - low) / middle if middle else None}

    def _now(self) -> float:
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)  # without it the current one, which the model needn't be on
        return time.perf_counter()


def waited_seconds() -> float | None:
    """Seconds that this process's threads, added up, have been ready to run while all processors were taken; None where
    the system doesn't say."""
    total = None
    for path in _TASKS.glob("*/schedstat"):  # nanoseconds that it ran, that it waited, and how often it ran
        with suppress(OSError, ValueError, IndexError):  # a thread may end now
            total = (total or 0.0) + int(path.read_text().split()[1]) / 1e9
    return total


def device_name(device: torch.device) -> str:
    """What a time on this device is a time of."""
    if device.type != "cuda":
        return cpu_name()
    return torch.cuda.get_device_name(device) if torch.cuda.is_available() else "a card of another machine"


def cpu_name() -> str:
    """This machine's processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _median(seconds: list[float]) -> float | None:
    rest = _after_warm_up(seconds)
    return statistics.median(rest) if rest else None


def _after_warm_up(seconds: list[float]) -> list[float]:
    return seconds[min(_WARM_UP, len(seconds) // 2) :]


def process_memory(device: torch.device) -> dict[str, Any]:
    """Peaks so far of the process's resident memory and of the GPU's allocator."""
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "process_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None,
    }
