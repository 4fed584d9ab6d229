"""Instruction tuning: the loss is that of answers, whatever is in a prompt, beside it in a sequence, or cut off."""

import copy
import json
import re

import chat_templates
import datasets
import numpy as np
import pytest
import torch
import transformers
from architectures import ARCHITECTURES
from letters import folder, letters
from tokenizers.pre_tokenizers import Metaspace
from torch import nn

import tasks
from tasks.data.order import position
from tasks.data.rows import Row
from tasks.data.tally import Tally
from tasks.instruct import conversations, gsm8k
from tasks.instruct.examples import collate, pack
from tasks.instruct.formats import Conversation, Message, conversation
from tasks.instruct.prompts import alpaca, encode
from tasks.instruct.templates import Template
from tasks.models import language

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def group(task, index):
    """The examples of the sequence that comes at `index` of the training's stream."""
    return task.groups[position(task.seed, index, task.train_size)]


def create(data="demo", **given):
    given = {"model": "config:llama-tiny", "batch_size": 4, "sequence_length": 96, **given}
    return tasks.create("instruct", data=str(data), **given)


@pytest.fixture(scope="module")
def demo(own_cache):
    return create()


@pytest.fixture(scope="module")
def chat_tokenizer(demo):
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=demo.tokenizer.backend_tokenizer)
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]})
    tokenizer.pad_token, tokenizer.chat_template = tokenizer.eos_token, CHATML
    return tokenizer


OF_ALPACA = "prompts are Alpaca's, since the tokenizer has no chat template; nor has a model that is saved"


def alpaca_rows(count, words=3):
    return [
        {"instruction": f"Say number {number}.", "input": "", "output": f"It is {number}. " + "Yes. " * words}
        for number in range(count)
    ]


def write(folder, rows, name="data.json"):
    lines = name.endswith(".jsonl")
    text = "".join(json.dumps(row) + "\n" for row in rows) if lines else json.dumps(rows)
    (folder / name).write_text(text)
    return folder / name


# ---- formats

TURNS = (Message("user", "Hi"), Message("assistant", "Hello!"))
HI, HELLO = ({"role": message.role, "content": message.content} for message in TURNS)
SHARED_HI, SHARED_HELLO = {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"instruction": "Hi", "output": "Hello!"}, Conversation(TURNS)),
        ({"instruction": "Hi", "input": "there", "output": "Hello!"}, Conversation(TURNS, "there")),
        ({"instruction": "Hi", "input": None, "output": "Hello!", "text": "x"}, Conversation(TURNS)),
        ({"question": "Hi", "answer": "Hello!"}, Conversation(TURNS)),
        ({"messages": [HI, HELLO]}, Conversation(TURNS)),
        ({"conversations": [SHARED_HI, SHARED_HELLO, SHARED_HI]}, Conversation(TURNS)),  # nothing answers the last turn
        ({"prompt": "Hi", "completion": "Hello!"}, Conversation(TURNS)),
    ],
)
def test_a_format_is_recognised_by_its_fields(row, expected):
    assert conversation(Row("here", row), Tally()) == expected


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"title": "Hi", "body": "Hello!"}, r"here: no known format .* has the fields title, body"),
        ({"instruction": "Hi", "output": " "}, "here: no answer to learn"),
        (
            {"prompt": "Hi", "completion": json.dumps([HELLO])},
            "'completion' holds turns written as a text: give a list",
        ),
        ({"messages": [HI]}, "here: no answer to learn"),
        ({}, r"has the fields none"),
        ({"instruction": "Hi", "output": 3}, "'output' must be text, got 3"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\]: the field 'content' is missing"),
        ({"messages": "Hi"}, "'messages' must be a list"),
        ({"conversations": [{"from": "dog", "value": "x"}]}, "unknown role .dog.: the roles are user, human"),
    ],
)
def test_a_row_without_its_fields_is_refused_with_its_place(row, message):
    with pytest.raises(ValueError, match=message):
        conversation(Row("here", row), Tally())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"a\.jsonl: the file is empty"),
        (b'{"question": "a", "answer": "\xff"}', r"a\.jsonl: it must be UTF-8, but 1 of its 1 rows are not"),
        (
            b'{"question": "a", "answer": "b"}\n{"question": "a", "ans',
            r"no \S+ conv.*not valid JSON \(first: .*a\.jsonl, line 2 at",
        ),
        (
            b'{"question": "a", "answer": "b"}\n{"question": "a"}',
            r"no \S+ conv.*no known format .*a\.jsonl, line 2 has",
        ),
        (b'{"question": "a", "answer": "b"}', r"has no (training|held-out) conversations"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_with_its_place(tmp_path, content, message):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        create(tmp_path / "a.jsonl")


def test_unknown_sources_are_refused_with_those_that_are_known():
    with pytest.raises(
        ValueError, match=r"'alpaca-gpt5' is neither 'demo' nor one of the hub's \(alpaca-gpt4, alpaca,"
    ):
        create("alpaca-gpt5")
    with pytest.raises(ValueError, match=r"can't load openai/gsm8k .*from the hub"):
        create("gsm8k")


def test_a_short_name_loads_its_data_set_at_its_revision_with_its_own_test_split(monkeypatch):
    asked = []

    def load_dataset(name, config, split, revision):
        asked.append((name, config, split, revision))
        rows = [{"question": f"{split} {n}?", "answer": f"#### {n}"} for n in range(6)]
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    read = conversations.read("gsm8k")
    known = conversations.HUB["gsm8k"]
    assert {one[:2] + one[3:] for one in asked} == {("openai/gsm8k", "main", known.revision)} and len(
        known.revision
    ) == 40
    assert {one.messages[0].content.split()[0] for one in read.training} == {"train"}
    assert [one.answer for one in read.held_out] == [f"#### {n}" for n in range(6)] and read.revision == known.revision


# ---- splits


def test_the_split_is_by_conversation_and_equal_ones_are_on_one_side(tmp_path):
    read = conversations.read(str(write(tmp_path, alpaca_rows(400) + alpaca_rows(400))))
    assert not set(read.training) & set(read.held_out)
    assert len(read.training) + len(read.held_out) == 800 and 10 < len(set(read.held_out)) < 40


def test_files_named_as_tests_are_held_out_and_nothing_of_them_is_trained_on(tmp_path):
    write(tmp_path, alpaca_rows(50), "train.jsonl")
    write(tmp_path, alpaca_rows(7) + [{"instruction": "New.", "output": "Yes."}], "my_test.jsonl")
    read = conversations.read(str(tmp_path))
    assert (len(read.training), len(read.held_out)) == (43, 8)
    repeated = "7 training conversations left out, since they are held out too"
    assert read.notes == ["held out: my_test.jsonl", repeated]


def test_conversations_without_an_answer_are_left_out_and_counted(tmp_path):
    rows = [*alpaca_rows(100), {"instruction": "Hi", "output": ""}]
    task = create(write(tmp_path, rows))
    said = f"1 row left out: no answer to learn (first: {tmp_path}/data.json, item 101)"
    assert task.provenance["notes"] == f"{said}; {OF_ALPACA}"


# ---- prompts


def test_alpacas_prompt_is_the_published_one():
    assert alpaca(Conversation(TURNS, "there")) == [
        (
            "Below is an instruction that describes a task, paired with an input that provides further context. "
            "Write a response that appropriately completes the request.\n\n"
            "### Instruction:\nHi\n\n### Input:\nthere\n\n### Response:",
            False,
        ),
        ("Hello!", True),
    ]  # fmt: skip
    more = alpaca(Conversation((*TURNS, Message("user", "Bye"), Message("assistant", "See you."))))
    assert more[0][0].startswith("Below is an instruction that describes a task. Write a response")
    assert more[2:] == [("\n\n### Instruction:\nBye\n\n### Response:", False), ("See you.", True)]


def test_a_chat_template_is_used_where_there_is_one_and_every_answer_is_told_apart(chat_tokenizer):
    turns = (Message("system", "Be kind."), *TURNS, Message("user", "Bye"), Message("assistant", "See you."))
    found = Template(chat_tokenizer).parts(turns, "here", Tally())
    dicts = [{"role": message.role, "content": message.content} for message in turns]
    assert "".join(text for text, _ in found) == chat_tokenizer.apply_chat_template(dicts, tokenize=False)
    assert [text for text, is_answer in found if is_answer] == ["Hello!<|im_end|>\n", "See you.<|im_end|>\n"]
    ((ids, answers),) = encode([Conversation(turns)], chat_tokenizer, Tally())
    assert chat_tokenizer.decode(ids[answers]) == "Hello!<|im_end|>\nSee you.<|im_end|>\n"
    ((ids, _),) = encode([Conversation(TURNS, "there")], chat_tokenizer, Tally())
    assert "user\nHi\n\nthere<|im_end|>" in chat_tokenizer.decode(ids)


ZEPHYR = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] }}"
    "{{ ' [/INST]' }}{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
MARKUP = ["<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>"]


@pytest.fixture(params=["prepend", "first", "always"])
def spacing_tokenizer(shared_data, request):
    """Llama's, which puts a space before a text; in the first file of it also after a control token."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(shared_data / "tokenizers" / "llama")
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>", "additional_special_tokens": MARKUP})
    tokenizer.pad_token = "</s>"
    if request.param != "prepend":
        tokenizer.backend_tokenizer.normalizer = None
        tokenizer.backend_tokenizer.pre_tokenizer = Metaspace(prepend_scheme=request.param, split=False)
    return tokenizer


@pytest.mark.parametrize("template", [CHATML, ZEPHYR, MISTRAL, chat_templates.LLAMA2, chat_templates.GEMMA])
def test_no_space_is_put_between_prompt_and_answer_where_the_template_has_none(spacing_tokenizer, template):
    spacing_tokenizer.chat_template = template
    turns = (*TURNS, Message("user", "What is it?"), Message("assistant", "42 things.\n#### 42"))
    ((ids, answers),) = encode([Conversation(turns)], spacing_tokenizer, Tally())
    dicts = [{"role": message.role, "content": message.content} for message in turns]
    assert ids.tolist() == spacing_tokenizer.apply_chat_template(dicts)["input_ids"]
    said = re.sub(r"<[^>]*>", " ", spacing_tokenizer.decode(ids[answers]))
    assert said.split() == ["Hello!", "42", "things.", "####", "42"]


def test_nor_is_one_put_in_an_answer_that_names_control_tokens_or_after_alpacas_prompt(spacing_tokenizer):
    spacing_tokenizer.chat_template = CHATML
    one = Conversation((TURNS[0], Message("assistant", "Say </s> or <|im_end|>.")))
    ((ids, answers),) = encode([one], spacing_tokenizer, Tally())
    text = spacing_tokenizer.apply_chat_template([HI], tokenize=False, add_generation_prompt=True)
    assert spacing_tokenizer.decode(ids[~answers]).replace(" ", "") == text.replace(" ", "")
    said = spacing_tokenizer.decode([13, *ids[answers]])
    assert said.replace("<|im_end|> \n", "<|im_end|>\n") == "\nSay </s> or <|im_end|>.<|im_end|>\n"
    spacing_tokenizer.chat_template = None
    ((ids, _),) = encode([Conversation(TURNS)], spacing_tokenizer, Tally())
    joined = "".join(text for text, _ in alpaca(Conversation(TURNS)))  # as Alpaca's own training tokenises it
    assert joined.endswith("### Response:Hello!")
    expected = spacing_tokenizer(joined, add_special_tokens=False)["input_ids"]
    assert [token for token in ids.tolist() if token not in (1, 2)] == expected


def test_templates_that_can_not_be_used_are_refused(chat_tokenizer, monkeypatch):
    monkeypatch.setattr(chat_tokenizer, "chat_template", "{{ raise_exception('no system messages') }}")
    with pytest.raises(ValueError, match=r"here: the chat template refuses it \(no system messages\) \(1 of"):
        encode([Conversation(TURNS, where="here")], chat_tokenizer, Tally())
    monkeypatch.setattr(chat_tokenizer, "chat_template", "{{ messages | length }}" + CHATML)
    with pytest.raises(ValueError, match=r"it changes what comes before an answer"):
        encode([Conversation(TURNS, where="here")], chat_tokenizer, Tally())


def test_models_that_begin_with_a_token_get_it_once(shared_data):
    tokenizer = transformers.AutoTokenizer.from_pretrained(shared_data / "tokenizers" / "llama")
    ((ids, answers),) = encode([Conversation(TURNS)], tokenizer, Tally())
    assert ids[0] == tokenizer.bos_token_id and (ids == tokenizer.bos_token_id).sum() == 1
    assert ids[-1] == tokenizer.eos_token_id and answers[-1]


# ---- the loss


def test_only_the_tokens_of_answers_have_labels(demo):
    batch = demo.batch(0)
    for row in range(4):
        counted = batch["labels"][row] != language.IGNORED
        assert (batch["labels"][row][counted] == batch["input_ids"][row][counted]).all()
        text = demo.tokenizer.decode(batch["input_ids"][row][batch["attention_mask"][row] == 1])
        assert text.endswith("### Response:" + demo.tokenizer.decode(batch["labels"][row][counted]))


def test_the_labels_of_prompts_and_padding_contribute_nothing(demo):
    model, batch = demo.build_model(), demo.batch(0)
    answers = batch["labels"] != language.IGNORED
    assert answers.any(1).all() and not answers.all()
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    before = nn.functional.cross_entropy(logits[:, :-1][answers[:, 1:]], batch["input_ids"][:, 1:][answers[:, 1:]])
    torch.testing.assert_close(demo.loss(model, batch), before)
    # tokens after the answer can't matter either: they are padding
    other = {**batch, "input_ids": torch.where(batch["attention_mask"] == 0, 7, batch["input_ids"])}
    torch.testing.assert_close(demo.loss(model, other), before)
    # but those of the answers do
    changed = {**batch, "labels": torch.where(answers, (batch["labels"] + 1) % 1024, batch["labels"])}
    assert abs(demo.loss(model, changed) - before) > 1e-3


SMALL = {"vocab_size": 1024, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
TINY = {
    "llama": {**SMALL, "num_attention_heads": 2},
    "gpt2": {"vocab_size": 1024, "n_embd": 32, "n_layer": 2, "n_head": 2},
    "gpt_neox": {**SMALL, "num_attention_heads": 2},
    "gemma2": {**SMALL, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16},
}


def tiny(kind, attention):
    config = transformers.AutoConfig.for_model(kind, **TINY[kind])
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


@pytest.mark.parametrize(
    ("kind", "attention"),
    [(kind, attention) for kind in TINY for attention in ("sdpa", "eager") if (kind, attention) != ("gemma2", "sdpa")],
)
def test_the_loss_of_packed_texts_is_the_token_weighted_mean_of_each_alone(demo, kind, attention):
    model = tiny(kind, attention)
    rows = [[demo.train[number] for number in group] for group in ([0, 5], [7, 1], [3])]
    batch = collate(rows, 200, demo.tokenizer.pad_token_id, packed=True)
    total, count = 0.0, 0
    for tokens, answers in (one for row in rows for one in row):
        ids = torch.from_numpy(tokens.astype(np.int64))[None]
        logits = model(input_ids=ids).logits[0, :-1]
        counted = torch.tensor(answers[1:])
        total += nn.functional.cross_entropy(logits[counted], ids[0, 1:][counted], reduction="sum").detach()
        count += int(counted.sum())
    torch.testing.assert_close(demo.loss(model, batch), total / count, atol=1e-5, rtol=1e-5)
    # without positions and mask it is another one: texts see each other
    seen = {key: value for key, value in batch.items() if key != "position_ids"}
    assert abs(demo.loss(model, seen).item() - (total / count).item()) > 1e-5


LITTLE = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
QWEN3_NEXT = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8}
QWEN3_NEXT |= {"linear_num_key_heads": 2, "linear_num_value_heads": 2}
MIXED = "can't keep packed texts apart"


@pytest.mark.parametrize(
    ("kind", "given", "words"),
    [
        ("llama", {}, None),
        ("mistral", {"sliding_window": 24}, None),  # as long as the longest text
        ("qwen2", {"sliding_window": 9, "use_sliding_window": False}, None),
        ("mistral", {"sliding_window": 9}, "looks back on 9 tokens, but .* longest has 24: .* --sequence-length 9"),
        ("gemma3_text", {"sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"]}, "back on 9 tok"),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, MIXED),
        ("qwen3_next", {"layer_types": ["linear_attention", "full_attention"], **QWEN3_NEXT}, MIXED),
    ],
)
def test_packing_is_refused_of_models_to_which_a_packed_text_is_not_what_it_is_alone(kind, given, words, tmp_path):
    own = {"num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.2}
    config = transformers.AutoConfig.for_model(kind, **LITTLE, **own, pad_token_id=0, eos_token_id=2, **given)
    torch.manual_seed(0)
    path = folder(tmp_path / kind, transformers.AutoModelForCausalLM.from_config(config), letters())
    tokenizer = letters()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.save_pretrained(path)
    rows = [{"prompt": f"{'abcdefg'[n % 7]}?", "completion": "xyz"[n % 3] * (1 + n % 22)} for n in range(80)]
    given = {"data": write(tmp_path, rows, "rows.jsonl"), "model": path, "sequence_length": 30}
    plain = create(**given)
    packed = collate([[plain.train[number] for number in (0, 5, 9)]], 30, 0, packed=True)
    model, total, count = plain.build_model().eval(), 0.0, 0
    with torch.no_grad():
        for tokens, answers in (plain.train[number] for number in (0, 5, 9)):
            ids, counted = torch.from_numpy(tokens.astype(np.int64))[None], torch.tensor(answers[1:])
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
            total += nn.functional.cross_entropy(logits[counted], ids[0, 1:][counted], reduction="sum").item()
            count += int(counted.sum())
        same = abs(language.loss(model, packed).item() - total / count) < 1e-5
    assert same == (words is None)
    if words is None:
        create(**given, options={"packing": True})
    else:
        with pytest.raises(ValueError, match=words):
            create(**given, options={"packing": True})
    if "back on" in (words or ""):
        create(**{**given, "sequence_length": 9}, options={"packing": True})


def test_in_low_precision_packed_texts_stay_apart_too(demo):
    model = demo.build_model().to(torch.bfloat16)
    batch = collate([[demo.train[0], demo.train[5]]], 256, 0, packed=True)
    changed = {**batch, "input_ids": batch["input_ids"].clone()}
    first = len(demo.train[0][0])
    changed["input_ids"][0, : first - 1] = 9
    logits = [
        model(**language.inputs({k: v for k, v in one.items() if k != "labels"}, torch.bfloat16)).logits
        for one in (batch, changed)
    ]
    assert torch.equal(logits[0][0, first:], logits[1][0, first:])


@pytest.mark.parametrize(
    "config",
    [
        transformers.BloomConfig(vocab_size=1100, hidden_size=32, n_layer=2, n_head=4),
        transformers.FalconConfig(**(LITTLE | {"vocab_size": 1100}), alibi=True),
    ],
    ids=["bloom", "falcon"],
)
def test_packing_is_refused_of_models_that_count_positions_by_their_mask(config, tmp_path):
    path = folder(tmp_path / "model", transformers.AutoModelForCausalLM.from_config(config), letters())
    data = write(tmp_path, [{"prompt": "a", "completion": "bc"[n % 2]} for n in range(40)], "rows.jsonl")
    with pytest.raises(ValueError, match=r"counts positions by its mask \(ALiBi\), .*: leave the option packing out"):
        create(data, model=path, sequence_length=600, options={"packing": True})


def test_packing_is_refused_of_a_model_that_takes_no_mask_of_pairs(tmp_path):
    config = transformers.OpenAIGPTConfig(vocab_size=1100, n_embd=32, n_layer=2, n_head=4, n_positions=600)
    path = folder(tmp_path / "model", transformers.AutoModelForCausalLM.from_config(config), letters())
    data = write(tmp_path, [{"prompt": "a", "completion": "bc"[n % 2]} for n in range(40)], "rows.jsonl")
    with pytest.raises(ValueError, match=r"\(openai-gpt\) takes no mask of each pair of tokens, .*: leave the option"):
        create(data, model=path, sequence_length=600, options={"packing": True})


# ---- packing and cutting


def test_groups_fit_hold_every_example_once_and_are_few():
    lengths = np.random.default_rng(0).integers(5, 100, 500)
    groups = pack(lengths, 128)
    assert sorted(number for group in groups for number in group) == list(range(500))
    sizes = [lengths[group].sum() for group in groups]
    assert max(sizes) <= 128
    assert len(groups) <= 1.05 * lengths.sum() / 128 + 1


def test_packing_holds_every_example_once_an_epoch_in_fewer_sequences(demo):
    packed = create(sequence_length=192, options={"packing": True}, batch_size=8)
    plain = create(sequence_length=192)
    assert packed.train_size < 0.6 * plain.train_size
    numbers = [number for index in range(packed.train_size) for number in group(packed, index)]
    assert sorted(numbers) == list(range(len(packed.train)))
    batch = packed.batch(0)
    starts = (batch["position_ids"] == 0).sum()
    assert batch["input_ids"].shape == (8, 192) and starts > 8
    assert all(len(set(group(packed, index))) == len(group(packed, index)) for index in range(20))


def test_an_answer_longer_than_the_sequence_is_cut_and_counted_and_a_prompt_without_room_is_left_out(tmp_path):
    rows = alpaca_rows(300) + [{"instruction": "Long.", "output": "word " * 500}]
    rows += [{"instruction": "word " * 500, "output": "Never seen."}]
    task = create(write(tmp_path, rows), sequence_length=128)
    assert task.provenance["notes"] == (
        f"{OF_ALPACA}; 1 of {len(task.train) + 1} training answers cut at the end to fit the sequence; "
        "1 training conversations left out, since no answer fits"
    )
    assert max(task.train.lengths) == 128
    ids, answers = task.train[int(np.argmax(task.train.lengths))]
    assert answers[-1] and "word word" in task.tokenizer.decode(ids[answers])
    assert not any("Never" in task.tokenizer.decode(task.train[n][0]) for n in range(len(task.train)))
    with pytest.raises(
        ValueError, match="none of the .* training conversations has its answer within sequence_length 20"
    ):
        create(tmp_path / "data.json", sequence_length=20)


@pytest.mark.parametrize("length", [40, 128])
def test_what_is_cut_off_is_the_end_of_the_answer_and_the_prompt_is_kept_whole(tmp_path, length):
    long = {"instruction": "Count.", "output": " ".join(f"number{n}" for n in range(300))}
    roles = ("user", "assistant") * 3
    turns = [{"role": role, "content": f"{role} says {'much ' * 60}{n}"} for n, role in enumerate(roles)]
    path = write(tmp_path, [*alpaca_rows(300), long, {"messages": turns}])
    task = create(path, sequence_length=length)
    whole = encode(conversations.read(str(path)).training, task.tokenizer, Tally())
    assert task.train.cut > 0 and any(len(ids) > 2 * length for ids, _ in whole)
    for n, number in enumerate(task.train.kept):
        (ids, answers), (all_ids, all_answers) = task.train[n], whole[number]
        assert ids.tolist() == all_ids[:length].tolist() and answers.tolist() == all_answers[:length].tolist()
        assert task.tokenizer.decode(ids).startswith("Below is an instruction")


def test_a_batch_is_a_function_of_seed_and_step_also_in_the_middle_of_an_epoch():
    for options in ({}, {"packing": True}):
        one, again = create(seed=1, options=options), create(seed=1, options=options)
        steps = [one.batch(step) for step in range(7)]
        later = again.batch(6)
        assert all(torch.equal(later[key], steps[6][key]) for key in later)
        assert not torch.equal(create(seed=2, options=options).batch(6)["input_ids"], later["input_ids"])
    positions = [group(one, index) for index in range(2 * one.train_size)]
    first, second = positions[: one.train_size], positions[one.train_size :]
    assert sorted(first) == sorted(second) and first != second


# ---- scores


def test_the_scores_count_each_token_of_an_answer_the_same_whatever_shares_a_batch(demo, monkeypatch):
    model = demo.build_model().eval()
    total = right = count = 0.0
    sums, counts = [], []
    for number in range(len(demo.validation)):
        tokens, answers = demo.validation[number]
        ids = torch.from_numpy(tokens.astype(np.int64))[None]
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1][torch.tensor(answers[1:])]
        labels = ids[0, 1:][torch.tensor(answers[1:])]
        sums.append(float(nn.functional.cross_entropy(logits, labels, reduction="sum")))
        counts.append(len(labels))
        total += sums[-1]
        right += float((logits.argmax(1) == labels).sum())
        count += len(labels)
    monkeypatch.setattr(language, "EVALUATION_TOKENS", 700)
    scores = demo.evaluate(model)
    assert set(scores) == {"loss", "perplexity", "token_accuracy", "loss_standard_error"}
    drawn = np.random.default_rng(0).integers(len(sums), size=(4000, len(sums)))  # the bootstrap over conversations
    spread = (np.array(sums)[drawn].sum(1) / np.array(counts)[drawn].sum(1)).std()
    assert scores["loss_standard_error"] == pytest.approx(spread, rel=0.15)
    assert scores["loss"] == pytest.approx(total / count, rel=1e-5)
    assert scores["token_accuracy"] == pytest.approx(right / count)
    assert (demo.headline, demo.higher_is_better) == ("perplexity", False)
    monkeypatch.setattr(demo, "_scorer", language.Scorer())
    ordered = np.argsort(-demo.validation.lengths, kind="stable")
    before = [sums[number] + counts[number] / 2 for number in ordered]  # every token was harder by as much
    demo.load_state_dict({"before": before})
    assert demo.evaluate(model)["loss_change_standard_error"] == pytest.approx(0.0, abs=1e-5)
    demo.remember_scores()
    assert demo.state_dict()["before"] == pytest.approx([sums[number] for number in ordered], rel=1e-4)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("6 * 7 = <<6*7=42>>42\n#### 42", "42"),
        ("so he has $1,234.50 in 3 banks\n#### 1,234.50", "1234.5"),
        ("The answer is 12.", "12"),
        ("First 3, then -7.0", "-7"),
        ("#### nothing, but 5 before", "5"),
        ("no number", None),
        ("#### 18 dollars, not 20", "18"),
    ],
)
def test_the_final_number_is_found(text, number):
    assert gsm8k.final_number(text) == number


def test_exact_match_is_the_share_of_right_final_numbers():
    references = ["#### 3", "#### 4,000", "#### 5"]
    assert gsm8k.exact_match(["it is 3", "#### 4000.0", "none"], references) == pytest.approx(2 / 3)


def question_rows(count):
    return [{"question": f"What is {n} + 1?", "answer": f"{n} + 1 = {n + 1}\n#### {n + 1}"} for n in range(count)]


def test_gsm8k_is_scored_by_generation(tmp_path, monkeypatch):
    task = create(write(tmp_path, question_rows(200), "qa.jsonl"), options={"answer_tokens": 8})
    assert (task.headline, task.higher_is_better) == ("exact_match", True)
    model = task.build_model()
    assert task.evaluate(model)["exact_match"] <= 0.2 and model.training
    asked = {}

    def right(model, tokenizer, prompts, new_tokens):
        asked.update(zip(map(tuple, prompts), task.references, strict=True))
        return [answer.replace("####", "so") for answer in task.references]

    monkeypatch.setattr(gsm8k, "generate", right)
    assert task.evaluate(model)["exact_match"] == 1.0
    for prompt, answer in asked.items():
        text = task.tokenizer.decode(list(prompt))
        assert text.endswith("### Response:") and answer.split(" + ")[0] in text and "####" not in text


def test_generation_in_batches_with_a_cache_is_what_one_token_after_the_other_gives(demo, monkeypatch):
    model = demo.build_model().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)  # decided enough that rounding can't change what comes next
    prompts = [demo.validation[number][0][: 20 + 9 * number].tolist() for number in range(4)]
    expected = []
    for prompt in prompts:
        ids = list(prompt)
        with torch.no_grad():
            while len(ids) < len(prompt) + 10 and (len(ids) == len(prompt) or ids[-1] != demo.tokenizer.eos_token_id):
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        expected.append(demo.tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True))
    assert gsm8k.generate(model, demo.tokenizer, prompts, 10) == expected
    monkeypatch.setattr(gsm8k, "GENERATION_TOKENS", 1)
    assert gsm8k.generate(model, demo.tokenizer, prompts, 10) == expected
    assert len(set(expected)) > 1


def test_a_model_that_mixes_the_prompts_of_a_batch_answers_them_one_by_one(demo, monkeypatch):
    torch.manual_seed(0)
    sizes = {"vocab_size": 1100, "hidden_size": 32, "attention_hidden_size": 32, "num_hidden_layers": 2}
    model = transformers.RwkvForCausalLM(transformers.RwkvConfig(**sizes)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.3)  # so that what came before decides what comes next
    prompts = [demo.validation[number][0][: 6 + 3 * (number // 2)].tolist() for number in range(6)]
    alone = [gsm8k.generate(model, demo.tokenizer, [prompt], 8)[0] for prompt in prompts]
    assert gsm8k.generate(model, demo.tokenizer, prompts, 8) == alone
    monkeypatch.setattr(gsm8k, "SEEN", float("inf"))
    assert gsm8k.generate(model, demo.tokenizer, prompts, 8) != alone


def parrot(follows):
    """A model that says after each token the one that `follows` it, and nearly as surely a second one."""
    config = transformers.LlamaConfig(
        vocab_size=1100,
        hidden_size=1100,
        intermediate_size=4,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        tie_word_embeddings=False,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.eye(1100))
        for p in (model.model.layers[0].self_attn.o_proj, model.model.layers[0].mlp.down_proj, model.lm_head):
            p.weight.zero_()
        for token, (first, second) in follows.items():
            model.lm_head.weight[first, token], model.lm_head.weight[second, token] = 1.0, 0.9
    return model


@pytest.mark.parametrize("tokenizer_ends", [True, False])
def test_an_answer_is_read_up_to_where_the_chat_template_ends_it(demo, chat_tokenizer, tokenizer_ends):
    if not tokenizer_ends:  # as in Qwen 2.5's base models, Gemma and Phi 3: the end of text is another token
        chat_tokenizer.add_special_tokens({"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"})
    newline, three, seven = (demo.tokenizer.encode(text)[-1] for text in ("\n", "3", "7"))
    end = chat_tokenizer.convert_tokens_to_ids("<|im_end|>")
    model = parrot({newline: (three, seven), three: (end, seven), end: (seven, three), seven: (seven, three)})
    prompt = chat_tokenizer.apply_chat_template([HI], add_generation_prompt=True)["input_ids"]
    assert prompt[-1] == newline and (chat_tokenizer.eos_token_id == end) == tokenizer_ends
    assert gsm8k.generate(model, chat_tokenizer, [prompt], 6) == ["3"]


def test_a_template_that_names_the_date_makes_the_same_tokens_on_another_day(chat_tokenizer):
    tokenizer = copy.deepcopy(chat_tokenizer)
    tokenizer.chat_template = "{{ strftime_now('Today is %d %b %Y. ') }}" + CHATML
    ((ids, _),) = encode([Conversation(TURNS)], tokenizer, Tally())
    assert tokenizer.decode(ids).startswith("Today is 26 Jul 2024. ")


ENDLESS = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"


def expect_to_end(tokenizer, end, own=None):
    """An answer `3` is read up to the token `end`."""
    newline, three, seven = (tokenizer.encode(text)[-1] for text in ("\n", "3", "7"))
    model = parrot({newline: (three, seven), three: (end, seven), end: (seven, three), seven: (seven, three)})
    model.generation_config = transformers.GenerationConfig(eos_token_id=own)
    written = gsm8k.generate(model, tokenizer, [[newline]], 6)[0]
    assert re.findall(r"\d", written) == ["3"]


def test_an_answer_ends_where_its_template_says_though_the_tokenizer_calls_that_token_ordinary(demo):
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=demo.tokenizer.backend_tokenizer)
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"])  # as tokenizers of fine-tuned models have them
    tokenizer.add_special_tokens({"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"})
    tokenizer.chat_template = CHATML
    expect_to_end(tokenizer, tokenizer.convert_tokens_to_ids("<|im_end|>"))


def test_an_answer_also_ends_where_the_models_own_settings_say(demo):
    """GLM's ends at the name of the next speaker, with which its template ends no answer."""
    expect_to_end(demo.tokenizer, demo.tokenizer.encode("u")[-1], own=[0, demo.tokenizer.encode("u")[-1]])


def chat_folder(tmp_path, template, architecture="llama"):
    tokenizer = letters()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    return folder(tmp_path / "model", ARCHITECTURES[architecture].build(), tokenizer)


@pytest.mark.parametrize("name", ["instruct", "dpo"])
def test_a_tuned_model_ends_its_answers_where_its_template_does(tmp_path, name):
    model = chat_folder(tmp_path, CHATML)  # as Qwen's base models: the tokenizer's own end is another token
    rows = [{"prompt": f"say {'abcdefghij'[n % 10] * n}", "chosen": "yes", "rejected": "no"} for n in range(60)]
    given = {"data": str(write(tmp_path, rows)), "batch_size": 2, "sequence_length": 128}
    task = tasks.create(name, model=model, **given)
    ends = [task.tokenizer.convert_tokens_to_ids(token) for token in ("</s>", "<|im_end|>")]
    assert task.build_model().generation_config.eos_token_id == ends
    assert not task.provenance["notes"] or "where to stop" not in task.provenance["notes"]


@pytest.mark.parametrize("name", ["instruct", "dpo"])
def test_a_template_that_ends_answers_with_nothing_is_said(tmp_path, name):
    rows = [{"prompt": f"say {'abcdefghij'[n % 10] * n}", "chosen": "yes", "rejected": "no"} for n in range(60)]
    given = {"data": str(write(tmp_path, rows)), "batch_size": 2, "sequence_length": 128}
    task = tasks.create(name, model=chat_folder(tmp_path, ENDLESS), **given)
    assert "the chat template ends an answer with no token, so where to stop isn't learned" in task.provenance["notes"]


def test_gsm8k_answers_are_written_as_far_as_the_model_has_positions(tmp_path, monkeypatch):
    rows = [{"question": "is it " + "a" * n, "answer": f"#### {n}"} for n in range(1, 28)]
    data = tmp_path / "data"
    data.mkdir()
    write(data, rows[::2], "train.json"), write(data, rows[1::2], "test.json")
    model = chat_folder(tmp_path, CHATML, "gpt2")  # has 64 positions
    task = create(data, model=model, sequence_length=64, options={"answer_tokens": 20})
    lengths, model = [len(prompt) for prompt in task._prompts()], task.build_model().eval()
    short = sum(length > 44 for length in lengths)
    assert 0 < short < len(lengths) == 13 and max(lengths) > 50
    assert f"{short} of 13 answers are written to fewer than 20 tokens" in task.provenance["notes"]
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        model.transformer.wte.weight[
            : len(task.tokenizer)
        ].zero_()  # all are as likely: it says the first one, and no end
    monkeypatch.setattr(type(task.tokenizer), "batch_decode", lambda self, ids, **_: [str(len(row)) for row in ids])
    written = gsm8k.generate(model, task.tokenizer, task._prompts(), 20)
    assert [int(one) for one in written] == [min(20, 64 - length) for length in lengths]


def test_an_answer_is_written_greedily_whatever_the_models_own_configuration_penalises(demo):
    newline, three, seven = (demo.tokenizer.encode(text)[-1] for text in ("\n", "3", "7"))
    model = parrot({newline: (three, seven), three: (three, seven), seven: (seven, three)})
    model.generation_config = transformers.GenerationConfig(repetition_penalty=2.0, no_repeat_ngram_size=2)
    assert gsm8k.generate(model, demo.tokenizer, [[newline]], 5) == ["33333"]
    assert model.generation_config.repetition_penalty == 2.0  # which is saved with it


# ---- real data


@pytest.mark.parametrize("name", ["alpaca_gpt4_en_demo.json", "gsm8k_test.jsonl"])
def test_published_files_are_read_as_they_are(shared_data, name):
    read = conversations.read(str(shared_data / "instruct" / name))
    assert len(read.training) + len(read.held_out) + read.tally.left_out.total() in (999, 1319)
    assert 0.03 < len(read.held_out) / len(read.training) < 0.08
