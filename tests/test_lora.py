"""LoRA and its relatives: against peft with torch's AdamW, and what must be left of them at the end."""

import copy

import peft
import pytest
import torch
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    RobertaConfig,
    RobertaForSequenceClassification,
    SqueezeBertConfig,
    SqueezeBertForSequenceClassification,
)

from optimizers import LoRA
from optimizers.contract import LAYERS, WIDTH, build_model, loss_of, train, weights_of
from optimizers.lora import VARIANTS
from optimizers.shared.adapters import corrected_gradients

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# of one layer: (m + n) of four (w, w) and three (w, 2 w) matrices
SUM_OF_SIDES = 4 * 2 * WIDTH + 3 * 3 * WIDTH


def roberta():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
             "initializer_range": 0.3}  # fmt: skip
    return RobertaForSequenceClassification(RobertaConfig(vocab_size=50, **sizes))


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2, initializer_range=0.3)
    )


MODELS = {"plain": build_model, "roberta": roberta, "gpt2": gpt2}


def outputs(model):
    model.eval()
    with torch.no_grad():
        given = model(torch.randint(2, 20, (3, 8), generator=torch.Generator().manual_seed(0)))
    return given if torch.is_tensor(given) else given.logits


def adapted(model):
    layers = peft.tuners.lora.LoraLayer
    return {name: module for name, module in model.named_modules() if isinstance(module, layers)}


def stir(model, optimizer, steps=3):
    """Some steps on random gradients, so that every adapter is far from where it started."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for p in optimizer.trainable:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()
        optimizer.zero_grad()


def build_reference(variant, head=False):
    """A model with peft's adapters, and torch's AdamW on them."""
    model = build_model()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        if variant == "vera":
            config = peft.VeraConfig(r=4, target_modules=LINEAR, projection_prng_key=7)
        else:
            config = peft.LoraConfig(r=4, lora_alpha=16, target_modules=LINEAR, **VARIANTS[variant])
        wrapped = peft.get_peft_model(model, config)
    if variant == "lora+":
        return model, create_loraplus_optimizer(
            wrapped, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=8.0, loraplus_weight_decay=0.1, fused=True
        )
    model.classifier.requires_grad_(head)
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    return model, torch.optim.AdamW(groups, lr=1e-2, fused=True)


@pytest.mark.parametrize("variant", [variant for variant in VARIANTS if variant != "lora-fa"])
def test_it_is_peft_with_torchs_fused_adamw_to_the_last_bit(variant):
    head = variant != "lora+"  # which in peft raises the rate of biases too
    model = build_model()
    always = {"always_train": ("classifier",)} if head else {}
    ours = LoRA(model, 1e-2, 0.1, rank=4, variant=variant, lora_plus_ratio=8.0, seed=7, **always)
    reference, adamw = build_reference(variant, head)
    start = weights_of(model)
    for step in range(20):
        ours.backward(loss_of(model, step))
        ours.step()
        ours.zero_grad()
        loss_of(reference, step).backward()
        adamw.step()
        adamw.zero_grad()
    there = dict(reference.named_parameters())
    assert there.keys() == start.keys()
    for name, p in model.named_parameters():
        assert torch.equal(p, there[name]), name
        assert p.requires_grad == there[name].requires_grad, name
    assert all(not torch.equal(start[n], p) for n, p in there.items() if p.requires_grad and "unused" not in n)


def test_lora_fa_is_peft_with_its_own_optimizer(monkeypatch):
    # which multiplies in bf16 where it can, and adds eps before the bias correction
    monkeypatch.setattr(peft.optimizers.lorafa, "is_bf16_available", lambda: False)
    model, reference = build_model(), build_model()
    ours = LoRA(model, 1e-2, 0.0, eps=1e-12, rank=4, variant="lora-fa", seed=7)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        wrapped = peft.get_peft_model(reference, peft.LoraConfig(r=4, lora_alpha=16, target_modules=LINEAR))
    theirs = create_lorafa_optimizer(wrapped, r=4, lora_alpha=16, lr=1e-2)
    theirs.param_groups[0]["eps"] = 1e-12
    for step in range(10):
        ours.backward(loss_of(model, step))
        for p, q in zip(model.parameters(), reference.parameters(), strict=True):
            q.grad = None if p.grad is None else p.grad.clone()
        ours.step()
        theirs.step()
        ours.zero_grad()
    for (name, p), q in zip(model.named_parameters(), reference.named_parameters(), strict=True):
        torch.testing.assert_close(p, q[1], rtol=1e-4, atol=1e-5, msg=name)
    assert {name.split(".")[-3] for name, p in model.named_parameters() if p.requires_grad} == {"lora_B"}


@pytest.mark.parametrize("rank", [3, 20])  # 20: above the 16 of A's input
def test_lora_fa_moves_the_weight_as_closely_along_its_gradient_as_b_a_can(rank):
    model = build_model()
    optimizer = LoRA(model, rank=rank, variant="lora-fa")
    module = model.layers[0].mlp.up_proj
    a, b, s = module.lora_A.default.weight, module.lora_B.default.weight, 4.0
    full = torch.randn(2 * WIDTH, WIDTH, generator=torch.Generator().manual_seed(0))  # the gradient of W
    (corrected,) = corrected_gradients(optimizer._frozen_a, [b], [s * full @ a.T])
    closest = torch.linalg.pinv(s * a.T.double()) @ full.T.double()  # the least-squares solution of x (s A) = full
    torch.testing.assert_close(s * (corrected @ a).double(), (s * a.T.double() @ closest).T, rtol=1e-3, atol=1e-3)


def test_lora_fa_corrects_gradients_where_they_are_though_the_model_is_spread_over_devices():
    def pair(device):
        return nn.Parameter(torch.ones(4, 2, device=device)), (torch.eye(2, 6, device=device), 0.5)

    frozen = dict([pair("meta"), pair("cpu")])
    elsewhere, here = corrected_gradients(frozen, list(frozen), [torch.ones_like(b) for b in frozen])
    assert elsewhere.device.type == "meta"
    torch.testing.assert_close(here, torch.full((4, 2), 4.0))  # 1 / s^2


def test_veras_modules_share_one_random_pair_of_the_largest_sides_which_is_a_function_of_the_seed():
    def pairs(seed, dtype=torch.float32):
        model = build_model(dtype)
        LoRA(model, rank=5, variant="vera", seed=seed)
        return {buffer.data_ptr(): buffer for buffer in model.buffers()}.values()

    a, b = pairs(0)
    assert (a.shape, b.shape) == ((5, 2 * WIDTH), (2 * WIDTH, 5))
    assert sum(buffer.nbytes for buffer in pairs(0, torch.bfloat16)) == 2 * 5 * (2 * WIDTH + 2 * WIDTH)
    assert all(map(torch.equal, pairs(0), pairs(0))) and not torch.equal(a, next(iter(pairs(1))))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", MODELS)
def test_finish_gives_the_plain_model_back_computing_the_same_function(name, variant):
    model = MODELS[name]()
    next(model.parameters()).requires_grad_(False)
    before = outputs(model)
    modules = {name: type(module) for name, module in model.named_modules()}
    parameters = {name: (p, p.requires_grad) for name, p in model.named_parameters()}
    keys, attributes = list(model.state_dict()), vars(model).keys() | set()
    optimizer = LoRA(model, 1.0 if variant == "vera" else 0.05, rank=3, dropout=0.3, variant=variant)
    stir(model, optimizer)
    trained = outputs(model)
    assert (trained - before).abs().max() > 0.05
    assert optimizer.finish() is model
    torch.testing.assert_close(outputs(model), trained, rtol=1e-4, atol=1e-5)
    assert {name: type(module) for name, module in model.named_modules()} == modules
    assert list(model.state_dict()) == keys and vars(model).keys() == attributes
    for name, p in model.named_parameters():
        assert (p is parameters[name][0], p.requires_grad) == (True, parameters[name][1]), name


@pytest.mark.parametrize("name", MODELS)
def test_all_linear_are_those_of_the_layers_so_neither_head_nor_embeddings(name):
    model = MODELS[name]()
    LoRA(model)
    expected = {
        "plain": {
            f"layers.{i}.{n}"
            for i in range(LAYERS)
            for n in [f"self_attn.{n}" for n in LINEAR[:4]] + [f"mlp.{n}" for n in LINEAR[4:]]
        },
        "roberta": {
            f"roberta.encoder.layer.{i}.{n}"
            for i in range(2)
            for n in ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
                      "intermediate.dense", "output.dense")
        },
        "gpt2": {
            f"transformer.h.{i}.{n}"
            for i in range(2)
            for n in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
        },
    }  # fmt: skip
    assert adapted(model).keys() == expected[name]


def test_what_is_frozen_or_always_trained_is_not_adapted():
    model = build_model()
    model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    LoRA(model, always_train=("layers.1.self_attn", "classifier"))
    names = adapted(model)
    assert len(names) == LAYERS * 7 - 1 - 4
    assert not any(name == "layers.0.mlp.up_proj" or name.startswith("layers.1.self_attn") for name in names)
    trained = {name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name}
    wanted = ("layers.1.self_attn", "classifier")
    assert trained == {name for name, _ in model.named_parameters() if name.startswith(wanted)}


@pytest.mark.parametrize("targets", [("q_proj", "layers.1.mlp.*"), "q_proj, layers.1.mlp.*"])
def test_targets_are_named_by_patterns(targets):
    model = build_model()
    LoRA(model, targets=targets)
    mlp = {f"layers.1.mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")}
    assert adapted(model).keys() == mlp | {f"layers.{i}.self_attn.q_proj" for i in range(LAYERS)}


def test_a_model_without_lists_of_layers_needs_its_targets_named():
    model = nn.Module()
    model.first, model.second = nn.Linear(8, 8), nn.Linear(8, 2)
    with pytest.raises(ValueError, match="'all-linear': Module has no layers .* or name the modules to adapt"):
        LoRA(model)
    LoRA(model, targets=("first",), always_train=("second",))
    assert adapted(model).keys() == {"first"} and model.second.weight.requires_grad


def test_a_module_whose_name_ends_like_a_target_is_left_alone():
    model = build_model()
    model.other = nn.Sequential()
    model.other.add_module("layers", copy.deepcopy(model.layers))
    LoRA(model, always_train=("other",))
    assert all(name.startswith("layers.") for name in adapted(model)) and len(adapted(model)) == 7 * LAYERS


@pytest.mark.parametrize("variant", ["lora", "dora", "vera"])
@pytest.mark.parametrize("trains", [False, True])
def test_adapters_train_or_evaluate_as_the_model_that_they_came_into(variant, trains):
    model = build_model().train(trains)
    model.layers[0].eval()  # as of a layer whose statistics are kept
    optimizer = LoRA(model, dropout=0.5, variant=variant)
    dropouts = {name: module.training for name, module in model.named_modules() if isinstance(module, nn.Dropout)}
    assert dropouts == {name: trains and not name.startswith("layers.0.") for name in dropouts} != {}
    optimizer.finish()
    assert model.training == trains and not model.layers[0].mlp.up_proj.training


def test_every_adapter_gets_a_gradient_even_beside_torchs_own_attention():
    model = nn.Module()
    model.layers = nn.ModuleList([nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)])
    optimizer = LoRA(model)
    optimizer.backward(model.layers[0](torch.randn(2, 5, 16)).square().sum())
    assert adapted(model).keys() == {"layers.0.linear1", "layers.0.linear2"}
    assert all(p.grad is not None for p in optimizer.trainable)


class Encoder(nn.Module):
    """Sequences of tokens (batch, length), perhaps with two of padding, through torch's own encoder."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(20, 16)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True), 2)

    def forward(self, tokens, padded):
        padding = torch.zeros_like(tokens, dtype=torch.bool)
        padding[:, -2:] = padded
        return self.encoder(self.embed(tokens), src_key_padding_mask=padding if padded else None)[:, 0]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("given", [{}, {"variant": "dora"}, {"variant": "vera"}, {"base": "nf4"}], ids=str)
def test_torchs_encoder_evaluates_with_its_adapters_as_it_trains(given, padded):
    model = Encoder()
    with pytest.warns(UserWarning, match=r"leaves out 2 modules, the first being .*out_proj"):
        optimizer = LoRA(model, **given)
    stir(model, optimizer)
    tokens = torch.randint(20, (3, 6), generator=torch.Generator().manual_seed(0))
    trained = model(tokens, padded).detach()
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(tokens, padded), trained)
        torch.testing.assert_close(copy.deepcopy(model)(tokens, padded), trained)
        finished = optimizer.finish()
        assert not any(module._forward_pre_hooks for module in finished.modules())
        assert finished.encoder.use_nested_tensor
        torch.testing.assert_close(finished(tokens, padded), trained, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("variant", ["lora", "rslora", "dora", "lora+", "lora-fa", "vera"])
def test_what_is_not_trained_never_moves(variant):
    model = build_model()
    before = weights_of(model)
    train(model, LoRA(model, 0.05, rank=4, variant=variant, always_train=("classifier",)), 5)
    now = {name.replace(".base_layer", ""): p for name, p in model.named_parameters()}
    for name, value in before.items():
        assert torch.equal(now[name], value) != name.startswith("classifier"), name


def test_the_update_is_scaled_by_alpha_over_rank_or_its_root():
    for given, scale in (
        ({"rank": 4}, 4.0),
        ({"rank": 4, "alpha": 2.0}, 0.5),
        ({"rank": 4, "variant": "rslora"}, 8.0),
        ({"rank": 4, "alpha": 2.0, "variant": "rslora"}, 1.0),
    ):
        model = build_model()
        optimizer = LoRA(model, 0.05, **given)
        stir(model, optimizer)
        module = model.layers[0].mlp.up_proj
        w, b, a = module.base_layer.weight.clone(), module.lora_B.default.weight, module.lora_A.default.weight
        expected = w + scale * b @ a
        torch.testing.assert_close(optimizer.finish().layers[0].mlp.up_proj.weight, expected, rtol=1e-5, atol=1e-5)


def test_pissa_takes_the_leading_singular_directions_out_of_the_weight_and_changes_no_output():
    model = build_model()
    w = model.layers[0].mlp.up_proj.weight.detach().clone()
    before = outputs(model)
    LoRA(model, rank=4, variant="pissa")
    torch.testing.assert_close(outputs(model), before, rtol=1e-5, atol=1e-5)
    rest = torch.linalg.svdvals(model.layers[0].mlp.up_proj.base_layer.weight)
    torch.testing.assert_close(rest[: WIDTH - 4], torch.linalg.svdvals(w)[4:], rtol=0.02, atol=1e-3)


def test_lora_plus_keeps_the_ratio_of_the_rates_under_a_scheduler():
    model = build_model()
    optimizer = LoRA(model, 1e-3, 0.1, variant="lora+", always_train=("classifier",))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + step))
    for step in range(3):
        a, others, b = optimizer.param_groups
        assert b["lr"] == pytest.approx(16e-3 / (1 + step)) and a["lr"] == others["lr"] == pytest.approx(
            1e-3 / (1 + step)
        )
        stir(model, optimizer, 1)
        scheduler.step()
    named = {id(p): name for name, p in model.named_parameters()}
    assert {named[id(p)].split(".")[-3] for p in b["params"]} == {"lora_B"} and len(b["params"]) == 7 * LAYERS
    assert (a["weight_decay"], others["weight_decay"], b["weight_decay"]) == (0.1, 0.0, 0.1)


@pytest.mark.parametrize("dtype, a_weight", [(torch.float32, 8), (torch.bfloat16, 12)])
def test_it_keeps_two_moments_and_a_master_of_the_adapters_alone(dtype, a_weight):
    model = build_model(dtype)
    before = sum(p.numel() for p in model.parameters())
    optimizer = LoRA(model, rank=5)
    stir(model, optimizer, 1)
    weights = LAYERS * 5 * SUM_OF_SIDES
    assert sum(p.numel() for p in model.parameters()) == before + weights
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert optimizer.state_bytes() == a_weight * weights + 4 * LAYERS * 7 * 2


def test_the_first_values_are_a_function_of_the_seed_alone():
    def first(seed, variant):
        torch.rand(3)
        before = torch.get_rng_state()
        model = build_model()
        optimizer = LoRA(model, seed=seed, variant=variant)
        assert torch.equal(torch.get_rng_state(), before)
        return [p.detach() for p in optimizer.trainable if p.any()]

    for variant in ("lora", "pissa"):
        for one, same in zip(first(0, variant), first(0, variant), strict=True):
            assert torch.equal(one, same)
    assert all(not torch.equal(one, other) for one, other in zip(first(0, "lora"), first(1, "lora"), strict=True))


def test_what_can_not_be_adapted_is_refused_and_the_model_left_as_it_was():
    model = build_model()
    names = [name for name, _ in model.named_modules()]
    for given, words in (
        ({"targets": ("q_prj",)}, "'q_prj' matches no linear module. Did you mean 'q_proj'\\?"),
        ({"targets": ("norm",)}, "'norm' matches no linear module"),
        ({"targets": ("classifier",), "always_train": ("classifier",)}, "frozen or always trained"),
        ({"variant": "qlora"}, "variant must be one of"),
        ({"alpha": 0.0}, "alpha must be"),
        ({"alpha": 8.0, "variant": "vera"}, "'vera' has no alpha, so alpha=8.0 would do nothing"),
        ({"dropout": 1.0}, "dropout must be"),
        ({"lora_plus_ratio": -1.0}, "lora_plus_ratio must be"),
        ({"lr": -1.0}, "lr must be"),
    ):
        with pytest.raises(ValueError, match=words):
            LoRA(model, **given)
    assert [name for name, _ in model.named_modules()] == names
    LoRA(model)
    with pytest.raises(ValueError, match="has adapters already: first finish()"):
        LoRA(model)


def test_layers_without_linear_modules_are_told_with_what_can_be_named_instead():
    given = {"hidden_size": 32, "embedding_size": 32, "intermediate_size": 32, "num_attention_heads": 4}
    model = SqueezeBertForSequenceClassification(SqueezeBertConfig(**given, num_hidden_layers=2, vocab_size=50))
    with pytest.raises(ValueError, match="without adapters, or name modules elsewhere: dense, classifier"):
        LoRA(model)


def test_after_finish_the_model_can_be_adapted_again():
    model = build_model()
    for variant in ("pissa", "dora"):
        optimizer = LoRA(model, 0.05, rank=2, variant=variant)
        stir(model, optimizer)
        expected = outputs(model)
        torch.testing.assert_close(outputs(optimizer.finish()), expected, rtol=1e-4, atol=1e-5)


def test_a_state_of_another_variant_is_refused():
    optimizer = LoRA(build_model(), variant="rslora")
    with pytest.raises(ValueError, match="variant='rslora', not 'lora'"):
        LoRA(build_model()).load_state_dict(optimizer.state_dict())
