"""The time of a table's runs by a few measured steps on this machine's own device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from membench.reproduce import steps
from membench.reproduce.needs import Need, duration
from membench.reproduce.recipes import Recipe
from membench.training.clock import PHASES

COUNT = 8


def time_said(recipe: Recipe, wanted: Sequence[Need], card: str = "") -> str:
    """A sentence: the hours of all runs, if every method takes as long as the first of its model.

    Each kind of `card` has steps of its own: a folder may be continued on another one.
    """
    first = {need.settings.model: need for need in reversed(wanted)}
    records = steps.make([_few(recipe, need, card) for need in first.values()])
    per_step = {}
    for model, record in zip(first, records, strict=True):
        if record["status"] != "ok":
            return f"{COUNT} steps of {model} to estimate the time: {record['error']}"
        per_step[model] = sum(record["time"][f"{phase}_seconds"] for phase in PHASES)
    hours = sum(need.steps * need.part.choices * per_step[need.settings.model] for need in wanted) / 3600
    where = records[0]["environment"]["device_name"]
    return f"By {COUNT} steps measured on this {where}: about {duration(hours)} of training steps for all of it."


def _few(recipe: Recipe, need: Need, card: str) -> steps.Settings:
    """A few of a run's steps, on random tokens: nothing is downloaded for an estimate."""
    settings = need.settings
    return replace(
        steps.on_random_tokens(settings),
        optimizers=(need.method,),
        model=recipe.architecture or settings.model,
        steps=COUNT,
        epochs=None,
        hyperparameters={need.method: {"lr": 1e-6}},
        out=str(Path(settings.out) / "steps" / "".join(sign if sign.isalnum() else "-" for sign in card)),
    )
