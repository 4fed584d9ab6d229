"""The library's cases of models: adapted is what was asked for, and blocks are of layers that the loss reaches."""

import copy
import importlib
import warnings
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import transformers
from library import TOKENS, build, config, description, every_method, gemma3, same, steps, subject, tiny_mamba, unlike
from torch import nn
from torch.utils.checkpoint import checkpoint

import optimizers
from optimizers import LoRA
from optimizers.contract import TinyTransformer, build_model, loss_of, train
from optimizers.scale import columns_and_head
from optimizers.shared.adapters import adapted_modules, find_targets
from optimizers.shared.blocks import shuffled
from optimizers.shared.dense_blocks import partitions
from optimizers.shared.matrices import layer_matrices

# ---- adapted is what was asked for


MOE = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
ROUTED = {**MOE, "n_routed_experts": 4, "n_shared_experts": 2, "first_k_dense_replace": 1}
MIXTURES = {
    "deepseek-v2": lambda: config(transformers.DeepseekV2Config, **ROUTED, **MLA),
    "deepseek-v3": lambda: config(transformers.DeepseekV3Config, **ROUTED, **MLA, n_group=2, topk_group=1),
    "glm4-moe": lambda: config(transformers.Glm4MoeConfig, **ROUTED, head_dim=8, n_group=1, topk_group=1),
    "qwen2-moe": lambda: config(transformers.Qwen2MoeConfig, **MOE, num_experts=4, shared_expert_intermediate_size=16),
    "mixtral": lambda: config(transformers.MixtralConfig, num_local_experts=4, num_experts_per_tok=2),
}


@pytest.mark.parametrize("name", MIXTURES)
def test_s2_adapted_is_exactly_what_was_asked_for(name):
    for variant in ("lora", "dora", "pissa"):
        model = build(MIXTURES[name]())
        asked = set(find_targets(model, "all-linear", ()))
        fused = {path for path, p in model.named_parameters() if p.dim() == 3}
        optimizer = LoRA(model, 1e-2, rank=2, variant=variant)
        assert set(adapted_modules(model)) == asked and fused <= {path for path, _ in model.named_parameters()}
        ranks = {p.shape[0] for path, p in model.named_parameters() if ".lora_A." in path}
        assert (ranks == {2} or variant == "pissa") and not hasattr(model, "peft_config")
        steps(model, optimizer, TOKENS, 2)
        model.eval()
        expected = model(input_ids=TOKENS).logits
        torch.testing.assert_close(optimizer.finish()(input_ids=TOKENS).logits, expected, rtol=1e-4, atol=1e-4)


def test_s2_modules_that_peft_adapts_unasked_are_an_error_and_leave_no_trace(monkeypatch):
    model = build_model()
    before = description(model)
    monkeypatch.setattr(
        "peft.LoraModel._check_target_module_exists", lambda self, config, key: key.endswith("_proj"), raising=False
    )
    with pytest.raises(ValueError, match="peft adapted other modules than it was told to; the difference is layers.0"):
        LoRA(model, targets="q_proj")
    assert not unlike(before, description(model))


@pytest.mark.parametrize(
    "normed",
    [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.orthogonal, nn.utils.spectral_norm],
    ids=["weight-norm", "orthogonal", "old-spectral-norm"],
)
def test_l_modules_whose_weight_is_computed_are_left_out_in_a_sentence(normed):
    model = build_model()
    model.layers[0].mlp.up_proj = normed(model.layers[0].mlp.up_proj)
    with pytest.raises(ValueError, match=r"'layers\.0\.mlp\.up_proj' can't be adapted: its weight is computed"):
        LoRA(model, targets="layers.0.mlp.up_proj")
    with pytest.warns(UserWarning, match=r"leaves out 1 modules, the first being layers\.0\.mlp\.up_proj"):
        optimizer = LoRA(model, always_train=("classifier",))
    train(model, optimizer, 2)
    optimizer.finish()


class Twice(torch.nn.Linear):
    def forward(self, x):
        return x @ self.weight.T * 2


class Router(torch.nn.Linear):
    def forward(self, x):
        return super().forward(x + torch.rand(())), x


def test_s2_a_linear_module_of_its_own_kind_is_adapted_if_it_returns_what_a_linear_one_does():
    model = build_model()
    model.layers[0].mlp.up_proj.__class__, model.layers[1].mlp.up_proj.__class__ = Twice, Router
    before = torch.get_rng_state()
    with pytest.warns(
        UserWarning, match=r"out 1 modules, the first being layers\.1\.mlp\.up_proj: Router returns some"
    ):
        names = find_targets(model, "up_proj", ())
    assert "layers.0.mlp.up_proj" in names and "layers.1.mlp.up_proj" not in names
    assert torch.equal(torch.get_rng_state(), before)


def test_w6_lora_trains_what_can_be_adapted_of_a_mamba_and_says_what_it_leaves_out():
    model = tiny_mamba()
    with pytest.raises(ValueError, match=r"'out_proj' can't be adapted: a Mamba layer's kernels read its weight"):
        LoRA(model, targets="out_proj")
    with pytest.warns(UserWarning, match="LoRA leaves out 6 modules"):
        optimizer = LoRA(model, 1e-2)
    assert set(adapted_modules(model)) == {f"backbone.layers.{i}.mixer.in_proj" for i in range(2)}
    losses = steps(model, optimizer, TOKENS, 8)
    assert losses[-1] < losses[0]
    optimizer.finish()


# ---- loss reaches block


CHOOSING = ["badam", "blockllm", "hft", "lisa"]


@pytest.mark.parametrize("method", CHOOSING)
def test_w7_blocks_are_of_layers_that_the_loss_reaches(method):
    example = optimizers.get(method).example
    model = gemma3()
    optimizer = optimizers.create(method, model, **example)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.warns(
        UserWarning, match="2 layers are not trained, since the first batch doesn't reach them: .*vision_tower"
    ):
        losses = steps(model, optimizer, TOKENS, 8)
    assert losses[-1] < losses[0] and optimizer.block_coverage > 0
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert any("language_model.layers" in name for name in moved) and not any("vision" in name for name in moved)
    again = gemma3()
    resumed = optimizers.create(method, again, **example)
    again.load_state_dict(model.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.selection == optimizer.selection
    assert steps(again, resumed, TOKENS, 4) == steps(model, optimizer, TOKENS, 4)


@every_method
@pytest.mark.filterwarnings("ignore")
def test_w7_a_tower_that_the_loss_does_not_reach_stays_as_it_was(method):
    model = gemma3()
    optimizer = optimizers.create(method, model, **optimizers.get(method).example)
    before = {name: p.clone() for name, p in optimizer.finished_state_dict().items()}
    for _ in range(4):
        optimizer.ask(lambda: model(input_ids=TOKENS, labels=TOKENS).loss)
        optimizer.step()
        optimizer.zero_grad()
    plain = optimizer.finish()
    moved = {name for name, p in plain.named_parameters() if not torch.equal(p, before[name])}
    assert moved and not any("vision" in name for name in moved)


@pytest.mark.parametrize("method", CHOOSING)
def test_w7_where_all_towers_run_nothing_is_left_out_and_nothing_is_disturbed(method):
    configuration = config(
        transformers.T5Config, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    models = [build(configuration, transformers.AutoModelForSeq2SeqLM) for _ in range(2)]
    made = [optimizers.create(method, model, **optimizers.get(method).example) for model in models]
    made[1]._reach.remove()  # as if nobody looked
    losses = []
    for model, optimizer in zip(models, made, strict=True):
        torch.manual_seed(5)
        losses.append(steps(model, optimizer, TOKENS, 6))
    assert losses[0] == losses[1] and made[0]._reach.unreached == []


OF_LAYER_1 = next(seed for seed in range(99) if shuffled(6, seed)[0] == 2)  # BlockLLM's first choice is its weight


class SkipsALayer(nn.Module):
    """Runs its layers, but for the second; or all, and drops what the second gives."""

    def __init__(self, runs: bool):
        super().__init__()
        self.layers, self.head, self.runs = nn.ModuleList(nn.Linear(4, 4) for _ in range(3)), nn.Linear(4, 1), runs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for number, layer in enumerate(self.layers):
            if number != 1:
                x = x + layer(x).tanh()
            elif self.runs:
                layer(x)
        return self.head(x)


@pytest.mark.parametrize("runs", [True, False], ids=["runs-for-nothing", "does-not-run"])
@pytest.mark.parametrize(
    ("method", "given"),
    [
        ("badam", {"switch_every": 2, "always_train": ("head",)}),
        ("badam", {"switch_every": 2}),
        ("lisa", {"switch_every": 2, "layers": 1}),
        ("hft", {"switch_every": 2}),
        ("blockllm", {"sparsity": 0.9, "patience": 1, "lr": 0.0, "always_train": ("head",), "seed": OF_LAYER_1}),
    ],
)
def test_w7_a_layer_that_never_gets_a_gradient_is_named(method, given, runs):
    model = SkipsALayer(runs)
    optimizer = optimizers.create(method, model, **given)
    reached = r"no gradient (ever )?reached (block '|any of the 1 tensors|layers\.1)"
    with pytest.raises(RuntimeError, match=rf"{reached}|the loss depends on nothing that \w+ is training"):
        for step in range(40):
            x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
            optimizer.backward(model(x).square().mean())
            optimizer.step()
            optimizer.zero_grad()


class Towers(nn.Module):
    """Two lists of layers; what the second gives is dropped, or returned, perhaps in an object, beside the first's."""

    def __init__(self, returns, checkpointed=False):
        super().__init__()
        torch.manual_seed(0)
        self.lower, self.upper = (nn.ModuleList(nn.Linear(4, 4) for _ in range(2)) for _ in range(2))
        self.returns, self.checkpointed = returns, checkpointed

    def forward(self, x):
        for layer in self.lower:
            x = checkpoint(layer, x.requires_grad_(), use_reentrant=True) if self.checkpointed else x + layer(x).tanh()
        y = x
        for layer in self.upper:
            y = y + layer(y).tanh()
        return {"nothing": x, "it": (x, y), "object": (x, SimpleNamespace(y=y))}[self.returns]


@pytest.mark.parametrize("method", CHOOSING)
def test_w7_layers_that_run_for_nothing_as_canines_last_in_a_classifier_are_left_out(method):
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    configuration = config(transformers.CanineConfig, **size, num_hash_buckets=64, local_transformer_stride=16)
    model = build(configuration, transformers.AutoModelForSequenceClassification)
    optimizer = optimizers.create(method, model, **optimizers.get(method).example)
    batch = {"input_ids": torch.randint(3, 60, (4, 32)), "labels": torch.tensor([0, 1, 0, 1])}
    with pytest.warns(UserWarning, match=r"1 layers are not trained.*: canine\.final_char_encoder\.layer\.0"):
        model(**batch)
    for _ in range(20):
        optimizer.backward(model(**batch).loss)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(
    ("returns", "checkpointed", "unreached"),
    [
        ("nothing", False, ["upper.0", "upper.1"]),
        ("it", False, []),
        ("object", False, []),
        ("it", True, []),
    ],
)
@pytest.mark.filterwarnings("ignore:2 layers are not trained")
def test_w7_a_layer_is_left_out_only_if_nothing_that_is_returned_depends_on_it(returns, checkpointed, unreached):
    model = Towers(returns, checkpointed)
    optimizer = optimizers.create("badam", model)
    required = [p.requires_grad for p in model.parameters()]
    model(torch.ones(2, 4))
    assert optimizer._reach.unreached == unreached
    if not unreached:
        assert required == [p.requires_grad for p in model.parameters()]


def train_towers(model, optimizer, count):
    for step in range(count):
        given = model(torch.arange(8.0).view(2, 4) + step)
        optimizer.backward(sum(x.square().mean() for x in (given if isinstance(given, tuple) else (given,))))
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.filterwarnings("ignore:2 layers are not trained")
@pytest.mark.parametrize("method", CHOOSING)
def test_w7_a_state_of_before_the_first_batch_is_gone_back_to_as_a_search_for_a_rate_does(method):
    model = Towers("nothing")
    optimizer = optimizers.create(method, model, **optimizers.get(method).example)
    before = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    found = []
    for _ in range(2):
        model.load_state_dict(before[0])
        optimizer.load_state_dict(before[1])
        train_towers(model, optimizer, 4)
        found.append((copy.deepcopy(model.state_dict()), optimizer.state_dict()))
    assert same(*found)


@pytest.mark.filterwarnings("ignore:2 layers are not trained")
@pytest.mark.parametrize("method", CHOOSING)
@pytest.mark.parametrize("knows", [True, False])
def test_w7_a_state_that_is_refused_leaves_what_is_known_of_the_layers_and_kept_for_them(method, knows):
    states = []
    for returns in ("nothing", "it", "nothing" if knows else None):
        model = Towers(returns)
        optimizer = optimizers.create(method, model, **optimizers.get(method).example)
        train_towers(model, optimizer, 0 if returns is None else 2)
        states.append(copy.deepcopy(optimizer.state_dict()))
    for state in states[:2]:
        next(iter(state["state"].values()))["exp_avg"] = torch.zeros(3)
        with pytest.raises(ValueError, match="this state doesn't fit"):
            optimizer.load_state_dict(state)
        assert same(optimizer.state_dict(), states[2])


def test_w7_adapters_that_the_model_does_not_reach_are_named():
    model = gemma3()
    with pytest.warns(
        UserWarning, match="no gradient reached the adapters of 12 of 33 modules in the first step, .*vis"
    ):
        steps(model, LoRA(model), TOKENS, 1)


class Checkpointed(TinyTransformer):
    """Its layers are checkpointed by torch's function, re-entrantly; nothing below them is trained."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__()

    def forward(self, tokens):
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=True)
        return self.classifier(self.norm(x).mean(1))


@pytest.mark.filterwarnings("ignore:None of the inputs")
@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("lora", "adapters of 21 of 21 modules in the first step, the first being layers.0.*leave them out of targets"),
        ("qlora", "adapters of 21 of 21 modules"),
        ("welore", r"factors of \d+ of \d+ modules in the first step, the first being layers.0.*freeze them before"),
    ],
)
def test_where_only_the_head_gets_gradients_it_is_said(method, words):
    model = Checkpointed()
    with pytest.warns(UserWarning, match=rf"no gradient reached the {words}.*uses re-entrant gradient checkpointing"):
        train(model, subject(method).build(model), 1)


@pytest.mark.filterwarnings("ignore:None of the inputs")
def test_blockllm_does_not_go_on_where_only_the_head_lowers_the_loss():
    model = Checkpointed()
    optimizer = subject("blockllm", patience=5).build(model)
    losses = []
    with pytest.raises(RuntimeError, match="no gradient reached any of the .* uses re-entrant gradient checkpointing"):
        for _ in range(20):
            losses.append(loss_of(model, 0))
            optimizer.backward(losses[-1])
            optimizer.step()
            optimizer.zero_grad()
    assert len(losses) == 5 and sorted(losses, reverse=True) == losses


# ---- models that are put together in other ways


class Tied(nn.Module):
    """A language model whose head is its embedding, and whose first and last layer are one module."""

    def __init__(self, alias=True):
        super().__init__()
        torch.manual_seed(0)
        self.embed_tokens = nn.Embedding(20, 16)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
        if alias:
            self.layers[2] = self.layers[0]
        self.classifier = nn.Linear(16, 20, bias=False)
        self.classifier.weight = self.embed_tokens.weight

    def forward(self, tokens):
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = x + layer(x).tanh()
        return self.classifier(x.mean(1))


@every_method
def test_a_tied_head_is_always_trained_by_its_own_name(method):
    model = Tied(alias=False)
    before = model.classifier.weight.detach().clone()
    optimizer = subject(method).build(model)
    for step in range(3):
        optimizer.ask(lambda step=step: loss_of(model, step))
        optimizer.step()
        optimizer.zero_grad()
        assert not torch.equal(model.classifier.weight, before)
        before = model.classifier.weight.detach().clone()
    plain = optimizer.finish()
    assert plain.classifier.weight is plain.embed_tokens.weight


@pytest.mark.parametrize("method", ["lora", "qlora", "welore"])
def test_a_module_with_two_places_in_the_model_stays_as_it_is(method):
    model = Tied()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = subject(method, **({"reduction": 0.8} if method == "welore" else {})).build(model)
    assert type(model.layers[0]) is nn.Linear
    train(model, optimizer, 3)
    trained = loss_of(model.eval(), 9)
    plain = optimizer.finish()
    assert plain.layers[0] is plain.layers[2]
    torch.testing.assert_close(loss_of(plain, 9), trained)  # the same function


def test_a_module_with_two_places_is_named():
    with pytest.warns(UserWarning, match="LoRA leaves out 1 modules, the first being layers.0: it has two places"):
        optimizers.LoRA(Tied())
    with pytest.raises(ValueError, match=r"'layers\.0' can't be adapted: it has two places in the model"):
        optimizers.LoRA(Tied(), targets="layers.0")


STACKED = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
ELEMENTWISE = {
    "gpt-oss": (lambda: build(config(transformers.GptOssConfig, **STACKED)), ("gate_up_proj_bias", "down_proj_bias")),
    "mamba": (tiny_mamba, ("A_log",)),
}


@pytest.mark.parametrize("name", ELEMENTWISE)
@pytest.mark.parametrize("method", ["adamw", "badam", "muon", "apollo", "sinkgd", "scale"])
def test_biases_and_rates_of_two_dimensions_neither_decay_nor_count_as_matrices(method, name):
    make, names = ELEMENTWISE[name]
    model = make()
    some = {path: p for path, p in model.named_parameters() if path.endswith(names)}
    assert some and all(p.dim() == 2 for p in some.values())
    before = {path: p.clone() for path, p in model.named_parameters()}
    optimizer = optimizers.create(method, model, lr=0.1, weight_decay=0.1)
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    optimizer.step()
    decayed = {path for path, p in model.named_parameters() if not torch.equal(p, before[path])}
    assert decayed and not decayed & set(some)
    matrices, (columns, _) = layer_matrices(model), columns_and_head(model)
    assert matrices and not set(some.values()) & {*matrices, *columns}


FUSED = {  # of an expert's matrices, which dimension takes the input
    "mixtral": (MIXTURES["mixtral"], 2),
    "gpt-oss": (lambda: config(transformers.GptOssConfig, **STACKED), 1),
    "llama4": (lambda: config(transformers.Llama4TextConfig, **{**STACKED, "num_experts_per_tok": 1}), 1),
}


@pytest.mark.parametrize("name", FUSED)
def test_a_column_of_scale_and_a_block_of_adam_mini_are_an_experts_output_whichever_way_its_matrix_lies(name):
    make, inputs = FUSED[name]
    model = build(make())
    experts = next(module for module in model.modules() if "Experts" in type(module).__name__)
    summed, partition = columns_and_head(model)[0], partitions(model)
    for own, p in experts.named_parameters(recurse=False):
        if p.dim() == 3:
            outputs = p.numel() // p.shape[inputs]
            assert (summed[p], partition[p].averaged, partition[p].blocks) == ((inputs,), (inputs,), outputs), own
        else:
            assert partition[p].blocks == p.numel(), own  # of a bias each entry


class Experts(nn.Module):
    """The matrices of experts in one tensor (experts, m, n)."""

    def __init__(self, stack):
        super().__init__()
        self.gate_up_proj = nn.Parameter(stack.clone())


def of_experts(stack):
    together, apart = nn.Module(), nn.Module()
    together.layers = nn.ModuleList([Experts(stack)])
    apart.layers = nn.ModuleList(nn.Linear(*one.T.shape, bias=False, dtype=stack.dtype) for one in stack)
    for layer, one in zip(apart.layers, stack, strict=True):
        layer.weight.data = one.clone()
    return together, apart


LOW_RANK = {"rank": 2, "update_every": 3}
EXACT = {**LOW_RANK, "svd": "exact"}


@pytest.mark.parametrize(("method", "given"), [
    ("muon", {"weight_decay": 0.1}),
    ("sinkgd", {}),
    ("sinkgd", {"weight_decay": 0.1}),
    ("galore", {**EXACT, "weight_decay": 0.1}),
    ("galore", {**EXACT, "projection": "full", "lazy": True, "projection_bits": 8, "states": "8bit"}),
    ("fira", EXACT),
    ("apollo", {**LOW_RANK, "weight_decay": 0.1}),
    ("apollo", {"scale_type": "tensor"}),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_matrices_of_experts_in_one_tensor_are_trained_as_if_each_had_its_own(method, given, dtype, monkeypatch):
    monkeypatch.setattr("optimizers.shared.matrices.PIECE", 2 * 6 * 4)  # two experts are computed at once
    for_all = torch.linspace(-1, 1, 12).view(2, 6)  # which expert it is, only its key says
    monkeypatch.setattr(
        "optimizers.apollo.random_projection", lambda rank, length, like, key: for_all[:rank, :length].to(like)
    )
    generator = torch.Generator().manual_seed(0)
    together, apart = of_experts(torch.randn(3, 6, 4, generator=generator).to(dtype))
    one, several = (optimizers.create(method, model, lr=0.1, **given) for model in (together, apart))
    for number in range(8):
        if number == 4:  # continued elsewhere
            saved = copy.deepcopy(one.state_dict())
            one.finish()
            one = optimizers.create(method, together, lr=0.1, **given)
            one.load_state_dict(saved)
        gradients = torch.randn(3, 6, 4, generator=generator).to(dtype)
        together.layers[0].gate_up_proj.grad = gradients.clone()
        for layer, gradient in zip(apart.layers, gradients, strict=True):
            layer.weight.grad = gradient.clone()
        one.step()
        several.step()
        weights = torch.stack([layer.weight for layer in apart.layers])  # LAPACK's last bit depends on alignment
        torch.testing.assert_close(together.layers[0].gate_up_proj.data, weights, rtol=1e-5, atol=1e-6)
    assert one.state_bytes() == several.state_bytes()


@pytest.mark.parametrize(("method", "function"), [("muon", "orthogonalize_"), ("sinkgd", "normalized")])
def test_small_matrices_of_experts_are_computed_at_once(method, function):
    model, _ = of_experts(torch.zeros(8, 6, 4))
    optimizer = optimizers.create(method, model, lr=0.1)
    model.layers[0].gate_up_proj.grad = torch.ones(8, 6, 4)
    module = importlib.import_module(f"optimizers.{method}")
    with mock.patch.object(module, function, wraps=getattr(module, function)) as computed:
        optimizer.step()
    assert [call.args[0].shape for call in computed.call_args_list] == [(8, 6, 4)]


@pytest.mark.parametrize(("method", "given"), [("galore", {}), ("galore", {"lazy": True}), ("fira", {})], ids=str)
@pytest.mark.parametrize("without", [1, 2, 4])  # subspaces are due at updates 1 and 4
def test_an_expert_without_tokens_chooses_its_subspace_by_its_next_gradient(method, given, without):
    generator = torch.Generator().manual_seed(0)
    model, _ = of_experts(torch.zeros(3, 20, 12))
    optimizer = optimizers.create(method, model, lr=0.1, **LOW_RANK, **given)
    experts = model.layers[0].gate_up_proj
    first, second = (torch.randn(20, 2, generator=generator) @ torch.randn(2, 12, generator=generator) for _ in "12")
    for number in range(1, 6):
        gradient = first if number < 4 else second  # of rank 2
        experts.grad = torch.stack([gradient, torch.zeros_like(gradient) if number == without else gradient, gradient])
        optimizer.step()
        right = optimizer.state[experts]["right"]
        if number in (3, 5):  # each has chosen of the first gradient, or of the second
            kept = gradient @ right.mT @ right
            torch.testing.assert_close(kept, gradient.expand_as(kept), rtol=1e-4, atol=1e-4)
    if "lazy" in given:  # two choices each, compared once
        assert [len(cosines) for cosines in optimizer.state[experts]["cosines"]] == [1, 1, 1]


@pytest.mark.parametrize("method", ["galore", "fira", "apollo"])
def test_a_state_of_experts_can_be_loaded_again_after_training_went_on_from_it(method):
    generator = torch.Generator().manual_seed(0)
    stack, *gradients = torch.randn(6, 3, 6, 4, generator=generator)
    model, _ = of_experts(stack)
    optimizer = optimizers.create(method, model, lr=0.1, **LOW_RANK)
    experts = model.layers[0].gate_up_proj

    def trained(saved):
        experts.data = stack.clone()
        optimizer.load_state_dict(saved)
        for g in gradients:
            experts.grad = g.clone()
            optimizer.step()
        return experts.detach().clone()

    saved = copy.deepcopy(optimizer.state_dict())
    once = trained(saved)
    saved = copy.deepcopy(optimizer.state_dict())
    assert not torch.equal(trained(saved), once) and torch.equal(trained(saved), trained(saved))


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_weights_that_layers_share_as_zambas_do_stay_as_they_are_and_the_others_are_adapted(method):
    model = build_model()
    model.layers[1].mlp.up_proj.weight = model.layers[0].mlp.up_proj.weight
    nn.utils.parametrizations.weight_norm(model.layers[1].mlp.down_proj)
    with pytest.warns(UserWarning) as told:
        optimizer = optimizers.create(method, model, always_train=("classifier",))
    said = " ".join(str(warning.message) for warning in told)  # each reason
    assert "LoRA leaves out 2 modules, the first being layers.0.mlp.up_proj: its weight is tied to another" in said
    assert "LoRA leaves out 1 modules, the first being layers.1.mlp.down_proj: its weight is computed" in said
    left_out = {"layers.0.mlp.up_proj", "layers.1.mlp.up_proj", "layers.1.mlp.down_proj"}
    assert adapted_modules(model) and not left_out & set(adapted_modules(model))
    train(model, optimizer, 2)
    plain = optimizer.finish()
    assert plain.layers[1].mlp.up_proj.weight is plain.layers[0].mlp.up_proj.weight


@pytest.mark.parametrize("method", ["lomo", "adalomo", "badam"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_were_cut_from_one_tensor_are_updated_in_the_backward_pass_like_any_others(method, dtype):
    """transformers cuts the fused weights of some checkpoints (Nomic-BERT, GTE, Jina, HRM) as it loads them."""
    losses = []
    for cut in (False, True):
        model = build_model()
        modules = [layer.mlp.up_proj for layer in model.layers]
        parts = torch.cat([module.weight.detach() for module in modules]).chunk(len(modules))
        for module, part in zip(modules, parts, strict=True):
            module.weight = nn.Parameter(part if cut else part.clone())
        model.to(dtype)
        given = {"in_backward": True} if method == "badam" else {}
        optimizer = optimizers.create(method, model, lr=1e-3, **given)
        losses.append(train(model, optimizer, 3))
        assert len({module.weight.untyped_storage().data_ptr() for module in modules}) == len(modules)
        assert {module.weight for module in modules} <= optimizer._group_of.keys()
    assert losses[0] == losses[1]


class TwoStacks(nn.Module):
    """An encoder, and a decoder whose layers are lists, which no one calls: their parts are called."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed_tokens = nn.Embedding(20, 16)
        self.encoder = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))
        self.decoder = nn.ModuleList(nn.ModuleList(nn.Linear(16, 16) for _ in range(2)) for _ in range(2))
        self.classifier = nn.Linear(16, 3)

    def forward(self, tokens):
        x = self.embed_tokens(tokens)
        for part in (*self.encoder, *(part for layer in self.decoder for part in layer)):
            x = x + part(x).tanh()
        return self.classifier(x.mean(1))


@pytest.mark.parametrize("method", ["badam", "blockllm", "lisa", "hft"])
def test_layers_whose_parts_the_model_calls_are_reached(method):
    model = TwoStacks()
    optimizer = subject(method).build(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, 2)
    assert optimizer._reach.unreached == []


def _farthest(made, model):
    """How far three steps on small gradients move a weight at most."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = made.build(model)
    for step in range(3):
        optimizer.ask(lambda step=step: loss_of(model, step) * 1e-3)
        optimizer.step()
        optimizer.zero_grad()
    kept = {name: p.detach() for name, p in model.named_parameters() if name in before}
    return max(float((p - before[name]).abs().max()) for name, p in kept.items())


@every_method
def test_no_moment_of_adam_is_in_float16(method):
    made = subject(method)
    model = build_model(torch.float16)
    if method in ("galore", "fira", "apollo", "muon", "scale", "sinkgd"):
        with pytest.raises(ValueError, match="would keep the moments of .* in float16, .*: cast the model to bfloat16"):
            made.build(model)
        return
    assert _farthest(made, model) <= 2 * _farthest(made, build_model()) + 1e-3
    if method in ("adamw", "adam-mini", "badam", "blockllm", "lisa", "hft", "lora", "qlora", "welore"):
        with pytest.raises(ValueError, match="or give master_weights=True"):
            made.build(build_model(torch.float16), master_weights=False)


def test_a_matrix_whose_first_gradient_is_zero_is_trained_as_soon_as_it_has_one():
    model = build_model()
    for layer in model.layers:  # so nothing above depends on what is below, at first
        nn.init.zeros_(layer.mlp.down_proj.weight)
    optimizer = subject("apollo", lr=1e-2, rank=4).build(model)
    train(model, optimizer, 1)
    before = model.layers[0].mlp.up_proj.weight.detach().clone()
    train(model, optimizer, 1, start=1)
    step = (model.layers[0].mlp.up_proj.weight - before).norm() / before.numel() ** 0.5
    assert step > 1e-3  # Adam's would be 1e-2, spread over r of 16 dimensions


@every_method
def test_weights_in_float64_keep_their_digits(method):
    model = build_model(torch.float64)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, subject(method).build(model), 3)
    moved = [p.detach() for name, p in model.named_parameters() if not torch.equal(p, before.get(name, p))]
    assert moved and all(not torch.equal(p.float().double(), p) for p in moved)


@pytest.mark.parametrize("method", ["galore", "muon", "sinkgd", "adamw"])
def test_a_cast_to_float16_is_met_as_a_model_in_float16(method):
    model = build_model()
    optimizer = subject(method, **({"master_weights": False} if method == "adamw" else {})).build(model)
    model.half()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match="would keep the moments of .* in float16"):
        train(model, optimizer, 1)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


# ---- a model that was loaded in 8 bits or fewer


class Quantized(nn.Linear):
    def __init__(self, dense):
        super().__init__(dense.in_features, dense.out_features)
        self.weight = nn.Parameter((dense.weight.detach() * 100).to(torch.int8), requires_grad=False)

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) / 100, self.bias)


def quantized():
    model = build_model()
    for layer in model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, child in list(parent.named_children()):
                setattr(parent, name, Quantized(child))
    return model


@every_method
def test_quantized_weights_are_not_passed_over_in_silence(method):
    model = quantized()
    if optimizers.get(method).adds_parameters:
        with pytest.raises(ValueError, match="neither frozen" if method == "welore" else "it is quantized"):
            subject(method).build(model)
    else:
        with pytest.warns(UserWarning, match="can't train 21 quantized weights, the first being layers.0.self_attn"):
            optimizer = subject(method).build(model)
        train(model, optimizer, 2)


@pytest.mark.parametrize(
    ("method", "given"),
    [("qlora", {"rank": 4}), ("welore", {"reduction": 0.9}), ("galore", {"weights": "8bit"})],
    ids=str,
)
def test_hooks_of_a_linear_module_that_is_replaced_go_on_and_can_still_be_removed(method, given):
    model, seen = build_model(), []
    handle = model.layers[0].mlp.down_proj.register_forward_hook(lambda module, inputs, output: seen.append(output))
    dense = model.layers[0].mlp.down_proj
    optimizer = optimizers.create(method, model, **given)
    assert not any(module is dense for module in model.modules())
    loss_of(model, 0)
    assert len(seen) == 1
    handle.remove()
    loss_of(model, 1)
    assert len(seen) == 1
    assert optimizer.finish().layers[0].mlp.down_proj is dense
