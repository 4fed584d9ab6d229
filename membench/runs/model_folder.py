"""`--save`: finished models as folders of transformers, each with its record beside it, all of it or nothing."""

import shutil
from pathlib import Path
from typing import Any

from membench.runs.model_card import card
from reports import record

CONFIG = "config.json"  # what makes a folder a model of transformers


class Models:
    """`PATH/RUN_ID/`, what `save_pretrained` writes and a model card, and `PATH/RUN_ID.json`, the record.

    A run's process writes a draft; once the run has its record, the draft takes the model's place.
    """

    def __init__(self, path: Path):
        self.path = path

    def model(self, run_id: str) -> Path:
        return self.path / run_id

    def draft(self, run_id: str) -> Path:
        return self.path / f".{run_id}.tmp"

    def has(self, run_id: str) -> bool:
        return (self.model(run_id) / CONFIG).is_file() and (self.path / f"{run_id}.json").is_file()

    def begin(self, run_id: str) -> Path:
        """Where to write a model: nothing is there, whatever an earlier attempt left."""
        draft = self.draft(run_id)
        shutil.rmtree(draft, ignore_errors=True)
        return draft

    def end(self, made: dict[str, Any]) -> None:
        """Keep the draft of a run that is ok with its record, and drop that of any other."""
        run_id = made["run_id"]
        draft, model = self.draft(run_id), self.model(run_id)
        if made["status"] == "ok":
            (draft / "README.md").write_text(card(made), encoding="utf-8")
            shutil.rmtree(model, ignore_errors=True)
            draft.rename(model)
            record.write(made, self.path)
        shutil.rmtree(draft, ignore_errors=True)
