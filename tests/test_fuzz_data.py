"""Whatever is in a file or in a model's folder: it is used, or it is refused in one sentence; no traceback, no hang."""

import shutil
from pathlib import Path
from random import Random

import pytest
import transformers
from architectures import ARCHITECTURES
from chat_templates import CHATML
from fuzz import damage_folder, damaged_file
from letters import folder, labelled, letters
from test_cases_models import TEXTS

import tasks
from tasks.c4.corpus import Documents
from tasks.classify import data as classify_data
from tasks.data.tally import Tally
from tasks.instruct import conversations
from tasks.instruct.prompts import encode

FILES, FOLDERS = 25, 10  # a seed: what a fast test tries
LONGEST_SENTENCE = 3000  # characters, with ten reasons


def read_c4(path):
    documents, tally = Documents(path), Tally()
    assert all(isinstance(text, str) and text.strip() for text in documents.read(tally))
    list(documents.training())
    return tally.notes


def read_classify(path):
    found = classify_data.read(path)
    assert found.train and found.validation and len(found.labels) > 1
    return found.notes


def read_instruct(path):
    found = conversations.read(path)
    assert all(one.answer.strip() for one in found.training + found.held_out)
    for tokenizer in (letters(), templated()):
        encoded = encode(found.training, tokenizer, found.tally)
        assert all(one is None or (one[1].any() and not one[1][0]) for one in encoded)
    return found.notes


def templated():
    tokenizer = letters()
    tokenizer.chat_template = CHATML
    return tokenizer


READERS = {"c4": read_c4, "classify": read_classify, "instruct": read_instruct}


def expect_a_sentence(error, name):
    text = str(error)
    assert "\n" not in text and 10 < len(text) < LONGEST_SENTENCE, text[:300]
    assert name in text, text[:300]


def try_file(kind, number, tmp_path):
    path = damaged_file(kind, tmp_path, Random(f"{kind} {number}"))
    try:
        notes = READERS[kind](str(path))
    except ValueError as error:
        expect_a_sentence(error, path.name)
    else:
        assert all("\n" not in note for note in notes)
    path.unlink()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", READERS)
def test_a_damaged_file_is_read_or_refused_in_a_sentence(kind, seed, tmp_path):
    for number in range(FILES):
        try_file(kind, seed * FILES + number, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", READERS)
def test_so_are_five_hundred_of_them(kind, tmp_path):
    for number in range(100, 600):
        try_file(kind, number, tmp_path)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders to damage copies of."""
    place = tmp_path_factory.mktemp("models")
    return {name: folder(place / name, ARCHITECTURES[name].build(), letters()) for name in ("bert", "llama", "gpt2")}


def try_folder(models, number, tmp_path):
    random = Random(f"folder {number}")
    name = random.choice(sorted(models))
    path = Path(shutil.copytree(models[name], tmp_path / f"model-{number}"))
    damage_folder(path, random)
    kind = "classify" if name == "bert" or random.random() < 0.5 else "c4"
    data = labelled(tmp_path / "a.jsonl", [text * 4 for text in TEXTS * 3])
    try:
        task = tasks.create(kind, model=str(path), data=data, batch_size=2, sequence_length=16)
        assert isinstance(task.provenance["notes"], str | None) and isinstance(task.head, tuple)
        assert isinstance(task.build_model(), transformers.PreTrainedModel)
    except ValueError as error:
        expect_a_sentence(error, path.name)
    shutil.rmtree(path)


@pytest.mark.parametrize("seed", range(4))
def test_a_damaged_folder_of_a_model_is_used_or_refused_in_a_sentence(models, seed, tmp_path):
    for number in range(FOLDERS):
        try_folder(models, seed * FOLDERS + number, tmp_path)


@pytest.mark.slow
def test_so_are_five_hundred_folders(models, tmp_path):
    for number in range(100, 600):
        try_folder(models, number, tmp_path)
