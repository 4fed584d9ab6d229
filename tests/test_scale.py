"""SCALE (arXiv 2506.16659): its rule written down plainly, on architectures whose columns and heads are known."""

import pytest
import torch
from architectures import ARCHITECTURES
from torch import nn

from optimizers import SCALE
from optimizers.contract import build_model, train


def give_gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def moved(model, optimizer, seed):
    """How far each tensor moves in a step, by name."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    give_gradients(model, seed)
    optimizer.step()
    return {name: before[name] - p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_a_matrix_moves_by_its_gradient_with_every_column_of_the_rates_norm(name):
    architecture = ARCHITECTURES[name]
    model = architecture.build()
    for name, step in moved(model, SCALE(model, lr=0.1), 0).items():
        module, g = model.get_submodule(name.rpartition(".")[0]), model.get_parameter(name).grad
        if g.dim() == 2:
            tied = architecture.tied and model.get_parameter(name) is model.get_output_embeddings().weight
            by_column = "Conv1D" in type(module).__name__ or ("mbedding" in type(module).__name__ and not tied)
            dim = 0 if by_column else 1  # a linear module's weight is (outputs, inputs): a column of W is a row of it
            torch.testing.assert_close(step, 0.1 * g / g.norm(dim=dim, keepdim=True), rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(("kind", "inputs"), [(nn.Conv2d, (1, 2, 3)), (nn.ConvTranspose2d, (0, 2, 3))])
def test_a_column_of_a_convolution_is_an_output_channel(kind, inputs):
    model = nn.ModuleDict({"layers": nn.ModuleList([kind(3, 5, 2)])})
    step = moved(model, SCALE(model, lr=0.1), 0)["layers.0.weight"]
    torch.testing.assert_close(step.square().sum(inputs), torch.full((5,), 0.01))


@pytest.mark.parametrize(("name", "heads"), [
    ("llama", {"lm_head.weight"}),
    ("qwen2", {"model.embed_tokens.weight"}),  # tied
    ("distilbert", {"pre_classifier.weight", "classifier.weight"}),
])  # fmt: skip
def test_only_the_last_layer_has_momentum_and_only_vectors_have_adams_moments(name, heads):
    model = ARCHITECTURES[name].build()
    optimizer = SCALE(model)
    moved(model, optimizer, 0)
    kept = {name: set(optimizer.state[p]) for name, p in model.named_parameters() if p in optimizer.state}
    vectors = {name for name, p in model.named_parameters() if p.dim() == 1}
    assert {name for name in kept if name not in vectors} == heads
    assert all(kept[name] == ({"momentum_buffer"} if name in heads else {"step", "exp_avg", "exp_avg_sq"})
               for name in kept)  # fmt: skip
    assert vectors <= kept.keys()


def test_the_heads_step_follows_the_moving_average_of_its_gradients():
    model = ARCHITECTURES["llama"].build()
    optimizer, average = SCALE(model, lr=0.1, momentum=0.8), 0.0
    for seed in range(4):
        step = moved(model, optimizer, seed)["lm_head.weight"]
        average = 0.8 * average + 0.2 * model.lm_head.weight.grad
        torch.testing.assert_close(step, 0.1 * average / average.norm(dim=1, keepdim=True), rtol=1e-4, atol=1e-5)


def test_a_column_of_zeros_stays_where_it_is():
    model = build_model()
    optimizer = SCALE(model, lr=0.1)
    give_gradients(model, 0)
    weight = model.layers[0].mlp.up_proj.weight
    weight.grad[3] = 0.0
    before = weight.detach().clone()
    optimizer.step()
    assert torch.equal(weight[3], before[3]) and weight.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_keeps_what_its_formula_says(dtype):
    model = build_model(dtype)
    optimizer = SCALE(model)
    train(model, optimizer, 2)
    vectors = [p for name, p in model.named_parameters() if p.dim() == 1 and not name.startswith("unused")]
    of_vectors = sum(2 * dtype.itemsize * p.numel() + 4 for p in vectors)
    assert optimizer.state_bytes() == of_vectors + dtype.itemsize * model.classifier.weight.numel()


def test_a_low_precision_gradient_is_normalised_in_fp32():
    model = build_model(torch.bfloat16)
    weight = model.layers[0].mlp.up_proj.weight
    weight.data.zero_()
    optimizer = SCALE(model, lr=1.0)
    give_gradients(model, 0)
    optimizer.step()
    g = weight.grad.float()
    torch.testing.assert_close(-weight.detach(), (g / g.norm(dim=1, keepdim=True)).bfloat16())


@pytest.mark.parametrize("given", [{"momentum": 1.0}, {"adamw_lr": 0.0}])
def test_values_out_of_range_are_refused(given):
    with pytest.raises(ValueError, match=f"{next(iter(given))} must be"):
        SCALE(build_model(), **given)
