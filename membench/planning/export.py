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
from membench.planning.blueprint import source_name
from optimizers.apollo import SCALES
from reports import plans
from reports.names import printable
from reports.table import Row, size_text
from tasks.models.packaged import PACKAGED
from tasks.models.source import PREFIX

Document = Mapping[str, Any]
Keys = dict[str, Any]
CAUSAL, YOURS = "AutoModelForCausalLM", "YOURS"

# By method: what is set whatever its hyper-parameters are, and the tool's names of those.
# LLaMA-Factory's GaLore and APOLLO refuse `adamw_torch_fused`, which is transformers' default.
FACTORY: dict[str, tuple[Keys, dict[str, str]]] = {
    "adafactor": ({"finetuning_type": "full", "optim": "adafactor"}, {}),
    "adam-mini": ({"finetuning_type": "full", "use_adam_mini": True}, {}),
    "adamw": ({"finetuning_type": "full", "optim": "adamw_torch"}, {}),
    "adamw8bit": ({"finetuning_type": "full", "optim": "adamw_bnb_8bit"}, {}),
    "apollo": (
        {"finetuning_type": "full", "use_apollo": True, "optim": "adamw_torch"},
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
        {"finetuning_type": "full", "use_galore": True, "optim": "adamw_torch"},
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
    "muon": ({"finetuning_type": "full", "use_muon": True}, {}),
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
EAGER: dict[str, Keys] = {"llamafactory": {"flash_attn": "disabled"}, "axolotl": {"eager_attention": True}}
# The training arguments' own, which LLaMA-Factory and axolotl take unless told, for methods with Adam's moments.
OF_ARGUMENTS: Keys = {"betas": (0.9, 0.999), "eps": 1e-8}
# LLaMA-Factory's keys for a dtype, without which trained weights become fp32 (not BAdam's), and others stay as saved.
PRECISION = {"full": {"bfloat16": "pure_bf16"}, "lora": {"bfloat16": "bf16", "float16": "fp16"}}
ALONE = {"use_badam", "galore_layerwise", "apollo_layerwise"}  # what it refuses in several processes
TWO_MODELS = "The reference is a second model in memory, which the plan has not."


def export(document: Document, tool: str) -> str:
    """The configuration for `tool` of the method that leaves most room, of those that fit where there is a budget.

    Raises:
        ValueError: none fits, or the tool doesn't have the method or the loss.
    """
    row, setup = _winner(document), document["setup"]
    if tool == "trainer" and setup["task"]:
        raise ValueError(f"--export trainer: its Trainer has no loss for {setup['task']}: use --export trl")
    if tool != "trainer" and setup["auto_class"] != CAUSAL:
        raise ValueError(f"--export {tool}: it trains causal language models, not {setup['model']}: use trainer")
    return {"trainer": _code, "trl": _code, "llamafactory": _factory, "axolotl": _axolotl}[tool](document, row, tool)


def _winner(document: Document) -> Row:
    rows = [row for row in document["rows"] if row["fits"] is not False]
    if not rows:
        raise ValueError(f"--export: nothing fits into {plans.budget_text(document)}, so there is nothing to export")
    return min(rows, key=lambda row: row["estimated_total_bytes"])


def _heading(document: Document, row: Row) -> list[str]:
    setup = document["setup"]
    budget = f", of {plans.budget_text(document)}" if document["budget_bytes"] else ""
    total = size_text(row["estimated_total_bytes"], plans.unit_of(document["budget_bytes"]))
    planned = f"{row['method']} on {setup['model']}: planned {total}{budget}."
    missing = [f"{setup['model']} has no weights: give a model of its kind."] if _model(setup) == YOURS else []
    return [planned, *missing]


def _model(setup: Mapping[str, Any]) -> str:
    """The folder or hub id that a tool can load; built-in models have no weights."""
    name = source_name(setup["model"])
    return YOURS if name.startswith(PREFIX) or name in PACKAGED else name


def _micro_batch(setup: Mapping[str, Any]) -> Keys:
    parts = setup["gradient_accumulation_steps"]
    return {"per_device_train_batch_size": setup["batch_size"] // parts, "gradient_accumulation_steps": parts}


def _unlike(row: Row) -> Keys:
    """The hyper-parameters that aren't the method's own defaults."""
    default = optimizers.resolve(optimizers.split(row["method"])[0])
    return {key: value for key, value in row["hyperparameters"].items() if value != default[key]}


# ---- code: the methods are membench's own


def _code(document: Document, row: Row, tool: str) -> str:
    setup, values = document["setup"], row["hyperparameters"]
    method, is_trl = optimizers.split(row["method"])[0], tool == "trl"
    kind = {None: "SFT", "dpo": "DPO"}[setup["task"]]
    config, base = (f"{kind}Config", f"{kind}Trainer") if is_trl else ("TrainingArguments", "MethodTrainer")
    given = {**_micro_batch(setup), **{theirs: values[ours] for ours, theirs in SHARED.items() if ours in values}}
    notes = []
    if setup["checkpointing"]:
        given |= {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    if is_trl:  # whose own defaults are checkpointing and autocast
        given |= {"max_length": setup["sequence_length"], "bf16": False}
        given.setdefault("gradient_checkpointing", False)
    else:
        notes += [f"Cut texts to {setup['sequence_length']} tokens when you tokenize: TrainingArguments can't say so."]
    if is_trl:
        notes += [
            "TRL computes the loss in pieces of its own, not from all logits: its head needs more or less memory."
        ]
    if kind == "DPO":
        given["precompute_ref_log_probs"] = True  # no second model; under FSDP one that is dropped before training
    if values.get("in_backward") or method in ("lomo", "adalomo", "mezo"):
        given["max_grad_norm"] = 0.0
        notes += ["It has no gradients to clip after the backward pass, nor to accumulate."]
    if setup["gpus"] > 1:
        given |= {"fsdp": True} if _is_sharded(setup) else {}
        notes += [f"Start it in {setup['gpus']} processes: torchrun --nproc-per-node {setup['gpus']}."]
    kwargs = {key: value for key, value in _unlike(row).items() if key not in SHARED}
    loaded = {"attn_implementation": setup["attention"]}
    loaded |= {"trust_remote_code": True} if setup["trust_remote_code"] else {}
    notes += _levers(setup, {"loss_chunks": False} if is_trl else {})
    lines = [
        *_commented([*_heading(document, row), *notes]),
        "import torch",
        f"from transformers import {setup['auto_class']}{'' if is_trl else ', TrainingArguments'}",
        *([f"from trl import {config}, {base}"] if is_trl else []),
        "",
        "from membench import MethodTrainer",
        "",
        *(["", f"class Trainer(MethodTrainer, {base}):", "    pass", "", ""] if is_trl else []),
        f"model = {setup['auto_class']}.from_pretrained(",
        f"    {_model(setup)!r},",
        f"    dtype=torch.{setup['dtype']},",
        *(f"    {key}={value!r}," for key, value in loaded.items()),
        ")",
        f"args = {config}(",
        '    output_dir="output",',
        *(f"    {key}={value!r}," for key, value in given.items()),
        ")",
        f"trainer = {'Trainer' if is_trl else 'MethodTrainer'}(",
        "    model,",
        "    args=args,",
        "    train_dataset=...,  # yours",
        f"    method={method!r},",
        f"    method_kwargs={kwargs!r},",
        ")",
        "trainer.train()",
    ]
    return "\n".join(lines)


def _is_sharded(setup: Mapping[str, Any]) -> bool:
    return setup["gpus"] > 1 and setup["strategy"] == "fsdp2"


def _levers(setup: Mapping[str, Any], more: Mapping[str, bool] | None = None) -> list[str]:
    """What of the plan's step a tool doesn't do, in words; `more` says it of further options, or otherwise."""
    used = {
        "loss_chunks": setup["loss_chunks"] > 1,
        "offload_activations": setup["offload_activations"],
        **(more or {}),
    }
    names = [_flag(name, setup[name]) for name, is_used in used.items() if is_used]
    every = setup["checkpointing_every"]  # the tools recompute each layer
    return [
        *([f"Not expressed, so it needs more than planned: {', '.join(names)}."] if names else []),
        *([f"Not expressed, so it needs less than planned: --checkpointing-every {every}."] if every > 1 else []),
    ]


def _flag(name: str, value: Any) -> str:
    """An option as it was given: `--loss-chunks 8`, `--offload-activations`."""
    flag = f"--{name.replace('_', '-')}"
    return flag if value is True else f"{flag} {value}"


# ---- YAML


def _factory(document: Document, row: Row, tool: str) -> str:
    setup = document["setup"]
    keys: Keys = {"model_name_or_path": _model(setup), "stage": "dpo" if setup["task"] else "sft", "do_train": True}
    own, unknown = _own_keys("LLaMA-Factory", FACTORY, row, setup["dtype"])
    if setup["gpus"] > 1 and (alone := ALONE & {key for key, value in own.items() if value}):
        raise ValueError(f"--export: LLaMA-Factory refuses {alone.pop()} on {setup['gpus']} GPUs: use trainer or trl")
    keys |= own
    keys |= {"cutoff_len": setup["sequence_length"], **_micro_batch(setup)}
    kind, dtype = own["finetuning_type"], setup["dtype"]
    precision = PRECISION[kind].get(dtype)
    casts = kind == "full" and "use_badam" not in own and precision is None
    keys |= {precision: True} if precision else {}
    if not (precision or casts):
        unknown += [f"Not expressed: --dtype {dtype}; the model is loaded in the dtype of its checkpoint."]
    keys |= {"use_reentrant_gc": False} if setup["checkpointing"] else {"disable_gradient_checkpointing": True}
    keys |= {"dataset": "YOURS", "template": "YOURS", "output_dir": "output"}
    unknown += [TWO_MODELS] if setup["task"] == "dpo" and kind == "full" else []
    more = {"dtype": casts and dtype != "float32"}
    return _yaml(_comments(document, row, unknown, more), keys | _loading(setup, tool))


def _axolotl(document: Document, row: Row, tool: str) -> str:
    setup = document["setup"]
    sizes = _micro_batch(setup)
    keys: Keys = {"base_model": _model(setup), **({"rl": "dpo"} if setup["task"] else {})}
    own, unknown = _own_keys("axolotl", AXOLOTL, row, setup["dtype"])
    keys |= own
    keys |= {
        "sequence_len": setup["sequence_length"],
        "micro_batch_size": sizes["per_device_train_batch_size"],
        "gradient_accumulation_steps": sizes["gradient_accumulation_steps"],
    }
    keys |= {"bf16": setup["dtype"] == "bfloat16"}  # its default, "auto", is true on most GPUs
    keys |= {"float16": True} if setup["dtype"] == "float16" else {}
    keys["gradient_checkpointing"] = setup["checkpointing"]
    keys |= {"gradient_checkpointing_kwargs": {"use_reentrant": False}} if setup["checkpointing"] else {}
    kind = "chat_template.default" if setup["task"] else "chat_template"
    keys |= {"datasets": [{"path": "YOURS", "type": kind}], "output_dir": "output"}
    unknown += [TWO_MODELS] if setup["task"] == "dpo" and "adapter" not in own else []
    return _yaml(_comments(document, row, unknown), keys | _loading(setup, tool))


def _comments(document: Document, row: Row, notes: list[str], more: Mapping[str, bool] | None = None) -> list[str]:
    setup = document["setup"]
    return [*_heading(document, row), *notes, *_levers(setup, {"gpus": _is_sharded(setup), **(more or {})})]


def _own_keys(
    tool: str, table: Mapping[str, tuple[Keys, dict[str, str]]], row: Row, dtype: str
) -> tuple[Keys, list[str]]:
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
    values, names = _filled(row["hyperparameters"]), SHARED | names
    told = {theirs: values[ours] for ours, theirs in names.items() if values.get(ours) is not None}
    adam = _adam(values)
    apart = {*names, "seed"} | ({*OF_ARGUMENTS} if adam is not None else set())
    left = {k: v for k, v in _unlike(row).items() if k not in apart}
    left |= {ours: None for ours in names if ours in values and values[ours] is None}  # it has a default of its own
    if values.get("master_weights") and dtype != "float32" and method not in ("badam", "lora", "qlora"):
        left["master_weights"] = True
    unknown = ", ".join(f"{key}={value}" for key, value in left.items())
    notes = [f"{tool} runs its own {method}: its other hyper-parameters, and what it needs, may differ from the plan."]
    return fixed | told | (adam or {}), notes + ([f"Not expressed: {unknown}."] if unknown else [])


def _adam(values: Keys) -> Keys | None:
    """Betas and eps of a method with Adam's moments where they aren't the arguments' own; None for one without."""
    if "betas" not in values:
        return None
    asked = {key: values[key] for key in OF_ARGUMENTS if values[key] != OF_ARGUMENTS[key]}
    betas = {"adam_beta1": asked["betas"][0], "adam_beta2": asked["betas"][1]} if "betas" in asked else {}
    return betas | ({"adam_epsilon": asked["eps"]} if "eps" in asked else {})


def _filled(values: Mapping[str, Any]) -> Keys:
    """Hyper-parameters with what a method takes for None, where that is one number for the whole model."""
    filled = dict(values)
    if "alpha" in values and values["alpha"] is None:
        filled["alpha"] = 4 * values["rank"]
    if "scale_type" in values:
        filled["scale"] = values["scale"] or SCALES[values["scale_type"]]
        filled["rank"] = values["rank"] or (1 if values["scale_type"] == "tensor" else None)
    return filled


def _loading(setup: Mapping[str, Any], tool: str) -> Keys:
    """How the model is loaded, where that isn't the tool's default."""
    eager = EAGER[tool] if setup["attention"] == "eager" else {}
    return eager | ({"trust_remote_code": True} if setup["trust_remote_code"] else {})


def _commented(lines: list[str]) -> list[str]:
    """Comments of Python and YAML, which a model's name that goes on on the next line would end."""
    return [f"# {printable(line)}" for line in lines]


def _yaml(comments: list[str], keys: Keys) -> str:
    return "\n".join([*_commented(comments), *(f"{key}: {_value(value)}" for key, value in keys.items())])


def _value(value: Any) -> str:
    """JSON is YAML, but YAML 1.1 takes 1e-05 for a text, and wants 1.0e-05; and of a sign it knows no two halves."""
    text = json.dumps(value, ensure_ascii=False)
    text = "".join(sign if sign.isprintable() else _by_number(ord(sign)) for sign in text)
    return re.sub(r"^(-?\d+)(e)", r"\1.0\2", text) if isinstance(value, float) else text


def _by_number(sign: int) -> str:
    return f"\\u{sign:04x}" if sign < 0x10000 else f"\\U{sign:08x}"
