"""Profiles: settings that belong together. Whatever a user gives replaces a profile's value."""

from typing import Any

_PAPER = {"lr": 1e-5, "weight_decay": 0.01}

PROFILES: dict[str, dict[str, Any]] = {
    # Small and offline: a tiny encoder with random weights on data that our own code makes up.
    "demo": {
        "model": "config:roberta-tiny",
        "data": "demo",
        "steps": 120,
        "batch_size": 16,
        "sequence_length": 32,  # holds every text of the demo
        # so few steps must visit all blocks and see the loss stall more than once
        "hyperparameters": {"badam": {"switch_every": 10}, "blockllm": {"sparsity": 0.7, "patience": 20}},
    },
    # RoBERTa-large on SuperGLUE as in BAdam, Table 11 (Luo, Yu & Li, 2024, arXiv 2404.02827).
    "paper": {
        "model": "FacebookAI/roberta-large",
        "data": "hub",
        "epochs": 32.0,
        "batch_size": 16,
        "sequence_length": 256,
        "hyperparameters": {
            "adamw": _PAPER,
            "badam": {**_PAPER, "switch_every": 100},
            "blockllm": _PAPER,
            "lora": {**_PAPER, "rank": 8},
        },
    },
}

_NOTES = {
    "demo": "a tiny model with random weights on made-up data, offline. It shows how everything is measured; "
    "it is not a result about the methods at scale (see --profile paper).",
    "paper": "RoBERTa-large on SuperGLUE, with the hyper-parameters of BAdam's Table 11.",
}


def note(profile: str, model: str, data: str) -> str:
    """What the tables of a comparison are about, in a sentence."""
    own = PROFILES[profile]
    if (model, data) == (own["model"], own["data"]):
        return f"profile {profile}: {_NOTES[profile]}"
    return f"profile {profile} on another model or other data: what wasn't given (steps, sizes) is the profile's."
