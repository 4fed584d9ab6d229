"""`plan --export`: what it prints can be read by the tool, with its own names of keys."""

import ast
from dataclasses import fields

import pytest
import transformers
import yaml
from transformers.training_args import OptimizerNames

import optimizers
from membench.planning.export import AXOLOTL, FACTORY, export

SETUP = {
    "model": "meta-llama/Llama-3.1-8B",
    "batch_size": 8,
    "gradient_accumulation_steps": 4,
    "sequence_length": 1024,
    "dtype": "bfloat16",
    "checkpointing": True,
    "checkpointing_every": 1,
    "loss_chunks": 8,
    "offload_activations": False,
    "task": None,
}


def document(*methods, **values):
    rows = [
        {
            "method": name,
            "fits": True,
            "estimated_total_bytes": 2**34 + place,
            "hyperparameters": optimizers.resolve(name, **values),
        }
        for place, name in enumerate(methods)
    ]
    return {"setup": SETUP, "budget_bytes": 24 * 2**30, "rows": rows}


@pytest.mark.parametrize("method", sorted(FACTORY))
def test_llamafactory_gets_yaml_with_the_method_and_the_micro_batch(method):
    text = export(document(method), "llamafactory")
    keys = yaml.safe_load(text)
    assert keys["per_device_train_batch_size"] == 2 and keys["gradient_accumulation_steps"] == 4
    assert keys["cutoff_len"] == 1024 and keys["learning_rate"] == optimizers.resolve(method)["lr"]
    assert keys["finetuning_type"] == ("lora" if "lora" in method else "full")
    assert "Not expressed, so it needs more than planned: --loss-chunks 8." in text


def test_hyper_parameters_have_the_tools_names():
    keys = yaml.safe_load(export(document("badam", switch_every=77, order="descending"), "llamafactory"))
    assert (keys["use_badam"], keys["badam_switch_interval"], keys["badam_switch_mode"]) == (True, 77, "descending")
    keys = yaml.safe_load(export(document("qlora"), "axolotl"))
    assert (keys["adapter"], keys["load_in_4bit"], keys["lora_r"]) == ("qlora", True, 64)
    keys = yaml.safe_load(export(document("lora", rank=8), "axolotl"))
    assert (keys["lora_r"], keys["lora_alpha"], keys["micro_batch_size"]) == (8, 32, 2)


def test_optimizers_are_those_that_transformers_knows():
    known = {name.value for name in OptimizerNames} | {"muon"}  # axolotl's own
    for table, key in ((FACTORY, "optim"), (AXOLOTL, "optimizer")):
        assert {fixed[key] for fixed, _ in table.values() if key in fixed} <= known


@pytest.mark.parametrize("method", optimizers.available())
@pytest.mark.parametrize("tool", ["trainer", "trl"])
def test_code_gives_every_method_to_the_trainer_with_arguments_that_exist(method, tool):
    tree = ast.parse(export(document(method), tool))
    calls = {node.func.id: node for node in ast.walk(tree) if isinstance(node, ast.Call) and hasattr(node.func, "id")}
    given = {keyword.arg for keyword in calls["SFTConfig" if tool == "trl" else "TrainingArguments"].keywords}
    assert given - {"max_length"} <= {field.name for field in fields(transformers.TrainingArguments)}
    made = calls["Trainer" if tool == "trl" else "MethodTrainer"]
    assert {keyword.arg: keyword.value for keyword in made.keywords}["method"].value == method


def test_what_the_method_was_changed_to_is_in_the_code_and_what_a_tool_cant_be_told_in_a_comment():
    assert "method_kwargs={'states': '8bit'}" in export(document("badam", states="8bit"), "trainer")
    assert "# Not expressed: states=8bit." in export(document("badam", states="8bit"), "llamafactory")
    assert "max_grad_norm=0.0" in export(document("galore", in_backward=True), "trainer")


def test_the_method_that_leaves_most_room_is_exported_and_what_a_tool_lacks_is_refused():
    assert "sgd on meta-llama" in export(document("sgd", "lora"), "axolotl")
    with pytest.raises(
        ValueError, match="--export: axolotl doesn't have badam, only adafactor, .*trainer and trl take"
    ):
        export(document("badam"), "axolotl")
    nothing = document("sgd")
    nothing["rows"][0]["fits"] = False
    with pytest.raises(ValueError, match="nothing fits into 24.00 GiB"):
        export(nothing, "trl")
