"""`--save`: finished models as transformers folders, each with its record beside it, all or nothing."""

import shutil
from pathlib import Path
from typing import Any

from membench.runs.model_card import card
from reports import record

CONFIG = "config.json"  # marks a folder as a transformers model


class Models:
    """`PATH/RUN_ID/`, with what `save_pretrained` writes and a model card, and `PATH/RUN_ID.json`, the record.

    A run's process writes a draft; once the run has a record, the draft replaces the model.
    """

    def __init__(self, path: Path):
        self.path = path

    def model(self, run_id: str) -> Path:
        """The folder of a run's model."""
        return self.path / run_id

    def draft(self, run_id: str) -> Path:
        """The folder of a run's draft."""
        return self.path / f".{run_id}.tmp"

    def has(self, run_id: str) -> bool:
        return (self.model(run_id) / CONFIG).is_file() and (self.path / f"{run_id}.json").is_file()

    def begin(self, run_id: str) -> Path:
        """Where to write a model: an empty place, whatever an earlier attempt left."""
        draft = self.draft(run_id)
        shutil.rmtree(draft, ignore_errors=True)
        return draft

    def end(self, made: dict[str, Any]) -> None:
        """Keep the draft and record of a run that is ok, and drop any other draft."""
        run_id = made["run_id"]
        draft, model = self.draft(run_id), self.model(run_id)
        try:
            if made["status"] == "ok":
                (draft / "README.md").write_text(card(made), encoding="utf-8")
                shutil.rmtree(model, ignore_errors=True)
                draft.rename(model)
                record.write(made, self.path)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
