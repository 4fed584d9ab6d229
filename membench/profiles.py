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
        "sequence_length": 64,
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

NOTES = {
    "demo": "profile demo: a tiny model with random weights on made-up data, offline. It shows how everything is "
    "measured; it is not a result about the methods at scale (see --profile paper).",
    "paper": "profile paper: RoBERTa-large on SuperGLUE with the hyper-parameters of BAdam's Table 11.",
}
