"""BAdam against its algorithm: Adam from zero on one block at a time, K steps each."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification
from transformers.models.auto.configuration_auto import AutoConfig

from optimizers import AdamW, BAdam
from optimizers.contract import build_model, loss_of, train, weights_of


def expect_equal(model, other):
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_with_one_block_badam_is_adamw_to_the_last_bit():
    model, other = build_model(), build_model()
    for m in (model, other):
        m.layers = m.layers[:1]
    others = ("embed_tokens", "norm", "classifier", "unused")
    train(model, BAdam(model, lr=1e-2, switch_every=50, always_train=others), 30)
    train(other, AdamW(other, lr=1e-2), 30)
    expect_equal(model, other)


@pytest.mark.parametrize("order", ["ascending", "descending"])
def test_badam_is_a_fresh_fused_adamw_for_each_block_visit_to_the_last_bit(order):
    steps, k = 22, 3  # more than two cycles over three blocks
    model, other = build_model(), build_model()
    train(model, BAdam(model, lr=1e-2, weight_decay=0.1, switch_every=k, order=order), steps)

    other.requires_grad_(False)
    for step in range(steps):
        if step % k == 0:
            other.requires_grad_(False)
            visit = step // k % 3
            layer = other.layers[visit if order == "ascending" else 2 - visit]
            layer.requires_grad_(True)
            matrices = [p for p in layer.parameters() if p.dim() >= 2]
            vectors = [p for p in layer.parameters() if p.dim() < 2]
            groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
            reference = torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1, fused=True)
        loss_of(other, step).backward()
        reference.step()
        reference.zero_grad()
    for name, p in model.named_parameters():
        assert torch.equal(p, dict(other.named_parameters())[name]), name


def test_every_block_the_first_too_gets_k_steps_and_a_cycle_visits_each_block_once():
    model = build_model()
    optimizer = BAdam(model, switch_every=4, seed=3)
    seen = []
    for step in range(24):
        seen.append(optimizer.selection)
        train(model, optimizer, 1, start=step)
    visits = seen[::4]
    assert seen == [name for name in visits for _ in range(4)]
    assert sorted(visits[:3]) == sorted(visits[3:]) == [f"layers.{i}" for i in range(3)]


def test_the_random_order_is_drawn_anew_each_cycle_and_is_a_function_of_the_seed():
    def orders(seed):
        model = build_model()
        optimizer = BAdam(model, seed=seed)
        names = []
        for _ in range(30):
            names.append(optimizer.selection)
            optimizer.advance()
        return [tuple(names[i : i + 3]) for i in range(0, 30, 3)]

    assert orders(1) == orders(1) != orders(2)
    assert len(set(orders(1))) > 1


@pytest.mark.parametrize(("dtype", "bytes_a_weight"), [(torch.float32, 8), (torch.bfloat16, 12)])
def test_after_many_switches_the_state_is_that_of_one_block_and_of_what_is_always_trained(dtype, bytes_a_weight):
    model = build_model(dtype)
    optimizer = BAdam(model, switch_every=2, always_train=("classifier",))
    train(model, optimizer, 41)  # one step into a visit
    held = [*model.layers[0].parameters(), *model.classifier.parameters()]
    assert optimizer.state_bytes() == sum(bytes_a_weight * p.numel() + 4 for p in held)


def test_what_is_always_trained_keeps_its_moments_over_switches():
    model = build_model()
    optimizer = BAdam(model, switch_every=2, always_train=("classifier",))
    train(model, optimizer, 9)
    assert optimizer.state[model.classifier.weight]["step"].item() == 9


def test_the_late_block_trains_and_the_others_stand_still():
    model = build_model()
    optimizer = BAdam(model, switch_every=5, order="ascending")
    train(model, optimizer, 10)
    before = weights_of(model)
    train(model, optimizer, 1, start=10)
    moved = {name for name, p in model.named_parameters() if not torch.equal(before[name], p)}
    assert moved == {name for name in before if name.startswith("layers.2.")}


def test_weight_decay_spares_vectors():
    model = build_model()
    optimizer = BAdam(model, lr=0.1, weight_decay=0.5, order="ascending")
    before = weights_of(model)
    for p in optimizer.trainable:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    layer, old = model.layers[0], "layers.0."
    torch.testing.assert_close(layer.mlp.up_proj.weight, before[old + "mlp.up_proj.weight"] * (1 - 0.1 * 0.5))
    assert torch.equal(layer.mlp.up_proj.bias, before[old + "mlp.up_proj.bias"])


def test_updates_below_one_ulp_of_bfloat16_add_up_in_the_master():
    def entries_changed(master_weights):
        model = build_model(torch.bfloat16)
        optimizer = BAdam(model, lr=1e-5, weight_decay=0.0, switch_every=101, master_weights=master_weights)
        before = weights_of(model)
        train(model, optimizer, 100)
        return sum((before[name] != p).sum().item() for name, p in model.named_parameters())

    assert entries_changed(True) > 3 * entries_changed(False)


def test_gradients_are_fp32_where_asked_and_the_parameter_gets_its_own_dtype_back():
    model = build_model(torch.bfloat16)
    optimizer = BAdam(model, order="ascending", fp32_gradients=True)
    optimizer.backward(loss_of(model, 0))
    assert model.layers[0].mlp.up_proj.weight.grad.dtype == torch.float32
    optimizer.finish()
    assert model.layers[0].mlp.up_proj.weight.grad_dtype == torch.bfloat16


def test_coverage_is_the_share_of_blocks_visited():
    model = build_model()
    optimizer = BAdam(model, switch_every=2)
    coverage = []
    for step in range(7):
        train(model, optimizer, 1, start=step)
        coverage.append(round(optimizer.block_coverage * 3))
        assert optimizer.coverage_after(step + 1)[:2] == (coverage[-1], 3)
    assert coverage == [1, 1, 2, 2, 3, 3, 3]
    assert optimizer.coverage_after(4).words(4) == "visits 2 of 3 blocks in 4 steps; switch_every <= 1 visits all"
    assert optimizer.coverage_after(2).words(2).endswith("; to visit all takes 3 steps or more")
    assert optimizer.coverage_after(5).words(5) == ""


def test_a_state_of_other_blocks_is_refused():
    state = BAdam(build_model(), block="sublayer").state_dict()
    with pytest.raises(ValueError, match="other blocks"):
        BAdam(build_model()).load_state_dict(state)


def test_a_block_that_no_gradient_reaches_is_an_error_not_silence():
    model = build_model()
    model.layers.append(nn.Linear(2, 2))
    forward = model.forward
    model.forward = lambda tokens: _without_last_layer(model, forward, tokens)
    optimizer = BAdam(model, switch_every=2, order="descending", always_train=("classifier",))
    with pytest.raises(RuntimeError, match=r"no gradient reached block 'layers\.3' in 2 steps"):
        train(model, optimizer, 2)


def _without_last_layer(model, forward, tokens):
    last = model.layers.pop(-1)
    try:
        return forward(tokens)
    finally:
        model.layers.append(last)


def roberta(layers=4):
    config = AutoConfig.for_model(
        "roberta", hidden_size=16, num_hidden_layers=layers, num_attention_heads=2, vocab_size=50, intermediate_size=32
    )
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(config)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_backward_pass_ends_at_the_active_block_also_when_a_trainer_turns_input_gradients_on(checkpointing):
    model = roberta()
    optimizer = BAdam(model, order="descending", always_train=("classifier",))
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    model.train()
    reached = []
    for i, layer in enumerate(model.roberta.encoder.layer):
        layer.attention.self.query.register_full_backward_hook(lambda *_, i=i: reached.append(i))
    optimizer.backward(model(torch.zeros(2, 5, dtype=torch.long), labels=torch.tensor([0, 1])).loss)
    assert reached == [3]


def test_re_entrant_checkpointing_is_refused_with_the_way_out():
    model = roberta(layers=2)
    BAdam(model, always_train=("classifier",))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.train()
    with pytest.raises(ValueError, match='"use_reentrant": False'):
        model(torch.zeros(2, 5, dtype=torch.long))
