"""The demo's data: always the same, in the official format, learnable and not trivial."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

import tasks
from tasks.superglue import data as superglue_data
from tasks.superglue import demo as superglue_demo
from tasks.superglue import rows as superglue
from tasks.superglue.task import Data, _second_texts

SEQUENCE_LENGTH = 32  # of the demo
QUICK = ("cb", "multirc", "record")  # pairs, groups and queries; the others take longer
NAMES = [
    pytest.param(name, marks=[] if name.split("/")[-1] in QUICK else pytest.mark.slow) for name in superglue.names()
]


def test_the_lines_are_the_same_in_every_process():
    code = f"import runpy; print(runpy.run_path({superglue_demo.__file__!r})['lines']('ReCoRD', 'val'))"
    said = [
        subprocess.run([sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True)
        for seed in ("1", "2")
    ]
    assert {one.stdout for one in said} == {f"{superglue_demo.lines('ReCoRD', 'val')}\n"}


@pytest.mark.parametrize("folder", superglue_data.FOLDERS)
def test_splits_are_of_their_size_and_share_few_examples(folder):
    if folder in superglue_data.DIAGNOSTICS:
        assert len(superglue_demo.lines(folder, "test")) == superglue_demo.SIZES["test"]
        return
    texts = {}
    for split in ("train", "val"):
        rows = [json.loads(line) for line in superglue_demo.lines(folder, split)]
        assert [row.pop("idx") for row in rows] == list(range(len(rows)))
        texts[split] = {json.dumps(row) for row in rows}
    assert len(texts["train"] & texts["val"]) < 0.2 * len(texts["val"])


def test_the_pairs_of_winogender_differ_in_one_pronoun():
    rows = [json.loads(line) for line in superglue_demo.lines("AX-g", "test")]
    for his, her in zip(rows[::2], rows[1::2], strict=True):
        assert his["pair_id"] == her["pair_id"] and his["label"] == her["label"]
        assert his["premise"] != her["premise"] == his["premise"].replace(" his ", " her ")


@pytest.mark.parametrize("name", NAMES)
def test_texts_fit_into_the_demos_sequences(name):
    task = tasks.create(
        f"superglue/{name}", model="config:roberta-tiny", batch_size=2, sequence_length=SEQUENCE_LENGTH + 16
    )
    pairs = [(e.first, second) for e in task.data.train + task.data.validation for second in _second_texts(e)]
    assert max(task.classifier.encoder.tokens(*pair).shape[1] for pair in pairs) <= SEQUENCE_LENGTH


# Bags of words have a classifier of their own here, so that the evidence in the data is seen without our models:
# (share of the most frequent answer, bag-of-words accuracy) must leave room below and above.
@pytest.mark.parametrize("name", NAMES)
def test_words_alone_beat_guessing_and_leave_something_to_learn(name):
    row = superglue.ROWS[name]
    data = Data(row, "demo")
    vectorizer = CountVectorizer(token_pattern=r"\S+")
    vectorizer.fit(text for e in data.train for text in (e.first, *_second_texts(e)))

    def bag(first, second):
        return np.hstack([vectorizer.transform([text]).toarray()[0] for text in (first, second)])

    def table(some):
        if row.classes is not None:
            return np.stack([bag(e.first, e.second) for e in some]), [e.label for e in some]
        rows = [(bag(e.first, text), i in e.right) for e in some for i, text in enumerate(_second_texts(e))]
        return np.stack([features for features, _ in rows]), [right for _, right in rows]

    fitted = LogisticRegression(max_iter=500, C=0.3).fit(*table(data.train))
    features, answers = table(data.validation)
    if row.classes is not None:
        predictions = fitted.predict(features)
        guess = max(np.mean(np.array(answers) == label) for label in set(answers))
        accuracy = np.mean(predictions == answers)
    else:
        scores = np.split(fitted.predict_proba(features)[:, 1], np.cumsum([len(c.candidates) for c in data.validation]))
        accuracy = np.mean([s.argmax() in c.right for s, c in zip(scores, data.validation, strict=False)])
        guess = np.mean([1 / len(choice.candidates) for choice in data.validation])
    assert guess + 0.12 < accuracy < 0.95, (guess, accuracy)


@pytest.mark.slow
def test_a_tiny_encoder_learns_one_with_adamw_and_is_not_perfect():
    steps, guess = 120, 0.5
    task = tasks.create("superglue/wic", model="config:roberta-tiny", batch_size=16, sequence_length=SEQUENCE_LENGTH)
    model = task.build_model().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1, (i + 1) / 12) * (1 - i / steps))
    for step in range(steps):
        task.loss(model, task.batch(step)).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    score = task.evaluate(model)[task.headline]
    assert guess + 0.15 < score < 0.97
