"""A run's id: another one for whatever makes another run, the same one for what doesn't, today as when it was saved."""

import dataclasses
import sys
from importlib.metadata import EntryPoint
from types import ModuleType
from typing import Any, get_args

import pytest
import torch
import transformers
from letters import letters
from torch import nn

import tasks
from membench.config import options
from membench.config.run import Run
from membench.config.settings import Settings, resolve
from membench.config.values import annotations
from membench.runs import prepare as module
from membench.runs.prepare import prepare
from tasks import plugins
from tasks.models.tokenization import load_tokenizer

PROVENANCE = {"data_revision": None, "data_sha256": None, "model_revision": None, "tokenizer": None}

# What changes nothing in a run: where it is kept, how it is shown, what else is compared, by which name values came.
FAN_OUT = {"jobs", "executor", "devices", "ray_address", "slurm", "detach", "begun_with"}
NO_OTHER_RUN = FAN_OUT | {
    "out",
    "save",
    "checkpoint_every",
    "retry",
    "quiet",
    "dry_run",
    "reference",
    "profile",
    "log_to",
}
NO_OTHER_RUN |= {"trust_remote_code"}  # the code is that of the model's revision
NO_OTHER_RUN |= {"fit_length"}  # the length that is found counts
# Of a task's provenance: where data of a known hash lie, what follows from model and versions, what is said of data.
NO_OTHER_DATA = {"data", "attention", "notes"}

GIVEN = {"task": "ours/first", "optimizers": "badam", "reference": False, "steps": 4, "batch_size": 2}
GIVEN |= {"sequence_length": 8, "threads": 1, "device": "cpu", "model": "tiny", "data": "here"}


class Ours:
    """A task that says of itself what a test wants it to."""

    headline, higher_is_better, train_size, from_scratch, head = "score", True, 10, False, ()

    def __init__(self, name: str, provenance: dict[str, Any], given: dict[str, Any]):
        self.name = f"ours/{name}"
        self.provenance = {"data": given["data"], **provenance}
        self.provenance["tokenizer"] = self.provenance["tokenizer"] or given["tokenizer"]

    def build_model(self) -> nn.Module:
        shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, vocab_size=8))

    def batch(self, step: int) -> Any: ...
    def loss(self, model: nn.Module, batch: Any) -> Any: ...
    def evaluate(self, model: nn.Module) -> Any: ...


@pytest.fixture
def provenance(monkeypatch) -> dict[str, Any]:
    """What the tasks of the installed family `ours` say of data, model and tokenizer; a test may change it."""
    said = dict(PROVENANCE)

    def create(name: str, *, flavour: int = 1, **given: Any) -> Ours:
        return Ours(name, said, given)

    family = ModuleType("family_of_the_tests")
    vars(family).update(
        NAME="ours", names=lambda: ("first", "second"), available_in=lambda data: ("first", "second"), create=create
    )
    monkeypatch.setitem(sys.modules, "family_of_the_tests", family)
    point = EntryPoint("ours", "family_of_the_tests", plugins.ENTRY_POINTS)
    monkeypatch.setattr(plugins, "entry_points", lambda group: [point])
    monkeypatch.setattr(module, "find_device", lambda name: torch.device(name))
    return said


def run(*assignments: str, **given: Any) -> Run:
    (made,) = prepare(resolve({**GIVEN, **given, "hyperparameters": list(assignments)}))
    return made


def run_id(*assignments: str, **given: Any) -> str:
    return run(*assignments, **given).run_id


def expect_all_to_differ(ids: dict[str, str]) -> None:
    alike = {name: other for name in ids for other in ids if name < other and ids[name] == ids[other]}
    assert not alike and len(ids) > 1


def another(name: str, value: Any, kind: Any) -> Any:
    """A value for an option that isn't `value`, as the option's annotation allows it."""
    by_name = {"task": "ours/second", "optimizers": "sgd", "seeds": "1", "device": "meta", "options": {"flavour": 2}}
    if name in by_name:
        return by_name[name]
    parts = [part for one in (kind, *get_args(kind)) for part in (one, *get_args(one))]  # of unions and literals
    words = [part for part in parts if isinstance(part, str) and part != value]
    if words:
        return words[0]
    if bool in parts:
        return not value
    if int in parts or float in parts:
        return 2 * value if value else 3 if int in parts else 0.25
    return "another"


def test_every_option_makes_another_run_but_those_that_only_say_where_and_how_it_is_made(provenance):
    kinds, usual = annotations(Settings), resolve(GIVEN)
    needs = {
        "checkpointing_every": {"checkpointing": True},
        "strategy": {"processes": 2},
        "offload_activations": {"device": "meta"},
    }
    ids = {"": run_id()}
    for name in {field.name for field in dataclasses.fields(Settings)} - NO_OTHER_RUN - {"epochs", "hyperparameters"}:
        ids[name] = run_id(**{name: another(name, getattr(usual, name), kinds[name]), **needs.get(name, {})})
    expect_all_to_differ(ids)


def test_every_hyperparameter_makes_another_run(provenance):
    other = {"order": "ascending", "block": "matrix", "inner": "sgd", "betas": "0.5,0.9", "always_train": "lm_head"}
    ids = {"": run_id()}
    for name, value in run().hyperparameters.items():
        text = other.get(name, str(not value if isinstance(value, bool) else 2 * value or 3))
        ids[name] = run_id(f"badam.{name}={text}")
    expect_all_to_differ(ids)


def test_what_only_says_where_and_how_a_run_is_made_leaves_its_id(provenance, tmp_path, monkeypatch):
    monkeypatch.setattr(options, "find_spec", lambda name: name)  # as if the tracker were installed
    other = {
        "out": str(tmp_path),
        "save": str(tmp_path),
        "checkpoint_every": 7,
        "retry": True,
        "quiet": True,
        "jobs": 3,
        "log_to": ["wandb"],
    }
    other |= {"dry_run": True, "trust_remote_code": True}
    assert set(other) | FAN_OUT | {"reference", "profile", "fit_length"} == NO_OTHER_RUN
    for name, value in other.items():
        assert run_id(**{name: value}) == run_id(), name
    assert run_id(device="auto", devices=["cpu"]) == run_id()
    assert run_id(executor="ray", ray_address="auto", detach=True) == run_id()
    assert run_id(executor="slurm", slurm={"partition": "gpu"}) == run_id()
    assert run_id(begun_with=2) == run_id()
    for strategy in ("fsdp2", "replicate"):
        two = run(processes=2, strategy=strategy)
        on_one = run(begun_with=2, strategy=strategy)
        assert on_one.begun_as == two.run_id != on_one.run_id == run_id()
    assert run(processes=2, begun_with=1, strategy="replicate").begun_as == run_id()
    assert run_id() in {made.run_id for made in prepare(resolve({**GIVEN, "reference": True}))}
    training = run().training
    assert dataclasses.replace(training, profile="another").identity == training.identity  # its values count, not it


def test_all_that_a_task_says_of_data_model_and_tokenizer_makes_another_run(provenance):
    cb = tasks.create("superglue/cb", model="config:roberta-tiny", batch_size=2, sequence_length=16)
    assert set(cb.provenance) - NO_OTHER_DATA == set(PROVENANCE)
    ids = {"": run_id()}
    for name in PROVENANCE:
        provenance.update({**PROVENANCE, name: "another"})
        ids[name] = run_id()
    expect_all_to_differ(ids)


def test_data_of_a_known_hash_are_the_same_wherever_they_lie(provenance):
    assert run_id(data="there") != run_id()
    provenance["data_sha256"] = "0123"
    assert run_id(data="there") == run_id()


# The hashes that end the ids of these runs since records exist: an option or a hyper-parameter that comes later must
# leave them as they are where it isn't used, or finished runs would be made again.
SAVED = {
    "adamw": "2d5b903283",
    "sgd": "5663dfa32f",
    "badam": "b09ff95df6",
    "blockllm": "62156a077a",
    "lisa": "4a59c0b7fa",
    "galore": "2030218be9",
    "lora": "7e55fe198c",
    "lomo": "a08df116c2",
    "adalomo": "8296ebdf61",
    "hft": "6ee5c0b209",
}

# which every model and all data had then
OF_THE_DEMO = ["badam.switch_every=10", "blockllm.sparsity=0.7", "blockllm.patience=20"]
OF_THE_DEMO += ["lomo.clip_norm=1.0", "sgd.momentum=0.9"]


@pytest.mark.parametrize("method", SAVED)
def test_a_run_that_was_saved_long_ago_is_found_again(provenance, method):
    assert run_id(*OF_THE_DEMO, optimizers=method).rpartition("--")[2] == SAVED[method]


def test_so_is_one_with_all_options_that_came_later(provenance):
    later = {"final_fraction": 0.1, "options": {"flavour": 2}, "evaluate_before": True}
    assert run_id(*OF_THE_DEMO, dtype="bfloat16", tokenizer="own", **later).rpartition("--")[2] == "ef512f3640"


@pytest.mark.parametrize("name", ["tiktoken.model", "tokenization_mine.py", "more/tool_use.jinja", "vocab.bpe"])
def test_whatever_a_tokenizer_is_made_of_makes_another_run_once_it_is_changed(name, tmp_path):
    letters().save_pretrained(tmp_path)
    before = load_tokenizer(str(tmp_path))[1]
    for path in (tmp_path / "README.md", tmp_path / name):
        path.parent.mkdir(exist_ok=True)
        path.write_text("x")
        changed = load_tokenizer(str(tmp_path))[1] != before
        assert changed == (path.name != "README.md")
