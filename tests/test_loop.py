import copy
import math
import os
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES
from torch import nn
from toy import Net, ToyTask

import optimizers
from membench.config.run import Training
from membench.training import clock as training_clock
from membench.training import loop as training_loop
from membench.training.clock import Clock
from membench.training.loop import Diverged, Loop, micro_batches, shares, training_step
from membench.training.schedule import learning_rate_factor

CPU = torch.device("cpu")


def phase(name):
    return nullcontext()


def training(**values) -> Training:
    return Training(**{"steps": 6, "batch_size": 4, "sequence_length": 3, **values})


def loop(method="adamw", seed=0, given=None, task=None, **values) -> Loop:
    task = task or ToyTask()
    model = task.build_model()
    optimizer = optimizers.create(method, model, **(given or {"lr": 1e-2}))
    return Loop(model, optimizer, task, training(**values), seed=seed, device=CPU)


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def equal(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_step_is_what_torch_does_by_hand():
    task = ToyTask()
    model, by_hand = task.build_model().eval(), task.build_model().eval()
    optimizer = optimizers.create("sgd", model, lr=0.1)
    loss = training_step(model, optimizer, task.loss, [task.batch(0)], phase=phase)
    expected = task.loss(by_hand, task.batch(0))
    expected.backward()
    assert loss.item() == expected.item() and not loss.requires_grad
    for p, q in zip(model.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(p, q - 0.1 * q.grad, rtol=0, atol=1e-7)
        assert p.grad is None


def test_accumulation_over_micro_batches_equals_the_whole_batch():
    whole, parts = ToyTask(batch_size=8), ToyTask(batch_size=2)
    models = [whole.build_model().eval().double(), parts.build_model().eval().double()]
    losses = []
    for model, task, number in zip(models, (whole, parts), (1, 4), strict=True):
        optimizer = optimizers.create("sgd", model, lr=0.1)
        for step in range(2):
            batches = micro_batches(task, step, training(batch_size=8, gradient_accumulation_steps=number), CPU)
            batches = [{key: value.double() for key, value in batch.items()} for batch in batches]
            losses.append(training_step(model, optimizer, task.loss, batches, phase=phase).item())
    assert losses[:2] == pytest.approx(losses[2:], rel=1e-12)
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


class TextTask(ToyTask):
    """Examples that have several labels each, or none (-100), and a loss that is the mean over labels."""

    def build_model(self):
        torch.manual_seed(0)
        return nn.Linear(8, 1)  # without dropout, which is drawn by micro-batch

    def batch(self, step):
        batch = super().batch(step)
        numbers = torch.arange(step * self.batch_size, (step + 1) * self.batch_size)
        return batch | {"labels": torch.where(torch.arange(3) < numbers[:, None] % 4, 1, -100)}

    def loss(self, model, batch):
        errors = (model(batch["x"]) - batch["y"]).pow(2).expand(-1, 3)
        return errors[batch["labels"] != -100].mean()


def test_micro_batches_count_by_their_labels_so_that_it_does_not_matter_where_a_batch_is_split():
    values = {"batch_size": 8, "schedule": "constant"}
    whole = loop("sgd", task=TextTask(batch_size=8), **values)
    parts = loop("sgd", task=TextTask(batch_size=2), gradient_accumulation_steps=4, **values)
    whole.run(), parts.run()
    losses = [[entry["loss"] for entry in one.progress.history] for one in (whole, parts)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    for p, q in zip(weights(whole.model), weights(parts.model), strict=True):
        torch.testing.assert_close(p, q)
    assert shares([TextTask(batch_size=2).batch(step) for step in range(4)]) == [1 / 12, 5 / 12, 1 / 12, 5 / 12]


class Texts(ToyTask):
    """Texts of two to five tokens, whose labels are their ids, as transformers' own collators make them."""

    def build_model(self):
        return ARCHITECTURES["llama"].build()

    def batch(self, step):
        numbers = range(step * self.batch_size, (step + 1) * self.batch_size)
        ids = torch.stack([torch.randint(3, 40, (5,), generator=torch.Generator().manual_seed(n)) for n in numbers])
        mask = (torch.arange(5) < torch.tensor(numbers)[:, None] % 4 + 2).long()
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.where(mask == 1, -100)}

    def loss(self, model, batch):
        return model(**batch, use_cache=False).loss


def test_of_a_text_the_first_token_which_nothing_predicts_does_not_count():
    values = {"batch_size": 8, "schedule": "constant"}
    whole = loop("sgd", task=Texts(batch_size=8), **values)
    parts = loop("sgd", task=Texts(batch_size=2), gradient_accumulation_steps=4, **values)
    whole.run(), parts.run()
    losses = [[entry["loss"] for entry in one.progress.history] for one in (whole, parts)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_nor_does_it_in_a_model_whose_class_is_derived_from_that_of_a_language_model():
    model, batches = ARCHITECTURES["llama"].build(), [Texts(batch_size=1).batch(step) for step in range(4)]
    expected = shares(batches, model=model)
    derived = type(f"FSDP{type(model).__name__}", (type(model),), {})  # what FSDP2 does to the class of any model
    model.__class__ = derived
    assert shares(batches, model=model) == expected != shares(batches)


def test_clipping_limits_the_norm_of_all_gradients_together():
    task = ToyTask()
    model = task.build_model().eval()
    before = weights(model)
    training_step(
        model, optimizers.create("sgd", model, lr=1.0), task.loss, [task.batch(0)], max_grad_norm=0.01, phase=phase
    )
    moved = math.sqrt(sum(float((p - q).pow(2).sum()) for p, q in zip(before, weights(model), strict=True)))
    assert moved == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize(("method", "can_do_otherwise"), [("sgd", True), ("lomo", False)])
def test_a_refusal_advises_another_form_only_to_a_method_that_has_it(method, can_do_otherwise):
    inside = {"in_backward": True} if can_do_otherwise else {}
    optimizer = optimizers.create(method, ToyTask().build_model(), lr=0.1, **inside)
    for parts, norm in ((2, None), (1, 1.0)):
        with pytest.raises(ValueError, match="updates inside the backward pass") as refused:
            training_loop.check_combination(optimizer, parts, norm)
        assert ("or in_backward=False" in str(refused.value)) == can_do_otherwise


@pytest.mark.parametrize("values", [{"gradient_accumulation_steps": 2}, {"max_grad_norm": 1.0}])
def test_what_needs_all_gradients_is_refused_for_updates_inside_the_backward_pass(values):
    with pytest.raises(ValueError, match="inside the backward pass"):
        loop(given={"lr": 0.1, "in_backward": True}, **values)
    task = ToyTask()
    model = task.build_model()
    optimizer = optimizers.create("sgd", model, lr=0.1, in_backward=True)
    batches = [task.batch(0)] * values.get("gradient_accumulation_steps", 1)
    with pytest.raises(ValueError, match="inside the backward pass"):
        training_step(model, optimizer, task.loss, batches, max_grad_norm=values.get("max_grad_norm"), phase=phase)


def test_phases_are_forward_and_backward_of_each_micro_batch_then_one_update():
    task, seen = ToyTask(), []
    model = task.build_model()
    optimizer = optimizers.create("sgd", model, lr=0.1)

    def note(name):
        seen.append(name)
        return nullcontext()

    loss = training_step(model, optimizer, task.loss, [task.batch(0), task.batch(1)], phase=note)
    assert seen == ["forward", "backward", "forward", "backward", "update"]
    assert not loss.requires_grad


def test_the_schedule_warms_up_linearly_and_falls_to_zero_after_the_last_step():
    factor = learning_rate_factor(training(steps=20, warmup_fraction=0.25))
    assert [factor(step) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert [factor(step) for step in range(5, 20)] == pytest.approx([1 - k / 15 for k in range(15)])
    assert factor(20) == 0.0


def test_a_schedule_can_end_above_zero_as_a_cosine_to_a_tenth_does():
    factor = learning_rate_factor(training(steps=100, warmup_fraction=0.1, schedule="cosine", final_fraction=0.1))
    assert factor(9) == factor(10) == 1.0
    assert factor(55) == pytest.approx(0.1 + 0.9 * 0.5)
    assert factor(100) == pytest.approx(0.1)


def test_a_score_before_the_first_step_is_that_of_the_untrained_model_and_changes_nothing(tmp_path):
    plain, scored = loop("badam"), loop("badam", evaluate_before=True)
    plain.run(), scored.run()
    assert scored.progress.initial_metrics == ToyTask().evaluate(ToyTask().build_model())
    assert plain.progress.initial_metrics is None and equal(weights(plain.model), weights(scored.model))


def test_what_was_reserved_on_a_card_for_a_score_before_the_first_step_is_not_the_trainings(monkeypatch):
    reserved, run = [7], loop(evaluate_before=True)  # at most: to build the model
    monkeypatch.setattr(run.task, "evaluate", lambda model: reserved.append(100) or {"error": 1.0})
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: max(reserved))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: reserved.append(5))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: reserved.__setitem__(slice(-1), []))
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: None)
    run.device = torch.device("cuda:1")
    run._look_before()
    assert run.peaks()["peak_reserved_bytes"] == 7
    reserved.append(9)  # by the training
    assert run.peaks()["peak_reserved_bytes"] == 9


class StreamedTask(ToyTask):
    """Reads forwards only, unless it is told where to go on."""

    position = 0

    def batch(self, step):
        assert step == self.position, "not where the reader stands"
        self.position += 1
        return super().batch(step)

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


def test_a_readers_state_is_part_of_the_checkpoint(tmp_path):
    path = tmp_path / "run.pt"
    whole = loop(task=StreamedTask())
    whole.run(checkpoint_path=path, checkpoint_every=4)
    continued = loop(task=StreamedTask())
    continued.run(checkpoint_path=path)  # from step 4
    assert continued.task.position == 6 and equal(weights(whole.model), weights(continued.model))
    assert len(continued.progress.history) == 6


@pytest.mark.parametrize("name", ["linear", "cosine", "constant"])
@pytest.mark.parametrize(("steps", "warmup"), [(1, 0.1), (1, 0.0), (4, 0.1), (7, 0.9)])
def test_no_schedule_wastes_a_step_or_exceeds_the_learning_rate(name, steps, warmup):
    factor = learning_rate_factor(training(steps=steps, warmup_fraction=warmup, schedule=name))
    assert all(0.0 < factor(step) <= 1.0 for step in range(steps))


def test_the_learning_rate_of_the_record_is_the_one_that_the_step_used():
    run = loop("sgd", given={"lr": 0.1}, steps=10, warmup_fraction=0.2)
    run.run()
    rates = [entry["learning_rate"] for entry in run.progress.history]
    assert rates == pytest.approx([0.05, 0.1] + [0.1 * (1 - k / 8) for k in range(8)])


def test_evaluating_on_the_way_changes_nothing_and_is_timed_apart():
    plain, evaluated = loop(), loop(evaluate_every=2)
    plain.run()
    evaluated.run()
    assert equal(plain.model.parameters(), evaluated.model.parameters())
    assert [entry["step"] for entry in evaluated.progress.history if entry["metrics"]] == [2, 4]
    assert evaluated.task.evaluations == 2
    assert evaluated.progress.evaluation_seconds > 0 == plain.progress.evaluation_seconds


def test_a_run_depends_on_its_seed_and_not_on_the_global_generator():
    one, same, other = loop(), loop(), loop(seed=1)
    one.run()
    torch.manual_seed(12345)
    same.run()
    other.run()
    assert equal(one.model.parameters(), same.model.parameters())
    assert not equal(one.model.parameters(), other.model.parameters())


class NotedMasks(ToyTask):
    """Keeps a dropout mask of each forward pass."""

    def __init__(self):
        super().__init__()
        self.masks = []

    def loss(self, model, batch):
        self.masks.append(tuple(torch.dropout(torch.ones(64), 0.5, model.training).tolist()))
        return super().loss(model, batch)


def masks(seed=0, path=None, every=0, **values):
    run = loop(seed=seed, task=NotedMasks(), **{"steps": 12, "gradient_accumulation_steps": 2, **values})
    run.run(checkpoint_path=path, checkpoint_every=every)
    return run.task.masks


def test_no_two_forward_passes_of_any_step_micro_batch_or_seed_share_a_dropout_mask():
    seen = [mask for seed in (0, 1, 2, 11) for mask in masks(seed)]
    assert len(set(seen)) == len(seen) == 4 * 12 * 2


def test_a_resumed_run_draws_the_masks_that_it_would_have_drawn(tmp_path):
    whole = masks(path=tmp_path / "run.pt", every=7)
    torch.manual_seed(99)
    assert masks(path=tmp_path / "run.pt") == whole[7 * 2 :]
    assert masks(seed=1) == masks(seed=1) != whole


def test_what_was_saved_of_a_run_does_not_change_while_it_goes_on(tmp_path):
    path, run, kept = tmp_path / "run.pt", loop("adamw", steps=6), []
    run.run(
        report=lambda step, loss: (
            kept.append(copy.deepcopy(state := run.state_dict()["progress"])) or kept.append(state)
            if step == 3
            else None
        ),
        checkpoint_path=path,
        checkpoint_every=4,
    )
    then, now = kept
    assert then == now and now["step"] == 3 and len(now["history"]) == 3
    written = path.read_bytes()
    loop("adamw", steps=6).run(checkpoint_path=path)  # goes on from step 4
    assert path.read_bytes() == written


def test_history_counts_steps_tokens_and_seconds():
    run = loop(steps=5)
    run.run()
    history = run.progress.history
    assert [entry["step"] for entry in history] == [1, 2, 3, 4, 5]
    assert [entry["tokens"] for entry in history] == [12, 24, 36, 48, 60]
    assert all(a["seconds"] < b["seconds"] for a, b in zip(history, history[1:], strict=False))
    assert history[-1]["seconds"] == run.progress.train_seconds


class PaddedTask(ToyTask):
    """Sequences of three tokens, of which the first example has one and the others all."""

    def batch(self, step):
        batch = super().batch(step)
        batch["attention_mask"][0, 1:] = 0
        return batch


def test_padding_is_no_token_and_every_micro_batch_counts():
    run = loop(task=PaddedTask(), steps=2, gradient_accumulation_steps=2)
    run.run()
    assert [entry["tokens"] for entry in run.progress.history] == [2 * (4 * 3 - 2), 4 * (4 * 3 - 2)]


def test_a_long_history_is_thinned_and_its_losses_are_means():
    run = loop("sgd", given={"lr": 1e-3}, steps=1200)
    losses = []
    run.run(report=lambda step, loss: losses.append(loss))
    history = run.progress.history
    assert len(history) == 600
    assert history[3]["loss"] == pytest.approx((losses[6] + losses[7]) / 2)


def test_a_loss_that_is_not_finite_ends_the_run_and_is_remembered():
    run = loop("sgd", given={"lr": 1e30}, steps=6)
    with pytest.raises(Diverged, match="the loss is (inf|nan) at step"):
        run.run()
    assert run.progress.step < 6
    assert run.progress.history[-1]["loss"] is None


def test_weights_that_are_not_finite_after_the_last_step_are_a_divergence():
    run = loop("sgd", given={"lr": float(torch.finfo(torch.float32).max)}, steps=1)
    with pytest.raises(Diverged, match="a weight is not finite"):
        run.run()


@pytest.mark.parametrize(("score", "shown"), [(float("nan"), "nan"), (float("-inf"), "-inf"), (1e200, r"1e\+200")])
def test_a_score_that_no_record_can_hold_is_a_divergence(score, shown):
    run = loop(steps=1)
    run.task.evaluate = lambda model: {"error": score}
    with pytest.raises(Diverged, match=f"error is {shown} after step 0"):
        run.evaluate(run.model)


def test_autocast_computes_in_bfloat16_and_keeps_the_weights():
    task, seen = ToyTask(), []
    task.loss = lambda model, batch: seen.append(model(batch["x"]).dtype) or ToyTask.loss(task, model, batch)
    run = loop(task=task, autocast="bfloat16", steps=1)
    run.run()
    assert seen == [torch.bfloat16]
    assert {p.dtype for p in run.model.parameters()} == {torch.float32}


def test_the_clock_adds_up_what_a_step_spends_in_a_phase():
    clock = Clock(CPU)
    for pause in (0.05, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0):  # the warm-up isn't in the medians
        for _ in range(2):
            with clock.phase("forward"):
                time.sleep(0.005 + pause)
        with clock.phase("update"):
            pass
        seconds = clock.end_step()
        assert seconds == pytest.approx(clock.steps["forward"][-1] + clock.steps["update"][-1])
    assert clock.steps["forward"][0] >= 0.11
    assert 0.01 <= clock.medians()["forward_seconds"] < 0.1
    assert clock.medians()["backward_seconds"] == 0.0


def test_the_time_of_a_phase_is_the_median_of_the_steps_after_the_warm_up(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def medians(*steps):
        clock = Clock(CPU)
        for seconds in steps:
            with clock.phase("backward"):
                now[0] += seconds
            clock.end_step()
        return clock.medians()["backward_seconds"]

    assert medians(90, 80, 70, 1, 2, 30) == 2  # of the last three; their mean is 11
    assert medians(90, 80, 70, 1, 2, 3, 30) == 2.5
    assert medians(9, 1) == 1 and medians(9) == 9  # of few steps, the later half
    assert medians() is None


def test_the_clock_waits_for_the_device_of_the_run_not_for_the_current_one(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device=None: waited.append(device))
    with Clock(torch.device("cuda:1")).phase("forward"):
        pass
    assert waited == [torch.device("cuda:1")] * 2


BESIDE = """
import os, subprocess, sys, time
from membench.training.clock import waited_seconds
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
time.sleep(1.0)  # they are at work
start, waited = time.perf_counter(), waited_seconds()
ran = time.process_time()
while time.process_time() - ran < 0.5:
    pass
print(time.perf_counter() - start, waited_seconds() - waited)
for other in others:
    other.kill()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_process_that_never_sleeps_has_waited_whenever_it_did_not_run():
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    done = subprocess.run([sys.executable, "-c", BESIDE], env=environment, capture_output=True, text=True, check=True)
    passed, waited = map(float, done.stdout.split())
    assert waited > 0.6  # the others had the processor for about two thirds of the time
    assert waited == pytest.approx(passed - 0.5, rel=0.1, abs=0.1)


def test_what_the_system_does_not_say_is_unknown(monkeypatch, tmp_path):
    monkeypatch.setattr(training_clock, "_TASKS", tmp_path)
    assert training_clock.waited_seconds() is None
    run = loop(steps=2)
    run.run()
    assert run.progress.waited_seconds is None


def test_seconds_that_steps_waited_add_up(monkeypatch):
    # what passes in the evaluation between the two steps isn't the training's
    said = iter([1.0, 1.5, 10.0, 10.25, 99.0])
    monkeypatch.setattr(training_loop, "waited_seconds", lambda: next(said))
    run = loop(steps=2, evaluate_every=1)
    run.run()
    assert run.progress.waited_seconds == 0.75


def test_a_net_of_the_tests_has_blocks():
    assert optimizers.create("badam", Net(), lr=0.1).cycle_length == 3


class Scored(ToyTask):
    def __init__(self, score):
        super().__init__()
        self.score = score

    def evaluate(self, model):
        return self.score


@pytest.mark.parametrize("half", [np.float64(0.5), np.float32(0.5), torch.tensor(0.5), torch.tensor([0.5]), 0.5])
def test_metrics_of_numpy_and_torch_are_kept_as_plain_numbers(half):
    made = loop(task=Scored({"accuracy": half}))
    assert [type(value) for value in made.evaluate(made.model).values()] == [float]
    assert made.evaluate(made.model) == {"accuracy": 0.5}


@pytest.mark.parametrize(
    ("score", "said"),
    [
        (None, "a dict, not NoneType"),
        ({"f1": None}, "f1=None, which is no number"),
        ({"f1": "0.5"}, "f1='0.5', which is no number"),
        ({"f1": {"a": 1.0}}, "which is no number"),
        ({"f1": torch.ones(2)}, "which is no number"),
    ],
)
def test_a_metric_that_is_no_number_is_named(score, said):
    made = loop(task=Scored(score))
    with pytest.raises(ValueError, match=said):
        made.evaluate(made.model)


@pytest.mark.parametrize(
    ("change", "said"),
    [({"n": 5}, "has a n that is no tensor"), ({"attention_mask": None}, "attention_mask that is no")],
)
def test_a_batch_that_is_not_of_tensors_is_told(change, said, monkeypatch):
    task = ToyTask()
    batch = task.batch
    monkeypatch.setattr(task, "batch", lambda step: batch(step) | change)
    with pytest.raises(ValueError, match=said):
        loop(task=task).run()
