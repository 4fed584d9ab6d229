"""`plan --export`: what it prints can be read by the tool, with its own names of keys."""

import ast
from dataclasses import fields

import pytest
import transformers
import yaml
from transformers.training_args import OptimizerNames

import optimizers
from membench.planning.export import AXOLOTL, CAUSAL, FACTORY, TWO_MODELS, export
from membench.training.hf_trainer import _from_arguments

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
    "attention": "sdpa",
    "trust_remote_code": False,
    "gpus": 1,
    "strategy": "fsdp2",
    "auto_class": "AutoModelForCausalLM",
}


def document(*methods, setup=SETUP, **values):
    rows = [
        {
            "method": name,
            "fits": True,
            "estimated_total_bytes": 2**34 + place,
            "hyperparameters": optimizers.resolve(name, **values),
        }
        for place, name in enumerate(methods)
    ]
    return {"setup": setup, "budget_bytes": 24 * 2**30, "rows": rows}


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


def calls_in(text):
    tree = ast.parse(text)
    return {getattr(n.func, "id", getattr(n.func, "attr", "")): n for n in ast.walk(tree) if isinstance(n, ast.Call)}


def values_in(call):
    return {k.arg: ast.literal_eval(k.value) for k in call.keywords if isinstance(k.value, ast.Constant | ast.Dict)}


@pytest.mark.parametrize("name", [*optimizers.available(), "badam:weight_decay=0.25:states=8bit", "apollo:rank=3"])
@pytest.mark.parametrize("tool", ["trainer", "trl"])
def test_the_code_trains_with_the_hyper_parameters_of_the_plan(name, tool):
    planned = document(name)
    calls = calls_in(export(planned, tool))
    given = values_in(calls["SFTConfig" if tool == "trl" else "TrainingArguments"])
    known = {field.name for field in fields(transformers.TrainingArguments)}
    given = {key: value for key, value in given.items() if key in known} | {"use_cpu": True}
    made = values_in(calls["Trainer" if tool == "trl" else "MethodTrainer"])
    args = transformers.TrainingArguments(**given)
    method = optimizers.get(made["method"])
    trained = optimizers.resolve(made["method"], **_from_arguments(method, args) | made["method_kwargs"])
    values = planned["rows"][0]["hyperparameters"]
    assert {**trained, "seed": 0} == {**values, "seed": 0}  # the arguments' own


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trls_own_defaults_dont_change_the_planned_step(checkpointing):
    trl = pytest.importorskip("trl")
    for task, name in ((None, "SFT"), ("dpo", "DPO")):
        setup = {**SETUP, "checkpointing": checkpointing, "task": task}
        given = values_in(calls_in(export(document("badam", setup=setup), "trl"))[f"{name}Config"])
        args = getattr(trl, f"{name}Config")(use_cpu=True, **given)
        assert (args.gradient_checkpointing, args.bf16, args.max_length) == (checkpointing, False, 1024)


def test_the_code_loads_a_model_that_can_be_loaded_as_it_was_planned():
    setup = {**SETUP, "model": "roberta-base", "auto_class": "AutoModelForSequenceClassification"}
    setup |= {"attention": "eager", "trust_remote_code": True}
    text = export(document("lora", setup=setup), "trainer")
    loaded = calls_in(text)["from_pretrained"]
    assert loaded.func.value.id == "AutoModelForSequenceClassification" and loaded.args[0].value == "YOURS"
    assert "# roberta-base has no weights: give a model of its kind." in text
    assert values_in(loaded) == {"attn_implementation": "eager", "trust_remote_code": True}
    with pytest.raises(ValueError, match="--export axolotl: it trains causal language models, not roberta-base"):
        export(document("lora", setup=setup), "axolotl")
    keys = yaml.safe_load(export(document("lora", setup={**setup, "auto_class": CAUSAL}), "llamafactory"))
    assert (keys["model_name_or_path"], keys["flash_attn"], keys["trust_remote_code"]) == ("YOURS", "disabled", True)


@pytest.mark.parametrize("name", ["one\nimport this", "one\rimport this", "smile \U0001f600", "a\x85b\u2028c: #d"])
def test_whatever_a_models_folder_is_called_is_a_text_and_no_code(name):
    setup = {**SETUP, "model": name}
    for tool in ("llamafactory", "axolotl"):
        keys = yaml.safe_load(export(document("lora", setup=setup), tool))
        assert keys["model_name_or_path" if tool == "llamafactory" else "base_model"] == name
    text = export(document("lora", setup=setup), "trainer")
    assert calls_in(text)["from_pretrained"].args[0].value == name and "\nimport this" not in text.replace("\r", "\n")


def test_preferences_are_trained_by_a_trainer_of_preferences():
    text = export(document("badam", setup={**SETUP, "task": "dpo"}), "trl")
    assert "class Trainer(MethodTrainer, DPOTrainer)" in text
    with pytest.raises(ValueError, match="its Trainer has no loss for dpo: use --export trl"):
        export(document("badam", setup={**SETUP, "task": "dpo"}), "trainer")


def test_a_preferences_reference_is_not_a_second_model_or_the_comment_says_that_it_is():
    setup = {**SETUP, "task": "dpo"}
    text = export(document("badam", setup=setup), "trl")
    assert values_in(calls_in(text)["DPOConfig"])["precompute_ref_log_probs"] is True and TWO_MODELS not in text
    for tool, kind in (("llamafactory", "adamw"), ("axolotl", "adamw")):
        assert f"# {TWO_MODELS}" in export(document(kind, setup=setup), tool)
        assert TWO_MODELS not in export(document(kind), tool)
        for adapters in ("lora", "qlora"):  # without which the same model is the reference
            assert TWO_MODELS not in export(document(adapters, setup=setup), tool)
    pairs = yaml.safe_load(export(document("lora", setup=setup), "axolotl"))
    assert pairs["datasets"][0]["type"] == "chat_template.default"


def test_weights_have_the_planned_dtype_or_the_comment_says_that_they_have_not():
    def told(method, dtype, tool):
        text = export(document(method, setup={**SETUP, "loss_chunks": 1, "dtype": dtype}), tool)
        return yaml.safe_load(text), text

    # axolotl's default of bf16 is "auto": without a key, fp32 would be bf16 on most GPUs
    for dtype, expected in (("bfloat16", (True, None)), ("float32", (False, None)), ("float16", (False, True))):
        keys, text = told("adamw", dtype, "axolotl")
        assert (keys["bf16"], keys.get("float16")) == expected and "--dtype" not in text
    precisions = ("pure_bf16", "bf16", "fp16")
    for method, dtype, key in (
        ("adamw", "bfloat16", "pure_bf16"),
        ("lora", "bfloat16", "bf16"),
        ("lora", "float16", "fp16"),
        ("adamw", "float32", None),  # trained weights are cast to it
    ):
        keys, text = told(method, dtype, "llamafactory")
        assert [one for one in precisions if one in keys] == ([key] if key else []) and "--dtype" not in text
    for method, dtype in (("lora", "float32"), ("qlora", "float32"), ("badam", "float32"), ("badam", "float16")):
        assert f"# Not expressed: --dtype {dtype}; the model is loaded" in told(method, dtype, "llamafactory")[1]
    assert "it needs more than planned: --dtype float16." in told("adamw", "float16", "llamafactory")[1]


@pytest.mark.parametrize("method", ["galore", "apollo"])
def test_llamafactorys_low_rank_methods_get_the_one_optimizer_that_they_take(method):
    assert transformers.TrainingArguments(use_cpu=True).optim != "adamw_torch"  # so it can't be left out
    assert yaml.safe_load(export(document(method), "llamafactory"))["optim"] == "adamw_torch"


def test_adams_betas_and_eps_are_told_where_they_are_not_the_arguments_own():
    for tool in ("llamafactory", "axolotl"):
        assert not {"adam_beta1", "adam_beta2", "adam_epsilon"} & set(yaml.safe_load(export(document("adamw"), tool)))
        text = export(document("adamw", betas=(0.8, 0.95), eps=1e-6), tool)
        keys = yaml.safe_load(text)
        assert (keys["adam_beta1"], keys["adam_beta2"], keys["adam_epsilon"]) == (0.8, 0.95, 1e-6)
        assert "betas" not in text and "eps=" not in text
    own = yaml.safe_load(export(document("apollo"), "llamafactory"))  # its default is the method's, not the arguments'
    assert own["adam_epsilon"] == optimizers.resolve("apollo")["eps"] == 1e-6
    assert "adam_epsilon" not in yaml.safe_load(export(document("adafactor"), "llamafactory"))  # eps isn't Adam's


def test_masters_are_missing_only_where_weights_are_not_fp32_themselves():
    missing = "# Not expressed: master_weights=True."
    assert missing in export(document("adamw"), "axolotl")
    assert missing not in export(document("adamw", setup={**SETUP, "dtype": "float32"}), "axolotl")


def test_parameters_that_are_always_trained_are_said_to_be_missing():
    for method, tool in (("badam", "llamafactory"), ("lora", "llamafactory"), ("lora", "axolotl")):
        assert "always_train=('lm_head',)." in export(document(method, always_train=("lm_head",)), tool)


def test_what_llamafactory_refuses_in_several_processes_is_refused():
    setup = {**SETUP, "gradient_accumulation_steps": 1, "gpus": 2}
    for method, values, key in (
        ("badam", {}, "use_badam"),
        ("galore", {"in_backward": True}, "galore_layerwise"),
        ("apollo", {"in_backward": True}, "apollo_layerwise"),
    ):
        for strategy in ("fsdp2", "replicate"):
            with pytest.raises(ValueError, match=f"LLaMA-Factory refuses {key} on 2 GPUs: use trainer or trl"):
                export(document(method, setup={**setup, "strategy": strategy}, **values), "llamafactory")
        assert "MethodTrainer" in export(document(method, setup=setup, **values), "trl")
    assert yaml.safe_load(export(document("galore", setup=setup), "llamafactory"))["galore_layerwise"] is False


def test_of_trls_loss_the_code_does_not_say_that_chunks_are_missing():
    text = export(document("badam"), "trl")  # whose head has pieces of its own
    assert "--loss-chunks" not in text and "# TRL computes the loss in pieces of its own" in text
    assert "--loss-chunks 8" in export(document("badam"), "trainer")


def test_what_of_the_planned_step_is_missing_is_said_with_what_it_does_to_memory():
    setup = {**SETUP, "checkpointing_every": 2, "offload_activations": True}
    for tool in ("trainer", "llamafactory"):
        text = export(document("lora", setup=setup), tool)
        assert "so it needs more than planned: --loss-chunks 8, --offload-activations." in text
        assert "so it needs less than planned: --checkpointing-every 2." in text  # each layer's activations go


def test_shards_are_expressed_or_said_to_be_missing():
    sharded = document("adamw", setup={**SETUP, "gpus": 4})
    text = export(sharded, "trainer")
    assert values_in(calls_in(text)["TrainingArguments"])["fsdp"] is True and "torchrun --nproc-per-node 4" in text
    assert "needs more than planned: --loss-chunks 8, --gpus 4." in export(sharded, "llamafactory")
    replicas = document("adamw", setup={**SETUP, "gpus": 4, "strategy": "replicate"})
    assert "fsdp" not in values_in(calls_in(export(replicas, "trainer"))["TrainingArguments"])
    assert "--gpus" not in export(replicas, "llamafactory")


def test_what_the_methods_name_says_is_told_or_said_to_be_missing():
    assert "# Not expressed: states=8bit." in export(document("badam:states=8bit"), "llamafactory")
    assert "max_grad_norm=0.0" in export(document("lomo:lr=0.01"), "trainer")
    text = export(document("apollo"), "llamafactory")  # whose own defaults are a rank of 16 and a scale of 32
    assert yaml.safe_load(text)["apollo_scale"] == 1.0 and "# Not expressed: rank=None." in text
    keys = yaml.safe_load(export(document("apollo", scale_type="tensor"), "llamafactory"))
    assert (keys["apollo_rank"], keys["apollo_scale"]) == (1, 128.0)


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
