"""What is held out is in nobody's training, in no family: neither in batches nor in a tokenizer, whatever it is."""

import functools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

import tasks
from tasks.c4 import task as c4
from tasks.classify.data import Labelled
from tasks.data import split
from tasks.data.held_out import is_chosen, is_held_out
from tasks.data.json_lines import Row
from tasks.data.split import Part
from tasks.data.tally import Tally
from tasks.instruct import conversations

Rows = list[dict[str, Any]]

# Words of what is held out: enough of each that a tokenizer trained on it had them, and none that the training has.
STRANGE = ("zyxwvu", "qjqjqj")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def texts(word: str, count: int, keep: Callable[[str], bool] = lambda text: True) -> list[str]:
    """Different texts about a word that `keep` keeps."""
    found: list[str] = []
    number = 0
    while len(found) < count:
        text = f"the {word} {word} number {number} was seen in the garden again"
        found += [text] if keep(text) else []
        number += 1
    return found


def write(path: Path, rows: Rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


# ---- for each family: the data with `held_out` words in what is held out, and the same words in its training


def superglue(folder: Path, held_out: str) -> str:
    def rows(word: str, count: int) -> Rows:
        some = texts(word, count)
        return [
            {"question": f"is it {text}", "passage": text, "label": bool(n % 2), "idx": n}
            for n, text in enumerate(some)
        ]

    write(folder / "BoolQ" / "train.jsonl", rows("museum", 60))
    write(folder / "BoolQ" / "val.jsonl", rows(held_out, 60))
    return str(folder)


def pretraining(folder: Path, held_out: str) -> str:
    training = texts("museum", 300, lambda text: not is_held_out(text))
    write(folder / "docs.jsonl", [{"text": text} for text in [*training, *texts(held_out, 60, is_held_out)]])
    return str(folder)


def of_question(word: str) -> dict[str, str]:
    return {"instruction": f"What of {word}?", "input": "", "output": f"It is {word}."}


def answers(folder: Path, held_out: str) -> str:
    def chosen(text: str) -> bool:
        ((name, _),) = split.named(conversations.KIND, [Part("here", [Row("here", of_question(text))])], Tally())
        return is_chosen(name)

    training = texts("museum", 300, lambda text: not chosen(text))
    rows = [of_question(text) for text in [*training, *texts(held_out, 60, chosen)]]
    write(folder / "data.jsonl", rows)
    return str(folder / "data.jsonl")


def answers_with_a_test_file(folder: Path, held_out: str) -> str:
    write(folder / "train.jsonl", [of_question(text) for text in texts("museum", 300)])
    write(folder / "test.jsonl", [of_question(text) for text in texts(held_out, 60)])
    return str(folder)


def of_pair(word: str) -> dict[str, str]:
    return {"prompt": f"What of {word}?", "chosen": f"It is {word}.", "rejected": f"It is no {word}."}


def pairs(folder: Path, held_out: str) -> str:
    for name, word in (("train", "museum"), ("test", held_out)):
        write(folder / f"{name}.jsonl", [of_pair(text) for text in texts(word, 60)])
    return str(folder)


def classes(folder: Path, held_out: str) -> str:
    def chosen(text: str) -> bool:
        return Labelled("here", text, "", 0).is_held_out

    training = texts("museum", 300, lambda text: not chosen(text))
    some = [*training, *texts(held_out, 60, chosen)]
    write(folder / "data.jsonl", [{"text": text, "label": n % 2} for n, text in enumerate(some)])
    return str(folder / "data.jsonl")


def classes_with_a_validation_file(folder: Path, held_out: str) -> str:
    for name, word in (("train", "museum"), ("val", held_out)):
        write(folder / f"{name}.jsonl", [{"text": text, "label": n % 2} for n, text in enumerate(texts(word, 60))])
    return str(folder)


SOURCES = {
    "superglue": ("superglue/boolq", "config:roberta-tiny", superglue),
    "c4": ("c4", "config:llama-tiny", pretraining),
    "instruct": ("instruct", "config:llama-tiny", answers),
    "instruct, test file": ("instruct", "config:llama-tiny", answers_with_a_test_file),
    "dpo": ("dpo", "config:llama-tiny", pairs),
    "classify": ("classify", "config:roberta-tiny", classes),
    "classify, validation file": ("classify", "config:roberta-tiny", classes_with_a_validation_file),
}


def test_every_family_is_held_to_it():
    families = {name.partition("/")[0] for name in tasks.available()}
    assert {name.partition("/")[0] for name, _, _ in SOURCES.values()} == families


def create(name: str, model: str, data: str) -> Any:
    return tasks.create(name, model=model, data=data, batch_size=4, sequence_length=64)


def words_of(task: Any, batches: Iterator[dict[str, torch.Tensor]]) -> str:
    return " ".join(task.tokenizer.decode(ids) for batch in batches for ids in batch["input_ids"].flatten(0, -2))


@pytest.mark.parametrize("source", SOURCES)
def test_what_is_held_out_changes_neither_the_tokenizer_nor_a_batch_nor_the_model(source, tmp_path):
    name, model, make = SOURCES[source]
    one, other = (create(name, model, make(tmp_path / word, word)) for word in STRANGE)
    assert one.provenance["data_sha256"] != other.provenance["data_sha256"]
    assert one.tokenizer.get_vocab() == other.tokenizer.get_vocab()
    for word in STRANGE:  # spelt in single letters, nearly: a tokenizer that had seen it would know it as a whole
        assert len(one.tokenizer.tokenize(word)) >= 4
    assert len(one.tokenizer.tokenize(" museum")) == 1
    assert one.train_size == other.train_size
    for task in (one, other):
        if isinstance(task, tasks.HasReference):
            task.remember_training(task.build_model().eval(), task.train_size)
    for step in range(0, 2 * one.train_size // 4, 7):
        first, second = one.batch(step), other.batch(step)
        assert all(torch.equal(first[key], second[key]) for key in first)
    whole = words_of(one, (one.batch(step) for step in range(one.train_size // 4 + 1)))
    assert "museum" in whole and not re.search("|".join(STRANGE), whole)
    weights = zip(one.build_model().parameters(), other.build_model().parameters(), strict=True)
    assert all(torch.equal(p, q) for p, q in weights)


def test_neither_does_what_is_held_out_of_a_stream_that_has_it_too(monkeypatch, tmp_path):
    def stream(word: str) -> Any:
        held_out = texts(word, 60)
        rows = {"train": texts("museum", 200) + held_out, "validation": held_out}
        for side, some in rows.items():
            write(tmp_path / word / f"{side}.jsonl", [{"text": text} for text in some])
        files = {side: str(tmp_path / word / f"{side}.jsonl") for side in rows}
        load = functools.partial(datasets.load_dataset, "json", data_files=files, streaming=True)
        monkeypatch.setattr(c4, "open_hub", lambda split: load(split=split))
        monkeypatch.setattr(c4.Hub, "digest", word)  # of the cache
        return create("c4", "config:llama-tiny", "hub")

    one, other = map(stream, STRANGE)
    assert one.tokenizer.get_vocab() == other.tokenizer.get_vocab()
    whole = words_of(other, (other.batch(step) for step in range(40)))
    assert "museum" in whole and not re.search("|".join(STRANGE), whole)


@pytest.mark.parametrize("family", ["instruct", "dpo", "c4", "classify"])
def test_what_lies_in_a_folder_and_is_not_read_is_said(family, tmp_path):
    rows = [
        {"text": words, "label": n % 2, "prompt": words, "chosen": f"yes {n}", "rejected": f"no {n}"}
        for n, words in enumerate(texts("cat", 400))
    ]
    data = tmp_path / "data"
    write(data / "train.jsonl", rows)
    write(data / "more" / "train.jsonl", rows)
    for name in ("rest.jsonl.bz2", "rest.parquet", "README.md", ".hidden", "LICENSE"):
        (data / name).write_text("x")
    model = "config:roberta-tiny" if family == "classify" else "config:llama-tiny"
    task = tasks.create(family, model=model, data=str(data), batch_size=2, sequence_length=128)
    assert "not read: more, rest.jsonl.bz2, rest.parquet" in task.provenance["notes"].split("; ")


@pytest.mark.parametrize(
    ("name", "is_apart"),
    [("evaluation.jsonl", True), ("held_out.jsonl", True), ("my-heldout.jsonl", True), ("test2.jsonl", True)]
    + [("contest.jsonl", False), ("latest.jsonl", False), ("values.jsonl", False)],
)
def test_a_file_is_held_out_by_its_name(name, is_apart, tmp_path):
    rows = [{"prompt": words, "completion": "yes"} for words in texts("cat", 60)]
    write(tmp_path / "train.jsonl", rows[:40])
    write(tmp_path / name, rows[40:])
    read = conversations.read(str(tmp_path))
    assert (len(read.held_out) == 20) == is_apart
