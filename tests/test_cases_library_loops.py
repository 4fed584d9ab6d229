"""The library's cases of loops: what clips, scales, cycles, compiles or distributes, with methods that care."""

import copy
import math
import warnings

import pytest
import torch
import transformers
from library import (
    TOKENS,
    build,
    config,
    every_method,
    steps,
    subject,
    trained,
)
from torch import nn

import optimizers
from optimizers import AdamW, BAdam, BlockLLM
from optimizers.contract import build_model, changed, loss_of, train, weights_of

CLIP_BY_AN_EARLY_NAME = nn.utils.clip_grad_norm_  # as `from torch.nn.utils import clip_grad_norm_` binds it

# ---- loops that clip, accumulate and scale


@pytest.mark.parametrize("method", ["lomo", "adalomo", "adamw", "badam", "galore"])
def test_s9_a_loop_that_clips_what_is_gone_is_told(method):
    more = {} if method in ("lomo", "adalomo") else {"in_backward": True}
    model = build_model()
    optimizer = subject(method, **more).build(model)
    optimizer.backward(loss_of(model, 0))
    for clip in (nn.utils.clip_grad_norm_, nn.utils.clip_grad_value_, CLIP_BY_AN_EARLY_NAME):
        with pytest.raises(ValueError, match="leaves no gradients to clip: .*max_grad_norm=0"):
            clip(model.parameters(), 1.0)
    nn.utils.clip_grad_norm_(model.parameters(), math.inf)  # what a Trainer does for the norm alone
    other = build_model()
    loss_of(other, 0).backward()
    assert nn.utils.clip_grad_norm_(other.parameters(), 1e-3) > 0
    optimizer.step()
    optimizer.finish()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)


@pytest.mark.parametrize("method", ["badam", "hft", "blockllm"])
@pytest.mark.parametrize("whole", [True, False])
def test_all_that_is_trained_now_is_clipped_over_the_models_parameters_or_what_is_trainable(method, whole):
    model = build_model()
    optimizer = subject(method).build(model)
    chosen = set()
    for step in range(6):
        optimizer.backward(loss_of(model, step))
        nn.utils.clip_grad_norm_(model.parameters() if whole else optimizer.trainable, 1e-6)
        left = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
        assert 0 < left <= 1.001e-6
        chosen.add(frozenset(name for name, p in model.named_parameters() if p.grad is not None))
        optimizer.step()
        optimizer.zero_grad()
    assert len(chosen) > 1  # so a list that was made once would have been out of date


@pytest.mark.parametrize(
    ("method", "more"), [("lomo", {}), ("adamw", {"in_backward": True}), ("lomo", {"clip_norm": 1.0})]
)
def test_n14_loss_scaling_raises_before_anything_moves(method, more):
    model = build_model()
    before = weights_of(model)
    optimizer = subject(method, **more).build(model)
    scaler = torch.amp.GradScaler("cpu")
    for scaled in (lambda: scaler.scale(loss_of(model, 0)), lambda: scaler.scale([loss_of(model, 0)])):
        with pytest.raises(ValueError, match="its loss can't be scaled by a GradScaler: train in bfloat16"):
            scaled()
    assert not changed(before, model)
    other = build_model()
    scaler.scale(loss_of(other, 0)).backward()  # of another model: nothing is in the way
    assert torch.amp.GradScaler("cpu", enabled=False).scale(loss_of(model, 0)).requires_grad
    optimizer.backward(loss_of(model, 0))
    assert changed(before, model)


def test_n14_blockllms_rule_never_sees_a_scaled_loss():
    model = build_model()
    optimizer = BlockLLM(model)
    with pytest.raises(ValueError, match="BlockLLM must see the loss itself"):
        optimizer.backward(torch.amp.GradScaler("cpu").scale(loss_of(model, 0)))
    optimizer.backward(loss_of(model, 0))
    optimizer.zero_grad()  # a step that is left out, as of a batch that isn't finite
    optimizer.backward(loss_of(model, 1))
    optimizer.step()
    assert optimizer.rule.losses == [pytest.approx(loss_of(build_model(), 1).item())]


@pytest.mark.parametrize("method", ["adamw", "sgd", "galore", "lora"])
def test_n14_loss_scaling_of_other_methods_changes_nothing(method):
    model, other = build_model(), build_model()
    plain, scaled = subject(method).build(model), subject(method).build(other)
    train(model, plain, 3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(3):
        scaler.scale(loss_of(other, step)).backward()
        scaler.step(scaled)
        scaler.update()
        scaled.zero_grad()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


@every_method
def test_l_one_cycle_works_or_says_that_there_is_no_momentum_to_cycle(method):
    model = build_model()
    optimizer = subject(method).build(model)
    if {"momentum", "betas"} & optimizer.defaults.keys():
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=20)
    else:
        with pytest.raises(ValueError, match="cycle_momentum"):
            torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=20)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=20, cycle_momentum=False)
    for step in range(6):
        train(model, optimizer, 1, start=step)
        scheduler.step()
    again = build_model()
    resumed = subject(method).build(again)
    torch.optim.lr_scheduler.OneCycleLR(resumed, 1e-2, total_steps=20, cycle_momentum="betas" in optimizer.defaults)
    again.load_state_dict(model.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    assert train(again, resumed, 2, start=6) == train(model, optimizer, 2, start=6)


# ---- distributed checkpoints and tensors


@every_method
def test_l_a_distributed_checkpoint_resumes_to_the_last_bit(method, tmp_path):
    checkpoint = pytest.importorskip("torch.distributed.checkpoint")
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    model, optimizer = trained(method)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is but one process
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        checkpoint.save(state, checkpoint_id=tmp_path / "all")
    dcp_to_torch_save(tmp_path / "all", tmp_path / "all.pt")
    saved = torch.load(tmp_path / "all.pt", weights_only=True)
    if not saved["optimizer"].get("state"):
        with pytest.raises(ValueError, match=r"torch\.distributed\.checkpoint drops it if it is empty: put {} there"):
            subject(method).build(build_model()).load_state_dict(saved["optimizer"])
        saved["optimizer"]["state"] = {}
    again = build_model()
    resumed = subject(method).build(again)
    again.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    assert train(again, resumed, 3, start=4) == train(model, optimizer, 3, start=4)


@every_method
def test_l_state_by_names_loads_and_a_rehearsed_step_is_refused_where_it_would_count(method):
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model, optimizer = trained(method)
    fresh = build_model()
    untrained = subject(method).build(fresh)
    for of, its in ((fresh, untrained), (model, optimizer)):
        if its.chooses and not its.state:  # torch makes a step where there is no state
            with pytest.raises(RuntimeError, match=r"zero gradients .* would count as a step of .*dcp_to_torch_save"):
                get_optimizer_state_dict(of, its)
        else:
            by_name = get_optimizer_state_dict(of, its)
    if optimizer.state or not optimizer.chooses:
        again = build_model()
        resumed = subject(method).build(again)
        again.load_state_dict(model.state_dict())
        resumed.load_state_dict(by_name)
        assert train(again, resumed, 3, start=4) == train(model, optimizer, 3, start=4)


def test_l_a_state_of_which_tensors_are_missing_is_refused():
    _, optimizer = trained("adamw")
    state = copy.deepcopy(optimizer.state_dict())
    del state["state"][3]
    with pytest.raises(
        ValueError, match=r"holds \d+ of the \d+ tensors that were saved: with torch\.distributed\.checkpoint"
    ):
        subject("adamw").build(build_model()).load_state_dict(state)


def test_l_state_bytes_are_those_of_this_process_alone(tmp_path):
    from torch.distributed.tensor import Shard, distribute_tensor
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=1, world_size=4, store=FakeStore())
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (4,))
        model = nn.Linear(8, 16, bias=False)
        whole = AdamW(nn.Linear(8, 16, bias=False))
        model.weight = nn.Parameter(distribute_tensor(model.weight.detach(), mesh, [Shard(0)]))
        sharded = AdamW(model)
        for optimizer in (whole, sharded):
            p = optimizer.param_groups[0]["params"][0]
            p.grad = torch.ones_like(p)
            optimizer.step()
        assert whole.state_bytes() == 2 * 16 * 8 * 4 + 4
        assert sharded.state_bytes() == 2 * 4 * 8 * 4 + 4
    finally:
        torch.distributed.destroy_process_group()


# ---- torch.compile


def test_l_a_compiled_model_is_met_in_its_plain_parts_and_a_choice_of_blocks_warned_of():
    compiled = torch.compile(build_model())
    with pytest.warns(UserWarning, match="gives up after 8: if it trains whole layers, compile each layer"):
        optimizer = BAdam(compiled, always_train=("classifier",))
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    assert names[0] == "layers.0.self_attn.q_proj.weight"
    optimizer.finish()
    AdamW(compiled).finish()


@pytest.mark.slow
@pytest.mark.parametrize(("method", "graphs"), [("badam", 3), ("lisa", 3)])
def test_l_compiled_layer_by_layer_a_method_of_blocks_needs_no_more_graphs_than_kinds_of_layers(method, graphs):
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    model = build(config(transformers.LlamaConfig, num_hidden_layers=12))
    for layer in model.model.layers:
        layer.compile(backend="eager")
    steps(model, optimizers.create(method, model, **optimizers.get(method).example), TOKENS, 40)
    assert counters["stats"]["unique_graphs"] <= graphs


# ---- how tensors lie in memory


def other_layout(t: torch.Tensor) -> torch.Tensor:
    """The same values; a matrix column by column, as a weight is that was transposed."""
    return t.detach().clone().t().contiguous().t() if t.dim() == 2 else t.detach().clone()


def lay_out_anew(model: nn.Module) -> None:
    for p in model.parameters():
        p.data = other_layout(p)


def steps_with_gradients(model, optimizer, count, start=0, layout=lambda t: t):
    """Each step's gradients by `autograd.grad`, laid out as told; BlockLLM also sees a loss."""
    for step in range(start, start + count):
        params = [p for p in model.parameters() if p.requires_grad]
        loss = loss_of(model, step)
        for p, g in zip(params, torch.autograd.grad(loss, params, allow_unused=True), strict=True):
            p.grad = None if g is None else layout(g)
        optimizer.note_loss(loss)
        optimizer.step()
        optimizer.zero_grad()


def furthest(one: nn.Module, other: nn.Module) -> float:
    return max((p - q).abs().max().item() for p, q in zip(one.parameters(), other.parameters(), strict=True))


UPDATES_IN_STEP = [m for m in optimizers.available() if m not in ("lomo", "adalomo", "mezo")]


VARIANTS = [{}, {"rows": 2}, {"in_backward": True}]


@pytest.mark.parametrize(
    ("method", "variant"),
    [(m, v) for m in UPDATES_IN_STEP for v in VARIANTS if v.keys() <= subject(m).keywords.keys()],
)
def test_each_weight_gets_its_own_gradient_and_moments_however_they_lie_in_memory(method, variant):
    def twin():
        model = build_model(torch.float64)
        optimizer = subject(method, **variant).build(model)
        train(model, optimizer, 4)
        return model, optimizer

    by_hand = not variant.get("in_backward")
    (model, optimizer), (moved, other), (given, one) = twin(), twin(), twin()
    lay_out_anew(moved)  # as `to(memory_format=...)` does in mid-run
    loaded = build_model(torch.float64)
    lay_out_anew(loaded)
    resumed = subject(method, **variant).build(loaded)
    state = copy.deepcopy(optimizer.state_dict())
    loaded.load_state_dict(model.state_dict())
    resumed.load_state_dict(state)
    for its, own in ((model, optimizer), (moved, other), (loaded, resumed)):
        train(its, own, 3, start=4)
    if by_hand:
        steps_with_gradients(given, one, 3, start=4, layout=other_layout)
    for twins in (moved, loaded, given)[: 3 if by_hand else 2]:
        assert furthest(model, twins) < 1e-4  # Adafactor's steps are as large where a gradient is but rounding


def test_a_weight_that_is_a_part_of_a_larger_tensor_is_updated_alone():
    whole = torch.ones(4, 16)
    model = nn.Linear(8, 4, bias=False)
    model.weight = nn.Parameter(whole[:, :8])
    reference = nn.Parameter(torch.ones(4, 8))
    optimizer, plain = AdamW(model, lr=0.1), torch.optim.AdamW([reference], lr=0.1, foreach=False)
    for value in (1.0, -3.0):
        model.weight.grad, reference.grad = torch.full((4, 8), value), torch.full((4, 8), value)
        optimizer.step()
        plain.step()
    torch.testing.assert_close(model.weight, reference)
    assert (whole[:, 8:] == 1).all()


# ---- what a loop does between backward pass and step


@pytest.mark.parametrize(
    "method", [m for m in optimizers.available() if m in ("lomo", "adalomo") or "in_backward" in subject(m).keywords]
)
def test_gradients_that_an_update_in_the_backward_pass_never_sees_are_refused(method):
    model = build_model()
    before = weights_of(model)
    optimizer = subject(method, **({} if method in ("lomo", "adalomo") else {"in_backward": True})).build(model)
    with pytest.raises(RuntimeError, match="a p.grad that was set by hand is never used: call optimizer.backward"):
        steps_with_gradients(model, optimizer, 1)
    assert not changed(before, model)
    optimizer.zero_grad()
    train(model, optimizer, 1)
    assert changed(before, model)


@pytest.mark.parametrize("kind", [float, torch.tensor])
@pytest.mark.parametrize(
    ("method", "given"), [("lomo", {}), ("lomo", {"clip_norm": 1.0}), ("adalomo", {}), ("badam", {"in_backward": True})]
)
def test_a_rate_that_is_set_when_the_backward_pass_has_used_another_is_refused(method, given, kind):
    model = build_model()
    optimizer = subject(method, **given, lr=kind(0.125)).build(model)
    optimizer.backward(loss_of(model, 0))
    for group in optimizer.param_groups:
        group["lr"] *= 0.5
    with pytest.raises(
        RuntimeError, match=r"has done so with lr=0\.125, so 0\.0625 comes too late for this step: set it before"
    ):
        optimizer.step()
    for group in optimizer.param_groups:
        group["lr"] *= 2
    optimizer.step()
    for group in optimizer.param_groups:
        group["lr"] *= 0.5
    train(model, optimizer, 1)


# ---- weights that a loop changes between steps


WITH_MASTERS = {m: {} for m in optimizers.available() if "master_weights" in subject(m).keywords} | {
    name: {"master_weights": True} for name in ("sgd", "adamw8bit")
}
PARTS = [("blockllm", {"rows": 2}), ("blockllm", {"sparsity": 0.3}), ("badam", {"in_backward": True})]


@pytest.mark.parametrize("change", ["load_state_dict", "in place", "vector_to_parameters"])
@pytest.mark.parametrize(("method", "variant"), [*WITH_MASTERS.items(), *PARTS])
def test_masters_follow_weights_that_a_loop_changes(method, variant, change):
    model = build_model(torch.bfloat16)
    optimizer = subject(method, **variant).build(model)
    train(model, optimizer, 4)
    assert any("master" in state for state in optimizer.state.values())
    new = {n: p.detach().clone() for n, p in model.named_parameters()}
    for value in new.values():
        value.view(-1)[0] = 0.75  # one weight of each
    masters = {p: state["master"].clone() for p, state in optimizer.state.items() if "master" in state}
    if change == "load_state_dict":
        model.load_state_dict({**model.state_dict(), **new})
    elif change == "vector_to_parameters":
        torch.nn.utils.vector_to_parameters(torch.cat([value.flatten() for value in new.values()]), model.parameters())
    else:
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(new[name])
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    train(model, optimizer, 1, start=4)
    assert not changed(new, model)
    for p, master in masters.items():
        kept = optimizer.state.get(p, {}).get("master")  # None: it was another block's turn
        assert kept is None or (kept != master).sum() <= 1  # the last bits of the others stay
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    train(model, optimizer, 1, start=5)
    assert changed(new, model)


@pytest.mark.parametrize(("method", "variant"), [*WITH_MASTERS.items(), *PARTS])
def test_a_state_may_be_loaded_before_the_weights(method, variant):
    model = build_model(torch.bfloat16)
    optimizer = subject(method, **variant).build(model)
    train(model, optimizer, 4)
    again = build_model(torch.bfloat16)
    resumed = subject(method, **variant).build(again)
    resumed.load_state_dict(optimizer.state_dict())
    again.load_state_dict(model.state_dict())
    assert train(again, resumed, 3, start=4) == train(model, optimizer, 3, start=4)
    assert not changed(weights_of(model), again)


# ---- steps that are skipped or taken back


@every_method
def test_nothing_is_left_of_a_step_that_was_skipped_or_taken_back(method):
    model, optimizer = trained(method)
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    expected = train(model, optimizer, 3, start=4)

    def go_back():
        model.load_state_dict(weights)
        optimizer.load_state_dict(state)

    go_back()
    optimizer.ask(lambda: loss_of(model, 99))  # a spike: back to what was saved
    model.zero_grad()
    go_back()
    assert train(model, optimizer, 3, start=4) == expected
    if not optimizer.in_backward:
        go_back()
        optimizer.ask(lambda: loss_of(model, 99) * math.nan)
        optimizer.zero_grad()
        assert train(model, optimizer, 3, start=4) == expected


# ---- a loop within autocast, and rates that are tensors


@pytest.mark.parametrize(
    ("method", "variant"),
    [
        (m, v)
        for m in optimizers.available()
        for v in ({}, {"in_backward": True})
        if v.keys() <= subject(m).keywords.keys()
    ],
)
def test_a_loop_within_autocast_updates_as_one_whose_steps_are_outside(method, variant):
    def run(around, each):
        model = build_model()
        optimizer = subject(method, **variant).build(model)
        losses = []
        with torch.autocast("cpu", torch.bfloat16, enabled=around):
            for step in range(5):
                with torch.autocast("cpu", torch.bfloat16, enabled=around or each):
                    losses.append(optimizer.ask(lambda step=step: loss_of(model, step)).item())
                optimizer.step()
                optimizer.zero_grad()
        return losses, model

    (expected, inside), (found, outside) = run(False, True), run(True, False)
    assert found == expected
    assert not changed(weights_of(inside), outside)


@every_method
def test_a_rate_that_is_a_tensor_is_each_groups_own(method):
    rate = optimizers.get(method).example["lr"]
    models = build_model(), build_model()
    plain = subject(method).build(models[0])
    optimizer = subject(method, lr=torch.tensor(rate, dtype=torch.float64)).build(models[1])
    for its in (plain, optimizer):
        for group in its.param_groups:
            group["lr"] *= 0.5  # in place, if it is a tensor
    state = optimizer.state_dict()
    optimizer.load_state_dict(state)
    for its in (plain, optimizer):
        for group in its.param_groups:
            group["lr"] *= 0.5
    assert [float(g["lr"]) for g in optimizer.param_groups] == pytest.approx([g["lr"] for g in plain.param_groups])
    assert train(models[1], optimizer, 3) == pytest.approx(train(models[0], plain, 3), abs=1e-3)


@every_method
def test_neither_the_default_dtype_nor_a_compiled_step_changes_an_update(method):
    torch._dynamo.reset()
    plain, other = build_model(), build_model()
    expected = train(plain, subject(method).build(plain), 4)
    optimizer = subject(method).build(other)
    optimizer.step = torch.compile(optimizer.step, backend="eager")
    torch.set_default_dtype(torch.float64)
    try:
        assert train(other, optimizer, 4) == expected
    finally:
        torch.set_default_dtype(torch.float32)
    assert not changed(weights_of(plain), other)


# ---- groups that a loop divides up


def divided(method, **more):
    """A method on a model whose classifier has a group of its own, at a rate of 0, before the others."""
    model = build_model()
    optimizer = subject(method, **more).build(model)
    head = model.classifier.weight
    (group,) = (group for group in optimizer.param_groups if any(p is head for p in group["params"]))
    group["params"] = [p for p in group["params"] if p is not head]
    optimizer.param_groups.insert(0, {**group, "params": [head], "lr": 0.0})
    return model, optimizer


@pytest.mark.parametrize(
    ("method", "variant"),
    [(m, {}) for m in optimizers.available() if not optimizers.get(m).adds_parameters]
    + [(m, {"in_backward": True}) for m in optimizers.available() if "in_backward" in subject(m).keywords],
)
def test_each_weight_has_the_rate_of_the_group_that_a_loop_put_it_into_and_resumes_with_its_own_state(method, variant):
    model, optimizer = divided(method, **variant)
    before = weights_of(model)
    train(model, optimizer, 5)
    moved = changed(before, model)
    assert "classifier.weight" not in moved and len(moved) > 1
    again, resumed = divided(method, **variant)
    again.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert train(again, resumed, 4, start=5) == train(model, optimizer, 4, start=5)
    assert not changed(weights_of(model), again)
