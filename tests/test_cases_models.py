"""Users' models: a score doesn't depend on padding, and what a folder or its configuration throws is one sentence."""

import json
import os
import re
from pathlib import Path

import peft
import pytest
import tokenizers
import torch
import transformers
from architectures import ARCHITECTURES
from letters import SPECIAL, folder, labelled, letters
from safetensors.torch import load_file, save_file

import tasks
from membench.planning.blueprint import Blueprint
from membench.planning.workload import Workload
from tasks.instruct import gsm8k
from tasks.instruct.examples import collate
from tasks.models.source import Source, longest_sequence
from tasks.models.tokenization import _files, load_tokenizer

TEXTS = [f"{'abcdefghij'[n % 10] * (1 + n % 12)} and {'xyz'[n % 3] * (n % 7)}" for n in range(40)]
LENGTH = 24


def classify(model, data, **given):
    return tasks.create("classify", model=model, data=data, **{"batch_size": 4, "sequence_length": LENGTH, **given})


def expect_independent_of_neighbours(task):
    """A text alone, padded, and in a batch of longer ones has the same logits."""
    model, pairs = task.build_model().eval(), [(text, "") for text in TEXTS[:8]]
    together = task.classifier.logits(model, pairs)
    alone = torch.cat([task.classifier.logits(model, [pair]) for pair in pairs])
    with torch.no_grad():
        inputs = task.classifier.encoder.batch(pairs)
        padded = model(**inputs).logits
    assert inputs["attention_mask"].sum(1).max() < LENGTH  # every one is padded
    for other in (together, padded):
        torch.testing.assert_close(other, alone, rtol=1e-3, atol=1e-5)
    assert (alone - alone.mean(0)).abs().max() > 1e-3  # and they tell texts apart


# ---- S4: padding


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("without", [(), ("pad_token",), ("pad_token", "eos_token")], ids=["pad", "eos", "neither"])
def test_s4_padding_changes_no_logits_whatever_the_tokenizer_pads_with(name, without, tmp_path):
    model = ARCHITECTURES[name].build().base_model
    path = folder(tmp_path / "model", model, letters(without=without))
    expect_independent_of_neighbours(classify(path, labelled(tmp_path / "a.jsonl", TEXTS)))


@pytest.mark.parametrize("name", [name for name, one in ARCHITECTURES.items() if one.is_causal])
@pytest.mark.parametrize("pad", [0, 1, 7, -1, None])
def test_s4_nor_whatever_the_configuration_of_a_causal_model_calls_padding(name, pad, tmp_path):
    model = ARCHITECTURES[name].build().base_model
    path = folder(tmp_path / "model", model, letters(without=("pad_token",)), pad_token_id=pad)
    expect_independent_of_neighbours(classify(path, labelled(tmp_path / "a.jsonl", TEXTS)))


SMALL = {"vocab_size": 40, "num_labels": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WIDE = {**SMALL, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
SEQ2SEQ = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
HEADS = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 64}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
OTHERS = {  # that pool, pad or number positions in ways of their own
    "albert": {**WIDE, "embedding_size": 16},
    "bart": {**SMALL, **SEQ2SEQ, **HEADS},
    "bloom": {**SMALL, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "deberta-v2": {**WIDE, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "electra": {**WIDE, "embedding_size": 16},
    "fnet": {key: value for key, value in WIDE.items() if key != "num_attention_heads"},
    "funnel": {**SMALL, "block_sizes": [1, 1], "d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 48},
    "modernbert": {**WIDE, "cls_token_id": 1, "sep_token_id": 2, "global_attn_every_n_layers": 2, "local_attention": 8},
    "opt": {**WIDE, "ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64},
    "t5": {**SMALL, **T5},
    "xlnet": {**SMALL, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48},
}


def build(name):
    config = transformers.AutoConfig.for_model(name, **OTHERS[name])
    torch.manual_seed(0)
    return transformers.AutoModelForSequenceClassification.from_config(config)


@pytest.mark.parametrize("name", OTHERS)
def test_s4_nor_those_of_models_that_pool_or_mix_in_ways_of_their_own(name, tmp_path):
    path = folder(tmp_path / "model", build(name), letters(ends=True))
    task = classify(path, labelled(tmp_path / "a.jsonl", TEXTS))
    if name in ("fnet", "funnel"):  # they mix padding in: every text is scored at one length
        model, pairs = task.build_model(), [(text, "") for text in TEXTS[:8]]
        alone = torch.cat([task.classifier.logits(model, [pair]) for pair in pairs])
        torch.testing.assert_close(task.classifier.logits(model, pairs), alone, rtol=1e-4, atol=1e-5)
    else:
        with torch.no_grad():
            for p in (model := task.build_model()).parameters():
                p.mul_(3)  # so that texts differ
        task.build_model = lambda: model
        expect_independent_of_neighbours(task)
    assert torch.isfinite(task.loss(task.build_model(), task.batch(0)))


# ---- W8: the configuration of the base model, and its tokenizer

ODD = {
    "several labels": {"problem_type": "multi_label_classification"},
    "regression": {"problem_type": "regression", "id2label": {"0": "x"}, "label2id": {"x": 0}},
    "tuples": {"return_dict": False},
    "everything": {"output_hidden_states": True, "output_attentions": True},
    "names": {"id2label": {"0": "a", "1": "b", "2": "c"}, "label2id": {"a": 0, "b": 1, "c": 2}},
}


@pytest.mark.parametrize("name", ["bert", "llama"])
@pytest.mark.parametrize("odd", ODD)
def test_w8_what_the_base_model_was_used_for_changes_nothing(name, odd, tmp_path):
    model, data = ARCHITECTURES[name].build().base_model, labelled(tmp_path / "a.jsonl", TEXTS)
    plain = classify(folder(tmp_path / "plain", model, letters()), data)
    task = classify(folder(tmp_path / "odd", model, letters(), **ODD[odd]), data)
    out = task.build_model()(**task.batch(0))
    torch.testing.assert_close(out.loss, plain.loss(plain.build_model(), plain.batch(0)))
    assert out.logits.shape == (4, 2) and not {"hidden_states", "attentions"} & set(out)


def gappy():
    """A tokenizer of letters whose `z` has a high number, and nothing the numbers below."""
    values = json.loads(letters().backend_tokenizer.to_str())
    values["model"]["vocab"]["z"] = 60
    backend = tokenizers.Tokenizer.from_str(json.dumps(values))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL)


def test_ids_beyond_as_many_as_a_tokenizer_has_get_an_embedding_or_are_refused(tmp_path):
    data = tmp_path / "a.jsonl"
    rows = [{"text": f"zebra {text * 5}", "label": n % 2} for n, text in enumerate(TEXTS * 3)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder(tmp_path / "causal", ARCHITECTURES["llama"].build(), gappy())
    task = tasks.create("c4", model=path, data=str(data), batch_size=2, sequence_length=16)
    model = task.build_model()
    assert "grew from 40 to 61 entries" in task.provenance["notes"] and task.evaluate(model)["loss"] > 0
    path = folder(tmp_path / "encoder", ARCHITECTURES["bert"].build().base_model, gappy())
    with pytest.raises(ValueError, match=r"the tokenizer has 61 entries, but .* has only 40 embeddings"):
        classify(path, str(data))


@pytest.mark.parametrize("grown", [False, True], ids=["as it is", "with a longer tokenizer"])
def test_a_checkpoints_own_head_is_kept_though_its_configuration_ties_it(grown, tmp_path):
    model, tokenizer = ARCHITECTURES["llama"].build(), letters()
    tokenizer.add_tokens([f"more{number}" for number in range(20 * grown)])
    path = folder(tmp_path / "model", model, tokenizer, tie_word_embeddings=True)
    rows = [{"text": text * 5} for text in TEXTS * 3]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = tasks.create("c4", model=path, data=str(tmp_path / "a.jsonl"), batch_size=2, sequence_length=16)
    built = task.build_model()
    assert torch.equal(built.lm_head.weight[:40], model.lm_head.weight)
    assert not built.config.tie_word_embeddings
    assert "the head has weights of its own, though config.json ties it" in task.provenance["notes"]


def test_a_tokenizer_that_transformers_warns_of_is_said(tmp_path):
    """Mistral's of before transformers 5: 100,000 entries or more, beside a config.json."""
    values = json.loads(letters().backend_tokenizer.to_str())
    values["model"]["vocab"] |= {f"more{number}": number for number in range(40, 100_041)}
    backend = tokenizers.Tokenizer.from_str(json.dumps(values))
    large = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL)
    model, note = ARCHITECTURES["mistral"].build(), "the tokenizer splits words by a pattern that its publisher has"
    data = tmp_path / "a.jsonl"
    data.write_text("".join(json.dumps({"text": text * 5}) + "\n" for text in TEXTS * 3))
    for tokenizer, warned in ((large, True), (letters(), False)):
        path = folder(tmp_path / f"warned {warned}", model, tokenizer, transformers_version="4.51.0")
        task = tasks.create("c4", model=path, data=str(data), batch_size=2, sequence_length=16)
        assert (note in (task.provenance["notes"] or "")) == warned


def test_weights_that_are_there_twice_are_refused(tmp_path):
    model = ARCHITECTURES["bert"].build().base_model
    path = folder(tmp_path / "model", model, letters())
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    for file in (tmp_path / "sharded").glob("*.safetensors*"):
        file.rename(Path(path) / file.name)
    words = "the folder has its weights twice, in model.safetensors and in the files of model.safetensors.index.json"
    assert words in refusal(path, tmp_path)
    (Path(path) / "model.safetensors").unlink()
    assert classify(path, labelled(tmp_path / "a.jsonl", TEXTS)).build_model()


def test_weights_in_another_format_are_said_not_to_be_read(bert, damaged, tmp_path):
    """Those of an earlier Trainer's fine-tuning lie in pytorch_model.bin, beside what the hub had as safetensors."""
    data, copy = labelled(tmp_path / "a.jsonl", TEXTS), damaged()
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    said = "not read, since the weights are also there as safetensors: pytorch_model.bin"
    assert said in classify(str(copy), data).provenance["notes"]
    (copy / "model.safetensors").unlink()
    assert "not read" not in classify(str(copy), data).provenance["notes"]


def test_a_folder_without_a_configuration_is_refused_with_what_is_there(tmp_path):
    (tmp_path / "model").mkdir()
    for name in ("model-Q4_K_M.gguf", "model_index.json"):
        (tmp_path / "model" / name).touch()
    words = "there is no config.json, only model-Q4_K_M.gguf, model_index.json; give a folder as transformers saves it"
    assert words in refusal(tmp_path / "model", tmp_path)


NLI = ("CONTRADICTION", "NEUTRAL", "ENTAILMENT")  # as a model of MNLI has them, in this order


@pytest.mark.parametrize("family", ["classify", "superglue/cb"])
def test_a_head_that_a_checkpoint_has_keeps_its_classes_whatever_their_order_in_the_data(family, tmp_path):
    config = transformers.AutoConfig.for_model("bert", **WIDE | {"num_labels": 3})
    config.id2label, config.label2id = dict(enumerate(NLI)), {name: place for place, name in enumerate(NLI)}
    torch.manual_seed(0)
    path = folder(tmp_path / "mnli", transformers.AutoModelForSequenceClassification.from_config(config), letters())
    rows = [{"text": text, "label": NLI[number % 3].lower()} for number, text in enumerate(TEXTS)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = "demo" if "cb" in family else str(tmp_path / "a.jsonl")
    task = tasks.create(family, model=path, data=data, batch_size=4, sequence_length=LENGTH)
    model = task.build_model().eval()
    assert [name.upper() for name in model.config.id2label.values()] == list(NLI) and not task.head
    assert f"the head is the checkpoint's own, of the classes {', '.join(NLI)}" in task.provenance["notes"]
    names = ("entailment", "contradiction", "neutral") if "cb" in family else sorted(map(str.lower, NLI))
    some = (task.data.train if "cb" in family else task.data.validation)[:9]
    predicted = [names[place] for place in task.classifier.predict(model, some)]
    with torch.no_grad():
        logits = model(**task.classifier.encoder.batch([(one.first, one.second) for one in some])).logits
    assert predicted == [NLI[place].lower() for place in logits.argmax(1)]
    batch = task.classifier.batch(some)
    assert [NLI[place].lower() for place in batch["labels"]] == [names[one.label] for one in some]


def test_a_head_of_other_classes_is_said_and_gets_the_datas_names(tmp_path):
    config = transformers.AutoConfig.for_model("bert", **WIDE)
    config.id2label, config.label2id = {0: "ham", 1: "spam"}, {"ham": 0, "spam": 1}
    path = folder(tmp_path / "spam", transformers.AutoModelForSequenceClassification.from_config(config), letters())
    task = classify(path, labelled(tmp_path / "a.jsonl", TEXTS))
    assert "the head is the checkpoint's own, of the classes ham, spam" in task.provenance["notes"]
    assert task.build_model().config.id2label == {0: "0", 1: "1"}


@pytest.mark.parametrize("odd", ["tuples", "everything"])
def test_w8_nor_for_a_language_model(odd, tmp_path):
    path = folder(tmp_path / "model", ARCHITECTURES["llama"].build(), letters(), **ODD[odd])
    data = tmp_path / "a.jsonl"
    data.write_text("".join(json.dumps({"text": text * 5}) + "\n" for text in TEXTS * 3))
    task = tasks.create("c4", model=path, data=str(data), batch_size=2, sequence_length=16)
    model = task.build_model()
    assert torch.isfinite(task.loss(model, task.batch(0))) and task.evaluate(model)["loss"] > 0


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_w8_models_that_count_ends_take_their_name_in_a_text_and_pairs_beside_single_texts(name, tmp_path):
    rows = [{"text": f"{text}</s>" if n % 3 else text, "label": n % 2} for n, text in enumerate(TEXTS)]
    rows = [row | {"text2": "is it?"} if n % 4 else row for n, row in enumerate(rows)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = classify(folder(tmp_path / "model", build(name), letters(ends=True)), str(tmp_path / "a.jsonl"))
    model = task.build_model()
    for step in range(8):
        assert torch.isfinite(task.loss(model, task.batch(step)))
    assert 0 <= task.evaluate(model)["accuracy"] <= 1


@pytest.mark.parametrize("name", ["opt", "bart", "roberta", "bert", "gpt2"])
def test_w8_all_positions_of_a_model_can_be_used_and_one_more_is_refused(name, tmp_path):
    model = build(name) if name in OTHERS else ARCHITECTURES[name].build().base_model
    path = folder(tmp_path / "model", model, letters(ends=True))
    data = labelled(tmp_path / "a.jsonl", [text * 40 for text in TEXTS])
    longest = longest_sequence(model)
    task = classify(path, data, sequence_length=longest)
    assert torch.isfinite(task.loss(task.build_model(), task.batch(0)))
    assert task.batch(0)["attention_mask"].all()
    with pytest.raises(ValueError, match=f"sequence_length {longest + 1} is too long for .* {longest} positions"):
        classify(path, data, sequence_length=longest + 1)


def test_w8_positions_that_stand_in_a_table_are_counted():
    config = transformers.GPTJConfig(n_embd=32, n_layer=1, n_head=4, rotary_dim=8, vocab_size=40, n_positions=48)
    assert longest_sequence(transformers.AutoModelForCausalLM.from_config(config)) == 48


def test_w8_a_tokenizer_without_an_end_can_not_separate_documents(tmp_path):
    path = folder(tmp_path / "model", ARCHITECTURES["llama"].build(), letters(without=("pad_token", "eos_token")))
    with pytest.raises(ValueError, match="has no end-of-text token"):
        tasks.create("c4", model=path, data="demo", batch_size=2, sequence_length=16)


# ---- N11: what comes from a checkpoint


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A tiny BERT as a folder, classifier for three classes included."""
    config = ARCHITECTURES["bert"].config()
    config.num_labels = 3
    model = ARCHITECTURES["bert"].model(config)
    return Path(folder(tmp_path_factory.mktemp("models") / "bert", model, letters()))


@pytest.fixture
def damaged(bert, tmp_path):
    """A copy of it, values of its configuration replaced."""

    def make(**config):
        copy = tmp_path / "model"
        copy.mkdir(exist_ok=True)
        for path in bert.iterdir():
            (copy / path.name).write_bytes(path.read_bytes())
        values = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps(values | config))
        return copy

    return make


def refusal(path, tmp_path):
    """The sentence that a comparison ends with."""
    data = labelled(tmp_path / "a.jsonl", TEXTS)
    with pytest.raises(ValueError) as caught:
        classify(str(path), data).head  # noqa: B018
    text = str(caught.value)
    assert "\n" not in text and len(text) < 600 and str(path) in text
    return text


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            {"hidden_size": 64},
            "50 of 57 tensors in embeddings and layers .*embeddings.* is .32,. there and .64,. in",
        ),
        ({"num_hidden_layers": 4}, r"16 of 73 tensors .*bert\.encoder\.layer\.3\.\S+ is missing"),
        ({"vocab_size": 41}, r"1 of 57 tensors .*word_embeddings.weight is .40, 32. there and .41, 32. in"),
        ({"intermediate_size": 64}, "9 of 57 tensors"),
        ({"max_position_embeddings": 32}, "position_embeddings.weight is .64, 32. there"),
    ],
)
def test_n11_weights_that_are_not_those_of_the_configuration_are_refused(damaged, tmp_path, config, words):
    text = refusal(damaged(**config), tmp_path)
    assert "don't match its config.json" in text and "or config:NAME for random weights" in text
    assert re.search(words, text), text


def test_n11_a_checkpoint_of_another_model_is_refused(damaged, tmp_path):
    copy = damaged()
    ARCHITECTURES["distilbert"].build().save_pretrained(tmp_path / "other")
    (copy / "model.safetensors").write_bytes((tmp_path / "other" / "model.safetensors").read_bytes())
    assert "don't match its config.json" in refusal(copy, tmp_path)


def test_n11_what_is_new_or_left_out_is_said(bert, damaged, tmp_path):
    data = labelled(tmp_path / "a.jsonl", TEXTS)
    assert classify(str(bert), data).provenance["notes"] == "new in the model, with random values: classifier"
    notes = classify(str(damaged(num_hidden_layers=2)), data).provenance["notes"]
    assert "16 tensors of layers that aren't in its config.json are left out (bert.encoder.layer.2." in notes
    path = folder(tmp_path / "llama", ARCHITECTURES["llama"].build(), letters())
    notes = tasks.create("c4", model=path, batch_size=2, sequence_length=16).provenance["notes"]
    assert "random values" not in notes and "left out" not in notes


def test_n11_a_pooler_is_new_wherever_the_model_registers_it(tmp_path):
    if "nomic_bert" not in transformers.CONFIG_MAPPING:
        pytest.skip("this transformers doesn't have it")
    config = transformers.AutoConfig.for_model("nomic_bert", **WIDE)
    path = folder(tmp_path / "model", transformers.AutoModel.from_config(config), letters(ends=True))
    task = classify(path, labelled(tmp_path / "a.jsonl", TEXTS))
    assert task.head == ("nomic_bert.pooler", "classifier")
    assert torch.isfinite(task.loss(task.build_model(), task.batch(0)))


def test_w8_a_model_without_a_table_of_embeddings_classifies(tmp_path):
    own = {"num_hash_functions": 2, "num_hash_buckets": 64, "local_transformer_stride": 8, "downsampling_rate": 2}
    config = transformers.CanineConfig(**WIDE, **own)
    path = folder(tmp_path / "model", transformers.CanineModel(config), letters(ends=True))
    task = classify(path, labelled(tmp_path / "a.jsonl", TEXTS))
    assert torch.isfinite(task.loss(task.build_model(), task.batch(0)))
    assert 0 <= task.evaluate(task.build_model())["accuracy"] <= 1


@pytest.mark.parametrize("kind", ["bitsandbytes", "gptq", "fp8"])
def test_a_quantized_model_is_refused_before_it_is_loaded_and_can_be_planned(damaged, tmp_path, kind):
    copy = damaged(quantization_config={"quant_method": kind, "load_in_4bit": True, "bits": 4})
    assert f"its weights are quantized ({kind})" in refusal(copy, tmp_path)
    assert Blueprint(Workload(str(copy))).parameters == Blueprint(Workload(str(damaged()))).parameters


def test_n11_weights_with_scales_are_refused_whatever_the_configuration_says(damaged, tmp_path):
    """In FP8 and without its `quantization_config`, a matrix of 0.07 was trained as one of 448."""
    file = damaged() / "model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if name.endswith("query.weight"))
    scale = weights[name].abs().max() / 448
    quantized = {name: (weights[name] / scale).to(torch.float8_e4m3fn), f"{name}_scale_inv": scale.reshape(1, 1)}
    save_file(weights | quantized, file, metadata={"format": "pt"})
    assert f"its weights are quantized, and have scales ({name}_scale_inv); give the model" in refusal(
        file.parent, tmp_path
    )


def test_weights_that_are_whole_numbers_are_refused_whatever_the_configuration_says(damaged, tmp_path):
    """The codes of bitsandbytes' int8, with its scales under their own name or without them."""
    file = damaged() / "model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if name.endswith("query.weight"))
    scale = weights[name].abs().amax(1)
    codes = (weights[name] / scale[:, None] * 127).round()
    save_file(weights | {name: codes.to(torch.int8)}, file, metadata={"format": "pt"})
    words = f"its weights are quantized, and whole numbers ({name} in model.safetensors); give the model"
    assert words in refusal(file.parent, tmp_path)
    scales = name.replace("weight", "SCB")
    save_file(weights | {name: codes, scales: scale}, file, metadata={"format": "pt"})
    assert f"its weights are quantized, and have scales ({scales}); give the model" in refusal(file.parent, tmp_path)


@pytest.mark.parametrize("beside_its_model", [True, False])
def test_an_adapter_is_no_model_and_one_beside_its_model_is_not_trained_in_its_place(
    damaged, tmp_path, beside_its_model
):
    copy = damaged()
    config = peft.LoraConfig(target_modules=["query"], r=2)
    peft.get_peft_model(ARCHITECTURES["bert"].build(), config).save_pretrained(copy)
    if not beside_its_model:
        for name in ("config.json", "model.safetensors"):
            (copy / name).unlink()
    assert "the folder has an adapter (adapter_config.json); merge it" in refusal(copy, tmp_path)


def test_an_adapter_among_the_weights_of_its_model_is_not_left_out(damaged, tmp_path):
    """In loralib's names, without a configuration, and for a query that was trained on it."""
    file = damaged() / "model.safetensors"
    weights = load_file(file)
    query = next(name for name in weights if name.endswith("query.weight"))
    adapter = {query.replace("weight", f"lora_{side}"): torch.ones(2, 2) for side in "AB"}
    save_file(weights | adapter, file, metadata={"format": "pt"})
    assert f"have an adapter beside them ({min(adapter)}), which would be left out; merge it" in refusal(
        file.parent, tmp_path
    )


# ---- N13: saved models


@pytest.mark.parametrize("name", ["c4", "instruct"])
def test_n13_a_saved_built_in_model_ends_where_its_tokenizer_says(name, tmp_path):
    task = tasks.create(name, model="config:llama-tiny", batch_size=2, sequence_length=96)
    task.build_model().save_pretrained(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    generation = transformers.GenerationConfig.from_pretrained(tmp_path)
    end = task.tokenizer.eos_token_id
    assert (config.eos_token_id, generation.eos_token_id) == (end, end) == (0, 0)
    assert (config.bos_token_id, generation.bos_token_id) == (0, 0)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        model.lm_head.weight.zero_()  # every next token is as likely: the first one, the end, is taken
        out = model.generate(torch.tensor([[5, 6]]), max_new_tokens=9, do_sample=False)
    assert out.tolist() == [[5, 6, end]]


def test_n13_of_a_pretrained_model_several_ends_stay(tmp_path):
    path = folder(tmp_path / "model", ARCHITECTURES["llama"].build(), letters(), eos_token_id=[2, 9])
    task = tasks.create("c4", model=path, batch_size=2, sequence_length=16)
    assert task.build_model().config.eos_token_id == [2, 9]


# ---- T: what a folder throws

VALUES = {
    "hidden_size x": ({"hidden_size": "x"}, "Field 'hidden_size' expected int, got str (value: 'x')"),
    "hidden_size null": ({"hidden_size": None}, "Field 'hidden_size' expected int, got NoneType (value: None)"),
    "layers two": ({"num_hidden_layers": "two"}, "Field 'num_hidden_layers' expected int, got str (value: 'two')"),
    "layers 2.5": ({"num_hidden_layers": 2.5}, "expected int, got float (value: 2.5)"),
    "layers -1": ({"num_hidden_layers": -1}, "num_hidden_layers in its config.json is -1, but it must be at least 1"),
    "layers 0": ({"num_hidden_layers": 0}, "num_hidden_layers in its config.json is 0"),
    "vocab_size 0": ({"vocab_size": 0}, "vocab_size in its config.json is 0, but it must be at least 1"),
    "hidden_size -32": ({"hidden_size": -32}, "hidden_size in its config.json is -32"),
    "heads 0": ({"num_attention_heads": 0}, "num_attention_heads in its config.json is 0"),
    "heads 5": (
        {"num_attention_heads": 5},
        "The hidden size (32) is not a multiple of the number of attention heads (5)",
    ),
    "many layers": (
        {"num_hidden_layers": 10**8},
        "num_hidden_layers in its config.json is 100000000, but it must be at most 10,000",
    ),
    "hidden_act": ({"hidden_act": "nope"}, "its hidden_act, 'nope', is unknown"),
    "pad": ({"pad_token_id": 99999}, "pad_token_id in its config.json is 99999, but it must be one of the 40 entries"),
    "dropout": ({"hidden_dropout_prob": 7}, "dropout probability has to be between 0 and 1, but got 7"),
    "eps": ({"layer_norm_eps": "small"}, "Field 'layer_norm_eps' expected float"),
    "model_type": ({"model_type": "nope"}, "model type `nope`"),
    "no model_type": ({"model_type": None}, "model type `None`"),
    "id2label": ({"id2label": "x"}, "config.json: "),
    "dtype": ({"dtype": "float99"}, "float99"),
}


@pytest.mark.parametrize("name", VALUES)
def test_t_a_value_that_no_model_can_have_is_named(damaged, tmp_path, name):
    config, words = VALUES[name]
    assert words in refusal(damaged(**config), tmp_path)


class Code:
    """Would touch a file when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch unpickled",)


def index(path, **content):
    (path / "model.safetensors").rename(path / "model-00001-of-00001.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps(content))


def pickled(path, content):
    (path / "model.safetensors").unlink()
    torch.save(content, path / "pytorch_model.bin")


FILES = {
    "truncated": (
        lambda path: (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:5000]),
        "model.safetensors isn't a complete safetensors file",
    ),
    "empty": (lambda path: (path / "model.safetensors").write_bytes(b""), "model.safetensors isn't a complete"),
    "garbage": (lambda path: (path / "model.safetensors").write_bytes(bytes(range(256)) * 9), "isn't a complete"),
    "no weights": (lambda path: (path / "model.safetensors").unlink(), "no file named model.safetensors"),
    "pickle of code": (
        lambda path: pickled(path, Code()),
        "holds more than tensors, and the rest would be run as code",
    ),
    "pickle of anything": (
        lambda path: ((path / "model.safetensors").unlink(), (path / "pytorch_model.bin").write_bytes(b"anything")),
        "pytorch_model.bin can't be read",
    ),
    "index without metadata": (
        lambda path: index(path, weight_map={"x": "model-00001-of-00001.safetensors"}),
        "model.safetensors.index.json has no 'metadata'",
    ),
    "index of nothing": (lambda path: index(path, metadata={}, weight_map={"x": "y"}), "names y, which is missing"),
    "index of a folder below": (
        lambda path: index(path, metadata={}, weight_map={"x": "sub/model.safetensors"}),
        "model.safetensors.index.json names 'sub/model.safetensors', which isn't beside it",
    ),
    "index of elsewhere": (
        lambda path: index(path, metadata={}, weight_map={"x": "../other.safetensors"}),
        "names '../other.safetensors', which isn't beside it in the folder: move that file there",
    ),
    "index of another place": (
        lambda path: index(path, metadata={}, weight_map={"x": "/tmp/other.safetensors"}),
        "names '/tmp/other.safetensors', which isn't beside it",
    ),
    "config.json of a folder below": (
        lambda path: (path / "config.json").write_text(
            '{"transformers_weights": "sub/model.safetensors", ' + (path / "config.json").read_text()[1:]
        ),
        "config.json names 'sub/model.safetensors', which isn't beside it",
    ),
    "pipe": (
        lambda path: ((path / "config.json").unlink(), os.mkfifo(path / "config.json")),
        "config.json: a pipe or a device, not a file",
    ),
    "config.json digits": (
        lambda path: (path / "config.json").write_text(f'{{"a": {"9" * 5000}}}'),
        "config.json has a number with too many digits",
    ),
    "tokenizer_config.json digits": (
        lambda path: (path / "tokenizer_config.json").write_text(f'{{"a": {"9" * 5000}}}'),
        "tokenizer_config.json has a number with too many digits",
    ),
    "config.json empty": (lambda path: (path / "config.json").write_text(""), "config.json isn't valid JSON (line 1"),
    "config.json cut": (lambda path: (path / "config.json").write_text('{\n"a": 1,\n'), "isn't valid JSON (line 3"),
    "config.json a list": (lambda path: (path / "config.json").write_text("[]"), "config.json must hold an object"),
    "config.json deep": (lambda path: (path / "config.json").write_text("[" * 100_000), "nested too deeply"),
    "config.json binary": (lambda path: (path / "config.json").write_bytes(b"\xff\xfe\x00\xff"), "isn't UTF-8 text"),
    "config.json twice": (
        lambda path: (path / "config.json").write_text('{"pad_token_id": 1, ' + (path / "config.json").read_text()[1:]),
        "config.json has 'pad_token_id' twice, with different values",
    ),
    "tokenizer_config.json twice": (
        lambda path: (path / "tokenizer_config.json").write_text('{"pad_token": "a", "pad_token": "b"}'),
        "tokenizer_config.json has 'pad_token' twice, with different values",
    ),
    "tokenizer.json cut": (lambda path: (path / "tokenizer.json").write_text('{"a'), "tokenizer.json isn't valid JSON"),
    "tokenizer.json list": (
        lambda path: (path / "tokenizer.json").write_text("[]"),
        "tokenizer.json must hold an object",
    ),
    "tokenizer.json other": (
        lambda path: (path / "tokenizer.json").write_text('{"model": 1}'),
        "can't load the tokenizer",
    ),
    "tokenizer_config": (lambda path: (path / "tokenizer_config.json").write_text("{"), "tokenizer_config.json isn't"),
}


@pytest.mark.parametrize("name", FILES)
def test_t_a_damaged_file_of_a_folder_is_named(damaged, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    damage, words = FILES[name]
    path = damaged()
    damage(path)
    assert words in refusal(path, tmp_path)
    assert not (tmp_path / "unpickled").exists()


def test_t_another_file_of_any_kind_that_a_tokenizer_is_read_from_makes_it_another_one(tmp_path):
    package = Path(transformers.__file__).parent
    sources = [path.read_text() for path in package.glob("**/*token*.py")]
    tables = [table for text in sources for table in re.findall(r"VOCAB_FILES_NAMES = \{(.*?)\}", text, re.DOTALL)]
    names = {name for table in tables for name in re.findall(r': "([^"]+)"', table)} | {"tokenizer.4.0.0.json"}
    assert {"vocab.txt", "vocab-src.json", "emoji.json"} < names
    for name in names:
        (tmp_path / name).write_text("")
    assert not names - {*_files(tmp_path)}


@pytest.mark.parametrize("name", [name for name in VALUES if name != "dropout"])
def test_t_a_plan_names_it_too(damaged, name):
    config, words = VALUES[name]
    with pytest.raises(ValueError) as caught:
        blueprint = Blueprint(Workload(str(damaged(**config)), dtype="float32"))
        with torch.device("meta"):
            blueprint.build(blueprint.depth)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["x" * 5000, "a/b/c", "../nowhere", "\x00", ""])
def test_t_a_name_that_can_be_no_model_is_refused(name, tmp_path):
    with pytest.raises(ValueError, match="no folder|can't load the model") as caught:
        Source(name)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_w9_nearly_the_name_of_a_built_in_model_is_told_before_the_hub_is_asked():
    with pytest.raises(ValueError, match=r"unknown model 'roberta-bsae'. Did you mean 'config:roberta-base'\?"):
        Source("roberta-bsae")


SHORT = (  # a chat template without words: these models have few positions
    "{% for message in messages %}{{ message['content'] }}{{ eos_token if message['role'] == 'assistant' else ' ' }}"
    "{% endfor %}"
)
CAUSAL = [name for name, one in ARCHITECTURES.items() if one.is_causal]


def conversations_in(path):
    rows = [{"prompt": f"{text}?", "completion": f"{text[::-1]}."} for text in TEXTS * 3]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("name", CAUSAL)
def test_s4_a_language_model_scores_and_writes_the_same_whatever_stands_beside_a_text(name, tmp_path):
    tokenizer = letters(without=("pad_token",))
    tokenizer.chat_template = SHORT
    path = folder(tmp_path / "model", ARCHITECTURES[name].build(), tokenizer)
    given = {"model": path, "data": conversations_in(tmp_path / "a.jsonl"), "batch_size": 2}
    task = tasks.create("instruct", **given, sequence_length=60)
    model = task.build_model().eval()
    some = [task.train[number] for number in range(4)]
    pad = task.tokenizer.pad_token_id
    whole = {
        key: value for key, value in collate([[one] for one in some], 60, pad, packed=False).items() if key != "labels"
    }
    with torch.no_grad():
        together = model(**whole).logits
        for row, (tokens, _) in enumerate(some):
            alone = model(input_ids=torch.tensor(tokens[None].astype("int64"))).logits[0]
            torch.testing.assert_close(together[row, : len(tokens)], alone, rtol=1e-3, atol=1e-4)
        for p in model.parameters():
            p.mul_(2)  # decided enough that rounding can't change what comes next
    prompts = [tokens[: 9 + 3 * row].tolist() for row, (tokens, _) in enumerate(some)]
    written = gsm8k.generate(model, task.tokenizer, prompts, 6)
    assert written == [gsm8k.generate(model, task.tokenizer, [prompt], 6)[0] for prompt in prompts]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_s6_names_of_control_tokens_are_text_for_every_architecture(name, tmp_path):
    path = folder(tmp_path / "model", ARCHITECTURES[name].build().base_model, letters(ends=True))
    saying = "<pad>ab</s><s>c"
    task = classify(path, labelled(tmp_path / "a.jsonl", [f"{text}{saying}" for text in TEXTS]), sequence_length=60)
    for tokens, mask in zip(*(task.batch(0)[key].tolist() for key in ("input_ids", "attention_mask")), strict=True):
        used = [token for token, seen in zip(tokens, mask, strict=True) if seen]
        assert [place for place, token in enumerate(used) if token in (0, 1, 2)] == [len(used) - 1]
    if name in CAUSAL:
        tokenizer = letters()
        tokenizer.chat_template = SHORT
        path = folder(tmp_path / "causal", ARCHITECTURES[name].build(), tokenizer)
        rows = [{"prompt": saying, "completion": f"{saying}{text}"} for text in TEXTS * 3]
        (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        tuned = tasks.create("instruct", model=path, data=str(tmp_path / "b.jsonl"), batch_size=2, sequence_length=60)
        for tokens, _ in (tuned.train[number] for number in range(9)):
            assert [place for place, token in enumerate(tokens) if token in (0, 1, 2)] == [len(tokens) - 1]


LITTLE = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
LITTLE |= {"num_attention_heads": 2, "pad_token_id": 0}
SEQ2SEQ = {"vocab_size": 40, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "decoder_ffn_dim": 48}
SEQ2SEQ |= {"encoder_ffn_dim": 48, "decoder_attention_heads": 2, "encoder_attention_heads": 2, "pad_token_id": 0}


@pytest.mark.parametrize(
    ("kind", "values", "why"),
    [
        ("llama", LITTLE, None),
        ("bert", {**LITTLE, "is_decoder": True}, None),
        ("bert-generation", {**LITTLE, "is_decoder": True}, None),
        ("bert-generation", LITTLE, "sees the tokens that it has to predict"),
        ("llama", {**LITTLE, "is_causal": False}, "sees the tokens that it has to predict"),
        ("xlnet", {"vocab_size": 40, "d_model": 32, "n_layer": 1, "n_head": 2, "d_inner": 48}, "sees the tokens"),
        ("marian", SEQ2SEQ, "asks for the token that was just read, not for the next"),
        ("bart", {**SEQ2SEQ, "is_decoder": True, "is_encoder_decoder": False}, "asks for the token that was just read"),
    ],
)
def test_a_language_model_that_learns_anything_but_the_next_token_from_those_before_is_refused(
    kind, values, why, tmp_path
):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **values)).eval()
    tokens = torch.arange(4, 20).view(2, 8)
    with torch.no_grad():
        found = model(input_ids=tokens, labels=tokens)
        changed = model(input_ids=tokens.clone().index_fill_(1, torch.tensor([7]), 30)).logits
    expected = torch.nn.functional.cross_entropy(found.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    predicts_the_next = abs(found.loss - expected) < 1e-5
    sees_no_later_one = torch.allclose(changed[:, :-1], found.logits[:, :-1], atol=1e-6)
    assert bool(predicts_the_next and sees_no_later_one) == (why is None)
    path = folder(tmp_path / "model", model, letters(), **({"is_causal": False} if "is_causal" in values else {}))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    given = {"model": path, "data": str(tmp_path / "a.jsonl"), "batch_size": 2, "sequence_length": 8}
    if why is None:
        tasks.create("c4", **given)
    else:
        with pytest.raises(ValueError, match=rf"\({kind}\) .*{why}"):
            tasks.create("c4", **given)


# ---- N4: what is cut


@pytest.mark.parametrize(("name", "least"), [("cb", 0.9), ("rte", 0.8), ("copa", 0.0)])
def test_n4_the_share_of_texts_that_are_cut_is_said(shared_data, name, least):
    given = {"model": "config:roberta-base", "tokenizer": str(shared_data / "tokenizers" / "roberta"), "batch_size": 2}
    task = tasks.create(f"superglue/{name}", data=str(shared_data / "superglue"), sequence_length=32, **given)
    notes = task.provenance["notes"] or "0.0% of the texts are cut to 32 tokens"
    share = float(notes.partition("% of the texts are cut to 32 tokens")[0]) / 100
    lengths = [len(task.tokenizer(*pair)["input_ids"]) for pair in task._texts()]
    assert share == pytest.approx(sum(length > 32 for length in lengths) / len(lengths), abs=1e-3) and share >= least


def test_of_a_file_sorted_by_length_the_long_texts_are_measured_too(tmp_path):
    texts = [f"{number} {'a' * (10 if number < 1500 else 90)}" for number in range(3000)]
    given = {"data": labelled(tmp_path / "sorted.jsonl", texts), "model": "config:roberta-tiny", "batch_size": 2}
    tokenizer = letters()
    tokenizer.save_pretrained(tmp_path / "letters")
    task = tasks.create("classify", tokenizer=str(tmp_path / "letters"), sequence_length=40, **given)
    share, _, rest = task.provenance["notes"].partition("% of the texts are cut to 40 tokens")
    assert 45 < float(share) < 55 and rest.startswith(
        ", of 1,000 that were measured; "
    )  # a half; 3 standard errors are 4.7
    assert (
        max(tasks.create("classify", tokenizer=str(tmp_path / "letters"), sequence_length=200, **given).lengths()) > 90
    )


@pytest.mark.parametrize("kind", ["classify", "c4", "instruct"])
def test_a_tokenizer_without_an_entry_for_strange_letters_is_refused_in_a_sentence(kind, tmp_path):
    tokenizer = letters()
    tokenizer.backend_tokenizer.model.unk_token = "<nowhere>"
    name = "bert" if kind == "classify" else "llama"
    model = folder(tmp_path / "model", ARCHITECTURES[name].build(), tokenizer)
    texts = [{"text": f"{text} \N{SNOWMAN}", "label": number % 2} for number, text in enumerate(TEXTS)]
    rows = [{"instruction": row["text"], "output": "b"} for row in texts] if kind == "instruct" else texts
    data = tmp_path / "a.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=r"^the tokenizer of '.*model' can't encode all of the texts \(.*\[UNK\]"):
        _ = tasks.create(kind, model=model, data=str(data), batch_size=2, sequence_length=LENGTH).provenance


@pytest.mark.parametrize(
    "name", ["chat_template.jinja", "special_tokens_map.json", "added_tokens.json", "spiece.model"]
)
def test_a_tokenizer_that_was_changed_in_any_of_its_files_has_another_name_in_records(tmp_path, name):
    letters().save_pretrained(tmp_path)
    before = load_tokenizer(str(tmp_path))[1]
    (tmp_path / name).write_text("{}")
    assert load_tokenizer(str(tmp_path))[1] != before
