"""SuperGLUE's metrics against hand counts and scikit-learn."""

import evaluate
import numpy as np
import pytest
from sklearn.metrics import f1_score, matthews_corrcoef

from tasks import metrics


def test_commitment_bank_is_accuracy_and_the_unweighted_mean_of_the_classes_f1():
    predictions, references = [0, 0, 1, 2, 2, 1], [0, 1, 1, 2, 0, 1]
    got = metrics.CommitmentBank().compute(predictions=predictions, references=references)
    # by hand: F1 of the classes .5, .8, 2/3
    assert got["accuracy"] == pytest.approx(4 / 6)
    assert got["f1"] == pytest.approx((0.5 + 0.8 + 2 / 3) / 3)
    assert got["f1"] == pytest.approx(f1_score(references, predictions, average="macro"))
    assert got["score"] == pytest.approx((got["accuracy"] + got["f1"]) / 2)


def test_multirc_f1a_is_over_all_answers_and_em_over_whole_questions():
    columns = {"predictions": [1, 0, 1, 1, 0], "references": [1, 0, 0, 1, 0], "groups": ["a", "a", "b", "b", "c"]}
    got = metrics.MultiRC().compute(**columns)
    # by hand: 2 true positives of 3 predicted and 2 real ones; questions a and c are right, b is not
    assert got == {"f1a": pytest.approx(0.8), "em": pytest.approx(2 / 3), "score": pytest.approx((0.8 + 2 / 3) / 2)}


def test_multirc_questions_need_not_be_adjacent():
    columns = {"predictions": [1, 1, 0], "references": [1, 0, 0], "groups": ["a", "b", "a"]}
    assert metrics.MultiRC().compute(**columns)["em"] == 0.5


def test_record_takes_the_best_answer_after_squad_normalisation():
    predictions = ["The United States!", "New York City", "Paris"]
    references = [["united states", "U.S."], ["York"], ["London", "Rome"]]
    got = metrics.ReCoRD().compute(predictions=predictions, references=references)
    # by hand: a match; one of three words against one of one, 2 * 1 / (3 + 1); nothing in common
    assert got == {"f1": pytest.approx((1 + 0.5 + 0) / 3), "em": pytest.approx(1 / 3), "score": pytest.approx(5 / 12)}


@pytest.mark.parametrize(
    ("text", "normalised"),
    [("The  Cat, a dog", "cat dog"), ("An U.S. theater", "us theater"), ("A", ""), ("Anna's", "annas")],
)
def test_squad_normalisation(text, normalised):
    assert metrics.normalise(text) == normalised


def test_matthews_agrees_with_scikit_learn_and_with_the_formula():
    predictions, references = [1, 1, 0, 0, 1], [1, 0, 0, 1, 1]
    got = metrics.Matthews().compute(predictions=predictions, references=references)["matthews"]
    tp, tn, fp, fn = 2, 1, 1, 1
    assert got == pytest.approx((tp * tn - fp * fn) / np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)))
    assert got == pytest.approx(matthews_corrcoef(references, predictions))


def test_gender_parity_is_the_share_of_pairs_with_equal_predictions_right_or_wrong():
    columns = {"predictions": [0, 0, 1, 0, 1, 1], "references": [0, 0, 1, 1, 0, 0], "groups": list("aabbcc")}
    got = metrics.Winogender().compute(**columns)
    assert got == {"gender_parity": pytest.approx(2 / 3), "accuracy": pytest.approx(0.5)}


def test_scoring_is_an_evaluate_metric_and_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    metric = metrics.Accuracy()
    assert isinstance(metric, evaluate.Metric)
    assert metric.compute(predictions=[1, 0, 1], references=[1, 1, 1]) == {"accuracy": pytest.approx(2 / 3)}
    assert list(tmp_path.iterdir()) == []
