"""A plan as the configuration of a trainer: code for transformers' and TRL's, YAML for LLaMA-Factory and axolotl.

The names of the keys are those of transformers 5 (`TrainingArguments`), TRL 1 (`SFTConfig`), LLaMA-Factory
(`hparams/finetuning_args.py`, `model_args.py`) and axolotl (`utils/schemas`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import optimizers
from reports.table import Row, gib

Document = Mapping[str, Any]
Keys = dict[str, Any]

# By method: what is set whatever its hyper-parameters are, and the tool's names of those.
FACTORY: dict[str, tuple[Keys, dict[str, str]]] = {
    "adafactor": ({"finetuning_type": "full", "optim": "adafactor"}, {}),
    "adam-mini": ({"finetuning_type": "full", "use_adam_mini": True}, {}),
    "adamw": ({"finetuning_type": "full", "optim": "adamw_torch"}, {}),
    "adamw8bit": ({"finetuning_type": "full", "optim": "adamw_bnb_8bit"}, {}),
    "apollo": (
        {"finetuning_type": "full", "use_apollo": True},
        {
            "rank": "apollo_rank",
            "update_every": "apollo_update_interval",
            "scale": "apollo_scale",
            "scale_type": "apollo_scale_type",
            "in_backward": "apollo_layerwise",
        },
    ),
    "badam": (
        {"finetuning_type": "full", "use_badam": True, "badam_mode": "layer"},
        {"order": "badam_switch_mode", "switch_every": "badam_switch_interval"},
    ),
    "galore": (
        {"finetuning_type": "full", "use_galore": True},
        {
            "rank": "galore_rank",
            "update_every": "galore_update_interval",
            "scale": "galore_scale",
            "projection": "galore_proj_type",
            "in_backward": "galore_layerwise",
        },
    ),
    "lora": (
        {"finetuning_type": "lora", "lora_target": "all"},
        {"rank": "lora_rank", "alpha": "lora_alpha", "dropout": "lora_dropout"},
    ),
    "qlora": (
        {"finetuning_type": "lora", "lora_target": "all", "quantization_bit": 4, "quantization_type": "nf4"},
        {
            "rank": "lora_rank",
            "alpha": "lora_alpha",
            "dropout": "lora_dropout",
            "double_quantization": "double_quantization",
        },
    ),
    "sgd": ({"finetuning_type": "full", "optim": "sgd"}, {}),
}
_LORA = {"rank": "lora_r", "alpha": "lora_alpha", "dropout": "lora_dropout"}
AXOLOTL: dict[str, tuple[Keys, dict[str, str]]] = {
    "adafactor": ({"optimizer": "adafactor"}, {}),
    "adamw": ({"optimizer": "adamw_torch_fused"}, {}),
    "adamw8bit": ({"optimizer": "adamw_bnb_8bit"}, {}),
    "lora": ({"optimizer": "adamw_torch_fused", "adapter": "lora", "lora_target_linear": True}, _LORA),
    "qlora": (
        {"optimizer": "adamw_torch_fused", "adapter": "qlora", "load_in_4bit": True, "lora_target_linear": True},
        _LORA,
    ),
    "muon": ({"optimizer": "muon"}, {}),
    "sgd": ({"optimizer": "sgd"}, {}),
}
SHARED = {"lr": "learning_rate", "weight_decay": "weight_decay"}


def export(document: Document, tool: str) -> str:
    """The configuration for `tool` of the method that leaves most room, of those that fit where there is a budget.

    Raises:
        ValueError: none fits, or the tool doesn't have the method.
    """
    row = _winner(document)
    return {"trainer": _trainer, "trl": _trl, "llamafactory": _factory, "axolotl": _axolotl}[tool](document, row)


def _winner(document: Document) -> Row:
    rows = [row for row in document["rows"] if row["fits"] is not False]
    if not rows:
        raise ValueError(
            f"--export: nothing fits into {gib(document['budget_bytes'])} GiB, so there is nothing to export"
        )
    return min(rows, key=lambda row: row["estimated_total_bytes"])


def _heading(document: Document, row: Row) -> list[str]:
    setup = document["setup"]
    budget = f", of {gib(document['budget_bytes'])} GiB" if document["budget_bytes"] else ""
    return [f"{row['method']} on {setup['model']}: planned {gib(row['estimated_total_bytes'])} GiB{budget}."]


def _micro_batch(setup: Mapping[str, Any]) -> Keys:
    parts = setup["gradient_accumulation_steps"]
    return {"per_device_train_batch_size": setup["batch_size"] // parts, "gradient_accumulation_steps": parts}


def _changed(row: Row) -> Keys:
    """The hyper-parameters that aren't the method's defaults."""
    default = optimizers.resolve(row["method"])
    return {key: value for key, value in row["hyperparameters"].items() if value != default[key]}


# ---- code: the methods are membench's own


def _trainer(document: Document, row: Row) -> str:
    return _code(document, row, "TrainingArguments", {}, [])


def _trl(document: Document, row: Row) -> str:
    length = {"max_length": document["setup"]["sequence_length"]}
    return _code(document, row, "SFTConfig", length, [])


def _code(document: Document, row: Row, config: str, more: Keys, notes: list[str]) -> str:
    setup, values = document["setup"], row["hyperparameters"]
    given = {**_micro_batch(setup), "learning_rate": values["lr"], **more}
    if setup["checkpointing"]:
        given |= {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    if values.get("in_backward") or row["method"] in ("lomo", "adalomo", "mezo"):
        given["max_grad_norm"] = 0.0
        notes = [*notes, "It has no gradients to clip after the backward pass, nor to accumulate."]
    if config == "TrainingArguments":
        notes = [
            *notes,
            f"Cut texts to {setup['sequence_length']} tokens when you tokenize: TrainingArguments can't say so.",
        ]
    kwargs = {key: value for key, value in _changed(row).items() if key != "lr"}
    is_trl = config == "SFTConfig"
    lines = [
        *(f"# {line}" for line in [*_heading(document, row), *notes, *_levers(setup, ("checkpointing",))]),
        "import torch",
        f"from transformers import AutoModelForCausalLM{'' if is_trl else ', TrainingArguments'}",
        *(["from trl import SFTConfig, SFTTrainer"] if is_trl else []),
        "",
        "from membench import MethodTrainer",
        "",
        *(["", "class Trainer(MethodTrainer, SFTTrainer):", "    pass", "", ""] if is_trl else []),
        f"model = AutoModelForCausalLM.from_pretrained({setup['model']!r}, dtype=torch.{setup['dtype']})",
        f"args = {config}(",
        '    output_dir="output",',
        *(f"    {key}={value!r}," for key, value in given.items()),
        ")",
        f"trainer = {'Trainer' if is_trl else 'MethodTrainer'}(",
        "    model,",
        "    args=args,",
        "    train_dataset=...,  # yours",
        f"    method={row['method']!r},",
        f"    method_kwargs={kwargs!r},",
        ")",
        "trainer.train()",
    ]
    return "\n".join(lines)


def _levers(setup: Mapping[str, Any], known: tuple[str, ...]) -> list[str]:
    """What of the plan's step a tool doesn't do, in words."""
    found = {
        "checkpointing_every": setup["checkpointing_every"] > 1,
        "loss_chunks": setup["loss_chunks"] > 1,
        "offload_activations": setup["offload_activations"],
    }
    names = [f"--{name.replace('_', '-')} {setup[name]}" for name, used in found.items() if used and name not in known]
    return [f"Not expressed, so it needs more than planned: {', '.join(names)}."] if names else []


# ---- YAML


def _factory(document: Document, row: Row) -> str:
    setup = document["setup"]
    keys = {"model_name_or_path": setup["model"], "stage": "dpo" if setup["task"] else "sft", "do_train": True}
    own, unknown = _own_keys("LLaMA-Factory", FACTORY, row)
    keys |= own
    keys |= {"cutoff_len": setup["sequence_length"], **_micro_batch(setup)}
    keys |= {"pure_bf16" if own["finetuning_type"] == "full" else "bf16": True} if setup["dtype"] == "bfloat16" else {}
    keys |= {"use_reentrant_gc": False} if setup["checkpointing"] else {"disable_gradient_checkpointing": True}
    keys |= {"dataset": "YOURS", "template": "YOURS", "output_dir": "output"}
    return _yaml([*_heading(document, row), *unknown, *_levers(setup, ())], keys)


def _axolotl(document: Document, row: Row) -> str:
    setup = document["setup"]
    sizes = _micro_batch(setup)
    keys = {"base_model": setup["model"], **({"rl": "dpo"} if setup["task"] else {})}
    own, unknown = _own_keys("axolotl", AXOLOTL, row)
    keys |= own
    keys |= {
        "sequence_len": setup["sequence_length"],
        "micro_batch_size": sizes["per_device_train_batch_size"],
        "gradient_accumulation_steps": sizes["gradient_accumulation_steps"],
    }
    keys |= {"bf16": True} if setup["dtype"] == "bfloat16" else {}
    keys["gradient_checkpointing"] = setup["checkpointing"]
    keys |= {"gradient_checkpointing_kwargs": {"use_reentrant": False}} if setup["checkpointing"] else {}
    keys |= {"datasets": [{"path": "YOURS", "type": "chat_template"}], "output_dir": "output"}
    return _yaml([*_heading(document, row), *unknown, *_levers(setup, ())], keys)


def _own_keys(tool: str, table: Mapping[str, tuple[Keys, dict[str, str]]], row: Row) -> tuple[Keys, list[str]]:
    """What sets the method and its hyper-parameters, and those that the tool can't be told.

    Raises:
        ValueError: the tool doesn't have the method.
    """
    method = optimizers.split(row["method"])[0]
    if method not in table:
        raise ValueError(
            f"--export: {tool} doesn't have {method}, only {', '.join(table)}; trainer and trl take every method"
        )
    fixed, names = table[method]
    values, names = row["hyperparameters"], SHARED | names
    told = {theirs: values[ours] for ours, theirs in names.items() if values.get(ours) is not None}
    if values.get("alpha", 0) is None:
        told["lora_alpha"] = 4 * values["rank"]
    left = {
        key: value for key, value in _changed(row).items() if key not in names and key not in ("seed", "always_train")
    }
    if values.get("master_weights") and method not in ("badam", "lora", "qlora"):
        left["master_weights"] = True
    unknown = ", ".join(f"{key}={value}" for key, value in left.items())
    notes = [f"{tool} runs its own {method}: its other hyper-parameters, and what it needs, may differ from the plan."]
    return fixed | told, notes + ([f"Not expressed: {unknown}."] if unknown else [])


def _yaml(comments: list[str], keys: Keys) -> str:
    return "\n".join([*(f"# {line}" for line in comments), *(f"{key}: {_value(value)}" for key, value in keys.items())])


def _value(value: Any) -> str:
    """JSON is YAML, except that YAML 1.1 takes 1e-05 for a text: it wants 1.0e-05."""
    text = json.dumps(value)
    return re.sub(r"^(-?\d+)(e)", r"\1.0\2", text) if isinstance(value, float) else text
