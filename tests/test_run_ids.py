"""Runs that exist keep their names: what was run is never run again because the code has learned something new."""

import json

import pytest

from membench.config.settings import resolve
from membench.runs import prepare

# As given to the runs of the first release
HASHES = {
    "adamw": "7fa3991308",
    "adalomo": "d7e087a8e4",
    "badam": "685b4e30e4",
    "blockllm": "8e447fe531",
    "galore": "4707994021",
    "hft": "59541e5005",
    "lisa": "7b6bbe9bc2",
    "lomo": "f7ec0eece4",
    "lora": "1f6a264a70",
    "sgd": "2e81f703e0",
}


def test_the_runs_of_the_first_release_have_the_ids_that_they_had():
    settings = resolve({"task": "superglue/cb", "optimizers": list(HASHES), "steps": 4, "threads": 1, "device": "cpu"})
    runs = prepare.prepare(settings)
    assert {run.method: run.run_id for run in runs} == {
        method: f"superglue-cb--{method}--config-roberta-tiny--s0--{digest}" for method, digest in HASHES.items()
    }


# Of adamw and badam, on each family of tasks and with each option that makes another run: the first release's, too.
IDS = {
    ("superglue/rte", "{}"): ["695fe2ba9b", "95c76de4b4"],
    ("classify", "{}"): ["67c6369d53", "e35b21396a"],
    ("c4", "{}"): ["5896b547ba", "a68341f095"],
    ("instruct", "{}"): ["412c589cf2", "12de9c6d29"],
    ("superglue/rte", '{"final_fraction": 0.1}'): ["6598d8b12e", "9d2d39ceaf"],
    ("superglue/rte", '{"evaluate_before": true}'): ["1abfab5c49", "33758e373e"],
    ("superglue/rte", '{"autocast": "bfloat16"}'): ["ed415ac504", "f566fe23e4"],
    ("superglue/rte", '{"dtype": "bfloat16"}'): ["838b4688bb", "f29bd1571c"],
    ("superglue/rte", '{"checkpointing": true}'): ["3184e3c218", "b8f1f5e148"],
    ("superglue/rte", '{"max_grad_norm": 1.0}'): ["5606528f63", "6b40dfefcf"],
    ("superglue/rte", '{"gradient_accumulation_steps": 2}'): ["a265440737", "7a260bad07"],
    ("superglue/rte", '{"evaluate_every": 1}'): ["d94520b295", "b9a02bea8a"],
    ("superglue/rte", '{"schedule": "cosine", "warmup_fraction": 0.0}'): ["d121d713e6", "b08d7facf2"],
    ("superglue/rte", '{"seeds": "3"}'): ["a8b15573a1", "574ae844c4"],
    ("superglue/rte", '{"learning_rate": 0.001}'): ["1290d7bd07", "2a95a5cf3e"],
    ("superglue/rte", '{"out": "elsewhere", "retry": true, "checkpoint_every": 7}'): ["695fe2ba9b", "95c76de4b4"],
    ("c4", '{"options": {"validation_tokens": 128}}'): ["d4ea1a0bec", "71263e5698"],
    ("instruct", '{"options": {"packing": true}}'): ["f366e043f3", "0119d78f2f"],
}


def write_texts(folder):
    """Data of one's own for three families; ids depend on what they hold, not on where they lie."""
    words = ["cat", "dog", "tree", "house", "river", "stone", "bird"]
    sentence = [" ".join(words[(n * step) % 7] for step in range(1, 9)) + f" {n}" for n in range(80)]
    rows = {
        "classify": [{"text": text, "label": ("yes", "no")[n % 2]} for n, text in enumerate(sentence)],
        "instruct": [{"instruction": text, "input": "", "output": text[:20]} for text in sentence],
        "c4": [{"text": " ".join(sentence[n:] + sentence[:n])} for n in range(80)],
    }
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))


@pytest.mark.parametrize(("family", "changes"), IDS)
def test_runs_keep_their_ids_whatever_was_asked_of_them(tmp_path, monkeypatch, family, changes):
    monkeypatch.setattr(prepare, "_refused", lambda *_: {})  # ids don't depend on it
    write_texts(tmp_path)
    data = "demo" if family.startswith("superglue") else str(tmp_path / f"{family}.jsonl")
    given = {"task": family, "data": data, "optimizers": "badam", "steps": 3, "batch_size": 4, "sequence_length": 96}
    given |= {"threads": 1, "device": "cpu", "hyperparameters": ["badam.switch_every=1"], **json.loads(changes)}
    ids = [run.run_id for run in prepare.prepare(resolve(given))]
    assert [name[-10:] for name in ids] == IDS[family, changes]
