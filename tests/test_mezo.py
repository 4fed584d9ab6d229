"""MeZO (arXiv 2305.17333): against the definition of its estimate, in float64, and the memory that it promises."""

import math

import pytest
import torch
import transformers
from library import tiny_mamba
from test_trainer import build_trainer
from torch import nn
from torch.func import functional_call
from transformers import Trainer

from membench.training.hf_trainer import MethodTrainer
from membench.training.loop import check_combination
from membench.training.metering import meter_cycle
from optimizers import MeZO
from optimizers.contract import batch, build_model, loss_of, train


def move(model, optimizer, distance, sample=0):
    """All weights moved by `distance` z at once, as the paper writes it: a copy."""
    named = dict(model.named_parameters())
    return {name: p.detach() + distance * optimizer._direction(p, sample) for name, p in named.items()}


def reference_step(model, optimizer, loss, lr, weight_decay=0.0):
    """The weights after Algorithm 1, from the definition."""
    named, used = dict(model.named_parameters()), {}
    for sample in range(optimizer.samples):
        above, below = (loss(move(model, optimizer, sign * optimizer.eps, sample)) for sign in (1, -1))
        used[sample] = (above - below) / (2 * optimizer.eps)
    return {
        name: p.detach() * (1 - lr * weight_decay * (p.dim() > 1))
        - lr / optimizer.samples * sum(slope * optimizer._direction(p, s) for s, slope in used.items())
        for name, p in named.items()
    }


@pytest.mark.parametrize("samples", [1, 3])
def test_a_step_is_that_of_the_definition(samples):
    model = build_model(torch.float64)
    del model.unused  # which no loss depends on
    optimizer = MeZO(model, lr=0.1, weight_decay=0.1, samples=samples)
    tokens, labels = torch.zeros(4, 6, dtype=torch.long), torch.tensor([0, 1, 2, 0])

    def loss(weights=None):
        given = dict(model.named_parameters()) if weights is None else weights
        return nn.functional.cross_entropy(functional_call(model, given, (tokens,)), labels)

    for _ in range(3):
        expected = reference_step(model, optimizer, loss, lr=0.1, weight_decay=0.1)
        optimizer.step(lambda: nn.functional.cross_entropy(model(tokens), labels))
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.detach(), expected[name], rtol=0, atol=1e-9)


def tied_llama(dtype):
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).to(dtype)


def test_tied_embeddings_move_together():
    model = tied_llama(torch.float64)
    optimizer = MeZO(model, lr=0.1)
    batch = dict.fromkeys(("input_ids", "labels"), torch.arange(12).view(2, 6))
    expected = reference_step(model, optimizer, lambda weights: functional_call(model, weights, (), batch).loss, 0.1)
    optimizer.step(lambda: model(**batch).loss)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), expected[name], rtol=0, atol=1e-6)  # Llama computes norms in fp32


def test_attention_of_torch_whose_parts_are_read_without_a_call_is_trained_as_all_else():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.5, batch_first=True).double()
    optimizer = MeZO(model, lr=0.1)
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    model.eval()
    expected = reference_step(
        model, optimizer, lambda weights: functional_call(model, weights, (x,)).square().mean(), 0.1
    )
    model.train()
    optimizer.step(lambda: (model(x) * model(x)).mean())  # no dropout, or the two would differ
    assert model.training and model.dropout.training
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), expected[name], rtol=0, atol=1e-9)


class ReadsItsPart(nn.Module):
    """Reads the weight of a part that it never calls, as Mamba layers and some routers of experts do."""

    def __init__(self, transposed):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 3, bias=False)])
        self.transposed = transposed

    def forward(self, x):
        part = self.layers[1].weight
        assert part.shape == (3, 4) and part.dtype is torch.float64
        x = self.layers[0](x)
        return x @ part.T if self.transposed else nn.functional.linear(x, part)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_weight_that_another_module_reads_is_trained_as_all_else(transposed):
    torch.manual_seed(0)
    model, x = ReadsItsPart(transposed).double(), torch.randn(5, 4, dtype=torch.float64)
    optimizer = MeZO(model, lr=0.1)

    def loss(weights):  # a term of the loss that no module computes
        return functional_call(model, weights, (x,)).square().mean() + weights["layers.1.weight"].abs().sum()

    expected = reference_step(model, optimizer, loss, 0.1)
    optimizer.step(lambda: model(x).square().mean() + model.layers[1].weight.abs().sum())
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), expected[name], rtol=0, atol=1e-9)


def test_each_weight_of_a_mamba_moves_and_comes_back():
    model, batch = tiny_mamba(), dict.fromkeys(("input_ids", "labels"), torch.arange(12).view(2, 6))
    optimizer = MeZO(model, lr=0.1, eps=1e-2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    weights = move(model, optimizer, 1e-2)
    expected = functional_call(model.eval(), weights, (), batch).loss
    losses = []
    optimizer.ask(lambda: losses.append(model(**batch).loss) or losses[-1])
    torch.testing.assert_close(losses[0], expected, rtol=0, atol=1e-6)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    optimizer.step()
    assert not [name for name, p in model.named_parameters() if torch.equal(p, before[name])]


def test_what_is_frozen_later_stays():
    model = build_model()
    optimizer = MeZO(model, lr=0.1)
    model.layers[1].requires_grad_(False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, optimizer, 2)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert "layers.0.mlp.up_proj.weight" in moved and not [name for name in moved if name.startswith("layers.1.")]


def test_directions_are_standard_normal_and_different_for_each_weight_step_and_sample():
    model = nn.ModuleList([nn.Linear(100, 100, bias=False) for _ in range(2)])
    optimizer = MeZO(model)
    draws = [optimizer._direction(p, sample) for p in model.parameters() for sample in (0, 1)]
    optimizer.steps = 1
    draws += [optimizer._direction(p, 0) for p in model.parameters()]
    together = torch.stack([z.flatten() for z in draws])  # (6, 10,000)
    assert torch.equal(draws[4], optimizer._direction(next(model.parameters()), 0))
    torch.testing.assert_close(together @ together.t() / 10_000, torch.eye(6), rtol=0, atol=0.06)
    assert together.mean(1).abs().max() < 0.05


def test_the_average_of_many_directions_is_the_gradient():
    torch.manual_seed(0)
    model, x = nn.Linear(3, 2), torch.randn(5, 3)
    model(x).square().mean().backward()
    start = {p: (p.detach().clone(), p.grad.clone()) for p in model.parameters()}
    MeZO(model, lr=1.0, samples=4000).step(lambda: model(x).square().mean())
    moved = torch.cat([(before - p.detach()).flatten() for p, (before, _) in start.items()])
    gradient = torch.cat([g.flatten() for _, g in start.values()])
    assert torch.nn.functional.cosine_similarity(moved, gradient, dim=0) > 0.98
    assert moved.norm() / gradient.norm() == pytest.approx(1, abs=0.1)


def test_both_losses_of_a_direction_see_the_same_random_numbers():
    model, drawn = nn.Linear(3, 2), []

    def loss():  # as of a denoising model
        drawn.append(torch.randn(5, 3))
        return model(drawn[-1]).square().mean()

    torch.manual_seed(0)
    MeZO(model, samples=2).ask(loss)
    above, below, next_above, next_below = drawn
    assert torch.equal(above, below) and torch.equal(next_above, next_below) and not torch.equal(above, next_above)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_asking_for_losses_leaves_every_weight_as_it_was_to_the_last_bit(dtype):
    model = build_model(dtype)
    before = {name: (p.detach().clone(), p.data_ptr()) for name, p in model.named_parameters()}
    optimizer, seen = MeZO(model, eps=0.1, samples=3), []
    optimizer.ask(lambda: seen.append(loss_of(model, 0)) or seen[-1])
    assert len({loss.item() for loss in seen}) == 6 and not any(loss.requires_grad for loss in seen)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name][0]) and p.data_ptr() == before[name][1]


def test_a_loss_that_fails_leaves_weights_modes_and_hooks_as_they_were():
    model = build_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}

    def loss():
        model.embed_tokens(torch.zeros(1, dtype=torch.long))
        return model.norm(torch.zeros(1, 3))  # of another width

    with pytest.raises(RuntimeError, match="normalized_shape"):
        MeZO(model).ask(loss)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(module.training and not module._forward_hooks for module in model.modules())


def test_what_no_loss_depends_on_stays():
    model = build_model()
    before = model.unused["probe"].weight.detach().clone()
    train(model, MeZO(model, lr=1e-2, weight_decay=0.1), 3)
    assert torch.equal(model.unused["probe"].weight, before)


def test_micro_batches_add_up_to_the_whole_batch():
    whole, parts = build_model(torch.float64), build_model(torch.float64)
    one, two = MeZO(whole, lr=1e-2), MeZO(parts, lr=1e-2)
    one.ask(lambda: (loss_of(whole, 0) + loss_of(whole, 1)) / 2)
    for step in (0, 1):
        two.ask(lambda step=step: loss_of(parts, step) / 2)
    one.step()
    two.step()
    for p, q in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-5)  # losses are fp32, and their difference is small


# ---- memory


def metered(layers, dtype=torch.float32):
    config = transformers.LlamaConfig(
        vocab_size=60, hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=2,
        use_cache=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).to(dtype).train()
    tokens = torch.zeros(2, 48, dtype=torch.long)
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}
    report = meter_cycle(model, MeZO(model), lambda m, b: m(**b).loss, lambda step: [batch])
    return report, sum(p.numel() * p.element_size() for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_weights_and_the_activations_of_one_layer_whatever_the_depth(dtype):
    (few, weights_of_few), (many, weights_of_many) = metered(2, dtype), metered(6, dtype)
    assert few["peak_allocated_bytes"] - weights_of_few == many["peak_allocated_bytes"] - weights_of_many
    assert many["maximum"]["gradients_bytes"] == many["maximum"]["optimizer_state_bytes"] == 0
    assert many["maximum"]["activations_bytes"] < 4000  # the batch and losses
    assert many["peak_phase"] == "forward"


def test_a_copy_of_one_modules_weights_lives_at_a_time():
    model = nn.Sequential(*[nn.Linear(100, 100, bias=False) for _ in range(4)])
    batch = [{"x": torch.zeros(1, 100)}]
    report = meter_cycle(model, MeZO(model), lambda m, b: m(b["x"]).sum(), lambda step: batch)
    assert 100 * 100 * 4 <= report["maximum"]["temporaries_bytes"] < 100 * 100 * 4 + 3000
    assert report["maximum"]["weights_bytes"] == 4 * 100 * 100 * 4


# ---- what can't be


def test_a_backward_pass_and_a_step_without_a_loss_are_refused():
    model = build_model()
    optimizer = MeZO(model)
    with pytest.raises(RuntimeError, match=r"call ask\(closure\) instead of backward\(loss\)"):
        optimizer.backward(loss_of(model, 0))
    with pytest.raises(RuntimeError, match=r"call step\(closure\), or use membench.MethodTrainer"):
        optimizer.step()


def test_a_stock_trainer_is_told_to_be_the_method_trainer(tmp_path):
    with pytest.raises(RuntimeError, match=r"use membench\.MethodTrainer"):
        build_trainer(Trainer, "mezo", tmp_path).train()


def test_clipping_is_refused_by_loop_and_trainer(tmp_path):
    with pytest.raises(ValueError, match="MeZO has no gradients to clip to 1.0"):
        check_combination(MeZO(build_model()), 1, 1.0)
    with pytest.raises(ValueError, match="MeZO has no gradients, so max_grad_norm=1.0"):
        build_trainer(MethodTrainer, "mezo", tmp_path, max_grad_norm=1.0)


def test_the_trainer_accumulates_and_logs_the_loss(tmp_path):
    given = {"max_steps": 3}
    whole = build_trainer(MethodTrainer, "mezo", tmp_path / "1", per_device_train_batch_size=8, **given)
    parts = build_trainer(MethodTrainer, "mezo", tmp_path / "2", gradient_accumulation_steps=2, **given)
    for trainer in (whole, parts):
        trainer.loss_is_scaled_for_ga = False  # a classifier's loss is a mean, though transformers takes it for a sum
        trainer.train()
    for p, q in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-4)
    losses = [[row["loss"] for row in trainer.state.log_history if "loss" in row] for trainer in (whole, parts)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4) and losses[0][0] == pytest.approx(math.log(2), abs=0.2)


@pytest.mark.parametrize("compiled", ["before, and run", "after", "each layer"])
def test_a_compiled_model_has_the_slopes_of_the_plain_one(compiled):
    torch._dynamo.reset()
    plain, model = build_model(), build_model()
    run = model
    if compiled == "each layer":
        for layer in model.layers:
            layer.compile(backend="eager")
    elif compiled == "before, and run":
        run = torch.compile(model, backend="eager")
    with torch.no_grad():
        loss_of(run.eval(), 0)
    model.train()
    optimizer = MeZO(model, lr=5e-3)
    if compiled == "after":
        run = torch.compile(model, backend="eager")
    expected = train(plain, MeZO(plain, lr=5e-3), 3)
    assert train(run, optimizer, 3) == expected
    assert torch.equal(plain.classifier.weight, model.classifier.weight)


def test_weights_that_cannot_be_moved_are_refused_in_a_sentence():
    tokens, _ = batch(0)
    model = build_model().eval()
    with pytest.raises(ValueError, match="TorchScript doesn't show: build it on the model that was traced"):
        MeZO(torch.jit.trace(model, (tokens,)))
    optimizer = MeZO(model)
    other = build_model()
    optimizer.ask(lambda: loss_of(other, 0))
    with pytest.raises(RuntimeError, match="the closure must run the model that it was built from"):
        optimizer.step()


def test_a_closure_with_a_backward_pass_is_told_to_leave_it_out():
    model = build_model()

    def closure():
        loss = loss_of(model, 0)
        loss.backward()
        return loss

    with pytest.raises(RuntimeError, match=r"called without gradients: leave loss.backward\(\) out of it"):
        MeZO(model).step(closure)


def test_within_autocast_both_sides_and_all_steps_see_their_own_weights():
    inside, around = build_model(), build_model()

    def loss_in_autocast(model, step):
        with torch.autocast("cpu", torch.bfloat16):
            return loss_of(model, step)

    first, second = MeZO(inside, lr=5e-3), MeZO(around, lr=5e-3)
    expected = [first.step(lambda step=step: loss_in_autocast(inside, step)) for step in range(3)]
    with torch.autocast("cpu", torch.bfloat16):
        found = [second.step(lambda step=step: loss_of(around, step)) for step in range(3)]
    assert found == expected
    assert torch.equal(inside.classifier.weight, around.classifier.weight)
