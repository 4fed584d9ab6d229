"""Whole runs on language models: their records and tables, and stopping and continuing them."""

import json

import datasets
import pytest
import torch

import optimizers
import tasks
from membench.config.run import Training
from membench.config.settings import resolve
from membench.runs import processes
from membench.runs.compare import compare
from membench.training.loop import Loop
from reports import record
from tasks.c4 import task as c4

TINY = {"steps": 3, "batch_size": 2, "sequence_length": 32, "threads": 1, "quiet": True}


@pytest.fixture(scope="module", autouse=True)
def server():
    processes.start_server()


def made(folder):
    return {found["method"]: found for found in record.load_folder(folder)}


def test_pretraining_ends_in_tables_with_perplexity_before_and_after(tmp_path, capsys):
    options = {"validation_tokens": 640}
    settings = resolve({**TINY, "task": "c4", "optimizers": "badam", "out": str(tmp_path), "options": options})
    assert compare(settings) == 0
    text, runs = capsys.readouterr().out, made(tmp_path)
    assert "Before training: c4 perplexity 1,0" in text and "c4 perplexity" in text and "validation_tokens=640" in text
    assert runs["adamw"]["initial_metrics"] == runs["badam"]["initial_metrics"]
    for run in runs.values():
        assert run["headline"] == "perplexity" and run["higher_is_better"] is False
        assert run["initial_metrics"]["perplexity"] > run["metrics"]["perplexity"] > 100
        assert run["history"][-1]["tokens"] == 3 * 2 * 32 and run["training"]["options"] == options
    # from random weights, embeddings, norms and head are trained by every method
    assert runs["badam"]["hyperparameters"]["always_train"] == ["lm_head"]
    assert runs["badam"]["hyperparameters"]["train_embeddings"] is True
    assert compare(settings) == 0
    assert "2 of 2 runs are already in" in capsys.readouterr().out


def test_instruction_tuning_says_what_it_cuts_and_options_make_another_run(tmp_path, capsys):
    rows = [{"question": f"What is {n}?", "answer": f"It is {n}. " * (2 if n % 5 else 60)} for n in range(120)]
    (tmp_path / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {
        **TINY,
        "sequence_length": 96,
        "task": "instruct",
        "data": str(tmp_path / "qa.jsonl"),
        "optimizers": "adamw",
    }
    given["out"] = str(tmp_path / "out")
    assert compare(resolve(given)) == 0
    text = capsys.readouterr().out
    assert (
        text.startswith("instruct: ") and "training answers cut at the end to fit the sequence" in text.split("\n")[0]
    )
    assert compare(resolve({**given, "options": {"packing": True}})) == 0
    runs = record.load_folder(tmp_path / "out")
    assert [run["training"]["options"] for run in runs] in ([{}, {"packing": True}], [{"packing": True}, {}])
    assert all("cut at the end" in run["environment"]["notes"] for run in runs)
    packed = next(run for run in runs if run["training"]["options"])
    plain = next(run for run in runs if not run["training"]["options"])
    assert packed["history"][-1]["tokens"] > 1.2 * plain["history"][-1]["tokens"]


class Stop(Exception):
    pass


def build(data):
    task = tasks.create("c4", model="config:llama-tiny", data=data, batch_size=2, sequence_length=16)
    model = task.build_model()
    optimizer = optimizers.create("badam", model, lr=1e-2, switch_every=3)
    training = Training(steps=12, batch_size=4, sequence_length=16, gradient_accumulation_steps=2)
    return Loop(model, optimizer, task, training, seed=0, device=torch.device("cpu"))


@pytest.mark.parametrize("data", ["local", "hub"])
def test_a_run_that_was_stopped_goes_on_with_the_same_batches_to_the_same_bits(data, tmp_path, monkeypatch):
    words = [" ".join(f"{n} word{k}" for k in range(n % 40)) for n in range(300)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in words))

    def open_hub(split):
        some = words[:270] if split == "train" else words[270:]
        return datasets.Dataset.from_list([{"text": text} for text in some]).to_iterable_dataset(num_shards=3)

    monkeypatch.setattr(c4, "open_hub", open_hub)
    source = data if data == "hub" else str(tmp_path / "a.jsonl")
    whole = build(source)
    whole.run()

    def stop(step, loss):
        if step == 8:
            raise Stop

    path = tmp_path / "run.pt"
    with pytest.raises(Stop):
        build(source).run(report=stop, checkpoint_path=path, checkpoint_every=5)
    continued, steps = build(source), []
    continued.run(report=lambda step, loss: steps.append(step), checkpoint_path=path)
    assert steps[0] == 6
    assert all(torch.equal(p, q) for p, q in zip(whole.model.parameters(), continued.model.parameters(), strict=True))
    assert [e["loss"] for e in whole.progress.history] == [e["loss"] for e in continued.progress.history]
