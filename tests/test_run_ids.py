"""Runs that exist keep their names: what was run is never run again because the code has learned something new."""

from membench.config.settings import resolve
from membench.runs.prepare import prepare

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
    settings = resolve(
        {"task": "superglue/cb", "optimizers": list(HASHES), "steps": 4, "threads": 1, "device": "cpu"}, []
    )
    runs = prepare(settings)
    assert {run.method: run.run_id for run in runs} == {
        method: f"superglue-cb--{method}--config-roberta-tiny--s0--{digest}" for method, digest in HASHES.items()
    }
