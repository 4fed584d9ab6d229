"""SuperGLUE's official metrics (Wang et al., 2019, arXiv 1905.00537) as `evaluate.Metric`s over scikit-learn.

Scoring downloads and writes nothing: predictions stay in memory. If the benchmark reports two metrics for a task,
`score` is their mean, which enters the benchmark's average.
"""

import re
import string
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import datasets
import evaluate
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

CITATION = "Wang et al., 2019. SuperGLUE: A Stickier Benchmark for General-Purpose Language Understanding Systems."
LABEL, TEXT, TEXTS = datasets.Value("int64"), datasets.Value("string"), datasets.List(datasets.Value("string"))


class InMemory(evaluate.Metric):
    """An `evaluate.Metric` that leaves no file or folder behind."""

    columns: ClassVar[dict[str, Any]] = {"predictions": LABEL, "references": LABEL}

    def __init__(self) -> None:
        super().__init__(keep_in_memory=True, seed=0)

    def _build_data_dir(self) -> str:
        return ""  # the base class makes a folder in the user's cache

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=type(self).__doc__ or "",
            citation=CITATION,
            inputs_description=f"columns: {', '.join(self.columns)}",
            features=datasets.Features(self.columns),
        )


class Accuracy(InMemory):
    """accuracy: share of correct predictions."""

    def _compute(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
        return {"accuracy": float(accuracy_score(references, predictions))}


class Classification(InMemory):
    """accuracy, and macro_f1: the unweighted mean of the classes' F1."""

    def _compute(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
        accuracy = float(accuracy_score(references, predictions))
        return {
            "accuracy": accuracy,
            "macro_f1": float(f1_score(references, predictions, average="macro", zero_division=0)),
        }


class CommitmentBank(InMemory):
    """accuracy, f1 (the unweighted mean of the classes' F1) and score (the mean of both)."""

    def _compute(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
        accuracy = float(accuracy_score(references, predictions))
        f1 = float(f1_score(references, predictions, average="macro", zero_division=0))
        return {"accuracy": accuracy, "f1": f1, "score": (accuracy + f1) / 2}


class MultiRC(InMemory):
    """f1a (F1 of "right" over all answers), em (share of questions with every answer right) and score (the mean).

    Khashabi et al., 2018. `groups` names the question of each answer.
    """

    columns = {"predictions": LABEL, "references": LABEL, "groups": TEXT}

    def _compute(
        self, predictions: Sequence[int], references: Sequence[int], groups: Sequence[str]
    ) -> dict[str, float]:
        right = _by_group(groups, [p == r for p, r in zip(predictions, references, strict=True)])
        f1a = float(f1_score(references, predictions, average="binary", zero_division=0))
        em = sum(map(all, right)) / len(right)
        return {"f1a": f1a, "em": em, "score": (f1a + em) / 2}


class ReCoRD(InMemory):
    """f1 and em of the chosen entity, each the best over the answers to a query, and score (the mean).

    Zhang et al., 2018; texts are normalised and compared as in SQuAD. `references` has a list of answers per query.
    """

    columns = {"predictions": TEXT, "references": TEXTS}

    def _compute(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
        f1, em = (_mean_of_best(match, predictions, references) for match in (token_f1, exact_match))
        return {"f1": f1, "em": em, "score": (f1 + em) / 2}


class Matthews(InMemory):
    """matthews: Matthews' correlation coefficient, -1..1."""

    def _compute(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
        return {"matthews": float(matthews_corrcoef(references, predictions))}


class Winogender(InMemory):
    """gender_parity (share of pairs, differing in a pronoun's gender, with equal predictions) and accuracy.

    Rudinger et al., 2018. `groups` names the pair of each example.
    """

    columns = {"predictions": LABEL, "references": LABEL, "groups": TEXT}

    def _compute(
        self, predictions: Sequence[int], references: Sequence[int], groups: Sequence[str]
    ) -> dict[str, float]:
        pairs = _by_group(groups, predictions)
        parity = sum(len(set(pair)) == 1 for pair in pairs) / len(pairs)
        return {"gender_parity": parity, "accuracy": float(accuracy_score(references, predictions))}


def _by_group(groups: Sequence[str], values: Sequence[Any]) -> list[list[Any]]:
    grouped = defaultdict(list)
    for group, value in zip(groups, values, strict=True):
        grouped[group].append(value)
    return list(grouped.values())


def _mean_of_best(
    match: Callable[[str, str], float], predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> float:
    best = [
        max(match(text, answer) for answer in answers) for text, answers in zip(predictions, references, strict=True)
    ]
    return sum(best) / len(best)


def normalise(text: str) -> str:
    """SQuAD's normalisation (Rajpurkar et al., 2016): lower case, no punctuation, no articles, single spaces."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(prediction: str, answer: str) -> float:
    """1.0 if both are the same after normalisation."""
    return float(normalise(prediction) == normalise(answer))


def token_f1(prediction: str, answer: str) -> float:
    """F1 over the words of both after normalisation."""
    predicted, expected = normalise(prediction).split(), normalise(answer).split()
    common = sum((Counter(predicted) & Counter(expected)).values())
    return 2 * common / (len(predicted) + len(expected)) if common else 0.0
