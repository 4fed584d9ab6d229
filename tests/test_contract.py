"""Every registered method, and each variant that has code of its own, keeps every promise of the interface."""

import pytest

import optimizers
from optimizers.contract import CHECKS, Subject
from optimizers.shared import in_pieces

VARIANTS = {
    "apollo-mini": ("apollo", {"scale_type": "tensor"}),
    "badam-ascending-matrix": ("badam", {"order": "ascending", "block": "matrix"}),
    "badam-embeddings-sublayer": ("badam", {"train_embeddings": True, "block": "sublayer", "order": "descending"}),
    "badam-sgd": ("badam", {"inner": "sgd", "lr": 0.3}),
    "badam-low-precision": ("badam", {"master_weights": False, "fp32_gradients": True}),
    "blockllm-release": ("blockllm", {"rule": "release", "probe_every": 2}),
    "blockllm-rows": ("blockllm", {"rows": 3}),
    "blockllm-embeddings": ("blockllm", {"train_embeddings": True}),
    "adafactor-torch": ("adafactor", {"rule": "torch", "lr": 0.1}),
    "adam-mini-low-precision": ("adam-mini", {"master_weights": False}),
    "adamw-low-precision": ("adamw", {"master_weights": False}),
    "lisa-frozen-embeddings": ("lisa", {"train_embeddings": False, "reset": "all", "layers": 2}),
    "lisa-no-reset": ("lisa", {"reset": "none"}),
    "lomo-clip-norm": ("lomo", {"clip_norm": 1.0}),
    "lomo-clip-value": ("lomo", {"clip_value": 0.01, "lr": 1.0}),
    "hft-one-round": ("hft", {"switch_every": None}),
    "galore-full-exact": ("galore", {"projection": "full", "svd": "exact"}),
    "galore-other-side": ("galore", {"projection": "reverse_std", "rank": 100}),
    "lora-dora": ("lora", {"variant": "dora"}),
    "lora-pissa": ("lora", {"variant": "pissa"}),
    "lora-plus": ("lora", {"variant": "lora+", "lr": 2e-3}),
    "lora-fa": ("lora", {"variant": "lora-fa"}),
    "lora-vera": ("lora", {"variant": "vera"}),
    "lora-nf4": ("lora", {"base": "nf4", "double_quantization": False}),
    "lora-nf4-dora": ("lora", {"base": "nf4", "variant": "dora"}),
    "lora-nf4-pissa": ("lora", {"base": "nf4", "variant": "pissa"}),
    "lora-nf4-bitsandbytes": ("lora", {"base": "nf4", "kernels": "bitsandbytes"}),
    "adamw8bit-rounded": ("adamw8bit", {"stochastic_rounding": True}),
    "adamw8bit-masters": ("adamw8bit", {"master_weights": True, "fp32_gradients": True}),
    "adamw-rounded": ("adamw", {"master_weights": False, "stochastic_rounding": True}),
    "badam-8bit-rounded": ("badam", {"states": "8bit", "master_weights": False, "stochastic_rounding": True}),
    "badam-sgd-rounded": (
        "badam",
        {"inner": "sgd", "lr": 0.3, "master_weights": False, "stochastic_rounding": True},
    ),
    "blockllm-rounded": ("blockllm", {"master_weights": False, "stochastic_rounding": True}),
    "lisa-8bit": ("lisa", {"states": "8bit"}),
    "hft-8bit": ("hft", {"states": "8bit", "master_weights": False}),
    "galore-quantised": ("galore", {"states": "8bit", "projection_bits": 4, "lazy": True}),
    "galore-8bit-weights": ("galore", {"weights": "8bit"}),
    "galore-8bit-weights-in-backward": ("galore", {"weights": "8bit", "in_backward": True}),
    "galore-rounded": ("galore", {"projection": "full", "projection_bits": 8, "stochastic_rounding": True}),
    "sgd-rounded": ("sgd", {"momentum": 0.9, "lr": 0.03, "stochastic_rounding": True}),
    "sgd-momentum": ("sgd", {"momentum": 0.9, "lr": 0.03}),
}
SUBJECTS = {name: (name, {}) for name in optimizers.available()} | VARIANTS


@pytest.fixture(autouse=True)
def small_tensors_in_few_bits_too(monkeypatch):
    """The contract's model has no tensor of 4,096 weights: without this, none would be in 8 bits."""
    monkeypatch.setattr(in_pieces, "SMALLEST", 64)


# What a variant's own code hardly touches, and what takes longest: of variants these are slow tests.
OF_METHODS = {
    *("describes_itself", "is_an_optimizer_of_the_models_parameters", "the_loss_falls", "runs_on_fake_tensors"),
    *("never_changes_its_groups", "leaves_global_randomness_alone", "follows_a_scheduler", "refuses_bad_values"),
    *("refuses_what_is_no_model_and_a_model_in_training", "says_what_the_finished_model_will_be"),
    *("rounds_at_random_with_the_right_mean", "takes_its_own_state_back_at_the_start"),
    *("frees_the_model_when_nobody_needs_it", "refuses_accumulation_in_backward", "refuses_the_state_of_another"),
    "leaves_a_state_that_it_loads_as_it_is",
}
IN_LOW_PRECISION = "resumes_to_the_last_bit_in_bfloat16"


def is_slow(name, check):
    if name not in VARIANTS:
        return False
    own = any(word in name for word in ("low-precision", "rounded", "8bit", "masters"))
    return check in OF_METHODS or (check == IN_LOW_PRECISION and not own)


PAIRS = [
    pytest.param(
        *(name, check),
        id=f"{name}-{check.__name__}",
        marks=pytest.mark.slow if is_slow(name, check.__name__) else (),
    )
    for name in SUBJECTS
    for check in CHECKS
]


def test_the_checks_that_are_slow_of_variants_exist():
    assert {check.__name__ for check in CHECKS} >= OF_METHODS | {IN_LOW_PRECISION}


@pytest.mark.parametrize(("name", "check"), PAIRS)
def test_contract(name, check):
    method, more = SUBJECTS[name]
    if "bitsandbytes" in more.values():
        pytest.importorskip("bitsandbytes")
    cls = optimizers.get(method)
    check(Subject(cls, {**cls.example, **more}))
