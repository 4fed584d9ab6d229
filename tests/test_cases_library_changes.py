"""What a user does to a model or a saved state once a method is built: nothing is left untrained in silence."""

import copy
import functools
from typing import Any

import pytest
import torch
from library import every_method, same, subject, trained
from torch import nn

import optimizers
from optimizers.contract import Layer, TinyTransformer, build_model, changed, loss_of, train, weights_of


def unfreeze(model: TinyTransformer) -> None:
    model.embed_tokens.requires_grad_(True)


def unfreeze_all(model: TinyTransformer) -> None:
    model.requires_grad_(True)


def put_another_head(model: TinyTransformer) -> None:
    model.classifier = nn.Linear(*reversed(model.classifier.weight.shape))


def add_a_layer(model: TinyTransformer) -> None:
    model.layers.append(Layer())


def assign_weights(model: TinyTransformer) -> None:
    model.load_state_dict({name: t.clone() for name, t in model.state_dict().items()}, assign=True)


CHANGES = {
    unfreeze: "embed_tokens.weight requires gradients",
    unfreeze_all: "requires gradients",
    put_another_head: "classifier.weight came into the model",
    add_a_layer: "layers.3.* came into the model",
    assign_weights: "came into the model",
}


@every_method
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_parameter_that_would_never_be_trained_stops_the_first_step_before_it_moves_anything(method, change):
    model = build_model()
    model.embed_tokens.requires_grad_(False)
    optimizer = subject(method).build(model)
    change(model)
    before = weights_of(model)
    with pytest.raises(RuntimeError, match=CHANGES[change]):
        train(model, optimizer, 1)
    assert not changed(before, model)


@every_method
def test_weights_that_were_replaced_stop_the_very_next_step(method):
    model, optimizer = trained(method, steps=5)  # not one of those after which all is looked through anyway
    assign_weights(model)
    with pytest.raises(RuntimeError, match="came into the model|no weight was read"):
        train(model, optimizer, 1, start=5)


@pytest.mark.parametrize("method", ["badam", "lisa", "hft", "blockllm"])
def test_a_block_whose_turn_it_is_not_can_not_be_unfrozen(method):
    model, optimizer = trained(method)
    waiting = next(p for p in optimizer._group_of if not p.requires_grad)
    waiting.requires_grad_(True)
    with pytest.raises(RuntimeError, match="requires gradients, but .* is being trained"):
        train(model, optimizer, 1)


@every_method
def test_weights_cast_under_a_state_of_another_dtype_stop_the_next_step(method):
    model, optimizer = trained(method)
    kept = any(optimizer.state.values())
    model.to(torch.float64)
    before = weights_of(model)
    if not kept:  # lomo, mezo, sgd
        train(model, optimizer, 1)
        assert changed(before, model)
        return
    with pytest.raises(RuntimeError, match=r"has become torch\.float64.*cast the model before building"):
        train(model, optimizer, 1)
    assert not changed(before, model)


@every_method
def test_weights_cast_before_the_first_step_are_trained(method):
    model = build_model()
    optimizer = subject(method).build(model)
    model.to(torch.float64)
    before = weights_of(model)
    train(model, optimizer, 1)
    assert changed(before, model)


@pytest.mark.parametrize("method", [m for m in optimizers.available() if "fp32_gradients" in subject(m).keywords])
def test_a_cast_that_would_leave_fp32_gradients_out_is_refused(method):
    model = build_model()
    optimizer = subject(method, fp32_gradients=True).build(model)
    model.to(torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"has become torch\.bfloat16 since it was built, so its gradients"):
        train(model, optimizer, 1)


@every_method
def test_a_group_can_not_be_added(method):
    model = build_model()
    optimizer = subject(method).build(model)
    groups = len(optimizer.param_groups)
    with pytest.raises(ValueError, match="no group can be added"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    assert len(optimizer.param_groups) == groups


@every_method
def test_a_parameter_that_a_loop_puts_into_a_group_is_refused(method):
    model, optimizer = trained(method, steps=3)
    optimizer.param_groups[0]["params"].append(nn.Parameter(torch.zeros(2)))
    with pytest.raises(RuntimeError, match="there are parameters in its groups that it wasn't built with"):
        train(model, optimizer, 1)


@every_method
def test_weights_made_in_inference_mode_are_refused_with_their_name(method):
    with torch.inference_mode():
        model = build_model()
    with pytest.raises(ValueError, match=r"embed_tokens\.weight, which was made in inference mode"):
        subject(method).build(model)


@every_method
@pytest.mark.parametrize(("name", "value"), [("lr", float("nan")), ("lr", -1.0), ("betas", (0.9, 1.5))])
def test_a_saved_value_that_no_constructor_would_take_is_refused(method, name, value):
    _, optimizer = trained(method)
    before = copy.deepcopy(optimizer.state_dict())
    bad = copy.deepcopy(before)
    if name not in bad["param_groups"][-1]:
        return
    bad["param_groups"][-1][name] = value
    with pytest.raises(ValueError, match=f"param_groups.* of this state: {name} must be"):
        optimizer.load_state_dict(bad)
    assert same(optimizer.state_dict(), before)


def renumbered(state: dict[str, Any], key: Any) -> dict[str, Any]:
    """The same state under other keys, as torch allows: `params` says which belongs to which parameter."""
    state = copy.deepcopy(state)
    state["state"] = {key(number): kept for number, kept in state["state"].items()}
    for group in state["param_groups"]:
        group["params"] = [key(number) for number in group["params"]]
    return state


@every_method
def test_state_goes_to_the_parameters_that_it_was_saved_for_whatever_their_numbers(method):
    _, optimizer = trained(method)
    state = copy.deepcopy(optimizer.state_dict())
    last = max(number for group in state["param_groups"] for number in group["params"])
    for key in (lambda number: last - number, lambda number: 7 * number + 3):
        again = subject(method).build(build_model())
        again.load_state_dict(renumbered(state, key))
        assert same(again.state_dict(), state)


@every_method
def test_a_number_that_stands_for_two_parameters_is_refused(method):
    _, optimizer = trained(method)
    state = copy.deepcopy(optimizer.state_dict())
    state["param_groups"][0]["params"][1] = state["param_groups"][0]["params"][0]
    with pytest.raises(ValueError, match="must be different numbers or names"):
        optimizer.load_state_dict(state)


@pytest.mark.parametrize("given", [{"seed": 1}, {"order": "descending"}, {"order": "ascending", "seed": 3}])
def test_moments_of_one_block_are_not_taken_along_into_the_visit_of_another(given):
    _, optimizer = trained("badam")
    other = subject("badam", **given).build(build_model())
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match="give the seed and order that it was saved with"):
        other.load_state_dict(optimizer.state_dict())
    assert same(other.state_dict(), before)


@every_method
def test_nothing_that_is_called_after_the_end_freezes_the_plain_model_again(method):
    model, optimizer = trained(method)
    state = copy.deepcopy(optimizer.state_dict())
    plain = optimizer.finish()
    with pytest.raises(RuntimeError, match=r"load_state_dict\(\) after finish\(\): build a new optimizer"):
        optimizer.load_state_dict(state)
    if optimizer.chooses and method != "mezo":
        with pytest.raises(RuntimeError, match=r"after finish\(\): build a new optimizer"):
            optimizer.advance()
    assert all(p.requires_grad for p in plain.parameters())


@pytest.mark.parametrize("method", [m for m in optimizers.available() if "fp32_gradients" in subject(m).keywords])
def test_the_end_drops_fp32_gradients_that_a_loop_has_left_those_of_adapters_too(method):
    model = build_model(torch.bfloat16)
    dtypes = {p: p.grad_dtype for p in model.parameters()}
    optimizer = subject(method, fp32_gradients=True).build(model)
    trained_now = optimizer.trainable
    optimizer.ask(functools.partial(loss_of, model, 0))
    assert any(p.grad is not None for p in trained_now)
    plain = optimizer.finish()
    assert all(p.grad is None for p in trained_now)
    assert {p: p.grad_dtype for p in plain.parameters()} == dtypes


def test_what_was_refused_once_is_refused_again_at_any_step():
    model = build_model()
    model.embed_tokens.requires_grad_(False)
    optimizer = subject("adamw").build(model)
    train(model, optimizer, 5)
    unfreeze(model)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=CHANGES[unfreeze]):
            train(model, optimizer, 1)
