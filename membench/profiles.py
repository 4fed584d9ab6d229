"""Profiles: settings that belong together, a set for each family of tasks. What a user gives replaces their values."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from .errors import UserError
from .values import suggestion

Values = dict[str, Any]


@dataclass(frozen=True)
class Profile:
    """What to use where nothing is given.

    Attributes:
        values: settings by name; they have a model and data.
        note: what its results are about, in a sentence.
        of_model: what differs for some models, by their names.
    """

    values: Values
    note: str
    of_model: dict[str, Values] = field(default_factory=dict)


_BADAM = {"lr": 1e-5, "weight_decay": 0.01}

SUPERGLUE = {
    # Small and offline: a tiny encoder with random weights on data that our own code makes up.
    "demo": Profile(
        {
            "model": "config:roberta-tiny",
            "data": "demo",
            "steps": 120,
            "batch_size": 16,
            "sequence_length": 32,  # holds every text of the demo
            # so few steps must visit all blocks and see the loss stall more than once
            "hyperparameters": {"badam": {"switch_every": 10}, "blockllm": {"sparsity": 0.7, "patience": 20}},
        },
        "a tiny model with random weights on made-up data, offline. It shows how everything is measured; "
        "it is not a result about the methods at scale (see --profile paper).",
    ),
    # RoBERTa-large on SuperGLUE as in BAdam, Table 11 (Luo, Yu & Li, 2024, arXiv 2404.02827).
    "paper": Profile(
        {
            "model": "FacebookAI/roberta-large",
            "data": "hub",
            "epochs": 32.0,
            "batch_size": 16,
            "sequence_length": 256,
            "hyperparameters": {
                "adamw": _BADAM,
                "badam": {**_BADAM, "switch_every": 100},
                "blockllm": _BADAM,
                "lora": {**_BADAM, "rank": 8},
            },
        },
        "RoBERTa-large on SuperGLUE, with the hyper-parameters of BAdam's Table 11.",
    ),
}

FAMILIES: dict[str, dict[str, Profile]] = {"superglue": SUPERGLUE}


def family(tasks: Iterable[str]) -> str:
    """The family that tasks (`family/task` or `family`) belong to.

    Raises:
        UserError: they are of several.
    """
    names = list(dict.fromkeys(task.partition("/")[0] for task in tasks))
    if len(names) > 1:
        raise UserError(
            f"--task: {' and '.join(names)} are different kinds of work, with models and rates of their own: "
            "compare on one after the other (in the same --out, if you like)"
        )
    return names[0] if names else ""


def choose(tasks: Iterable[str], name: str) -> Profile:
    """A family's profile; families without any (a user's own) have SuperGLUE's.

    Raises:
        UserError: there is no profile of that name, or the tasks are of several families.
    """
    profiles = FAMILIES.get(family(tasks), SUPERGLUE)
    if name not in profiles:
        raise UserError(f"--profile {name}: there is no such profile. {suggestion(name, profiles)}")
    return profiles[name]


def note(tasks: Iterable[str], name: str, model: str, data: str) -> str:
    """What the tables of a comparison are about, in a sentence."""
    profile = choose(tasks, name)
    if data == profile.values["data"] and (model == profile.values["model"] or model in profile.of_model):
        return f"profile {name}: {profile.note}"
    return f"profile {name} on another model or other data: what wasn't given (steps, sizes) is the profile's."
