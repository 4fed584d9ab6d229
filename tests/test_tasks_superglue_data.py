"""Reading SuperGLUE: the official format, what is wrong with a line, and the hub's rows."""

import json

import datasets
import pytest

import tasks
from tasks.data.rows import Row
from tasks.data.tally import Tally
from tasks.superglue import data as superglue_data
from tasks.superglue import rows as superglue
from tasks.superglue.examples import NEEDLESS, examples, wsc

HUB_FEATURES = {  # of aps/super_glue, from the card of the pinned revision
    "boolq": [("question", "string"), ("passage", "string"), ("idx", "int32"), ("label", ["False", "True"])],
    "cb": [
        ("premise", "string"),
        ("hypothesis", "string"),
        ("idx", "int32"),
        ("label", ["entailment", "contradiction", "neutral"]),
    ],
    "copa": [
        *((name, "string") for name in ("premise", "choice1", "choice2", "question")),
        ("idx", "int32"),
        ("label", ["choice1", "choice2"]),
    ],
    "multirc": [
        *((name, "string") for name in ("paragraph", "question", "answer")),
        ("idx", {name: datasets.Value("int32") for name in ("paragraph", "question", "answer")}),
        ("label", ["False", "True"]),
    ],
    "record": [
        ("passage", "string"),
        ("query", "string"),
        ("entities", datasets.List(datasets.Value("string"))),
        (
            "entity_spans",
            {
                "text": datasets.List(datasets.Value("string")),
                "start": datasets.List(datasets.Value("int32")),
                "end": datasets.List(datasets.Value("int32")),
            },
        ),
        ("answers", datasets.List(datasets.Value("string"))),
        ("idx", {"passage": datasets.Value("int32"), "query": datasets.Value("int32")}),
    ],
    "rte": [
        ("premise", "string"),
        ("hypothesis", "string"),
        ("idx", "int32"),
        ("label", ["entailment", "not_entailment"]),
    ],
    "wic": [
        *((name, "string") for name in ("word", "sentence1", "sentence2")),
        *((name, "int32") for name in ("start1", "start2", "end1", "end2", "idx")),
        ("label", ["False", "True"]),
    ],
    "wsc.fixed": [
        ("text", "string"),
        ("span1_index", "int32"),
        ("span2_index", "int32"),
        ("span1_text", "string"),
        ("span2_text", "string"),
        ("idx", "int32"),
        ("label", ["False", "True"]),
    ],
    "axb": [
        ("sentence1", "string"),
        ("sentence2", "string"),
        ("idx", "int32"),
        ("label", ["entailment", "not_entailment"]),
    ],
    "axg": [
        ("premise", "string"),
        ("hypothesis", "string"),
        ("idx", "int32"),
        ("label", ["entailment", "not_entailment"]),
    ],
}


def features(config):
    def feature(kind):
        if isinstance(kind, str):
            return datasets.Value(kind)
        return datasets.ClassLabel(names=kind) if type(kind) is list else kind

    return datasets.Features({name: feature(kind) for name, kind in HUB_FEATURES[config]})


def hub_rows(config, official):
    """What the hub's own loading script made of an official row."""
    if config == "multirc":
        for question in official["passage"]["questions"]:
            for answer in question["answers"]:
                yield {
                    "paragraph": official["passage"]["text"],
                    "question": question["question"],
                    "answer": answer["text"],
                    "idx": {"paragraph": official["idx"], "question": question["idx"], "answer": answer["idx"]},
                    "label": answer["label"],
                }
    elif config == "record":
        text, entities = official["passage"]["text"], official["passage"]["entities"]
        spans = sorted((e["start"], e["end"] + 1) for e in entities)
        for qa in official["qas"]:
            yield {
                "passage": text,
                "query": qa["query"],
                "entities": list({text[start:end] for start, end in spans}),
                "entity_spans": {
                    "text": [text[start:end] for start, end in spans],
                    "start": [start for start, _ in spans],
                    "end": [end for _, end in spans],
                },
                "answers": sorted({answer["text"] for answer in qa["answers"]}),
                "idx": {"passage": official["idx"], "query": qa["idx"]},
            }
    else:
        row = {**official, **official.get("target", {})}
        if isinstance(row["label"], str):
            row["label"] = features(config)["label"].str2int(row["label"])
        yield {name: row[name] for name, _ in HUB_FEATURES[config]} | {"label": int(row["label"])}


@pytest.mark.parametrize("row", [*superglue.ROWS.values(), *superglue.DIAGNOSTICS], ids=lambda row: row.folder)
def test_the_hub_gives_the_same_examples_as_the_official_files(row, monkeypatch):
    split = "test" if row.folder in superglue_data.DIAGNOSTICS else "val"
    official = superglue_data.read("demo", row.folder, split)
    config = {"WSC": "wsc.fixed", "AX-b": "axb", "AX-g": "axg"}.get(row.folder, row.folder.lower())

    def load_dataset(path, name, *, split, revision):
        assert (path, name) == ("aps/super_glue", config)
        assert split in ("validation", "test") and len(revision) == 40
        rows = [new for line in lines_of(official) for new in hub_rows(config, json.loads(line))]
        return datasets.Dataset.from_list(rows, features=features(config))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    theirs = examples(superglue_data.read("hub", row.folder, split), row.make, Tally())
    ours = examples(official, row.make, Tally())
    if row.folder in ("MultiRC", "AX-g"):  # groups are named differently, but must be the same groups
        assert partition(theirs) == partition(ours)
        theirs, ours = ([(e.first, e.second, e.label) for e in some] for some in (theirs, ours))
    assert theirs == ours and len(ours) > 100


def lines_of(file):
    return file.content.decode().splitlines()


def partition(some):
    first_with = {}
    return [first_with.setdefault(example.group, index) for index, example in enumerate(some)]


# ---- what is wrong with a file


@pytest.fixture
def release(tmp_path):
    """A folder in the official layout with 20 examples a file; gives the folder and a function that edits a line."""
    for folder in superglue_data.FOLDERS:
        (tmp_path / folder).mkdir()
        for split in ("test",) if folder in superglue_data.DIAGNOSTICS else ("train", "val"):
            lines = lines_of(superglue_data.read("demo", folder, split))[:20]
            path = tmp_path / superglue_data.file_name(folder, split)
            path.write_text("".join(f"{line}\n" for line in lines))

    def edit(name, number, change):
        lines = (tmp_path / name).read_text().splitlines()
        row = json.loads(lines[number - 1])
        changed = change(row)
        lines[number - 1] = changed if isinstance(changed, str) else json.dumps(row if changed is None else changed)
        (tmp_path / name).write_text("\n".join(lines) + "\n")

    return tmp_path, edit


def create(folder, name, **given):
    given = {"model": "config:roberta-tiny", "batch_size": 2, "sequence_length": 32, **given}
    return tasks.create(f"superglue/{name}", data=str(folder), **given)


def drop(*path):
    def change(row):
        for key in path[:-1]:
            row = row[key]
        del row[path[-1]]

    return change


def put(value, *path):
    def change(row):
        for key in path[:-1]:
            row = row[key]
        row[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("name", "file", "change", "words"),
    [
        ("rte", "RTE/train.jsonl", lambda row: json.dumps(row)[:30], "not valid JSON"),
        ("rte", "RTE/train.jsonl", lambda row: [1], "expected a JSON object"),
        ("rte", "RTE/val.jsonl", drop("premise"), "'premise' is missing"),
        ("rte", "RTE/val.jsonl", put("maybe", "label"), '"entailment", "not_entailment" (first: '),
        ("rte", "RTE/val.jsonl", put(None, "hypothesis"), "'hypothesis' must be text (first: "),
        ("rte", "AX-b/AX-b.jsonl", drop("sentence2"), "'sentence2' is missing"),
        ("rte", "AX-g/AX-g.jsonl", put("x", "pair_id"), "'pair_id' must be a whole number"),
        ("boolq", "BoolQ/train.jsonl", put(1, "label"), "one of false, true (first: "),
        ("cb", "CB/train.jsonl", put("contradicts", "label"), "neutral"),
        ("copa", "COPA/train.jsonl", put(2, "label"), "one of 0, 1 (first: "),
        ("copa", "COPA/train.jsonl", put("why", "question"), "'question' must be one of"),
        ("multirc", "MultiRC/train.jsonl", put([], "passage", "questions"), "'questions' is an empty list"),
        ("multirc", "MultiRC/train.jsonl", drop("passage", "questions", 1, "answers", 2, "label"), "answers[2]"),
        ("record", "ReCoRD/train.jsonl", put(999, "passage", "entities", 0, "end"), "isn't inside the passage"),
        ("record", "ReCoRD/train.jsonl", put("no gap", "qas", 0, "query"), "no @placeholder"),
        ("wic", "WiC/train.jsonl", put(999, "end2"), "aren't inside sentence2"),
        ("wsc", "WSC/train.jsonl", put(99, "target", "span1_index"), "isn't one of the text's"),
        ("wsc", "WSC/train.jsonl", put(True, "target", "span1_index"), "must be a whole number (first: "),
    ],
)
def test_a_wrong_line_is_left_out_and_named_with_its_file_and_number(release, name, file, change, words):
    folder, edit = release
    before = create(folder, name)
    edit(file, 7, change)
    task = create(folder, name)
    notes = task.provenance["notes"]
    assert notes.startswith("1 row left out: ") and f"{folder}/{file}, line 7" in notes and words in notes
    assert "\n" not in notes
    assert len(sizes(before)) == len(sizes(task)) and sum(sizes(before)) > sum(sizes(task))


def sizes(task):
    return [len(some) for some in (task.data.train, task.data.validation, *task.data.diagnostics.values())]


def test_a_file_cut_off_in_the_middle_names_its_last_line(release):
    folder, _ = release
    path = folder / "CB/train.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    assert "1 row left out: not valid JSON (first: " in (notes := create(folder, "cb").provenance["notes"])
    assert "CB/train.jsonl, line 20 at character" in notes


def test_of_a_file_with_more_wrong_lines_than_right_ones_nothing_is_used(release):
    folder, edit = release
    for number in range(3, 14):
        edit("CB/val.jsonl", number, drop("premise") if number > 3 else lambda row: "[")
    with pytest.raises(ValueError, match=r"CB/val.jsonl, line 3: not valid JSON.*11 of the 20 rows.*'premise' is miss"):
        create(folder, "cb")


def test_bytes_that_are_no_text_name_their_line(release):
    folder, _ = release
    path = folder / "CB/train.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:3], lines[3].replace(b"a", b"\xe4", 1), *lines[4:]]))
    notes = create(folder, "cb").provenance["notes"]
    assert notes.startswith(f"1 characters that aren't Unicode replaced by U+FFFD (first: {path}, line 4)")


def test_an_empty_split_and_a_missing_file_are_named(release):
    folder, _ = release
    (folder / "CB/val.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"CB/val.jsonl: the file is empty"):
        create(folder, "cb")
    (folder / "CB/val.jsonl").unlink()
    with pytest.raises(ValueError, match=r"CB/val.jsonl is missing"):
        create(folder, "cb")


def test_an_unknown_folder_says_which_layout_is_expected(tmp_path):
    for act in (lambda: create(tmp_path, "rte"), lambda: tasks.expand("superglue", data=str(tmp_path))):
        with pytest.raises(ValueError, match=r"layout of the official SuperGLUE release: BoolQ, CB.*train.jsonl"):
            act()


def test_a_family_expands_to_what_the_source_has(release):
    folder, _ = release
    assert len(tasks.expand("superglue")) == 8 and set(tasks.expand("superglue")) <= set(tasks.available())
    for name in ("WSC", "CB", "AX-b"):
        for path in (folder / name).iterdir():
            path.unlink()
        (folder / name).rmdir()
    names = ["boolq", "copa", "multirc", "record", "rte", "wic"]
    assert tasks.expand("superglue", data=str(folder)) == [f"superglue/{name}" for name in names]
    metrics = create(folder, "rte").evaluate(create(folder, "rte").build_model())
    assert set(metrics) == {"accuracy", "ax_g_gender_parity", "ax_g_accuracy"}


def test_the_digest_follows_the_bytes_of_the_files_and_nothing_else(release):
    folder, edit = release
    before = create(folder, "cb").provenance["data_sha256"]
    assert create(folder, "cb", seed=3).provenance["data_sha256"] == before
    edit("CB/val.jsonl", 3, put("entailment", "label"))
    edit("CB/val.jsonl", 3, put("new words", "premise"))
    assert create(folder, "cb").provenance["data_sha256"] != before


def test_a_line_separator_of_unicode_inside_a_text_does_not_end_the_line(release):
    folder, _ = release
    path = folder / "CB/train.jsonl"
    row = {"premise": "one\u2028two", "hypothesis": "h", "label": "neutral"}
    path.write_text(json.dumps(row, ensure_ascii=False) + "\n")
    assert create(folder, "cb").train_size == 1


# ---- what becomes of a row


def row_of(value):
    return Row("here", value)


def test_wsc_marks_words_by_their_places():
    text = "Mark told Pete many lies about himself, which Pete included in his book."
    target = {"span1_text": "Mark", "span1_index": 0, "span2_text": "He", "span2_index": 11}
    (example,) = wsc(row_of({"text": text, "target": target, "label": False}))
    assert example.first == "* Mark * told Pete many lies about himself, which Pete included in # his # book."
    assert (example.second, example.label) == ("", 0)


def test_wsc_marks_a_span_of_several_words():
    target = {"span1_text": "The tall tree", "span1_index": 0, "span2_text": "it", "span2_index": 5}
    (example,) = wsc(row_of({"text": "The tall tree fell because it was old.", "target": target, "label": True}))
    assert example.first == "* The tall tree * fell because # it # was old."


def test_wic_marks_by_characters_and_names_the_word():
    row = {"word": "place", "sentence1": "Do you want to come over to my place later?", "sentence2": "A placed place."}
    row |= {"start1": 31, "end1": 36, "start2": 9, "end2": 14, "label": False}
    (example,) = superglue.wic(row_of(row))
    assert example.first == "Do you want to come over to my * place * later?"
    assert example.second == "A placed * place *. place"


def test_multirc_gives_one_example_an_answer_grouped_by_question():
    answers = [{"text": "yes", "label": 1}, {"text": "no", "label": 0}]
    questions = [{"question": "A?", "answers": answers}, {"question": "B?", "answers": answers[:1]}]
    some = list(superglue.multirc(row_of({"passage": {"text": "P.", "questions": questions}})))
    assert [(e.first, e.second, e.label) for e in some] == [
        ("P.", "A? yes", 1),
        ("P.", "A? no", 0),
        ("P.", "B? yes", 1),
    ]
    assert some[0].group == some[1].group != some[2].group


def test_record_offers_each_entity_once_with_inclusive_ends_and_all_answers():
    text = "Ann met Bo. Ann left.\n@highlight\nBo stayed"
    entities = [{"start": 0, "end": 2}, {"start": 8, "end": 9}, {"start": 12, "end": 14}]
    qas = [{"query": "It was @placeholder who left", "answers": [{"text": "Ann"}, {"text": "Ann"}]}]
    (choice,) = superglue.record(row_of({"passage": {"text": text, "entities": entities}, "qas": qas}))
    assert choice.first == "Ann met Bo. Ann left. Bo stayed"
    assert (choice.candidates, choice.right, choice.wrong, choice.answers) == (("Ann", "Bo"), (0,), (1,), ("Ann",))
    assert choice.filled(1) == "It was Bo who left"


def test_winogender_pairs_without_ids_are_found_by_their_pronouns():
    def group(premise):
        row = {"premise": premise, "hypothesis": "The nurse left.", "label": "entailment"}
        return next(superglue.ax_g(row_of(row))).group

    assert group("The nurse said she left.") == group("The nurse said he left.")
    assert group("The nurse said she left.") != group("The cook said he left.")


# ---- real data


@pytest.mark.parametrize(
    ("name", "train", "validation"),
    [
        ("boolq", 9427, 3270),
        ("cb", 250, 56),
        ("copa", 400, 100),
        ("multirc", 27243, 4848),  # answers to 5,131 and 953 questions
        ("record", 32, 32),
        ("rte", 2490, 277),
    ],
)
def test_real_files_have_as_many_examples_as_published(shared_data, name, train, validation):
    row = superglue.ROWS[name]
    train_lines, validation_lines = (
        superglue_data.read(str(shared_data / "superglue"), row.folder, split) for split in ("train", "val")
    )
    tally = Tally(needless=NEEDLESS)
    some, others = examples(train_lines, row.make, tally), examples(validation_lines, row.make, tally)
    assert not tally.notes
    assert (len(some), len(others)) == (train, validation)
    if name == "multirc":
        assert len({e.group for e in some}) == 5131 and len({e.group for e in others}) == 953
    if name == "record":
        assert all(choice.right and choice.wrong for choice in some)
