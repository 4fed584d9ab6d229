"""The document of a session on a GPU: parts in order of importance, until the time is up, whatever any of them does.

The file is complete after every part. A part that fails leaves its traceback there; one for which there is too little
time, the reason. If a failure has made the whole process unusable (a CUDA error), it raises `Broken`, and the next
process continues with the same file.
"""

from __future__ import annotations

import json
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.models.damage import is_out_of_memory

SCHEMA = 1
_SPOILT = ("CUDA error", "device-side assert", "CUBLAS_STATUS_NOT_INITIALIZED", "cuDNN error")


@dataclass(frozen=True)
class Part:
    """A piece of work.

    Attributes:
        name: "methods/llama3-8b/badam".
        work: does it, and returns JSON.
        expected_seconds: it isn't begun with less time left.
        limit_seconds: it is stopped after this time.
    """

    name: str
    work: Callable[[], dict[str, Any]]
    expected_seconds: float = 5.0
    limit_seconds: float = 60.0


class Broken(Exception):
    """Nothing more can be done on the device by this process."""


class OutOfTime(BaseException):
    """A part has used up its time, or the session has: not an error, which what runs might catch as one of its own."""


class Journal:
    """The document and its file.

    Args:
        path: of the JSON; existing content is kept if `resume` is true.
        minutes: the session's limit, including the time before it was resumed.
    """

    def __init__(self, path: Path, minutes: float, resume: bool = False):
        self.path = path
        self.document: dict[str, Any] = {"schema": SCHEMA, "started_unix": time.time(), "parts": {}}
        if resume and path.exists():
            self.document = json.loads(path.read_text(encoding="utf-8"))
            for record in self.parts.values():
                if record["status"] == "running":
                    record |= {"status": "failed", "error": "the process died"}
        self.document["minutes"] = minutes
        self._deadline = self.document["started_unix"] + 60 * minutes

    @property
    def parts(self) -> dict[str, dict[str, Any]]:
        return self.document["parts"]

    @property
    def seconds_left(self) -> float:
        """Time left to the session."""
        return self._deadline - time.time()

    def save(self) -> None:
        """Write the file, all or nothing."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        temporary.write_text(json.dumps(self.document, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, self.path)

    def do(self, part: Part) -> dict[str, Any]:
        """Do a part, unless it is done, and note its outcome.

        Raises:
            Broken: see there.
        """
        if part.name in self.parts and self.parts[part.name]["status"] != "skipped":
            return self.parts[part.name]
        if self.seconds_left < part.expected_seconds:
            reason = f"{max(0.0, self.seconds_left):.0f} s were left, and it takes about {part.expected_seconds:.0f} s"
            return self._note(part, {"status": "skipped", "reason": reason})
        self._note(part, {"status": "running"})
        start = time.perf_counter()
        record = self._outcome(part)
        self._note(part, {**record, "part_seconds": round(time.perf_counter() - start, 3)})
        if record["status"] == "failed" and is_spoilt(record["error"]):
            raise Broken(record["error"])
        return record

    def _outcome(self, part: Part) -> dict[str, Any]:
        try:
            with _alarm(min(part.limit_seconds, self.seconds_left)):
                return {"status": "ok", **part.work()}
        except OutOfTime as error:
            return {"status": "out_of_time", **_described(error)}
        except Exception as error:
            return {"status": "out_of_memory" if is_out_of_memory(error) else "failed", **_described(error)}

    def _note(self, part: Part, record: dict[str, Any]) -> dict[str, Any]:
        self.parts[part.name] = record
        self.save()
        return record


def is_spoilt(error: str) -> bool:
    """Has what says so made the whole process unusable?"""
    return any(sign in error for sign in _SPOILT)


def _described(error: BaseException) -> dict[str, Any]:
    text = str(error).strip().splitlines()
    frames = "".join(traceback.format_exception(error))
    return {"error": f"{type(error).__name__}: {text[0] if text else ''}", "traceback": frames[-3000:]}


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """Raises OutOfTime within this context after so many seconds."""

    def ring(*_: Any) -> None:
        raise OutOfTime(f"stopped after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(0.01, seconds))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
