"""Profiles: settings that belong together, one set per family of tasks. Values that a user gives replace theirs."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from membench.config.errors import UserError
from reports.names import suggestion

Values = dict[str, Any]


@dataclass(frozen=True)
class Profile:
    """What to use where the user gives nothing.

    Attributes:
        values: settings by name, including a model and data.
        note: what its results are about, in a sentence.
        of_model: what differs for some models, by name.
    """

    values: Values
    note: str
    of_model: dict[str, Values] = field(default_factory=dict)


_MUON = {"ns_dtype": "float32"}  # demos run on CPUs, few of which compute in bf16
_BADAM = {"lr": 1e-5, "weight_decay": 0.01}

SUPERGLUE = {
    # Small and offline: a tiny encoder with random weights on data made up by our own code.
    "demo": Profile(
        {
            "model": "config:roberta-tiny",
            "data": "demo",
            "steps": 120,
            "batch_size": 16,
            "sequence_length": 32,  # enough for every text of the demo
            # these few steps must visit all blocks and see the loss stall more than once
            "hyperparameters": {
                "badam": {"switch_every": 10},
                "blockllm": {"sparsity": 0.7, "patience": 20},
                "lomo": {"clip_norm": 1.0},
                "mezo": {"samples": 8},  # random weights are far from what a direction or two per step can move
                "muon": _MUON,
                "sgd": {"momentum": 0.9},
            },
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

# These few steps must visit all blocks, change subspaces and see the loss stall more than once.
_TINY_LANGUAGE: Values = {
    "model": "config:llama-tiny",
    "data": "demo",
    "steps": 400,
    "batch_size": 8,
    "evaluate_before": True,
    "schedule": "cosine",
    "hyperparameters": {
        "badam": {"switch_every": 10},
        "blockllm": {"sparsity": 0.7, "patience": 20},
        "fira": {"rank": 48, "update_every": 50},
        "galore": {"rank": 48, "update_every": 50},
        "muon": _MUON,
    },
}
_TINY_NOTE = (
    "a tiny Llama with random weights on the documentation of Python's standard library, offline. It shows how "
    "everything is measured; it is not a result about the methods at scale (see --profile paper)."
)


def _galore(steps: int, rank: int, micro_batches: int, lr: float) -> Values:
    """A size of GaLore's Table 2; the rate of full training has to be chosen from .01, .005, .001, .0005 and .0001."""
    low_rank = {"rank": rank, "lr": lr}
    return {
        "steps": steps,
        "gradient_accumulation_steps": micro_batches,
        "hyperparameters": {
            "*": {"weight_decay": 0.0},
            "adamw": {"lr": lr, "master_weights": False},
            "galore": {"rank": rank, "lr": 1e-2, "update_every": 200, "scale": 0.25},
            "lora": {**low_rank, "master_weights": False},
        },
    }


C4 = {
    "demo": Profile(
        {
            **_TINY_LANGUAGE,
            "sequence_length": 64,
            "hyperparameters": {**_TINY_LANGUAGE["hyperparameters"], "mezo": {"samples": 16, "lr": 4e-3}},
        },
        _TINY_NOTE,
    ),
    # Pretraining as in GaLore, Table 2 and Appendix C (Zhao et al., 2024, arXiv 2403.03507).
    "paper": Profile(
        {
            "model": "config:llama-60m",
            "tokenizer": "google-t5/t5-base@a9723ea7f1b39c1eae772870f3b547bf6ef7e6c1",
            "data": "hub",
            "batch_size": 512,
            "sequence_length": 256,
            "dtype": "bfloat16",
            "schedule": "cosine",
            "warmup_fraction": 0.1,
            "final_fraction": 0.1,
            "options": {"validation_tokens": 10_000_000},
            **_galore(10_000, 128, 4, 1e-3),
        },
        "LLaMA pretrained on C4 with GaLore's protocol (Table 2): tokens, schedule, ranks; the likeliest of its five "
        "rates, where the paper takes the best.",
        of_model={
            "config:llama-60m": _galore(10_000, 128, 4, 1e-3),
            "config:llama-130m": _galore(20_000, 256, 8, 1e-3),
            "config:llama-350m": _galore(60_000, 256, 16, 5e-4),
            "config:llama-1b": _galore(100_000, 512, 32, 5e-4),
        },
    ),
}


def _badam_tuning(lora_rank: int, micro_batches: int) -> Values:
    """From BAdam's Tables 2 and 5: 1e-6 is its rate for Llama 3-8B, and one of two for Llama 2-7B."""
    shared = {"lr": 1e-6, "weight_decay": 0.01}
    return {
        "gradient_accumulation_steps": micro_batches,
        "hyperparameters": {
            "adamw": shared,
            "badam": {**shared, "switch_every": 100},
            "blockllm": shared,
            "lisa": shared,
            "lora": {**shared, "rank": lora_rank},
            "galore": {**shared, "rank": 256, "update_every": 256, "scale": 0.25},
        },
    }


INSTRUCT = {
    "demo": Profile({**_TINY_LANGUAGE, "steps": 300, "sequence_length": 128}, _TINY_NOTE),
    # Llama 3-8B on Alpaca-GPT4 as in BAdam, Section 4 and Appendix B (Luo, Yu & Li, 2024, arXiv 2404.02827).
    "paper": Profile(
        {
            "model": "meta-llama/Meta-Llama-3-8B",
            "data": "alpaca-gpt4",
            "epochs": 3.0,
            "batch_size": 16,
            "sequence_length": 728,
            "dtype": "bfloat16",
            "checkpointing": True,
            "schedule": "cosine",
            "evaluate_before": True,
            **_badam_tuning(8, 8),
        },
        "Llama on Alpaca-GPT4 with BAdam's protocol (Tables 2 and 5).",
        of_model={
            "meta-llama/Meta-Llama-3-8B": _badam_tuning(8, 8),
            "meta-llama/Llama-2-7b-hf": _badam_tuning(100, 2),
        },
    ),
}

DPO = {
    "demo": Profile({**_TINY_LANGUAGE, "steps": 120, "batch_size": 4, "sequence_length": 80}, _TINY_NOTE),
}

CLASSIFY = {
    "demo": Profile(
        {**SUPERGLUE["demo"].values, "sequence_length": 128},
        "a tiny model with random weights on made-up sentences, offline; --data takes your own, --model a real one.",
    )
}

DEMO = "demo"
_OF_DEMO_ALONE = ("sequence_length", "hyperparameters")  # chosen for its tiny model, its texts and its few steps

FAMILIES: dict[str, dict[str, Profile]] = {
    "superglue": SUPERGLUE,
    "c4": C4,
    "instruct": INSTRUCT,
    "dpo": DPO,
    "classify": CLASSIFY,
}


def family(tasks: Iterable[str]) -> str:
    """The family to which tasks (`family/task` or `family`) belong.

    Raises:
        UserError: they belong to several.
    """
    names = list(dict.fromkeys(task.partition("/")[0] for task in tasks))
    if len(names) > 1:
        raise UserError(
            f"--task: {' and '.join(names)} belong to different task families: run one comparison per family "
            "(they may share --out)"
        )
    return names[0] if names else ""


def choose(tasks: Iterable[str], name: str) -> Profile:
    """A family's profile; families without one (a user's own) have SuperGLUE's.

    Raises:
        UserError: there is no profile with that name, or the tasks belong to several families.
    """
    profiles = FAMILIES.get(family(tasks), SUPERGLUE)
    if name not in profiles:
        raise UserError(f"--profile {name}: there is no such profile. {suggestion(name, profiles)}")
    return profiles[name]


def layers(tasks: Iterable[str], name: str, model: str | None, data: str | None) -> tuple[Values, Values]:
    """A profile's values and, over them, those of a model; `model` and `data` are None where none are given.

    What the demo has of its own doesn't reach another model or other data: they get the methods' own defaults.

    Raises:
        UserError: see `choose`.
    """
    profile = choose(tasks, name)
    values = profile.values
    if name == DEMO and (model or values["model"], data or values["data"]) != (values["model"], values["data"]):
        values = {key: value for key, value in values.items() if key not in _OF_DEMO_ALONE}
    return values, profile.of_model.get(model or "", {})


def note(tasks: Iterable[str], name: str, model: str, data: str) -> str:
    """What the tables of a comparison are about, in a sentence."""
    profile = choose(tasks, name)
    if data == profile.values["data"] and (model == profile.values["model"] or model in profile.of_model):
        return f"profile {name}: {profile.note}"
    return (
        f"profile {name} on another model or other data: steps, batch size and such are the profile's where you gave "
        "none."
    )
