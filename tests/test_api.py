"""membench from Python: the documented examples run, and the functions give what the command line gives."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import plan_models
import pytest
import torch
import transformers
from commands import DATA, command
from torch import nn

import membench
import optimizers
from membench.commands.plan import plan
from membench.planning import budget
from membench.testing import assert_peak_at_most

ROOT = Path(__file__).resolve().parent.parent
TINY = {"task": "superglue/cb", "data": DATA, "steps": 2, "batch_size": 4, "threads": 1, "quiet": True}


def python(folder, *arguments):
    path = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *arguments], cwd=folder, env=path, capture_output=True, text=True)


def test_the_documents_examples_run_as_a_plain_script_without_a_guard(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "api.md").read_text(), re.DOTALL)
    assert len(blocks) >= 5
    code = "\n".join(blocks)
    for shown, quick in {  # the same calls on a smaller model and less data
        '"llama3-8b"': repr(plan_models.folder(tmp_path, "llama", 2, max_position_embeddings=1024)),
        '"llama-60m", "lora", budget="2GiB").rows["lora"]': '"roberta-tiny", "sgd", budget="2GiB").rows["sgd"]',
        '"superglue/rte"': f'"superglue/cb", data={DATA!r}, batch_size=2, sequence_length=16, threads=1',
    }.items():
        assert shown in code
        code = code.replace(shown, quick)
    (tmp_path / "script.py").write_text("print('started')\n" + code)
    done = python(tmp_path, "script.py")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("started") == 1, "a child process ran the script again"
    assert "badam" in done.stdout and "MiB at the peak" in done.stdout


def test_importing_membench_imports_nothing_heavy(tmp_path):
    code = "import membench, sys; print({'torch', 'transformers', 'typer', 'pandas', 'rich'} & set(sys.modules))"
    assert python(tmp_path, "-c", code).stdout.strip() == "set()"


def test_every_exported_name_is_there_and_documented():
    for name in membench.__all__:
        assert name == "__version__" or getattr(membench, name).__doc__


def without_times(record):
    history = [{key: value for key, value in entry.items() if key != "seconds"} for entry in record["history"]]
    environment = {key: value for key, value in record["environment"].items() if key != "created"}
    memory = {key: value for key, value in record["memory"].items() if key != "process_peak_bytes"}
    kept = {**record, "history": history, "environment": environment, "memory": memory}
    return {key: value for key, value in kept.items() if key != "time"}


def test_compare_and_the_command_make_the_same_records_apart_from_times(tmp_path):
    options = ("--steps", "2", "--batch-size", "4", "--threads", "1", "--no-reference", "--set", "badam.switch_every=1")
    asked = ("compare", "--optimizers", "badam", "--task", "superglue/cb", "--data", DATA, "--out", "there")
    assert command(*asked, *options, cwd=tmp_path).returncode == 0
    values = {"badam": {"switch_every": 1}}
    made = membench.compare(["badam"], out=tmp_path / "here", reference=False, hyperparameters=values, **TINY)
    assert [without_times(run) for run in made] == [
        without_times(run) for run in membench.load_records(tmp_path / "there")
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    out = tmp_path_factory.mktemp("api") / "runs"
    return membench.compare("sgd", out=out, **TINY), out


def test_the_same_call_again_makes_nothing_and_prints_nothing(runs, capfd):
    made, out = runs
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.json")}
    again = membench.compare("sgd", out=out, **TINY)
    assert again == made and {path: path.stat().st_mtime_ns for path in out.glob("*.json")} == before
    assert capfd.readouterr().out == ""


def test_a_frame_has_a_row_a_run_and_flat_columns(runs):
    made, out = runs
    frame = membench.to_frame(out)
    assert len(frame) == len(made) == 2
    assert set(frame["method"]) == {"adamw", "sgd"}
    by_method = {run["method"]: run for run in made}
    for _, row in frame.iterrows():
        run = by_method[row["method"]]
        assert row["memory.peak_allocated_bytes"] == run["memory"]["peak_allocated_bytes"]
        assert row["training.steps"] == 2 and row["metrics.score"] == run["metrics"]["score"]
    assert not any(isinstance(value, dict) and value for value in frame.iloc[0])


def test_report_prints_what_the_command_prints(runs, capsys):
    from reports import tables

    membench.report(runs[0])
    assert capsys.readouterr().out == tables.render(runs[0]) + "\n"
    membench.report(runs[1], format="markdown")
    assert "|" in capsys.readouterr().out


def test_report_shows_html_in_a_notebook_with_names_escaped(runs, monkeypatch):
    import types

    shown = []
    display = types.SimpleNamespace(HTML=lambda text: text, display=shown.append)
    notebook = types.SimpleNamespace(get_ipython=lambda: types.SimpleNamespace(kernel=object()), display=display)
    monkeypatch.setitem(sys.modules, "IPython", notebook)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    membench.report([{**run, "model": "<script>"} for run in runs[0]])
    assert "<table>" in shown[0] and "&lt;script&gt;" in shown[0] and "<script>" not in shown[0]


def test_check_finds_nothing_in_equal_records_and_a_peak_that_grew(runs):
    made = runs[0]
    assert membench.check(made, runs[1], only=["memory"]).regressions == []
    grown = json.loads(json.dumps(made))
    for run in grown:
        for place in ("at_peak", "maximum"):
            run["memory"][place]["weights_bytes"] += 10**8
        run["memory"]["peak_allocated_bytes"] += 10**8
    verdict = membench.check(made, grown, only=["memory"])
    assert {finding.metric for finding in verdict.regressions} == {"memory"} and verdict.code == 1


def test_a_mistake_is_a_value_error_of_one_sentence(tmp_path):
    for call, word in [
        (lambda: membench.compare("badm", out=tmp_path), "badam"),
        (lambda: membench.compare("badam", out=tmp_path, stepz=3), "steps"),
        (lambda: membench.compare("badam", out=tmp_path, steps=0), "steps"),
        (lambda: membench.compare("badam", out=tmp_path, hyperparameters={"badam": {"switch": 1}}), "switch_every"),
        (lambda: membench.plan("llama3-8b", "lroa"), "lora"),
        (lambda: membench.plan("llama3-8b", "lora", budget="24 bananas"), "24 bananas"),
        (lambda: membench.plan("no-such-model", "lora"), "no-such-model"),
        (lambda: membench.report(tmp_path / "nowhere"), "nowhere"),
        (lambda: membench.check(tmp_path, tmp_path), "records"),
        (lambda: membench.check([], [], only=["speed"]), "speed"),
        (lambda: membench.check([], [], only=[]), "only is empty"),
        (lambda: membench.plan("llama3-8b", []), "optimizers is empty"),
        (lambda: membench.plan("llama3-8b", [42]), "not 42"),
        (lambda: membench.plan("llama3-8b", "lora", budget=0), "budget=0"),
        (lambda: membench.plan("llama3-8b", "lora", hyperparameters={"lr": 1}), "by method"),
        (lambda: membench.plan("llama3-8b", "lora", checkpointing=True, gradient_checkpointing=False), "same option"),
        (lambda: membench.plan("llama-tiny", "lora", sequence_length=8, loss_chunks=64), "--loss-chunks 64"),
        (lambda: membench.compare("badam", out=tmp_path, options=[1]), "--option must be values by name"),
    ]:
        with pytest.raises(membench.UserError) as caught:
            call()
        assert isinstance(caught.value, ValueError)
        assert word in str(caught.value) and "\n" not in str(caught.value)


def test_numbers_of_numpy_and_paths_and_iterators_are_what_they_stand_for(tmp_path, runs):
    import numpy

    values = {"badam": {"switch_every": numpy.int64(3), "lr": numpy.float32(0.5)}}
    folder = Path(plan_models.folder(tmp_path, "llama", 2))
    given = {"batch_size": numpy.int64(2), "sequence_length": numpy.int32(8), "checkpointing": numpy.bool_(True)}
    plan = membench.plan(folder, iter(["badam"]), hyperparameters=values, **given)
    assert (plan.rows["badam"].hyperparameters["switch_every"], plan.rows["badam"].hyperparameters["lr"]) == (3, 0.5)
    setup = json.loads(json.dumps(plan.document))["setup"]
    assert (setup["batch_size"], setup["sequence_length"], setup["checkpointing"]) == (2, 8, True)
    made, out = runs
    assert membench.compare(iter(["sgd"]), out=out, seeds=range(1), **TINY) == made
    assert len(membench.to_frame(iter(made))) == 2 and len(membench.to_frame(made[0])) == 1
    assert membench.check(iter(made), iter(made), only="memory").regressions == []


def linear():
    model = nn.Linear(10, 1, bias=False)
    return model, [torch.ones(4, 10)], lambda model, batch: model(batch).sum()


def test_a_class_stands_for_its_name(tmp_path, monkeypatch):
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "mine_in_lib.py").write_text("from optimizers import SGD\n\n\nclass Mine(SGD):\n    pass\n")
    monkeypatch.syspath_prepend(str(tmp_path / "lib"))
    from mine_in_lib import Mine

    given = {**TINY, "out": tmp_path / "runs", "reference": False, "hyperparameters": {Mine: {"lr": 0.25}}}
    made = {run["method"]: run for run in membench.compare([optimizers.SGD, Mine], **given)}
    assert {name: run["status"] for name, run in made.items()} == {"sgd": "ok", "mine_in_lib:Mine": "ok"}
    assert made["mine_in_lib:Mine"]["hyperparameters"]["lr"] == 0.25 != made["sgd"]["hyperparameters"]["lr"]
    assert list(membench.plan("roberta-tiny", Mine).rows) == ["mine_in_lib:Mine"]


def test_a_class_that_a_run_couldnt_import_is_refused():
    class Local(optimizers.SGD):
        pass

    of_notebook = type("Mine", (optimizers.SGD,), {"__module__": "__main__"})
    for given in Local, of_notebook:
        with pytest.raises(membench.UserError, match=f"put {given.__name__} into a file, at its top level"):
            membench.plan("roberta-tiny", given)


def test_measured_memory_is_the_bytes_that_adam_is_known_to_keep():
    model, batches, loss_fn = linear()
    usage = membench.measure_memory(model, torch.optim.Adam(model.parameters()), loss_fn, batches)
    assert usage.maximum["weights_bytes"] == usage.maximum["gradients_bytes"] == 40
    assert usage.maximum["optimizer_state_bytes"] == 2 * 40 + 4  # two moments, and the step's count
    assert sum(usage.at_peak.values()) == usage.peak_allocated_bytes


def test_memory_is_measured_with_clipping_of_batches_from_a_loader_and_of_the_optimizers_own_model():
    model, batches, loss_fn = linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    usage = membench.measure_memory(model, optimizer, loss_fn, iter(batches), max_grad_norm=1.0)
    assert usage.maximum["gradients_bytes"] == 40
    with pytest.raises(membench.UserError, match="trains no parameter of this model"):
        membench.measure_memory(linear()[0], optimizer, loss_fn, batches)


def test_a_ceiling_holds_to_the_byte():
    model, batches, loss_fn = linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    peak = membench.measure_memory(model, optimizer, loss_fn, batches).peak_allocated_bytes
    assert assert_peak_at_most(peak, model, optimizer, loss_fn, batches).peak_allocated_bytes == peak
    with pytest.raises(AssertionError, match=rf"{peak:,} bytes at its peak, 1 more than {peak - 1:,}"):
        assert_peak_at_most(peak - 1, model, optimizer, loss_fn, batches)
    with pytest.raises(ValueError, match="batches is empty"):
        assert_peak_at_most(peak, model, optimizer, loss_fn, [])


def test_planning_leaves_the_callers_garbage_to_the_collector(tmp_path):
    import gc

    gc.unfreeze()
    membench.plan(plan_models.folder(tmp_path, "llama", 2), "sgd", sequence_length=8)
    assert gc.get_freeze_count() == 0


def test_where_no_length_is_asked_for_a_plan_and_the_command_take_what_the_model_takes(tmp_path, capsys):
    transformers.GPT2Config(n_positions=64, n_embd=16, n_layer=2, n_head=2, vocab_size=50).save_pretrained(tmp_path)
    assert membench.plan(str(tmp_path), "sgd").document["setup"]["sequence_length"] == 64
    plan(model=str(tmp_path), optimizers=["sgd"], format="json")
    assert json.loads(capsys.readouterr().out)["setup"]["sequence_length"] == 64
    with pytest.raises(membench.UserError, match="512 is too long"):
        membench.plan(str(tmp_path), "sgd", sequence_length=512)


AFTER_TENSORS_OF_ONES_OWN = """
import torch, transformers, membench
weight = torch.randn(800, 800, requires_grad=True)
(weight @ weight).sum().backward()  # starts the pool of threads
sizes = {"d_model": 16, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
config = transformers.BartConfig(**sizes, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=16, decoder_ffn_dim=16)
config.save_pretrained("bart")
print(len(membench.plan("bart", ["sgd", "adamw"], sequence_length=8).rows))
"""


def test_where_values_are_needed_a_plan_is_made_beside_the_threads_of_the_callers_own_tensors(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-c", AFTER_TENSORS_OF_ONES_OWN]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.stdout.split() == ["2"], done.stderr


def test_a_plan_has_the_figures_of_its_document(tmp_path, monkeypatch):
    monkeypatch.setattr(budget, "built_in_models", lambda causal: {})
    plan = membench.plan(plan_models.folder(tmp_path, "llama", 2), ["sgd"], sequence_length=8, budget=2**30)
    assert list(plan.rows) == ["sgd"]
    for row in plan.document["rows"]:
        mine = plan.rows[row["method"]]
        assert (mine.peak_allocated_bytes, mine.fits) == (row["peak_allocated_bytes"], True)
        assert sum(mine.at_peak.values()) == mine.peak_allocated_bytes
    assert "sgd" in str(plan) and "<table>" in plan._repr_html_()


def test_a_record_made_in_a_checkout_names_its_commit(runs):
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    commits = subprocess.run(["git", "rev-list", "HEAD", "-n", "50"], cwd=ROOT, capture_output=True, text=True).stdout
    assert runs[0][0]["environment"]["commit"] in commits.split()
