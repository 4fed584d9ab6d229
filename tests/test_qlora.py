"""QLoRA and LoRA on a base in 4 bits: against peft on bitsandbytes, and the bytes that there are."""

import bitsandbytes
import peft
import pytest
import torch
from plan_models import blueprint, maxima
from torch import nn
from transformers.pytorch_utils import Conv1D

from membench.planning.blueprint import Blueprint
from membench.planning.fake import QuickFakeTensorMode
from membench.planning.planner import method_values
from membench.planning.simulate import simulate
from membench.planning.workload import Workload
from optimizers import LoRA, QLoRA, contract
from optimizers.contract import LAYERS, build_model, loss_of, train, weights_of
from optimizers.shared import nf4
from optimizers.shared.blocks import find_layers
from optimizers.shared.nf4_linear import NF4Linear, quantize_linears
from reports.parts import FIELDS

WEIGHTS, ACTIVATIONS = FIELDS.index("weights_bytes"), FIELDS.index("activations_bytes")


def quantized(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, NF4Linear)}


def bytes_of(module):
    return sum(buffer.nbytes for buffer in module.buffers())


def what_nf4_makes_of(weight, *, double=True):
    return nf4.dequantize(nf4.quantize(weight, double=double), weight.shape, weight.dtype)


DENSE = {
    "linear": lambda: nn.Linear(24, 40),
    "without bias": lambda: nn.Linear(24, 40, bias=False),
    "transposed": lambda: Conv1D(40, 24),
}


@pytest.mark.parametrize("kind", DENSE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_module_is_the_linear_one_on_the_dequantised_weight_forward_and_backward(kind, dtype):
    torch.manual_seed(0)
    dense = DENSE[kind]().to(dtype)
    model = nn.Sequential(dense).requires_grad_(False)
    x = torch.randn(3, 5, 24, dtype=dtype, requires_grad=True)
    dense.weight.data = what_nf4_makes_of(dense.weight, double=False)  # of which it makes the same again
    expected = model(x)
    (gradient,) = torch.autograd.grad(expected.square().sum(), x)
    quantize_linears(model, ["0"], double=False)
    y = model(x)
    assert torch.equal(y, expected)
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), x)[0], gradient)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_cast_of_the_model_casts_the_weights_that_it_stands_for_and_what_finish_returns(dtype):
    model, same = build_model(), build_model()
    optimizer = QLoRA(model, rank=4)
    QLoRA(same, rank=4).finish().to(dtype)  # the 4-bit weights' values, cast
    model.to(dtype)
    assert all(torch.equal(module.weight, same.get_submodule(name.removesuffix(".base_layer")).weight)
               for name, module in quantized(model).items())  # fmt: skip
    optimizer.finish()
    assert {p.dtype for p in model.parameters()} == {dtype}
    for (name, ours), expected in zip(model.named_parameters(), same.parameters(), strict=True):
        assert torch.equal(ours, expected), name


def test_it_is_peft_on_bitsandbytes_to_the_last_bit(monkeypatch):
    # On a CPU with AVX-512 bitsandbytes restores rows shorter than a block, 64 weights, wrongly
    monkeypatch.setattr(contract, "WIDTH", 64)
    reference = build_model()
    for layer in reference.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, dense in list(part.named_children()):
                linear = bitsandbytes.nn.Linear4bit(
                    dense.in_features,
                    dense.out_features,
                    compute_dtype=torch.float32,
                    compress_statistics=False,
                    quant_type="nf4",
                )
                linear.load_state_dict(dense.state_dict())
                setattr(part, name, linear.to("cpu"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        config = peft.LoraConfig(
            r=4, lora_alpha=16, target_modules="all-linear", exclude_modules=["classifier", "probe"]
        )
        peft.get_peft_model(reference, config)
    adamw = torch.optim.AdamW([p for p in reference.parameters() if p.requires_grad], 1e-2, weight_decay=0, fused=True)
    theirs = []
    for step in range(10):
        loss = loss_of(reference, step)
        loss.backward()
        adamw.step()
        adamw.zero_grad()
        theirs.append(loss.item())
    model = build_model()
    ours = LoRA(model, 1e-2, 0.0, rank=4, base="nf4", double_quantization=False, seed=7)
    assert train(model, ours, 10) == theirs


def test_all_linear_modules_of_the_layers_are_in_four_bits_and_nothing_else_is():
    model = build_model()
    model.layers[0].mlp.up_proj.weight.requires_grad_(False)  # the user's: never touched
    before = weights_of(model)
    QLoRA(model, targets=("q_proj",), always_train=("classifier", "layers.1.self_attn.k_proj"))
    linear = {name for name, _ in build_model().named_modules() if name.endswith("_proj")}
    names = {name.removesuffix(".base_layer") for name in quantized(model)}
    assert names == linear - {"layers.0.mlp.up_proj", "layers.1.self_attn.k_proj"} and len(names) == 7 * LAYERS - 2
    kept = {name.replace(".base_layer", ""): p for name, p in model.named_parameters() if "lora_" not in name}
    assert kept.keys() == before.keys() - {f"{name}.weight" for name in names}
    assert all(torch.equal(p, before[name]) for name, p in kept.items())


@pytest.mark.parametrize("double", [False, True])
def test_the_finished_model_is_what_the_bits_stand_for_with_the_adapters_merged(double):
    model = build_model()
    before = weights_of(model)
    optimizer = QLoRA(model, 1e-2, rank=4, alpha=8.0, dropout=0.0, double_quantization=double)
    train(model, optimizer, 3)
    module = model.layers[1].mlp.down_proj
    delta = 2.0 * module.lora_B.default.weight @ module.lora_A.default.weight
    plain = optimizer.finish()
    base = what_nf4_makes_of(before["layers.1.mlp.down_proj.weight"], double=double)
    torch.testing.assert_close(plain.layers[1].mlp.down_proj.weight, base + delta, rtol=1e-5, atol=1e-6)
    assert delta.abs().max() > 0.01 and not quantized(plain)


def test_qlora_is_lora_on_nf4_with_the_papers_hyperparameters():
    model, other = build_model(), build_model()
    torch.manual_seed(0)
    losses = train(model, QLoRA(model), 4)
    torch.manual_seed(0)
    assert losses == train(other, LoRA(other, 2e-4, 0.0, rank=64, alpha=16.0, dropout=0.1, base="nf4"), 4)


def test_a_state_on_another_base_is_refused():
    state = LoRA(build_model()).state_dict()
    with pytest.raises(ValueError, match="base='full', not 'nf4'"):
        LoRA(build_model(), base="nf4").load_state_dict(state)


# ---- bytes


@pytest.mark.parametrize(("double", "a_weight"), [(True, 0.5 + 1 / 64 + 4 / (64 * 256)), (False, 0.5 + 4 / 64)])
def test_a_layer_of_llama3_8b_takes_the_papers_bytes_a_weight(double, a_weight):
    b = Blueprint(Workload("llama3-8b"))
    with QuickFakeTensorMode():
        model = b.build(1)
        (layer,) = find_layers(model).values()
        matrices = [p.numel() for p in layer.parameters() if p.dim() == 2]
        QLoRA(model, double_quantization=double)
        held = [bytes_of(module) for module in quantized(layer).values()]
    assert sum(held) == a_weight * sum(matrices) + 4 * double * len(matrices)
    assert len(held) == len(matrices) == 7 and sum(matrices) == 218_103_808


@pytest.mark.parametrize("checkpointing", [False, True])
def test_it_keeps_no_more_activations_than_lora(checkpointing, tmp_path):
    b = blueprint(tmp_path, "llama", 2, dtype="bfloat16", checkpointing=checkpointing)
    same = {"rank": 8, "alpha": 16.0, "dropout": 0.0}
    lora, qlora = (
        maxima(simulate(b, method, {**method_values(b, method, {}), **same}, b.depth)) for method in ("lora", "qlora")
    )
    assert qlora[1 + ACTIVATIONS] == lora[1 + ACTIVATIONS]
    with QuickFakeTensorMode():
        model = b.build(b.depth)
        in_layers = sum(p.nbytes for layer in find_layers(model).values() for p in layer.parameters() if p.dim() == 2)
        QLoRA(model, **same)
        held = sum(map(bytes_of, quantized(model).values()))
    assert lora[1 + WEIGHTS] - qlora[1 + WEIGHTS] == in_layers - held > 0


class Halving(nn.Linear):
    def forward(self, x):
        return super().forward(x) / 2


def test_a_linear_module_that_computes_something_else_is_adapted_and_keeps_its_weights():
    torch.manual_seed(0)
    model, x = nn.ModuleDict({"layers": nn.ModuleList([Halving(64, 64), nn.Linear(64, 64)])}), torch.randn(2, 64)
    before = model["layers"][0](x)
    QLoRA(model)
    assert torch.equal(model["layers"][0](x), before)
    assert list(quantized(model)) == ["layers.1.base_layer"]
