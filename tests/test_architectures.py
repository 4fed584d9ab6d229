"""Every method trains every architecture: what must hold of each pair, on a tiny random instance of it."""

import io
import itertools
from collections import Counter
from typing import Any

import pytest
import torch
import transformers
from architectures import ARCHITECTURES, INNER, LAYERS, VOCABULARY, WIDTH, Architecture
from plan_models import at_peak, maxima
from torch import Tensor, nn

import optimizers
from membench.memory.components import classify
from membench.planning.blueprint import Blueprint
from membench.planning.planner import method_values
from membench.planning.simulate import simulate
from membench.planning.workload import Workload
from optimizers import GaLore, LoRA, MemoryEfficientOptimizer
from optimizers.shared.adapters import adapted_modules, find_targets
from optimizers.shared.blocks import split_into_blocks
from optimizers.shared.layer_parts import parts_of_layers
from optimizers.shared.matrices import layer_matrices
from optimizers.shared.nf4_linear import NF4Linear
from reports.parts import PARTS
from tasks.models.source import Source

# One random direction a step: 30 of them lower the loss a little, and of a causal model with another rate.
BY_LOSSES_ALONE = {"mezo": {"lr": 3e-3}}
# The pairs that tell most are quick: what sees a weight as a matrix with GPT-2 (fused, transposed matrices, tied
# embeddings), any other method with another model, which changes from one to the next. `make test-slow` has all.
OF_MATRICES = ("galore", "fira", "apollo", "muon", "lora", "qlora", "welore", "scale", "sinkgd", "adafactor", "adalomo")
OTHERS = [name for name in ARCHITECTURES if name != "gpt2"]
QUICK = {("gpt2", method) for method in OF_MATRICES} | {
    (OTHERS[n % len(OTHERS)], method)
    for n, method in enumerate(name for name in optimizers.available() if name not in OF_MATRICES)
}
PAIRS = [
    pytest.param(name, method, marks=() if (name, method) in QUICK else pytest.mark.slow)
    for name in ARCHITECTURES
    for method in optimizers.available()
]
PER_ARCHITECTURE = pytest.mark.parametrize("name", ARCHITECTURES)
every_pair = pytest.mark.parametrize(("name", "method"), PAIRS)


def create(method: str, model: nn.Module, architecture: Architecture, **given: Any) -> MemoryEfficientOptimizer:
    """With hyper-parameters that suit a tiny model; a new head is named, as the tasks do."""
    given = {**optimizers.get(method).example, **BY_LOSSES_ALONE.get(method, {}), **given}
    if architecture.head and "always_train" in optimizers.resolve(method):
        given["always_train"] = architecture.head
    return optimizers.create(method, model, **given)


def train(model: nn.Module, optimizer: MemoryEfficientOptimizer, batch: dict[str, Tensor], steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        loss = optimizer.ask(lambda: model(**batch).loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def outputs(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    training = model.training
    logits = model.eval()(**batch).logits
    model.train(training)
    return logits


def tied(model: Any) -> bool:
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


# ---- every method on every architecture


def test_every_architecture_and_every_method_is_among_the_quick_ones():
    assert {name for name, _ in QUICK} == set(ARCHITECTURES)
    assert {method for _, method in QUICK} == set(optimizers.available())


@every_pair
def test_the_loss_falls_and_a_plain_model_of_the_same_function_comes_out(name, method, tmp_path):
    architecture = ARCHITECTURES[name]
    model, batch = architecture.build(), architecture.batch()
    parts = {path: type(module) for path, module in model.named_modules()}
    keys = list(model.state_dict())
    optimizer = create(method, model, architecture)
    losses = train(model, optimizer, batch, 30)
    assert sum(losses[-3:]) / 3 < (0.95 if method in BY_LOSSES_ALONE else 0.4) * losses[0]
    expected = outputs(model, batch)
    plain = optimizer.finish()
    assert plain is model and {path: type(module) for path, module in plain.named_modules()} == parts
    assert list(plain.state_dict()) == keys and all(p.requires_grad for p in plain.parameters())
    assert tied(plain) == architecture.tied
    torch.testing.assert_close(outputs(plain, batch), expected, rtol=1e-4, atol=1e-4)  # adapters are merged now
    plain.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(outputs(again, batch), outputs(plain, batch)) and tied(again) == architecture.tied


@every_pair
def test_only_what_is_selected_moves_and_never_what_was_frozen(name, method):
    architecture = ARCHITECTURES[name]
    model, batch = architecture.build(), architecture.batch()
    frozen = [model.get_input_embeddings(), model.get_submodule(f"{architecture.layers}.1.{architecture.mlp[-1]}")]
    for module in frozen:
        module.weight.requires_grad_(False)
    start = {path: (p, p.detach().clone()) for path, p in model.named_parameters()}
    # all of its tensors, or BlockLLM may leave a layer out
    optimizer = create(method, model, architecture, **({"sparsity": 0.0} if method == "blockllm" else {}))
    for _ in range(optimizer.cycle_length):
        weights = {p: p.detach().clone() for p in model.parameters()}
        selected = {p for p in weights if p.requires_grad}
        train(model, optimizer, batch, 2)
        moved = {p for p, value in weights.items() if not torch.equal(p, value)}
        assert moved and moved <= selected
        optimizer.advance()
    finished = dict(optimizer.finish().named_parameters())
    assert all(finished[path] is p for path, (p, _) in start.items())
    changed = {path for path, (p, value) in start.items() if not torch.equal(p, value)}
    for path, p in finished.items():
        if any(p is module.weight for module in frozen):
            assert not p.requires_grad and path not in changed
    for layer in range(LAYERS):
        assert any(path.startswith(f"{architecture.layers}.{layer}.") for path in changed), f"layer {layer} never moved"


@every_pair
def test_a_training_resumes_to_the_last_bit(name, method):
    architecture = ARCHITECTURES[name]
    batch = architecture.batch()
    straight = architecture.build()
    expected = train(straight, create(method, straight, architecture), batch, 8)
    model = architecture.build()
    optimizer = create(method, model, architecture)
    losses = train(model, optimizer, batch, 4)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    revived = architecture.build()
    again = create(method, revived, architecture)
    revived.load_state_dict(saved["model"])
    again.load_state_dict(saved["optimizer"])
    assert losses + train(revived, again, batch, 4) == expected
    for p, q in zip(straight.parameters(), revived.parameters(), strict=True):
        assert torch.equal(p, q)


# ---- where each method finds its parts


def in_layers(architecture: Architecture, names: tuple[str, ...]) -> set[str]:
    return {f"{architecture.layers}.{layer}.{name}" for layer in range(LAYERS) for name in names}


@PER_ARCHITECTURE
def test_every_layer_is_a_block_and_holds_all_of_its_parameters(name):
    architecture = ARCHITECTURES[name]
    model = architecture.build()
    blocks = split_into_blocks(model, embeddings=True)
    layers = [f"{architecture.layers}.{layer}" for layer in range(LAYERS)]
    assert list(blocks) == ["embeddings", *layers, "head"]
    for layer in layers:
        assert set(blocks[layer]) == set(model.get_submodule(layer).parameters())
    counts = Counter(p for params in blocks.values() for p in params)
    assert set(counts) == set(model.parameters()) and set(counts.values()) == {1}
    in_blocks = {model.get_input_embeddings().weight: "embeddings"}
    if architecture.is_causal and not architecture.tied:
        in_blocks[model.get_output_embeddings().weight] = "head"
    for p, block in in_blocks.items():
        assert any(p is other for other in blocks[block])


@PER_ARCHITECTURE
def test_half_layers_are_attention_and_mlp_and_matrices_are_blocks_of_their_own(name):
    architecture = ARCHITECTURES[name]
    model = architecture.build()
    halves = split_into_blocks(model, "sublayer")
    assert len(halves) == 2 * LAYERS
    for layer in range(LAYERS):
        for half, names in (("attention", architecture.attention), ("mlp", architecture.mlp)):
            block = halves[f"{architecture.layers}.{layer}.{half}"]
            expected = {model.get_submodule(f"{architecture.layers}.{layer}.{one}").weight for one in names}
            assert {p for p in block if p.dim() == 2} == expected
    assert set(split_into_blocks(model, "matrix")) == in_layers(architecture, architecture.attention + architecture.mlp)


@PER_ARCHITECTURE
def test_adapters_and_projections_go_to_all_matrices_of_the_layers(name):
    architecture = ARCHITECTURES[name]
    model = architecture.build()
    expected = in_layers(architecture, architecture.attention + architecture.mlp)
    assert set(find_targets(model, "all-linear", ())) == expected
    assert set(layer_matrices(model)) == {model.get_submodule(path).weight for path in expected}


@PER_ARCHITECTURE
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_adapted_is_what_was_asked_for(name, method):
    architecture = ARCHITECTURES[name]
    model = architecture.build()
    create(method, model, architecture)
    assert set(adapted_modules(model)) == in_layers(architecture, architecture.attention + architecture.mlp)
    four_bits = {path.removesuffix(".base_layer") for path, m in model.named_modules() if isinstance(m, NF4Linear)}
    assert four_bits == (set(adapted_modules(model)) if method == "qlora" else set())


@PER_ARCHITECTURE
def test_half_fine_tuning_draws_from_attention_mlp_and_norms(name):
    architecture = ARCHITECTURES[name]
    model = architecture.build()
    parts, layers = parts_of_layers(model, leave_out=())
    assert [[len(category) for category in layer] for layer in layers] == LAYERS * [
        [len(architecture.attention), len(architecture.mlp), architecture.norms]
    ]
    assert sum(len(params) for params in parts.values()) == sum(
        1 for layer in range(LAYERS) for _ in model.get_submodule(f"{architecture.layers}.{layer}").parameters()
    )


@PER_ARCHITECTURE
def test_every_parameter_has_its_component(name):
    architecture = ARCHITECTURES[name]
    model = architecture.build()
    components = classify(model)
    expected, reached = {}, False
    for path, p in model.named_parameters():
        module = path.rpartition(".")[0]
        inside = path.startswith(f"{architecture.layers}.")
        reached = reached or inside
        of_layer = ".".join(module.removeprefix(f"{architecture.layers}.").split(".")[1:])
        if p.dim() == 1 and "norm" in type(model.get_submodule(module)).__name__.lower():
            expected[module] = "norms"
        elif inside:
            expected[module] = "attention" if of_layer in architecture.attention else "mlp"
        else:
            expected[module] = "head" if reached else "embeddings"
    assert {module: components[module] for module in expected} == expected
    output = model.get_output_embeddings()  # a tied one holds no parameter of its own, but it makes the logits
    if output is not None:
        assert {components[path] for path, module in model.named_modules() if module is output} == {"head"}


@pytest.mark.parametrize("variant", ["rslora", "dora", "pissa", "lora+", "lora-fa", "vera"])
@pytest.mark.parametrize("name", ["gpt2", "gpt-neox"])
def test_variants_of_lora_take_fused_and_transposed_matrices(name, variant):
    architecture = ARCHITECTURES[name]
    model, batch = architecture.build(), architecture.batch()
    before = outputs(model, batch)
    optimizer = LoRA(model, {"lora+": 1e-3, "vera": 0.1}.get(variant, 1e-2), rank=4, variant=variant)
    torch.testing.assert_close(outputs(model, batch), before, rtol=1e-4, atol=1e-3)
    losses = train(model, optimizer, batch, 20)
    assert losses[-1] < 0.6 * losses[0]
    expected = outputs(model, batch)
    torch.testing.assert_close(outputs(optimizer.finish(), batch), expected, rtol=1e-3, atol=1e-3)


def test_galore_projects_the_longer_side_of_a_transposed_matrix_as_of_any_other():
    architecture = ARCHITECTURES["gpt2"]
    model = architecture.build()
    optimizer = GaLore(model, 1e-2, rank=4)
    train(model, optimizer, architecture.batch(), 1)
    attention = model.transformer.h[0].attn
    assert attention.c_attn.weight.shape == (32, 96)  # (in, out): the rows are projected
    assert optimizer.state[attention.c_attn.weight]["left"].shape == (32, 4)
    assert optimizer.state[attention.c_attn.weight]["exp_avg"].shape == (4, 96)


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if ARCHITECTURES[name].tied])
def test_an_adapter_on_a_tied_head_is_refused_since_it_would_change_the_embeddings_too(name):
    with pytest.raises(ValueError, match="'lm_head'.*tied"):
        LoRA(ARCHITECTURES[name].build(), targets=("lm_head",))


# ---- memory


PLANNED_QUICKLY = {
    ("llama", "badam"),
    ("gemma2", "lora"),
    ("roberta", "badam"),
    ("gpt-neox", "lora"),
    ("distilbert", "badam"),
}


@pytest.mark.parametrize(
    ("name", "method"),
    [
        pytest.param(*pair, marks=[] if pair in PLANNED_QUICKLY else pytest.mark.slow)
        for pair in itertools.product(ARCHITECTURES, ["badam", "lora"])
    ],
)
def test_planned_on_fake_tensors_equals_metered_on_real_ones(name, method, tmp_path):
    ARCHITECTURES[name].config().save_pretrained(tmp_path)
    b = Blueprint(Workload(str(tmp_path), batch_size=2, sequence_length=12, dtype="float32", device="cpu"))
    assert b.is_causal == ARCHITECTURES[name].is_causal and b.head == ARCHITECTURES[name].head
    values = method_values(b, method, {})
    planned, metered = (simulate(b, method, values, b.depth, device=d) for d in (None, "cpu"))
    assert maxima(planned) == maxima(metered)
    assert [size > 0 for size in maxima(planned)] == [True, *(not part.later for part in PARTS)]  # one process
    assert at_peak(planned) == at_peak(metered)


@pytest.mark.parametrize("method", ["badam", "lora"])
def test_a_model_whose_first_weights_depend_on_what_is_drawn_is_planned_like_any_other(method, tmp_path):
    shape = {"hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
    tokens = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = transformers.ModernBertDecoderConfig(**shape, **tokens, local_attention=4)  # draws again beyond a limit
    config.save_pretrained(tmp_path)
    b = Blueprint(Workload(str(tmp_path), batch_size=2, sequence_length=12, dtype="float32", device="cpu"))
    values = method_values(b, method, {})
    planned, metered = (simulate(b, method, values, b.depth, device=d) for d in (None, "cpu"))
    assert maxima(planned) == maxima(metered) and at_peak(planned) == at_peak(metered)


@PER_ARCHITECTURE
def test_a_folder_of_it_is_fine_tuned_with_a_new_head_that_every_method_trains(name, tmp_path):
    architecture = ARCHITECTURES[name]
    architecture.build().base_model.save_pretrained(tmp_path)
    source = Source(str(tmp_path))
    kind, settings = transformers.AutoModelForSequenceClassification, {"num_labels": 3, "pad_token_id": 0}
    assert source.head(kind, **settings) == (architecture.head or ("score",))
    model = source.build(kind, 0, "float32", **settings)
    batch = architecture.batch() | {"labels": torch.arange(6) % 3}
    optimizer = optimizers.create("badam", model, lr=1e-2, switch_every=3, always_train=source.head(kind, **settings))
    losses = train(model, optimizer, batch, 15)
    assert losses[-1] < 0.6 * losses[0]
