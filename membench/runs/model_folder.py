"""`--save`: finished models as transformers folders, each with its record beside it, all or nothing."""

import hashlib
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from membench.config.errors import UserError, about_file
from membench.runs.model_card import card
from reports import record

CONFIG = "config.json"  # marks a folder as a transformers model


class Models:
    """`PATH/RUN_ID/`, with what `save_pretrained` writes and a model card, and `PATH/RUN_ID.json`, the record.

    A run's process writes a draft, which is whole if it is there; once the run has a record, it replaces the model.

    Args:
        path: of the models.
        out: the folder of the records, which one command at a time writes: another command, with another, may make the
            same run for the same `path`, and has a draft of its own.
    """

    def __init__(self, path: Path, out: Path):
        self.path = path
        self._command = hashlib.sha256(os.path.realpath(out).encode()).hexdigest()[:8]

    def model(self, run_id: str) -> Path:
        """The folder of a run's model."""
        return self.path / run_id

    def draft(self, run_id: str) -> Path:
        """The folder of a run's draft."""
        return self.path / f".{run_id}.{self._command}.tmp"

    def has(self, run_id: str) -> bool:
        return (self.model(run_id) / CONFIG).is_file() and (self.path / f"{run_id}.json").is_file()

    def check(self, run_ids: Iterable[str]) -> None:
        """Raises UserError if what no run has written is in the place of a model or its record, before it is made."""
        for run_id in run_ids:
            model, made = self.model(run_id), self.path / f"{run_id}.json"
            for place, is_free in ((model, model.is_dir() and not model.is_symlink()), (made, made.is_file())):
                if os.path.lexists(place) and not is_free:
                    why = "it is in the way of a run's model"
                    raise UserError(f"--save {place}: {why}: move it, or choose another folder")

    def end(self, made: dict[str, Any]) -> None:
        """Keep the draft and record of a run that is ok, and drop any other draft, whole or half.

        There is none of a run that an earlier command began without `--save`. A model that is replaced is put aside
        first: half removed, with its record still beside it, it would pass for a saved one if this process is killed.

        Raises:
            UserError: they can't be kept.
        """
        run_id = made["run_id"]
        draft, model = self.draft(run_id), self.model(run_id)
        aside = draft.with_name(f"{draft.name}.old")
        try:
            if made["status"] == "ok" and draft.is_dir():
                (draft / "README.md").write_text(card(made), encoding="utf-8")
                shutil.rmtree(aside, ignore_errors=True)
                if model.exists():
                    model.rename(aside)
                draft.rename(model)
                record.write(made, self.path)
        except OSError as error:
            raise UserError(f"--save {about_file(error)}; the same command makes the run again to save it") from error
        finally:
            for left in self.path.glob(f"{draft.name}*"):
                shutil.rmtree(left, ignore_errors=True)
