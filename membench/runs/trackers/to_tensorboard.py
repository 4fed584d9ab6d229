"""TensorBoard: event files in OUT/tensorboard/RUN_ID, written without TensorFlow or torch."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.text.metadata import create_summary_metadata
from tensorboard.summary.writer.event_file_writer import EventFileWriter
from tensorboard.util.tensor_util import make_tensor_proto

from membench.config.run import Run


class _Log:
    def __init__(self, folder: Path):
        self._writer = EventFileWriter(str(folder))
        self._last = 0

    def log(self, step: int, values: dict[str, float]) -> None:
        self._last = step
        self._add([Summary.Value(tag=name, simple_value=value) for name, value in values.items()])
        self._writer.flush()

    def end(self, record: dict[str, Any], values: dict[str, float]) -> None:
        self.log(self._last, values)
        text = make_tensor_proto(json.dumps(record, indent=2).encode())
        self._add([Summary.Value(tag="record", metadata=create_summary_metadata("record", ""), tensor=text)])
        self._writer.close()

    def interrupt(self) -> None:
        self._writer.close()

    def _add(self, values: list[Any]) -> None:
        self._writer.add_event(Event(wall_time=time.time(), step=self._last, summary=Summary(value=values)))


def begin(run: Run, out: Path) -> _Log:
    """Replaces what an earlier attempt has logged."""
    folder = out / "tensorboard" / run.run_id
    shutil.rmtree(folder, ignore_errors=True)
    return _Log(folder)
