"""Users' files: one odd row stops no data set, nothing is dropped without a word, and contents are text everywhere."""

import gzip
import json

import numpy as np
import pytest
import transformers
from architectures import ARCHITECTURES
from chat_templates import MARKUP
from letters import folder, letters

import tasks
from tasks.c4.corpus import Documents
from tasks.classify import data as classify_data
from tasks.data.rows import Row, RowError
from tasks.data.tally import Tally
from tasks.dpo.formats import pair
from tasks.instruct import conversations
from tasks.instruct.formats import Conversation, Message, conversation
from tasks.instruct.prompts import encode
from tasks.instruct.templates import Template

ASKED, ANSWERED = Message("user", "Hi"), Message("assistant", "Hello!")
QUESTION, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def lines(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def alpaca_rows(count):
    return [{"instruction": f"Say number {n}.", "output": f"It is {n}."} for n in range(count)]


def texts(count):
    return [{"text": f"the {n}th museum was {'bad' if n % 2 else 'good'}", "label": n % 2} for n in range(count)]


def read(path, rows):
    """What is read of good rows with `rows` among them, and the notes."""
    found = conversations.read(lines(path, [*alpaca_rows(100), *rows]))
    return len(found.training) + len(found.held_out) - 100, "; ".join(found.notes)


def of(row):
    tally = Tally()
    return conversation(Row("here", row), tally), "; ".join(tally.notes)


def used(row, make=conversation):
    """What becomes of a row that can be used, and the notes, fields that weren't used among them."""
    tally = Tally()
    (found,) = tally.use("file", [Row("here", row)], lambda one: make(one, tally))
    return found, "; ".join(tally.notes)


# ---- S3, N12: tables


def test_s3_a_quote_in_a_tsv_is_text_and_in_a_csv_it_holds_a_cell_together(tmp_path):
    rows = [(f'"Museum {n} was fine' if n % 9 == 4 else f'museum {n} "was" fine', str(n % 2)) for n in range(63)]
    (tmp_path / "a.tsv").write_text("text\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in rows))
    found = classify_data.read(str(tmp_path / "a.tsv"))
    assert {(one.first, found.labels[one.label]) for one in found.train + found.validation} == set(rows)
    assert not found.notes
    (tmp_path / "a.csv").write_text("text,label\n" + "".join(f'"museum, {n}\n""of"" art",{n % 2}\n' for n in range(63)))
    found = classify_data.read(str(tmp_path / "a.csv"))
    assert {one.first for one in found.train + found.validation} == {f'museum, {n}\n"of" art' for n in range(63)}


@pytest.mark.parametrize("digest", [lambda path: classify_data.read(path).sha256, lambda path: Documents(path).sha256])
def test_the_same_bytes_with_quotes_and_without_are_other_data(tmp_path, digest):
    """Or runs on a table that was given another ending would pass for those that were made before."""
    table = "text\tlabel\n" + "".join(f'"museum {n} ""was"" fine"\t{n % 2}\n' for n in range(63))
    names = ("a.csv", "a.tsv", "b.csv", "b.tsv")
    for name in names:
        (tmp_path / name).write_text(table)
    csv, tsv, *copies = (digest(str(tmp_path / name)) for name in names)
    assert csv != tsv and copies == [csv, tsv]


@pytest.mark.parametrize(("name", "separator"), [("a.csv", ","), ("a.tsv", "\t")])
def test_s3_lines_may_end_as_those_of_a_mac(tmp_path, name, separator):
    text = f"text{separator}label\r" + "".join(f"museum {n}{separator}{n % 2}\r" for n in range(60))
    (tmp_path / name).write_text(text, newline="")
    found = classify_data.read(str(tmp_path / name))
    assert len(found.train) + len(found.validation) == 60 and found.labels == ("0", "1") and not found.notes


def test_s3_a_carriage_return_within_a_line_of_a_tsv_is_text(tmp_path):
    text = "text\tlabel\n" + "".join(f"museum\r{n}\t{n % 2}\n" for n in range(60))
    (tmp_path / "a.tsv").write_text(text, newline="")
    found = classify_data.read(str(tmp_path / "a.tsv"))
    assert {one.first for one in found.train + found.validation} == {f"museum\r{n}" for n in range(60)}


@pytest.mark.parametrize("odd", ['"museum 7,1', '"museum" 7,1', "museum 7", "museum 7,1,2", '"'])
def test_s3_an_odd_line_of_a_csv_takes_no_other_with_it(tmp_path, odd):
    good = [f"museum {n},{n % 2}" for n in range(100, 160)]
    (tmp_path / "a.csv").write_text("\n".join(["text,label", *good[:30], odd, *good[30:]]) + "\n")
    found = classify_data.read(str(tmp_path / "a.csv"))
    assert {one.first for one in found.train + found.validation} == {line[:10] for line in good}
    (note,) = found.notes
    assert note.startswith("1 row left out: ") and f"{tmp_path}/a.csv, line 32" in note


def test_a_table_of_semicolons_is_read_as_one_of_commas(tmp_path):
    (tmp_path / "a.csv").write_text("text;label\n" + "".join(f"museum, {n};{n % 2}\n" for n in range(60)))
    assert classify_data.read(str(tmp_path / "a.csv")).train[0].first.startswith("museum, ")


@pytest.mark.parametrize(("name", "separator"), [("a.csv", ","), ("a.tsv", "\t")])
def test_s3_the_header_of_a_second_table_that_was_put_after_the_first_is_no_example(tmp_path, name, separator):
    tables = [[f"museum {n}{separator}{n % 2}" for n in range(start, start + 40)] for start in (0, 40)]
    for mark in ("", "\ufeff"):
        written = "".join(f"{mark}text{separator}label\n" + "\n".join(rows) + "\n" for rows in tables)
        (tmp_path / name).write_text(written)
        found = classify_data.read(str(tmp_path / name))
        assert found.labels == ("0", "1") and len(found.train) + len(found.validation) == 80
        assert found.notes == (f"1 row left out: it is the header again (first: {tmp_path}/{name}, line 42)",)


def test_what_lies_beside_rows_without_being_any_is_not_read(tmp_path):
    """macOS's resource forks, hidden copies, what `datasets` writes: one of them stopped a data set, or was learned."""
    lines(tmp_path / "train.jsonl", alpaca_rows(100))
    (tmp_path / "._train.jsonl").write_bytes(b"\0\5\x16\7" + bytes(200))
    lines(tmp_path / ".old.jsonl", [{"instruction": f"old {n}", "output": "x"} for n in range(9)])
    (tmp_path / "dataset_info.json").write_text("{\n}\n")
    (tmp_path / ".gitattributes").write_text("x")
    found = conversations.read(str(tmp_path))
    assert len(found.training) + len(found.held_out) == 100
    assert found.notes == ["not read: ._train.jsonl, .old.jsonl, dataset_info.json"]
    (tmp_path / "train.jsonl").rename(tmp_path / "data-00000-of-00001.arrow")
    with pytest.raises(ValueError, match=r"nor a file or folder of files in .*; it has .*data-00000-of-00001\.arrow"):
        conversations.read(str(tmp_path))
    assert conversations.read(str(tmp_path / ".old.jsonl")).held_out  # unless it is asked for


@pytest.mark.parametrize("name", ["testing", "tests", "evals", "my_test (1)", "validate", "contest", "latest"])
def test_which_files_are_held_out_is_said(tmp_path, name):
    lines(tmp_path / "train.jsonl", alpaca_rows(40))
    lines(tmp_path / f"{name}.jsonl", [{"instruction": f"other {n}", "output": "x"} for n in range(9)])
    found = conversations.read(str(tmp_path))
    if name in ("contest", "latest"):
        assert len(found.training) > 40 and not found.notes
    else:
        assert len(found.training) == 40 and found.notes == [f"held out: {name}.jsonl"]


def test_n12_what_is_there_twice_is_not_guessed_at(tmp_path):
    twice = '{"instruction": "Hi", "output": "One.", "output": "Two."}'
    count, notes = read(tmp_path / "a.jsonl", [twice])
    assert count == 0 and f"an object has 'output' twice (first: {tmp_path}/a.jsonl, line 101)" in notes
    (tmp_path / "a.json").write_text(f"[{twice}, {', '.join(map(json.dumps, alpaca_rows(100)))}]")
    assert "an object has 'output' twice" in conversations.read(str(tmp_path / "a.json")).notes[0]
    (tmp_path / "a.csv").write_text("text,text2,text2,label\na,b,c,1\n")
    with pytest.raises(ValueError, match=r"a.csv, line 1: the header has 2 columns 'text2': give each its own name"):
        classify_data.read(str(tmp_path / "a.csv"))


# ---- S5: fields


def test_s5_alpacas_system_and_history_are_used():
    row = {
        "instruction": "Bye",
        "input": "now",
        "output": "See you.",
        "system": "Be kind.",
        "history": [["Hi", "Hello!"]],
    }
    found, notes = of(row)
    assert found.messages == (
        Message("system", "Be kind."),
        ASKED,
        ANSWERED,
        Message("user", "Bye\n\nnow"),
        Message("assistant", "See you."),
    )
    assert not notes


@pytest.mark.parametrize("name", ["conversations", "messages"])
def test_s5_a_system_text_beside_the_turns_is_used(name):
    found, _ = of({"system": "Be kind.", name: [QUESTION, ANSWER]})
    assert found.messages == (Message("system", "Be kind."), ASKED, ANSWERED)
    assert of({"system": None, name: [QUESTION, ANSWER]})[0].messages == (ASKED, ANSWERED)


def test_s5_what_says_it_reaches_the_tokens(tmp_path):
    rows = [{**row, "system": "Speak like a pirate.", "history": [["What?", "Arr!"]]} for row in alpaca_rows(100)]
    task = tasks.create(
        "instruct", data=lines(tmp_path / "a.jsonl", rows), model="config:llama-tiny", batch_size=2, sequence_length=256
    )
    for tokens, answers in (task.train[number] for number in range(5)):
        text, learned = task.tokenizer.decode(tokens), task.tokenizer.decode(tokens[answers])
        assert text.startswith("Speak like a pirate.") and "### Instruction:\nWhat?" in text
        assert learned.startswith("Arr!<|endoftext|>It is ")


def test_s5_other_fields_are_counted(tmp_path):
    more = [{**row, "id": n, "source": "x", "text": None} for n, row in enumerate(alpaca_rows(30), 1)]
    turns = [QUESTION | {"name": "Ann"}, ANSWER | {"reasoning": "hm"}]
    _, notes = read(tmp_path / "a.jsonl", [*more, {"messages": turns, "tools": [{"name": "f"}]}])
    assert notes.startswith("unused fields: ")
    for words in ("id (30)", "source (30)", "tools (1)", "messages[].name (1)", "messages[].reasoning (1)"):
        assert words in notes
    assert "text" not in notes


# ---- S6: text is text

SAYING = "</s> closes an s tag. <pad> is another, <|im_end|> and <|endoftext|> too."


@pytest.mark.parametrize("name", ["llama", "gpt2", "roberta"])
def test_s6_control_tokens_named_in_a_conversation_are_text(shared_data, name):
    tokenizer = transformers.AutoTokenizer.from_pretrained(shared_data / "tokenizers" / name)
    ((ids, answers),) = encode(
        [Conversation((Message("user", SAYING), Message("assistant", SAYING)))], tokenizer, Tally()
    )
    assert tokenizer.decode(ids[answers][:-1]).strip() == SAYING
    special = set(tokenizer.all_special_ids)
    assert [number for number, token in enumerate(ids) if token in special] in ([0, len(ids) - 1], [len(ids) - 1])
    answer = ids[answers][:-1].tolist()
    after_a_prompt = tokenizer(f"### Response:{SAYING}", add_special_tokens=False, split_special_tokens=True)[
        "input_ids"
    ]
    assert after_a_prompt[-len(answer) :] == answer


@pytest.fixture
def templated(shared_data):
    """Llama's tokenizer with the template and the control tokens of another model."""

    def make(name):
        tokenizer = transformers.AutoTokenizer.from_pretrained(shared_data / "tokenizers" / "llama")
        tokenizer.chat_template, special = MARKUP[name]
        tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
        tokenizer.add_tokens(["<think>", "</think>"])
        return tokenizer

    return make


@pytest.mark.parametrize("name", MARKUP)
def test_s6_a_templates_own_markup_is_control_tokens_and_the_same_words_in_a_turn_are_not(templated, name):
    tokenizer = templated(name)
    saying = " and ".join(["</s>", *MARKUP[name][1]])
    turns = (Message("user", f"What is {saying}?"), Message("assistant", f"{saying}."))
    plain = tuple(message._replace(content="Nothing.") for message in turns)
    (with_names, said), (without, _) = encode([Conversation(turns), Conversation(plain)], tokenizer, Tally())
    special = set(tokenizer.all_special_ids)
    assert [token for token in with_names if token in special] == [token for token in without if token in special]
    text = tokenizer.decode(with_names[said], skip_special_tokens=True)
    assert saying in " ".join(text.split())


@pytest.mark.parametrize("name", MARKUP)
def test_s6_without_such_words_the_tokens_are_those_of_the_template_alone(templated, name):
    tokenizer = templated(name)
    turns = [ASKED, ANSWERED]
    parts = Template(tokenizer).parts(turns, "here", Tally())
    ((ids, answers),) = encode([Conversation(tuple(turns))], tokenizer, Tally())
    whole, prompt = (
        tokenizer("".join(text for text, _ in some), add_special_tokens=False)["input_ids"]
        for some in (parts, parts[:-1])
    )
    assert ids.tolist() == whole and ids[~answers].tolist() == prompt


def test_s6_names_of_control_tokens_in_a_classified_text_are_text(tmp_path, shared_data):
    rows = [{**row, "text": f"{row['text']} {SAYING}", "text2": SAYING} for row in texts(60)]
    task = tasks.create(
        "classify",
        data=lines(tmp_path / "a.jsonl", rows),
        model="config:roberta-base",
        tokenizer=str(shared_data / "tokenizers" / "roberta"),
        batch_size=4,
        sequence_length=96,
    )
    special = set(task.tokenizer.all_special_ids)
    for ids in task.batch(0)["input_ids"].tolist():
        names = [task.tokenizer.convert_ids_to_tokens(token) for token in ids if token in special]
        assert [name for name in names if name != "<pad>"] == ["<s>", "</s>", "</s>", "</s>"]


# ---- W3: one odd row

ODD = {
    "null": ({"instruction": "Hi", "output": None}, "'output' must be text"),
    "null value": ({"conversations": [{"from": "human", "value": None}]}, "'value' must be text"),
    "no turns": ({"messages": []}, "'messages' is an empty list"),
    "null content": ({"messages": [QUESTION, {"role": "assistant", "content": None}]}, "'content' must be text"),
    "no answer": ({"instruction": "Hi", "output": ""}, "no answer to learn"),
    "unanswered": ({"messages": [QUESTION]}, "no answer to learn"),
    "number": ({"instruction": "Hi", "output": 42}, "'output' must be text"),
    "cut": ('{"instruction": "Hi", "out', "not valid JSON"),
    "a list": ("[1, 2]", "expected a JSON object"),
    "deep": ("[" * 100_000, "nested too deeply"),
    "deep object": ('{"a":' * 100_000 + "1" + "}" * 100_000, "nested too deeply"),
    "huge number": ('{"instruction": 1' + "0" * 10_000 + "}", "no known format"),
    "image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, ANSWER]},
        'a part of its content isn\'t text but "image_url"',
    ),
    "history": ({"instruction": "a", "output": "b", "history": ["c"]}, "'history' must be a list of pairs of texts"),
}


@pytest.mark.parametrize("name", ODD)
def test_w3_an_odd_row_is_left_out_and_counted_with_its_place(tmp_path, name):
    row, reason = ODD[name]
    count, notes = read(tmp_path / "a.jsonl", [row])
    assert count == 0 and "\n" not in notes
    assert notes.startswith(f"1 row left out: {reason}") and f"(first: {tmp_path}/a.jsonl, line 101" in notes


def test_w3_tool_calls_beside_a_null_content_are_context(tmp_path):
    call = {"function": {"name": "add", "arguments": '{"a": 1}'}}
    said = [
        QUESTION,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "1"},
        ANSWER,
    ]
    found, notes = of({"messages": said})
    assert [message.role for message in found.messages] == ["user", "assistant", "tool", "assistant"]
    assert [message.learned for message in found.messages if message.role == "assistant"] == [False, True]
    assert "add" in found.messages[1].content and not notes


@pytest.mark.parametrize("nothing", [{"tool_calls": []}, {"tool_calls": None}, {"function_call": {}}])
def test_s5_an_answer_that_calls_no_tool_is_learned_as_it_is(nothing):
    """Files of one schema for all turns have the field in each."""
    turns = [QUESTION, {**ANSWER, **nothing}, QUESTION, {**ANSWER, **nothing}]
    found, notes = of({"messages": turns})
    assert found.messages == (ASKED, ANSWERED, ASKED, ANSWERED) and not notes


def test_w3_what_comes_before_any_question_is_left_out(tmp_path):
    found, notes = of({"messages": [ANSWER, QUESTION, ANSWER]})
    assert found.messages == (ASKED, ANSWERED)
    assert notes == "1 turns left out, since they precede the user's first (first: here)"
    with pytest.raises(RowError, match="here: no answer to learn"):
        of({"messages": [ANSWER]})


def test_w3_halves_of_characters_are_mended_and_counted(tmp_path):
    count, notes = read(tmp_path / "a.jsonl", ['{"instruction": "x \\ud83d", "output": "\\udead \\ud83d\\ude00"}'])
    assert count == 1 and notes == (
        f"2 characters that aren't Unicode replaced by U+FFFD (first: {tmp_path}/a.jsonl, line 101)"
    )
    found, _ = conversations.read(str(tmp_path / "a.jsonl")), None
    assert {"\ufffd \U0001f600"} <= {one.answer for one in found.training + found.held_out}


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("packed", [False, True])
def test_w3_a_byte_order_mark_is_no_character(tmp_path, encoding, packed):
    content = json.dumps(texts(60)).encode(encoding)
    (tmp_path / "a.json").write_bytes(gzip.compress(content) if packed else content)
    assert len(classify_data.read(str(tmp_path / "a.json")).train) > 40
    marked = b"".join(f"\ufeff{json.dumps(row)}\n".encode() for row in texts(60))  # files one after the other
    (tmp_path / "b.jsonl").write_bytes(marked)
    assert not classify_data.read(str(tmp_path / "b.jsonl")).notes


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.jsonl"])
def test_zero_bytes_of_wide_characters_without_a_mark_are_never_taken_for_text(tmp_path, encoding, name):
    (tmp_path / name).write_bytes(("\u201cThe museum\u201d was open. " * 500).encode(encoding))
    with pytest.raises(ValueError, match=f"{name}: it must be UTF-8, but has many zero bytes, .* convert it"):
        list(Documents(str(tmp_path / name)).read(Tally()))


def test_a_zero_character_in_a_text_is_text(tmp_path):
    (tmp_path / "a.txt").write_text("\0the museum was open. " * 100)
    assert "".join(Documents(str(tmp_path / "a.txt")).read(Tally())) == "\0the museum was open. " * 100


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_halves_of_characters_in_a_wide_file_are_counted(tmp_path, encoding):
    lines = [f'{{"instruction": "Say {n}.", "output": "{n}."}}\n' for n in range(99)]
    content = "".join([*lines, '{"instruction": "x \ud83d", "output": "y"}'])
    (tmp_path / "a.jsonl").write_bytes(content.encode(encoding, "surrogatepass"))
    found = conversations.read(str(tmp_path / "a.jsonl"))
    assert found.notes == [f"1 characters that aren't Unicode replaced by U+FFFD (first: {tmp_path}/a.jsonl, line 100)"]


def test_w3_a_long_cell_is_a_text(tmp_path):
    rows = [f"museum {n},{n % 2}" for n in range(60)]
    (tmp_path / "a.csv").write_text("text,label\n" + "\n".join([*rows, f"{'word ' * 30_000},1"]))
    found = classify_data.read(str(tmp_path / "a.csv"))
    assert max(len(one.first) for one in found.train + found.validation) == 150_000


def test_w3_a_file_of_more_odd_rows_than_others_is_an_error(tmp_path):
    rows = [*alpaca_rows(40), *[{"instruction": "Hi", "output": None}] * 41, "{"]
    with pytest.raises(ValueError) as caught:
        conversations.read(lines(tmp_path / "a.jsonl", rows))
    assert str(caught.value) == (
        f"{tmp_path}/a.jsonl, line 41: 'output' must be text, got null (42 of the 82 rows of {tmp_path}/a.jsonl "
        "can't be used; others: not valid JSON (1))"
    )
    assert len(conversations.read(lines(tmp_path / "a.jsonl", rows[:80])).training) > 30


def test_w3_what_is_said_of_the_data_stands_in_the_record_of_every_kind_of_task(tmp_path):
    given = {"batch_size": 2, "sequence_length": 64}
    (tmp_path / "c4").mkdir()
    data = {
        "classify": ("config:roberta-tiny", lines(tmp_path / "a.jsonl", [*texts(60), {"text": None, "label": 1}])),
        "c4": ("config:llama-tiny", lines(tmp_path / "c4" / "a.jsonl", [*texts(900), {"text": None}])),
        "instruct": ("config:llama-tiny", lines(tmp_path / "b.jsonl", [*alpaca_rows(100), {"prompt": "x"}])),
    }
    for name, (model, path) in data.items():
        task = tasks.create(name, model=model, data=path, **given | {"sequence_length": 128})
        assert "1 row left out: " in task.provenance["notes"] and path in task.provenance["notes"]


@pytest.mark.parametrize("family", ["classify", "c4", "instruct", "dpo"])
def test_what_the_tokenizer_does_not_know_is_counted(tmp_path, family):
    """To a model all of it is one token: a score then says little of the texts."""
    answers = {"chosen": "yes", "rejected": "no"}
    for name, odd in (("known", "museum"), ("unknown", "\u535a\u7269\u9986")):
        said = [f"{'ab'[n % 2] * (n % 30)} {'cd'[n % 3 % 2]} {odd}" for n in range(200)]
        rows = [{"text": text, "label": n % 2, "prompt": text} | answers for n, text in enumerate(said)]
        template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
        kind = "roberta" if family == "classify" else "llama"
        model = ARCHITECTURES[kind].build()
        path = folder(tmp_path / name, model.base_model if family == "classify" else model, letters())
        (tmp_path / name / "chat_template.jinja").write_text(template)
        given = {"model": path, "data": lines(tmp_path / f"{name}.jsonl", rows), "batch_size": 2, "sequence_length": 60}
        notes = tasks.create(family, **given).provenance["notes"] or ""
        assert (" tokens are <unk>, which stands for all that the tokenizer doesn't know" in notes) == (
            name == "unknown"
        )


def test_a_tokenizer_whose_token_for_the_unknown_is_not_in_its_vocabulary_is_used(tmp_path):
    path = folder(tmp_path / "model", ARCHITECTURES["roberta"].build().base_model, letters())
    config = tmp_path / "model" / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "unk_token": ""}))
    rows = [{"text": "ab" * (1 + n), "label": n % 2} for n in range(20)]
    given = {"model": path, "data": lines(tmp_path / "a.jsonl", rows), "batch_size": 2, "sequence_length": 60}
    assert "stands for all" not in (tasks.create("classify", **given).provenance["notes"] or "")


@pytest.mark.parametrize("name", MARKUP)
def test_w3_turns_that_a_template_refuses_are_put_so_that_it_takes_them(templated, name):
    turns = [
        [Message("system", "Be kind."), ASKED, ANSWERED],
        [ASKED, Message("user", "there"), ANSWERED],
        [ASKED, ANSWERED, Message("system", "Be rude."), Message("user", "Bye"), Message("assistant", "Go.")],
        [ASKED, Message("assistant", '{"f": 1}', learned=False), Message("tool", "42"), ANSWERED],
    ]
    tally, tokenizer = Tally(), templated(name)
    found = encode([Conversation(tuple(some)) for some in turns], tokenizer, tally)
    for some, one in zip(turns, found, strict=True):
        text = tokenizer.decode(one[0])
        assert all(message.content in text for message in some)
        learned = tokenizer.decode(one[0][one[1]])
        assert some[-1].content in learned and not any(m.content in learned for m in some if m.role != "assistant")
    assert not tally.left_out


REASONED = "<think>\nA greeting.\n</think>\n\nHello!"


@pytest.mark.parametrize("name", ["qwen3", "r1"])
def test_w3_templates_of_reasoning_models_take_single_and_several_turns(templated, name):
    tokenizer, tally = templated(name), Tally()
    single, reasoned = (ASKED, ANSWERED), (ASKED, Message("assistant", REASONED))
    several = (*reasoned, Message("user", "Bye"), Message("assistant", REASONED.replace("Hello", "See you")))
    found = encode([Conversation(one, where="here") for one in (single, reasoned, several)], tokenizer, tally)
    learned = ["".join(tokenizer.decode(ids[answers]).split()) for ids, answers in found]
    assert "Hello!" in learned[0] and "Agreeting.</think>Hello!" in learned[1]
    assert "Agreeting.</think>Seeyou!" in learned[2] and "Hello" not in learned[2]
    text = tokenizer.decode(found[2][0])
    assert text.count("A greeting.") == 1  # of the last answer: the template drops it before
    assert [(count, what[:28]) for what, count in tally.mended.items()] == [(1, "earlier answers not learned,")]
    for ids, answers in found:
        asked = tokenizer.decode(ids[~answers], skip_special_tokens=False)
        assert "Hi" in asked


def test_w3_a_conversation_that_no_form_helps_is_left_out_with_its_place(templated):
    tokenizer, tally = templated("chatml"), Tally()
    tokenizer.chat_template = (
        "{% for message in messages %}{% if 'beans' in message['content'] %}{{ raise_exception('no beans') }}"
        "{% endif %}{% endfor %}" + tokenizer.chat_template
    )
    odd = Conversation((Message("user", "beans"), ANSWERED), where="a.jsonl, line 7")
    found = encode([Conversation((ASKED, ANSWERED)), odd, Conversation((ASKED, ANSWERED))], tokenizer, tally)
    assert [one is None for one in found] == [False, True, False]
    assert tally.notes == ["1 row left out: the chat template refuses it (no beans) (first: a.jsonl, line 7)"]


# ---- W4: roles


@pytest.mark.parametrize("user", ["user", "human", "User", "Human", "prompter"])
@pytest.mark.parametrize("assistant", ["assistant", "gpt", "model", "Assistant", "bot"])
@pytest.mark.parametrize("keys", [("role", "content"), ("from", "value")])
@pytest.mark.parametrize("name", ["messages", "conversations"])
def test_w4_roles_have_many_names_in_both_spellings(user, assistant, keys, name):
    turns = [dict(zip(keys, pair, strict=True)) for pair in ((user, "Hi"), (assistant, "Hello!"))]
    assert of({name: turns}) == (Conversation((ASKED, ANSWERED)), "")


def test_w4_an_unknown_role_is_named_with_its_place(tmp_path):
    _, notes = read(tmp_path / "a.jsonl", [{"messages": [QUESTION, {"role": "dog", "content": "Wuff"}]}])
    assert f'unknown role "dog" (first: {tmp_path}/a.jsonl, line 101, messages[1]: the roles are user,' in notes


# ---- W5: formats


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi", "completion": "Hello!"},
        {"prompt": [QUESTION], "completion": [ANSWER]},
        {"prompt": "Hi", "response": "Hello!"},
        {"instruction": "Hi", "context": "", "response": "Hello!", "category": "open_qa"},
        {"query": "Hi", "response": "Hello!"},
        {"question": "Hi", "response": "Hello!"},
        {"input": "Hi", "output": "Hello!"},
        {"conversation": [QUESTION, ANSWER]},
        {"prompt": "Hi", "chosen": "Hello!", "rejected": "Go."},
        {"prompt": [QUESTION], "chosen": [ANSWER], "rejected": [ANSWER]},
        {"prompt": "Hi", "chosen": [QUESTION, ANSWER], "rejected": [QUESTION, ANSWER]},
        {"chosen": [QUESTION, ANSWER], "rejected": [QUESTION, ANSWER]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, ANSWER]},
        {"messages": [{"role": "user", "content": ["H", {"type": "text", "text": "i"}]}, ANSWER]},
    ],
)
def test_w5_the_formats_that_everybody_reads_are_read(row):
    assert of(row)[0] == Conversation((ASKED, ANSWERED))


def test_w5_dollys_context_belongs_to_the_question():
    assert of({"instruction": "Hi", "context": "there", "response": "Hello!"})[0] == Conversation(
        (ASKED, ANSWERED), "there"
    )


@pytest.mark.parametrize("call", ["function_call", "tool_call"])
@pytest.mark.parametrize("tool", ["observation", "tool", "function", "ipython"])
def test_w5_what_goes_to_tools_and_comes_from_them_is_context(call, tool):
    said = [("human", "Hi"), (call, '{"f": 1}'), (tool, "42"), ("gpt", "Hello!")]
    found, notes = of({"conversations": [{"from": role, "value": text} for role, text in said]})
    assert [(message.content, message.learned) for message in found.messages if message.role == "assistant"] == [
        ('{"f": 1}', False),
        ("Hello!", True),
    ]
    assert found.messages[2] == Message("tool", "42") and not notes


def test_w5_an_answer_of_no_weight_is_context():
    said = [QUESTION, ANSWER | {"weight": 0}, QUESTION, ANSWER | {"weight": 1}]
    assert [message.learned for message in of({"messages": said})[0].messages] == [True, False, True, True]


@pytest.mark.parametrize("mark", [{"train": False}, {"training": False}, {"loss": False}, {"weight": False}])
def test_s5_an_answer_marked_as_not_to_be_learned_is_context(mark):
    found, notes = used({"messages": [QUESTION, ANSWER | mark, QUESTION, ANSWER]})
    assert [one.learned for one in found.messages if one.role == "assistant"] == [False, True] and not notes


@pytest.mark.parametrize("weight", ["0", 0.5, [0]])
def test_s5_a_weight_that_is_neither_all_nor_nothing_is_refused(weight):
    with pytest.raises(RowError, match=r"messages\[1\]: 'weight' must be 0 or 1, got "):
        of({"messages": [QUESTION, ANSWER | {"weight": weight}]})


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi", "completion": "Hello!", "label": False},
        {"prompt": [QUESTION], "completion": [ANSWER], "label": False},
        {"messages": [QUESTION, ANSWER], "kto_tag": False},
        {"prompt": "Hi", "completion": "Hello!", "label": "False"},  # of a table
        {"prompt": "Hi", "completion": "Hello!", "label": "0"},
        {"prompt": "Hi", "completion": "Hello!", "label": 0},
        {"messages": [QUESTION, ANSWER], "kto_tag": "false "},
    ],
)
def test_an_answer_to_avoid_is_not_learned_and_one_to_give_is(row):
    with pytest.raises(RowError, match="its answer is marked as one to avoid"):
        of(row)
    opposite = {"False": "True", "false ": "true", "0": "1"}
    (mark,) = {"label", "kto_tag"} & row.keys()
    found, notes = used({**row, mark: opposite.get(row[mark], True)})
    assert found.messages == (ASKED, ANSWERED) and not notes


def test_a_label_that_is_neither_true_nor_false_is_a_field_that_is_not_used():
    found, notes = used({"prompt": "Hi", "completion": "Hello!", "label": "greeting"})
    assert found.messages == (ASKED, ANSWERED) and notes == "unused fields: label (1)"


def test_a_label_of_another_kind_leaves_no_answer_out():
    assert of({"instruction": "Hi", "output": "Hello!", "label": False})[0].answer == "Hello!"


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "Answer.", "question": "Hi", "answer": "Hello!"},
        {"prompt": "Answer.", "query": "Hi", "response": "Hello!"},
        {"instruction": "Answer.", "input": "Hi", "output": "Hello!"},
    ],
)
def test_s5_of_two_questions_none_is_dropped(row):
    found, notes = used(row)
    assert (found.messages[0].content, found.context, found.answer) == ("Answer.", "Hi", "Hello!") and not notes


def test_s5_a_question_that_is_only_written_out_again_is_not_asked_twice():
    row = {"instruction": "Hi", "prompt": "### Instruction: Hi ### Response:", "output": "Hello!"}
    found, notes = used(row)
    assert (found.messages, found.context) == ((ASKED, ANSWERED), "") and notes == "unused fields: prompt (1)"


def test_s5_question_and_context_both_belong_to_the_instruction():
    found, _ = used({"instruction": "Answer.", "question": "Who?", "context": "Bob.", "answer": "He."})
    assert found.context == "Who?\n\nBob."
    assert of({"instruction": "Hi", "input": " \n", "output": "Hello!"})[0].context == ""


@pytest.mark.parametrize("nothing", [None, "", " \n"])
@pytest.mark.parametrize(
    "row",
    [
        {"instruction": 0, "input": "Hi", "output": "Hello!"},
        {"instruction": 0, "prompt": 0, "question": "Hi", "completion": 0, "answer": "Hello!"},
        {"messages": 0, "prompt": "Hi", "completion": "Hello!"},
        {"messages": 0, "conversations": [QUESTION, ANSWER], "prompt": 0, "output": 0},
        {"messages": [QUESTION], "prompt": 0, "output": 0, "response": "Hello!"},
    ],
)
def test_w3_rows_of_several_formats_in_one_file_have_empty_fields_of_the_others(row, nothing):
    lists = {"messages": [] if nothing == "" else None}
    given = {name: lists.get(name, nothing) if value == 0 else value for name, value in row.items()}
    assert used(given)[0].messages == (ASKED, ANSWERED) and not used(given)[0].context
    if "completion" in row:
        given |= {"chosen": "Hello!", "rejected": "No."}
        assert tuple(used(given, pair)[0].prompt) == (ASKED,)


@pytest.mark.parametrize("name", ["system", "system_prompt"])
@pytest.mark.parametrize("field", ["messages", "chosen"])
def test_s5_a_system_text_that_the_turns_say_too_is_said_once(name, field):
    told = Message("system", "Be kind.")
    found, notes = used({name: "Be kind.", field: [{"role": "system", "content": "Be kind."}, QUESTION, ANSWER]})
    assert found.messages == (told, ASKED, ANSWERED) and not notes
    found, notes = used({name: "Be kind.", field: [{"role": "system", "content": "Be short."}, QUESTION, ANSWER]})
    assert found.messages == (told, Message("system", "Be short."), ASKED, ANSWERED)


@pytest.mark.parametrize("field", ["output", "response", "chosen"])
@pytest.mark.parametrize("earlier", [0, 1])
def test_w5_an_answer_beside_the_turns_ends_them(field, earlier):
    found, notes = used({"messages": [QUESTION, ANSWER] * earlier + [QUESTION], field: "Hello!"})
    assert found.messages == (ASKED, ANSWERED) * (earlier + 1) and not notes


@pytest.mark.parametrize("said", [["Hi", "Hello!"] * 2, [{"input": "Hi", "output": "Hello!"}] * 2])
def test_w5_turns_without_roles_are_the_users_and_the_assistants(said):
    assert of({"conversation": said})[0].messages == (ASKED, ANSWERED) * 2


def test_w5_history_may_be_turns():
    found, _ = used({"instruction": "Hi", "output": "Hello!", "history": [QUESTION, ANSWER]})
    assert found.messages == (ASKED, ANSWERED) * 2


@pytest.mark.parametrize("make", [conversation, pair])
def test_s5_a_prompt_that_a_whole_conversation_does_not_say_is_counted(make):
    parts = {"role": "user", "content": [{"type": "text", "text": "Hi"}]}
    whole = {"chosen": [QUESTION, ANSWER], "rejected": [QUESTION, ANSWER | {"content": "No."}]}
    for said, unused in [("Hi", False), ([QUESTION], False), ("Be kind.", True), ([parts], True)]:
        _, notes = used({"prompt": said, **whole}, make)
        assert ("prompt" in notes) == unused


def test_notes_name_fields_in_the_order_of_the_data():
    tally, names = Tally(), [f"field_{n}" for n in range(9)]
    list(tally.use("file", [Row("here", dict.fromkeys(names, 1))], lambda row: row))
    assert tally.notes == [f"unused fields: {', '.join(f'{name} (1)' for name in names)}"]


@pytest.mark.parametrize("separator", ["\n", " ", ""])
def test_w5_a_text_file_without_empty_lines_has_several_documents(tmp_path, separator):
    (tmp_path / "a.txt").write_text(separator.join(f"{n} museums are open." for n in range(2000)))
    documents = Documents(str(tmp_path))
    found = list(documents.read(Tally()))
    assert "".join(found) == (tmp_path / "a.txt").read_text() and len(found) > 10
    assert sum(documents.is_held_out(text) for text in found) >= 1
    assert len(list(documents.training())) < len(found)


def test_w5_where_hashes_choose_no_document_one_is_held_out(tmp_path):
    some = [f"museum {n}" for n in range(5)]
    documents = Documents(lines(tmp_path / "a.jsonl", [{"text": text} for text in some]))
    assert [documents.is_held_out(text) for text in some].count(True) == 1


def test_tables_are_read_by_every_task(tmp_path):
    (tmp_path / "a.csv").write_text("instruction,output\n" + "".join(f"Say {n}.,It is {n}.\n" for n in range(100)))
    found = conversations.read(str(tmp_path / "a.csv"))
    assert len(found.training) + len(found.held_out) == 100
    (tmp_path / "a.tsv").write_text("text\n" + "".join(f"museum {n}\n" for n in range(100)))
    assert list(Documents(str(tmp_path / "a.tsv")).read(Tally())) == [f"museum {n}" for n in range(100)]


def test_cached_tokens_come_with_what_was_said_of_their_data(tmp_path):
    path = lines(
        tmp_path / "a.jsonl",
        [*alpaca_rows(100), *({"instruction": f"{n} museums. " * 90, "output": "y"} for n in range(3))],
    )
    given = {"data": path, "model": "config:llama-tiny", "batch_size": 2, "sequence_length": 128}
    first, again = (tasks.create("instruct", **given) for _ in range(2))
    assert first.provenance == again.provenance and "since no answer fits" in first.provenance["notes"]
    assert all(np.array_equal(*pair) for pair in zip(first.train[0], again.train[0], strict=True))


@pytest.mark.parametrize("kind", ["classify", "instruct", "c4"])
def test_t_a_file_whose_bytes_can_not_be_had_is_named(tmp_path, kind):
    path = tmp_path / ("a.txt" if kind == "c4" else "a.jsonl")
    path.symlink_to("/proc/self/mem")  # opens, but reading fails
    with pytest.raises(ValueError, match=f"{path}: can't be read .Input/output error"):
        {"classify": classify_data.read, "instruct": conversations.read, "c4": Documents}[kind](str(path))


def test_w5_where_hashes_choose_no_conversation_one_is_held_out(tmp_path):
    asked = [{"instruction": f"Say {word}.", "output": word} for word in ("one", "two", "three")]
    found = conversations.read(lines(tmp_path / "a.jsonl", asked))
    assert len(found.held_out) == 1 and len(found.training) == 2


def test_validation_texts_that_are_also_trained_on_are_counted(tmp_path):
    texts = [{"text": f"number {n}", "label": n % 2} for n in range(60)]
    for name, some in (("train", texts[:40]), ("val", texts[30:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    assert classify_data.read(str(tmp_path)).notes == ("10 of 30 validation examples are also trained on",)
    (tmp_path / "val.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts[40:]))
    assert classify_data.read(str(tmp_path)).notes == ()
