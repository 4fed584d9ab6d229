"""One refusal stops nothing else: in a comparison and in a study it is a row and a record, and the rest runs; and what
was changed is made anew."""

import importlib
import json
import re
import sys
from pathlib import Path

import pytest
from architectures import ARCHITECTURES
from letters import folder, labelled, letters
from test_cases_models import TEXTS, build

from membench.config import study_file
from membench.config.errors import UserError
from membench.config.settings import resolve
from membench.runs.compare import compare
from membench.runs.prepare import prepare
from membench.runs.study import study
from membench.training import execute
from reports import record
from reports.regressions import exact

LISA = "can't: layers must be at most 1, the number that the model has, not 2"


@pytest.fixture
def given(tmp_path):
    """Options of a comparison on a tiny ALBERT, whose layers are one."""
    data = labelled(tmp_path / "a.jsonl", TEXTS)
    model = folder(tmp_path / "model", build("albert"), letters())
    shape = {"steps": 2, "batch_size": 4, "sequence_length": 24, "threads": 1, "quiet": True}
    return {"task": "classify", "model": model, "data": data, "out": str(tmp_path / "out"), **shape}


def records(path):
    return {made["method"]: made for made in map(record.load, sorted(path.glob("*.json")))}


def test_w2_what_a_method_refuses_is_a_row_and_a_record_and_the_others_run(given, tmp_path, capsys):
    assert compare(resolve({**given, "optimizers": "lisa,sgd", "reference": False})) == 1
    made = records(tmp_path / "out")
    assert (made["lisa"]["status"], made["lisa"]["error"]) == ("failed", LISA)
    assert made["sgd"]["status"] == "ok"
    out = capsys.readouterr().out
    assert f"classify lisa seed 0: {LISA}" in out and "1 refused" in out and "1 ok" in out
    assert exact._ended(made["lisa"], made["lisa"])[0] == "fine"  # of a baseline that has it, too


def test_w2_where_nothing_is_left_or_a_value_is_to_blame_it_is_a_mistake(given):
    with pytest.raises(UserError, match="lisa: layers must be at most 1"):
        prepare(resolve({**given, "optimizers": "lisa"}))
    with pytest.raises(UserError, match="badam: switch_every must be a whole number of at least 1, not 0"):
        prepare(resolve({**given, "optimizers": "badam,sgd", "hyperparameters": ["badam.switch_every=0"]}))
    with pytest.raises(UserError, match="lomo: .* can't accumulate 2 micro-batches"):
        prepare(resolve({**given, "optimizers": "lomo", "gradient_accumulation_steps": 2}))
    runs = prepare(resolve({**given, "optimizers": "lomo,badam", "gradient_accumulation_steps": 2}))
    assert [(run.method, run.refused is None) for run in runs] == [("adamw", True), ("lomo", False), ("badam", True)]


@pytest.mark.parametrize(
    ("method", "more", "sentence"),
    [
        ("mezo", {"processes": 2, "batch_size": 4}, "moves each module's weights .* or with --strategy replicate"),
        ("qlora", {"track": "gradient_norm"}, "keeps something else .*: leave out --track gradient_norm"),
    ],
)
def test_w2_what_shards_or_a_tracked_norm_rule_out_is_known_before_anything_is_trained(given, method, more, sentence):
    sgd, other = prepare(resolve({**given, "optimizers": f"sgd,{method}", "reference": False, **more}))
    assert sgd.refused is None and re.search(sentence, other.refused) and ".py" not in other.refused


def test_w2_gradients_in_fp32_of_shards_in_low_precision_are_a_mistake_unless_replicas_are_asked_for(given):
    asked = {**given, "optimizers": "lora", "hyperparameters": ["lora.fp32_gradients=true"], "dtype": "bfloat16"}
    asked |= {"reference": False, "processes": 2, "batch_size": 4}
    with pytest.raises(UserError, match="lora: LoRA has fp32_gradients, .*: train replicas"):
        prepare(resolve(asked))
    assert prepare(resolve({**asked, "strategy": "replicate"}))[0].refused is None


def test_w2_in_a_study_too(given, tmp_path, capsys):
    lines = [f"{name} = {json.dumps(value)}" for name, value in given.items() if name not in ("model", "quiet")]
    text = "\n".join([*lines, f"models = [{given['model']!r}]", 'optimizers = "lisa,sgd"', "reference = false"])
    (tmp_path / "s.toml").write_text(f"{text}\n[tune]\nlr = [1e-3, 1e-2]\nbudget = 2\n")
    assert study(study_file.load(str(tmp_path / "s.toml"), {"quiet": True})) == 1
    made = records(tmp_path / "out")
    assert made["lisa"]["error"] == LISA and made["sgd"]["status"] == "ok"
    assert len(list((tmp_path / "out" / "tuning").glob("*sgd*.json"))) == 2
    assert "1 refused" in capsys.readouterr().out


def test_w2_a_task_that_a_model_can_not_do_stops_no_other(tmp_path):
    model = folder(tmp_path / "model", ARCHITECTURES["llama"].build(), letters())
    given = {"task": "superglue/copa,superglue/cb", "model": model, "optimizers": "sgd", "sequence_length": 24}
    runs = prepare(resolve({**given, "steps": 1, "reference": False}))
    assert [(run.task, run.refused is None) for run in runs] == [("superglue/copa", False), ("superglue/cb", True)]
    assert "(llama) can't be built with AutoModelForMultipleChoice" in runs[0].refused
    with pytest.raises(UserError, match="can't be built with AutoModelForMultipleChoice"):
        prepare(resolve({**given, "task": "superglue/copa", "steps": 1}))


def test_w2_a_task_whose_data_are_missing_stops_no_other(tmp_path):
    for name, label in (("CB", "neutral"), ("RTE", "entailment")):
        (tmp_path / name).mkdir()
        row = json.dumps({"premise": "It rains.", "hypothesis": "It is wet.", "label": label})
        (tmp_path / name / "train.jsonl").write_text(f"{row}\n" * 3)
    (tmp_path / "RTE" / "val.jsonl").write_text(f"{row}\n" * 3)
    runs = prepare(resolve({"data": str(tmp_path), "optimizers": "sgd", "epochs": 1, "reference": False}))
    assert [(run.task, run.refused is None) for run in runs] == [("superglue/cb", False), ("superglue/rte", True)]
    assert "CB/val.jsonl is missing" in runs[0].refused and runs[0].training.record["steps"] is None


OWN = """
import torch
from edited_helper import scaled

class Mine(torch.optim.SGD):
    def __init__(self, params, lr=1e-3):
        super().__init__(params, lr=scaled(lr))
"""


def test_a_method_of_ones_own_whose_code_was_changed_is_another_run(given, tmp_path, monkeypatch):
    code = tmp_path / "code"
    code.mkdir()
    monkeypatch.syspath_prepend(str(code))

    def made(**files):
        for name, text in files.items():
            (code / f"{name}.py").write_text(text)
            sys.modules.pop(name, None)
        sys.modules.pop("edited_method", None)
        importlib.invalidate_caches()
        adamw, mine = prepare(resolve({**given, "optimizers": "edited_method:Mine,adamw", "reference": False}))
        assert "method_code" in mine.environment and "method_code" not in adamw.environment
        return mine.run_id, adamw.run_id

    first = made(edited_method=OWN, edited_helper="def scaled(lr): return lr\n", other="x = 1\n")
    assert made(other="x = 2\n") == first  # which the method doesn't use
    edited = made(edited_method=OWN.replace("scaled(lr)", "10 * scaled(lr)"))
    assert edited[0] != first[0] and edited[1] == first[1]
    assert made(edited_method=OWN) == first
    assert made(edited_helper="def scaled(lr): return 100 * lr\n")[0] not in (first[0], edited[0])


def edit_data(given, code):
    path = Path(given["data"])
    path.write_text(path.read_text().replace(" and ", " end "))


def edit_model(given, code):
    path = Path(given["model"], "config.json")
    path.write_text(path.read_text().replace("{", '{"note": 1,', 1))


def edit_tokenizer(given, code):
    Path(given["model"], "merges.txt").write_text("a b\n")


def edit_method(given, code):
    (code / "edited_later.py").write_text(OWN.replace("scaled(lr)", "10 * scaled(lr)"))


EDITS = {
    edit_data: "its data",
    edit_model: "its model",
    edit_tokenizer: "its model and its tokenizer",
    edit_method: "the code of its method",
}


@pytest.mark.parametrize("edit", EDITS)
def test_a_run_is_not_made_of_what_was_changed_since_it_was_named(given, tmp_path, monkeypatch, edit):
    code = tmp_path / "code"
    code.mkdir()
    (code / "edited_later.py").write_text(OWN)
    (code / "edited_helper.py").write_text("def scaled(lr): return lr\n")
    monkeypatch.syspath_prepend(str(code))
    for name in ("edited_later", "edited_helper"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    (run,) = prepare(resolve({**given, "optimizers": "edited_later:Mine", "reference": False}))
    checkpoint = tmp_path / f"{run.run_id}.pt"
    assert execute.execute(run, checkpoint, 0)["status"] == "ok"
    edit(given, code)
    found = execute.execute(run, checkpoint, 0)
    assert found["status"] == "failed" and f"{EDITS[edit]} changed since this run was prepared" in found["error"]
    assert "metrics" not in found
