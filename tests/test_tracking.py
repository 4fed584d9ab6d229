"""`--track gradient_norm`: the norm is the full gradient's, and the training never notices that it is taken."""

import copy
import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import optimizers
import tasks
from membench.config.run import Training
from membench.training import tracking
from membench.training.loop import Diverged, Loop
from optimizers.contract import Subject, batch, build_model

CPU = torch.device("cpu")
EXAMPLES = 16  # in a batch of the contract
REPLACING = ("qlora", "welore")


class Task:
    """The contract's transformer and batches, as a task."""

    def build_model(self) -> nn.Module:
        return build_model().train()

    def batch(self, step: int) -> dict[str, torch.Tensor]:
        x, y = batch(step)
        return {"x": x, "labels": y, "attention_mask": torch.ones_like(x)}

    def loss(self, model: nn.Module, one: dict[str, torch.Tensor]) -> torch.Tensor:
        return F.cross_entropy(model(one["x"]), one["labels"])

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return {}


def trained(method: str, track: str | None, steps: int = 4) -> Loop:
    task = Task()
    model = task.build_model()
    kind = optimizers.get(method)
    training = Training(steps=steps, batch_size=EXAMPLES, sequence_length=6, track=track, schedule="constant")
    loop = Loop(model, Subject(kind, kind.example).build(model), task, training, seed=0, device=CPU)
    loop.run()
    return loop


def norm_by_hand(model: nn.Module, batches: int) -> float:
    """Of one backward pass over all examples at once, on a copy without hooks."""
    plain = copy.deepcopy(model).eval()
    for p in plain.parameters():
        p.requires_grad_(True)
    parts = [Task().batch(step) for step in range(batches)]
    joined = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    Task().loss(plain, joined).backward()
    return float(torch.cat([p.grad.flatten() for p in plain.parameters() if p.grad is not None]).norm())


@pytest.mark.parametrize("method", [name for name in optimizers.available() if name not in REPLACING])
def test_training_is_the_same_to_the_last_bit(method):
    plain, tracked = trained(method, None), trained(method, "gradient_norm")
    for (name, p), q in zip(plain.model.named_parameters(), tracked.model.parameters(), strict=True):
        assert torch.equal(p, q) and p.requires_grad == q.requires_grad, name
    norms = [entry["gradient_norm"] for entry in tracked.progress.history]
    assert len(norms) == 4 and min(norms) > 0
    assert not any("gradient_norm" in entry for entry in plain.progress.history)


@pytest.mark.parametrize("method", ["adamw", "badam", "lomo", "mezo"])
def test_the_norm_is_of_all_weights_and_of_all_examples(method):
    """Also where a method has frozen most weights, or keeps no gradient."""
    loop = trained(method, "gradient_norm", steps=3)
    expected = norm_by_hand(loop.optimizer.finish(), tracking.EXAMPLES // EXAMPLES)
    assert loop.progress.history[-1]["gradient_norm"] == pytest.approx(expected, rel=1e-5)


def test_adapters_are_left_out_and_counted_where_they_moved_the_weights():
    loop = trained("lora", "gradient_norm", steps=3)
    expected = norm_by_hand(loop.optimizer.finish(), tracking.EXAMPLES // EXAMPLES)
    assert loop.progress.history[-1]["gradient_norm"] == pytest.approx(expected, rel=1e-4)


def test_a_norm_that_is_not_finite_is_unknown_and_the_run_has_diverged():
    task, training = Task(), Training(steps=4, batch_size=EXAMPLES, sequence_length=6, track="gradient_norm")
    model = task.build_model()
    loop = Loop(model, optimizers.create("sgd", model, lr=1e30), task, training, seed=0, device=CPU)
    with pytest.raises(Diverged):
        loop.run()
    assert loop.progress.history[0]["loss"] > 0 and loop.progress.history[0]["gradient_norm"] is None


@pytest.mark.parametrize("method", REPLACING)
def test_a_method_that_replaced_weights_is_refused(method):
    with pytest.raises(ValueError, match="keeps something else in the place of weights.*leave out --track gradient"):
        trained(method, "gradient_norm")


def test_a_long_run_has_about_a_hundred_points():
    training = Training(steps=5_000, batch_size=4, sequence_length=6)
    assert tracking.interval(training) == 50
    assert len(tracking.first_batches(Task(), training, CPU)) == 32


class Stream(Task):
    """Batches that come once, in order."""

    place = 0

    def batch(self, step: int) -> dict[str, torch.Tensor]:
        self.place += 1
        return super().batch(self.place)

    def state_dict(self):
        return {"place": self.place}

    def load_state_dict(self, state):
        self.place = state["place"]


def test_a_stream_is_put_back():
    task = Stream()
    tracking.first_batches(task, Training(steps=9, batch_size=16, sequence_length=6), CPU)
    assert task.place == 0


def test_a_task_with_a_reference_is_tracked_once_it_has_seen_the_model(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    pairs = [{"prompt": f"Is {n} even?", "chosen": ("Yes", "No")[n % 2], "rejected": "It depends."} for n in range(90)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    given = {
        "model": "config:llama-tiny",
        "batch_size": 4,
        "sequence_length": 64,
        "data": str(tmp_path / "pairs.jsonl"),
    }
    task = tasks.create("dpo", **given)
    model = task.build_model()
    training = Training(steps=1, batch_size=4, sequence_length=64, track="gradient_norm")
    loop = Loop(model, optimizers.create("sgd", model, lr=0.0), task, training, seed=0, device=CPU)
    loop.run()
    assert loop.progress.history[0]["gradient_norm"] > 0
