"""Each method keeps what its `keeps` says, to the byte, on a tiny Llama: bytes counted from shapes alone."""

import pytest
import torch
from architectures import ARCHITECTURES, LAYERS

import optimizers
from optimizers.shared.low_rank_linear import low_rank_linears
from optimizers.shared.matrices import layer_matrices

LLAMA = ARCHITECTURES["llama"]  # width 32, 4 heads of 8, 2 of keys; MLP 48
HEADS, KEY_HEADS, KEYS, WIDTH, INNER = 4, 2, 16, 32, 48
STEP = 4  # bytes of a step count


def two_moments(params, size):
    return sum(2 * size * p.numel() + STEP for p in params)


def of_rest(model, size):
    inside = set(layer_matrices(model))
    return two_moments([p for p in model.parameters() if p not in inside], size)


def muon(model, size):
    return size * sum(p.numel() for p in layer_matrices(model)) + of_rest(model, size)


def adafactor(model, size):
    return 4 * sum(sum(p.shape) for p in model.parameters())  # m + n of a matrix, n of a vector


def adam_mini(model, size):
    vocabulary = len(model.get_input_embeddings().weight)
    of_layer = HEADS + KEY_HEADS + KEYS + WIDTH + 2 * INNER + WIDTH + 2  # q, k, v, o; gate and up, down; two norms
    blocks = LAYERS * of_layer + 2 * vocabulary + 1  # embeddings and head; the last norm
    of_a_weight = 4 if size == 4 else 4 + 4  # the first moment, a master
    return of_a_weight * sum(p.numel() for p in model.parameters()) + 4 * blocks


def sinkgd(model, size):
    return of_rest(model, size)


def scale(model, size):
    vectors = [p for p in model.parameters() if p.dim() == 1]
    return size * model.get_output_embeddings().weight.numel() + two_moments(vectors, size)


def apollo(model, size):
    shapes = [tuple(p.shape) for p in layer_matrices(model)]
    moments = sum(2 * max(shape) * (min(shape) // 4) * size + 4 + STEP for shape in shapes)
    return moments + of_rest(model, size)


def fira(model, size):
    rank = 4
    shapes = [sorted(p.shape) for p in layer_matrices(model)]
    return sum((m + 2 * n) * rank * size + 4 + STEP for m, n in shapes) + of_rest(model, size)


MATRICES = [
    (WIDTH, WIDTH),
    (KEYS, WIDTH),
    (KEYS, WIDTH),
    (WIDTH, WIDTH),
    (INNER, WIDTH),
    (INNER, WIDTH),
    (WIDTH, INNER),
]
RANK = 8


def of_new_weights(count, tensors, size):
    return (8 if size == 4 else 12) * count + STEP * tensors


def lora(model, size):
    return of_new_weights(LAYERS * sum(RANK * (m + n) for m, n in MATRICES), 2 * LAYERS * len(MATRICES), size)


def lora_fa(model, size):
    return of_new_weights(LAYERS * sum(RANK * m for m, _ in MATRICES), LAYERS * len(MATRICES), size)


def vera(model, size):
    return of_new_weights(LAYERS * sum(RANK + m for m, _ in MATRICES), 2 * LAYERS * len(MATRICES), size)


def welore(model, size):
    factors = [p for module in low_rank_linears(model).values() for p in (module.up, module.down)]
    norms = (2 * LAYERS + 1) * WIDTH
    return of_new_weights(sum(p.numel() for p in factors) + norms, len(factors) + 2 * LAYERS + 1, size)


def sgd(model, size):
    return (4 if size == 4 else 4 + 4) * sum(p.numel() for p in model.parameters())


def adamw8bit(model, size):  # no tensor here has 4,096 weights
    return (8 if size == 4 else 12) * sum(p.numel() for p in model.parameters())


FORMULAS = {
    "sgd:momentum=.9:master_weights=true": sgd,
    "adamw8bit:master_weights=true": adamw8bit,
    "welore": welore,
    "lora": lora,
    "lora:variant=lora-fa": lora_fa,
    "lora:variant=vera": vera,
    "muon": muon,
    "adafactor": adafactor,
    "adam-mini": adam_mini,
    "sinkgd": sinkgd,
    "scale": scale,
    "apollo": apollo,
    "fira:rank=4": fira,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", FORMULAS)
def test_state_bytes_are_the_formulas(method, dtype):
    model = LLAMA.build(dtype)
    optimizer = optimizers.create(method, model)
    model(**LLAMA.batch()).loss.backward()
    optimizer.step()
    assert optimizer.state_bytes() == FORMULAS[method](model, dtype.itemsize)
