"""Tasks by name; batches, loss and evaluation of SuperGLUE's tasks."""

import json
import random

import numpy as np
import pytest
import torch
from torch import nn

import tasks
from tasks.data.order import position
from tasks.models import classifier
from tasks.superglue import task as superglue_task

NAMES = tasks.expand("superglue")


def place(task, index):
    """Of the example that comes at `index` of the training's stream."""
    return position(task.seed, index, task.train_size)


def create(name, **given):
    given = {"model": "config:roberta-tiny", "batch_size": 4, "sequence_length": 32, **given}
    return tasks.create(name, **given)


@pytest.mark.parametrize(
    ("wrong", "meant"), [("superglue/rtee", "superglue/rte"), ("rte", "superglue/rte"), ("superglu", "superglue")]
)
def test_an_unknown_task_suggests_the_nearest_one(wrong, meant):
    for act in (lambda: create(wrong), lambda: tasks.expand(wrong)):
        with pytest.raises(ValueError, match=f"unknown task '{wrong}'. Did you mean '{meant}'\\?"):
            act()


def test_one_task_expands_to_itself_and_the_family_to_all():
    assert tasks.expand("superglue/rte") == ["superglue/rte"]
    assert tasks.expand("superglue") == [
        f"superglue/{name}" for name in ("boolq", "cb", "copa", "multirc", "record", "rte", "wic", "wsc")
    ]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
        ({"seed": -1}, "seed must be at least 0, not -1"),
        ({"dtype": "float8"}, "unknown dtype 'float8': use float32, bfloat16, float16"),
        ({"sequence_length": 5}, "sequence_length 5 leaves no room for text: use at least 6"),
        ({"sequence_length": 513}, "sequence_length 513 is too long for config:roberta-tiny, which has 512 positions"),
    ],
)
def test_wrong_settings_are_refused_with_the_way_out(given, words):
    with pytest.raises(ValueError) as caught:
        create("superglue/cb", **given)
    assert words in str(caught.value)


@pytest.mark.parametrize("name", NAMES)
def test_every_task_offers_what_the_protocol_says(name):
    task = create(name)
    model = task.build_model()
    assert (task.name, task.higher_is_better, task.from_scratch) == (name, True, True)
    batch = task.batch(0)
    choices = () if task.row.classes else (2,)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (4, *choices, 32)
    assert set(batch) == {"input_ids", "attention_mask", "labels"} and batch["labels"].shape == (4,)
    assert all(tensor.dtype == torch.int64 and tensor.device.type == "cpu" for tensor in batch.values())
    loss = task.loss(model, batch)
    loss.backward()
    assert loss.shape == () and all(p.grad is not None for p in model.parameters())
    assert set(task.head) <= {"classifier", "roberta.pooler"} and "classifier" in task.head


def test_the_loss_is_cross_entropy_of_the_logits():
    task = create("superglue/cb")
    model, batch = task.build_model().eval(), task.batch(0)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert logits.shape == (4, 3)
    torch.testing.assert_close(task.loss(model, batch), nn.functional.cross_entropy(logits, batch["labels"]))


# ---- batches


def same(first, second):
    return all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name", ["superglue/rte", "superglue/record"])
def test_a_batch_is_a_function_of_seed_and_step(name):
    one, again = create(name, seed=1), create(name, seed=1)
    later = [one.batch(step) for step in range(8)][7]
    assert same(later, again.batch(7))
    assert not same(later, again.batch(6)) and not same(later, create(name, seed=2).batch(7))


@pytest.mark.parametrize("name", ["superglue/rte", "superglue/copa", "superglue/record"])
def test_micro_batches_are_the_rows_of_one_batch(name):
    parts, whole = (create(name, batch_size=size) for size in (2, 4))
    for step in range(3):
        first, second = parts.batch(2 * step), parts.batch(2 * step + 1)
        assert same({key: torch.cat([rows, second[key]]) for key, rows in first.items()}, whole.batch(step))


def test_an_epoch_shows_every_example_once_in_an_order_of_its_own():
    task = create("superglue/cb", batch_size=7)
    positions = [place(task, index) for index in range(2 * task.train_size)]
    first, second = positions[: task.train_size], positions[task.train_size :]
    assert sorted(first) == sorted(second) == list(range(task.train_size))
    assert first != second


def test_a_batch_may_be_larger_than_the_data(monkeypatch):
    task = create("superglue/cb", batch_size=5)
    task.train, task.train_size = task.train[:2], 2
    assert task.batch(3)["input_ids"].shape == (5, 32)


def test_all_batches_have_one_shape_and_the_mask_counts_the_tokens():
    task = create("superglue/wsc", sequence_length=40)
    for step in range(5):
        batch = task.batch(step)
        assert batch["input_ids"].shape == (4, 40)
        texts = [task.train[place(task, 4 * step + row)] for row in range(4)]
        lengths = [len(task.tokenizer(example.first)["input_ids"]) for example in texts]
        assert batch["attention_mask"].sum(dim=1).tolist() == lengths
        padding = batch["input_ids"][batch["attention_mask"] == 0]
        assert (padding == task.tokenizer.pad_token_id).all()


def test_the_longer_text_is_cut_and_the_shorter_one_kept():
    task = create("superglue/boolq", sequence_length=20)
    row = task.batch(0)["input_ids"][0]
    question = task.train[place(task, 0)].second
    assert question in task.tokenizer.decode(row).replace("</s>", " ") and (row != task.tokenizer.pad_token_id).all()


def test_a_choice_in_training_has_one_right_candidate_at_a_random_place():
    task = create("superglue/record", batch_size=16)
    labels = set()
    for step in range(4):
        batch = task.batch(step)
        for row in range(16):
            choice = task.train[place(task, 16 * step + row)]
            right = {choice.filled(index) for index in choice.right}
            texts = [task.tokenizer.decode(ids, skip_special_tokens=True) for ids in batch["input_ids"][row]]
            ends = [any(text.endswith(end) for end in right) for text in texts]
            assert ends == [place == batch["labels"][row] for place in range(2)]
            labels.add(int(batch["labels"][row]))
    assert labels == {0, 1}


@pytest.fixture
def one_query(tmp_path):
    """ReCoRD with a single query on six names, two of which are right."""
    names = ["Anna", "Boris", "Clara", "David", "Elena", "Frank"]
    text = " ".join(names)
    entities = [{"start": text.index(name), "end": text.index(name) + len(name) - 1} for name in names]
    query = {"query": "And then came @placeholder", "answers": [{"text": "Boris"}, {"text": "Elena"}], "idx": 0}
    line = json.dumps({"passage": {"text": text, "entities": entities}, "qas": [query], "idx": 0})
    (tmp_path / "ReCoRD").mkdir()
    for split in ("train", "val"):
        (tmp_path / "ReCoRD" / f"{split}.jsonl").write_text(line + "\n")
    return str(tmp_path)


def shown(task, steps):
    """The right and the wrong candidate of each step, and the place of the right one."""
    for step in range(steps):
        batch = task.batch(step)
        texts = task.tokenizer.batch_decode(batch["input_ids"][0], skip_special_tokens=True)
        label = int(batch["labels"][0])
        yield texts[label].split()[-1], texts[1 - label].split()[-1], label


def test_from_epoch_to_epoch_every_candidate_is_shown_the_right_ones_and_the_wrong_ones(one_query):
    seen = [list(shown(create("superglue/record", data=one_query, batch_size=1, seed=seed), 60)) for seed in (0, 0, 1)]
    right, wrong, labels = map(set, zip(*seen[0], strict=True))
    assert right == {"Boris", "Elena"} and wrong == {"Anna", "Clara", "David", "Frank"} and labels == {0, 1}
    assert len(set(seen[0])) == 2 * 4 * 2  # each with each, at either place
    assert seen[0] == seen[1] != seen[2]


def test_two_queries_of_a_batch_are_not_given_the_same_draw(one_query):
    task = create("superglue/record", data=one_query, batch_size=8)
    rows = [tuple(ids.flatten().tolist()) for ids in task.batch(0)["input_ids"]]
    assert len(set(rows)) > 3


# ---- evaluation


class Oracle(nn.Module):
    """Answers from a table of what the tokens of a pair of texts deserve."""

    def __init__(self, task, score):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))
        self.task, self.score = task, score

    def forward(self, input_ids, attention_mask):
        flat = input_ids.flatten(0, -2)
        texts = self.task.tokenizer.batch_decode(flat, skip_special_tokens=True)
        self.logits = torch.tensor([self.score(text) for text in texts]).reshape(len(flat), -1)
        return self


def oracle(task, right):
    """A model that gives every example of the validation set the score of a right, or else a wrong answer."""
    table = {}
    for example in task.data.validation:
        for index, second in enumerate(superglue_task._second_texts(example)):
            ids = task.classifier.encoder.tokens(example.first, second)[0]
            text = task.tokenizer.decode(ids, skip_special_tokens=True)
            if task.row.classes is None:
                table[text] = float((index in example.right) == right)
            else:
                label = example.label if right else (example.label + 1) % task.row.classes
                table[text] = [float(label == one) for one in range(task.row.classes)]
    default = 0.0 if task.row.classes is None else [0.0] * task.row.classes
    return Oracle(task, lambda text: table.get(text, default))


@pytest.mark.parametrize("name", NAMES)
def test_right_answers_score_one_and_wrong_ones_zero(name):
    task = create(name)
    best, worst = (task.evaluate(oracle(task, right)) for right in (True, False))
    # a text that the demo made twice with different labels can't be answered right both times
    assert best[task.headline] > 0.97
    assert worst[task.headline] < 0.03
    assert all(type(value) is float for value in best.values())


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("superglue/boolq", {"accuracy"}),
        ("superglue/cb", {"accuracy", "f1", "score"}),
        ("superglue/copa", {"accuracy"}),
        ("superglue/multirc", {"f1a", "em", "score"}),
        ("superglue/record", {"f1", "em", "score"}),
        ("superglue/rte", {"accuracy", "ax_b_matthews", "ax_g_gender_parity", "ax_g_accuracy"}),
        ("superglue/wic", {"accuracy"}),
        ("superglue/wsc", {"accuracy"}),
    ],
)
def test_a_task_has_its_official_metrics_and_the_mean_of_two_as_headline(name, keys):
    task = create(name)
    metrics = task.evaluate(oracle(task, right=True))
    assert set(metrics) == keys
    assert task.headline == ("score" if "score" in keys else "accuracy")


def test_evaluating_is_repeatable_without_trace_in_the_model_or_in_random_numbers():
    task = create("superglue/rte")
    model = task.build_model().train()
    model.roberta.encoder.layer[0].attention.self.dropout.p = 0.5
    before = (torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate())
    first, second = task.evaluate(model), task.evaluate(model)
    assert first == second and model.training
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all() and before[2] == random.getstate()
    task.evaluate(model.eval())
    assert not model.training


def test_evaluation_does_not_depend_on_what_shares_a_batch(monkeypatch):
    task = create("superglue/copa")
    model = task.build_model().eval()
    pairs = [(choice.first, choice.filled(0)) for choice in task.data.validation[:40]]
    with torch.no_grad():
        together = task.classifier.logits(model, pairs)
        monkeypatch.setattr(classifier, "EVALUATION_BATCH", 1)
        alone = task.classifier.logits(model, pairs)
    assert together.shape == (40, 1)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


def test_the_training_mode_comes_back_when_evaluation_fails():
    task = create("superglue/cb")
    model = oracle(task, right=True).train()
    model.score = lambda text: 1 / 0
    with pytest.raises(ZeroDivisionError):
        task.evaluate(model)
    assert model.training
