"""GaLore on weights in 8 bits (Q-GaLore, arXiv 2407.08296), against dense modules with the same values."""

import copy

import gloo
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from toy import ToyTask
from transformers.pytorch_utils import Conv1D

from membench.config.run import Training
from membench.training.loop import Diverged, Loop
from optimizers import GaLore
from optimizers.contract import build_model, loss_of, train
from optimizers.shared import affine, quantized
from optimizers.shared.affine_linear import AffineLinear

RESTORED = 2**-8  # the largest error of 8 bits, over the range of a group: half a step


def layered(*modules):
    model = nn.Module()
    model.layers = nn.ModuleList(modules)
    return model


def computing(modules, **more):
    """A model of `modules` one after another, in the layers, and GaLore on it in 8 bits."""
    model = layered(*modules)
    return model, GaLore(model, 1e-2, rank=2, scale=1.0, weights="8bit", **more)


def in_8_bits(dense):
    """A module in 8 bits, and a dense one with the same values."""
    module = AffineLinear(copy.deepcopy(dense))
    same = copy.deepcopy(dense)
    same.weight.data = module.dequantized(dense.weight.dtype)
    return module, same


@pytest.mark.parametrize("dense", [nn.Linear(40, 24), nn.Linear(7, 5, bias=False), Conv1D(24, 40)], ids=repr)
def test_outputs_and_gradients_are_those_of_the_dense_module_with_its_values(dense):
    torch.manual_seed(0)
    module, same = in_8_bits(dense)
    x = torch.randn(3, 4, 40 if dense.weight.numel() > 35 else 7)
    inputs = [x.clone().requires_grad_() for _ in "12"]
    for one, given in zip((module, same), inputs, strict=True):
        one(given).square().sum().backward()
    torch.testing.assert_close(module(x), same(x))
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    for p, q in zip(module.parameters(), same.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    limit = RESTORED * (dense.weight.max() - dense.weight.min())
    assert 0 < (module.dequantized(torch.float32) - dense.weight).abs().max() <= limit


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_an_input_without_rows_and_modules_without_outputs_are_as_in_the_dense_module():
    torch.manual_seed(0)
    module, same = in_8_bits(nn.Linear(8, 4))
    x = torch.randn(8)
    for one in (module, same):
        one(x).square().sum().backward()
    torch.testing.assert_close(module.weight.grad, same.weight.grad)
    torch.testing.assert_close(module.bias.grad, same.bias.grad)
    empty, _ = in_8_bits(nn.Linear(8, 0))
    empty(torch.randn(2, 8)).sum().backward()
    assert empty.weight.grad.shape == empty.to(torch.bfloat16).weight.shape == (0, 8)


def test_a_weight_takes_one_byte_and_5_for_256_of_them_and_its_parameter_a_single_number():
    module, _ = in_8_bits(nn.Linear(512, 64, bias=False, dtype=torch.bfloat16))
    assert sum(buffer.nbytes for buffer in module.buffers()) == 512 * 64 + 5 * 512 * 64 // 256
    assert module.weight.untyped_storage().nbytes() == 2
    assert module.weight.isnan().all()  # whoever reads it elsewhere notices


def test_a_cast_is_of_the_values_that_codes_stand_for():
    module, same = in_8_bits(nn.Linear(40, 24))
    scales = module.scales
    module.to(torch.bfloat16)
    assert module.scales.dtype is torch.float32 and torch.equal(module.scales, scales)
    assert module.weight.dtype is torch.bfloat16 and module.weight.untyped_storage().nbytes() == 2
    assert torch.equal(module.dequantized(torch.bfloat16), same.weight.bfloat16())
    x = torch.randn(2, 40)
    with torch.autocast("cpu", torch.bfloat16):
        same_values, _ = in_8_bits(nn.Linear(40, 24))
        assert same_values(x).dtype is torch.bfloat16


@pytest.mark.parametrize("columns", [20, 256, 300])  # groups that end within rows, with them, and neither
def test_numbers_stored_at_random_have_the_right_mean_and_their_neighbours_values(columns, monkeypatch):
    monkeypatch.setattr(affine, "PIECE", 512)
    torch.manual_seed(0)
    matrix = torch.randn(16, columns)
    start = affine.quantize(matrix, 8)
    before = affine.dequantize(start, 8, matrix.shape, torch.float32)
    change = 0.02 * torch.randn(matrix.shape) * torch.tensor([1.0, 0.05]).repeat_interleave(8)[:, None]
    draws = []
    for draw in range(300):
        packed = {name: tensor.clone() for name, tensor in start.items()}
        for values, rows in affine.rewritten(packed, columns, torch.Generator().manual_seed(draw)):
            assert torch.equal(values, before[rows])
            values += change[rows]
        draws.append(affine.dequantize(packed, 8, matrix.shape, torch.float32))
    steps = (matrix.max() - matrix.min()) / 200  # at least those of any group
    off = torch.stack(draws) - (before + change)
    assert off.abs().max() <= steps
    assert (off.mean(0).abs() <= 5 * steps * (0.25 / 300) ** 0.5 + 1e-6).all()


def test_numbers_that_still_fit_keep_their_grid_so_that_only_what_changed_is_rounded():
    torch.manual_seed(0)
    matrix = torch.randn(4, 256)
    packed = affine.quantize(matrix, 8)
    scales, codes = packed["scales"].clone(), packed["codes"].view(4, 256).clone()
    inner = matrix.abs() < 1.0
    for values, rows in affine.rewritten(packed, 256, torch.Generator().manual_seed(0)):
        values[inner[rows] & (torch.arange(256) < 128)] += 1e-3
    assert torch.equal(packed["scales"], scales)
    same = packed["codes"].view(4, 256) == codes
    assert same[~inner].all() and same[:, 128:].all() and not same.all()
    for values, _ in affine.rewritten(packed, 256, torch.Generator().manual_seed(1)):
        values *= 10.0
    assert (packed["scales"] > 9 * scales).all()


def test_updates_smaller_than_a_step_of_8_bits_are_kept_on_average():
    """A constant gradient moves all weights of a dense matrix by 1e-4 at each of 100 steps: half a step of 8 bits."""
    torch.manual_seed(0)
    dense, packed = (layered(nn.Linear(64, 32, bias=False)) for _ in "12")
    packed.load_state_dict(dense.state_dict())
    optimizers = GaLore(dense, 1e-4, rank=2, scale=1.0), GaLore(packed, 1e-4, rank=2, scale=1.0, weights="8bit")
    start = dense.layers[0].weight.detach().clone()
    for optimizer in optimizers:
        (p,) = optimizer.trainable
        for _ in range(100):
            p.grad = torch.ones(32, 64)
            optimizer.step()
            optimizer.zero_grad()
    moved, in_few = ((one.finish().layers[0].weight - start).mean() for one in optimizers)
    assert moved < -1e-4
    torch.testing.assert_close(in_few, moved, rtol=0.05, atol=0)


def test_a_model_in_8_bits_learns_what_it_learns_in_full():
    losses = {}
    for weights in ("full", "8bit"):
        model = build_model()
        optimizer = GaLore(model, 1e-2, rank=4, update_every=10, scale=1.0, weights=weights)
        train(model, optimizer, 60)
        optimizer.finish()
        assert not any(isinstance(module, AffineLinear) for module in model.modules())
        losses[weights] = sum(loss_of(model, step).item() for step in range(5))
    start = sum(loss_of(build_model(), step).item() for step in range(5))
    assert losses["8bit"] - losses["full"] < 0.1 * (start - losses["full"])


def test_nothing_moves_at_a_rate_of_0():
    model = build_model()
    optimizer = GaLore(model, 0.0, rank=4, weights="8bit")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train(model, optimizer, 3)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_model_without_linear_modules_in_its_layers_is_refused_and_so_is_a_state_of_other_weights():
    with pytest.raises(ValueError, match="weights='8bit' is for linear modules in the model's layers, and none is"):
        GaLore(layered(nn.Conv1d(3, 3, 3)), weights="8bit")
    with pytest.raises(ValueError, match="weights must be .*, not 'int8'"):
        GaLore(build_model(), weights="int8")
    state = GaLore(build_model(), rank=4, weights="8bit").state_dict()
    with pytest.raises(ValueError, match="this state was saved with weights='8bit', not 'full'"):
        GaLore(build_model(), rank=4).load_state_dict(state)


def test_rewriting_in_pieces_is_rewriting_the_whole(monkeypatch):
    torch.manual_seed(0)
    matrix = torch.randn(32, 256)
    seen = []
    for piece in (1 << 16, 1024):
        monkeypatch.setattr(affine, "PIECE", piece)
        monkeypatch.setattr(quantized, "PIECE", piece)
        packed = affine.quantize(matrix, 8)
        for values, _ in affine.rewritten(packed, 256, torch.Generator().manual_seed(0)):
            values += 1.0  # on other grids
        seen.append(packed)
    assert torch.equal(seen[0]["scales"], seen[1]["scales"]) and torch.equal(seen[0]["zeros"], seen[1]["zeros"])


class Falcons(nn.Linear):
    """As Falcon's: a `forward` of its own, with the same result."""

    def forward(self, x):
        return x @ self.weight.T if self.bias is None else x @ self.weight.T + self.bias


class Halving(nn.Linear):
    def forward(self, x):
        return super().forward(x) / 2


def test_modules_that_compute_something_else_or_whose_weight_others_read_stay_as_they_are():
    patched = nn.Linear(8, 8)
    whole = patched.forward
    patched.forward = lambda x: whole(x) / 2
    encoder = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)
    modules = [nn.Linear(8, 8), Falcons(8, 8, bias=False), Halving(8, 8), patched, encoder.eval()]
    x = torch.randn(2, 3, 8)
    with torch.no_grad():  # where torch's encoder hands its weights to one kernel
        before = [module(x) for module in modules]
        model, _ = computing(modules)
        for y, module in zip(before, model.layers, strict=True):
            torch.testing.assert_close(module(x), y, atol=0.05, rtol=0)
    assert [isinstance(module, AffineLinear) for module in model.layers] == [True, True, False, False, False]


def test_hooks_of_the_dense_module_are_called_until_their_handles_remove_them():
    dense, seen = nn.Linear(8, 4), []
    handle = dense.register_forward_hook(lambda *_: seen.append("forward"))
    dense.register_forward_pre_hook(lambda *_: seen.append("before"))
    model, optimizer = computing([dense])
    assert (model.layers[0].in_features, model.layers[0].out_features) == (8, 4)
    model.layers[0](torch.randn(2, 8))
    handle.remove()
    model.layers[0](torch.randn(2, 8))
    optimizer.finish().layers[0](torch.randn(2, 8))
    assert seen == ["before", "forward", "before", "before"]


def test_a_copy_of_the_model_computes_the_same_and_is_as_small():
    model, _ = computing([nn.Linear(8, 4)])
    copied = copy.deepcopy(model)
    x = torch.randn(2, 8)
    assert torch.equal(copied.layers[0](x), model.layers[0](x))
    assert copied.layers[0].weight.untyped_storage().nbytes() == 4


def test_dense_weights_that_are_loaded_are_quantised():
    source, (model, _) = nn.Linear(8, 4), computing([nn.Linear(8, 4)])
    model.load_state_dict(layered(source).state_dict())
    same, _ = in_8_bits(source)
    assert torch.equal(model.layers[0].dequantized(torch.float32), same.dequantized(torch.float32))
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"layers.0.codes\""):
        model.load_state_dict(layered(nn.Linear(8, 5)).state_dict())


def test_second_derivatives_are_refused():
    module, _ = in_8_bits(nn.Linear(8, 4))
    x = torch.randn(2, 8, requires_grad=True)
    (slope,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.square().sum().backward()


def test_a_model_that_reads_a_weight_without_calling_its_module_is_refused():
    model, optimizer = computing([nn.Linear(8, 4)])
    with pytest.raises(RuntimeError, match="first loss with weights='8bit' is NaN.* this model reads weights"):
        optimizer.backward(F.linear(torch.randn(2, 8), model.layers[0].weight).sum())


def test_a_state_of_full_weights_is_refused_by_its_setting():
    state = GaLore(build_model(), rank=4).state_dict()
    with pytest.raises(ValueError, match="this state was saved with weights='full', not '8bit'"):
        GaLore(build_model(), rank=4, weights="8bit").load_state_dict(state)
    del state["extra"]["weights"], state["param_groups"][0]["extra"]  # as before there was the option
    GaLore(build_model(), rank=4).load_state_dict(state)


def run_of(weights="8bit"):
    task = ToyTask()
    model = task.build_model()
    optimizer = GaLore(model, 1e-2, rank=4, update_every=3, scale=1.0, weights=weights)
    training = Training(steps=8, batch_size=4, sequence_length=3)
    return Loop(model, optimizer, task, training, seed=0, device=torch.device("cpu"))


class Stop(Exception):
    pass


def stop(step, loss):
    if step == 7:
        raise Stop


def test_a_run_ends_and_one_that_was_stopped_has_the_same_bits(tmp_path):
    whole, again = run_of(), run_of()
    whole.run()
    with pytest.raises(Stop):
        run_of().run(report=stop, checkpoint_path=tmp_path / "run.pt", checkpoint_every=5)
    again.run(checkpoint_path=tmp_path / "run.pt", checkpoint_every=5)
    one, other = (loop.optimizer.finish().state_dict() for loop in (whole, again))
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_a_run_whose_weights_in_8_bits_are_no_longer_finite_has_diverged():
    loop = run_of()

    def spoil(step, loss):
        if step == 8:
            next(m for m in loop.model.modules() if isinstance(m, AffineLinear)).scales[0] = float("nan")

    with pytest.raises(Diverged, match="a weight is not finite after the last step"):
        loop.run(report=spoil)


def replica(rank):
    model = build_model()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 + rank)  # the first one's are taken
    return trained_on([rank, 2 + rank, 4 + rank], model, optimizer_of(model, replicate=True))


def optimizer_of(model, replicate=False):
    optimizer = GaLore(model, 1e-2, rank=4, scale=1.0, weights="8bit")
    if replicate:
        optimizer.data_parallel()
    return optimizer


def trained_on(steps, model, optimizer, beside=0):
    """The finished weights after steps on the mean loss of these batches and those `beside` them."""
    for step in steps:
        optimizer.backward((loss_of(model, step) + loss_of(model, step + beside)) / 2)
        optimizer.step()
        optimizer.zero_grad()
    return {name: value.clone() for name, value in optimizer.finish().state_dict().items()}


def test_two_replicas_are_equal_to_the_bit_and_one_process_on_both_batches_but_for_what_is_rounded():
    one, other = gloo.run(replica)
    model = build_model()
    alone = trained_on([0, 2, 4], model, optimizer_of(model), beside=1)
    for name, value in one.items():
        assert torch.equal(value, other[name])
        step = (value.max() - value.min()) / 100
        assert (value - alone[name]).abs().max() <= step and (value == alone[name]).float().mean() > 0.5
