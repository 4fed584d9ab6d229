"""Tasks of somebody else's are found by their path, or by the name that an installed package gives to them."""

from importlib.metadata import EntryPoint

import pytest

import tasks
from membench.config.errors import UserError
from membench.config.settings import resolve
from membench.runs.prepare import prepare
from tasks import plugins as own

MODULE = """
from torch import nn


class Mine:
    name, headline, higher_is_better, train_size, from_scratch = "mine", "score", True, 10, True
    head = ()
    provenance = {"data": "own", "data_revision": None, "data_sha256": None, "model_revision": None, "tokenizer": None}

    def __init__(self, *, seed, **given):
        self.seed, self.given = seed, given

    def build_model(self):
        return nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))

    def batch(self, step): ...
    def loss(self, model, batch): ...
    def evaluate(self, model): ...


class Writes(Mine):
    def build_model(self):
        from transformers import LlamaConfig, LlamaForCausalLM

        sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
        return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=1))


class WritesInItsOwnWay(Writes):
    def build_model(self):
        model = super().build_model()
        model.__class__ = type("Own", (type(model),), {})
        return model


class OfNothing(Mine):
    provenance = {}


class SaysSo(Mine):
    kind = "language"


class SaysNonsense(Mine):
    kind = "poetry"


class NoTask:
    def __init__(self, **given): ...


other = 3
NAME = "ours"


def names():
    return ("first", "second")


def available_in(data):
    return names()[:1]


def create(name, **given):
    return Mine(**given)
"""
GIVEN = {"model": "config:roberta-tiny", "batch_size": 2, "sequence_length": 16, "seed": 3}


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "own_task.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)


def install(monkeypatch, name, value):
    point = EntryPoint(name, value, own.ENTRY_POINTS)
    monkeypatch.setattr(own, "entry_points", lambda group: [point] if group == own.ENTRY_POINTS else [])


def test_a_users_own_class_is_found_by_its_path_and_gets_what_every_task_gets(module):
    assert tasks.expand("own_task:Mine") == ["own_task:Mine"]
    task = tasks.create("own_task:Mine", data="here", **GIVEN)
    assert type(task).__name__ == "Mine" and task.seed == 3
    assert task.given["data"] == "here" and task.given["batch_size"] == 2


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("own_task:Yours", "own_task has no 'Yours'"),
        ("no_such_module:Mine", "importable from this folder or installed"),
        ("own_task:other", "must be a class \\(or function\\) that makes a task, not 3"),
        (
            "own_task:NoTask",
            "'own_task:NoTask' lacks batch, build_model, evaluate, .* see tasks.Task for what a task has",
        ),
    ],
)
def test_what_is_no_task_is_refused_in_a_sentence(module, path, words):
    with pytest.raises(ValueError, match=words):
        tasks.create(path, **GIVEN)


def test_an_installed_package_adds_a_task_through_its_entry_point(module, monkeypatch):
    install(monkeypatch, "theirs", "own_task:Mine")
    assert tasks.available()[-1] == "theirs" and tasks.expand("theirs") == ["theirs"]
    assert tasks.create("theirs", **GIVEN).seed == 3


def test_an_installed_package_adds_a_family_through_its_entry_point(module, monkeypatch):
    install(monkeypatch, "ours", "own_task")
    assert tasks.available()[-2:] == ["ours/first", "ours/second"]
    assert tasks.expand("ours", data="x") == ["ours/first"] and tasks.expand("ours/second") == ["ours/second"]
    assert tasks.create("ours/second", **GIVEN).seed == 3


def test_an_installed_task_that_is_broken_is_in_nobodys_way_until_it_is_asked_for(module, monkeypatch):
    install(monkeypatch, "broken", "no_such_module:Task")
    assert tasks.expand("superglue/rte") == ["superglue/rte"]
    with pytest.raises(
        ValueError, match="task 'broken' of an installed package can't be loaded: ModuleNotFoundError: No module named"
    ):
        tasks.expand("broken")


def test_a_run_of_it_is_called_as_it_was_asked_for_and_a_model_that_can_not_be_saved_is_refused(module):
    given = {"task": "own_task:Mine", "optimizers": "sgd", "steps": 1, "model": "x"}
    runs = prepare(resolve(given))
    assert {run.task for run in runs} == {"own_task:Mine"} and runs[0].run_id.startswith("own_task-Mine--adamw--")
    with pytest.raises(UserError, match="--save: Sequential isn't a transformers model"):
        prepare(resolve({**given, "save": "models"}))


@pytest.mark.parametrize(
    ("name", "kind", "rate"),
    [
        ("Mine", "classification", 3e-4),
        ("Writes", "language", 1e-3),
        ("WritesInItsOwnWay", "language", 1e-3),
        ("SaysSo", "language", 1e-3),
    ],
)
def test_the_default_rate_for_random_weights_suits_what_the_task_trains(module, name, kind, rate):
    assert tasks.kind(tasks.create(f"own_task:{name}", **GIVEN)) == kind
    (run,) = prepare(resolve({"task": f"own_task:{name}", "optimizers": "adamw", "steps": 1, "model": "x"}))
    assert run.hyperparameters["lr"] == rate


def test_a_task_may_have_no_provenance(module):
    (run,) = prepare(resolve({"task": "own_task:OfNothing", "optimizers": "adamw", "steps": 1, "model": "x"}))
    assert "data_sha256" not in run.environment


def test_a_kind_that_there_is_none_of_is_refused(module):
    with pytest.raises(UserError, match="its kind must be one of classification, language, preference, not 'poetry'"):
        prepare(resolve({"task": "own_task:SaysNonsense", "optimizers": "adamw", "steps": 1, "model": "x"}))


@pytest.mark.parametrize(
    ("epochs", "batch_size", "steps"),
    [(1.0, 4, 3), (2.0, 4, 5), (1.0, 5, 2), (0.1, 4, 1), (0.01, 4, 1), (0.25, 1, 3), (1.0, 100, 1), (3.0, 7, 5)],
)
def test_epochs_are_as_many_steps_as_show_every_example_so_often(module, epochs, batch_size, steps):
    given = {"task": "own_task:Mine", "optimizers": "sgd", "reference": False, "model": "x"}  # ten examples
    (run,) = prepare(resolve({**given, "epochs": epochs, "batch_size": batch_size}))
    assert run.training.steps == steps
