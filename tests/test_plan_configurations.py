"""Built-in configurations have exactly as many parameters as the published checkpoints."""

import pytest
import transformers

from tasks.models.source import CONFIGURATIONS, Source

# From the safetensors indices of the official checkpoints (tied weights once); GaLore's 1B and 7B by the paper's names.
PARAMETERS = {
    "gpt2": 124_439_808,
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3.1-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "gemma2-2b": 2_614_341_888,
    "gemma2-9b": 9_241_705_984,
    "mistral-7b": 7_241_732_096,
    "tinyllama": 1_100_048_384,
}
ENCODERS = {"roberta-base": 124_645_632, "roberta-large": 355_359_744}
GALORE = {"llama-60m": 58e6, "llama-130m": 134e6, "llama-350m": 368e6, "llama-1b": 1339e6, "llama-7b": 6738e6}


def parameters(name: str, kind: type) -> int:
    return sum(p.numel() for p in Source(f"config:{name}").skeleton(kind).parameters())


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_causal_model_has_the_parameters_of_its_checkpoint(name):
    assert parameters(name, transformers.AutoModelForCausalLM) == PARAMETERS[name]


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_has_the_parameters_of_its_checkpoint(name):
    skeleton = Source(f"config:{name}").skeleton(transformers.AutoModelForSequenceClassification)
    encoder = sum(p.numel() for p in skeleton.base_model.parameters())
    pooler = skeleton.config.hidden_size * (skeleton.config.hidden_size + 1)  # of checkpoints, without a use here
    assert encoder + pooler == ENCODERS[name]


@pytest.mark.parametrize("name", GALORE)
def test_galores_models_have_the_sizes_of_its_tables(name):
    assert parameters(name, transformers.AutoModelForCausalLM) == pytest.approx(GALORE[name], rel=0.005)


def test_every_configuration_is_checked():
    assert {*CONFIGURATIONS} == {*PARAMETERS, *ENCODERS, *GALORE, "roberta-tiny", "llama-tiny", "llama-4m"}


def test_head_sizes_are_the_official_ones():
    heads = {"llama3.2-1b": 64, "llama3.2-3b": 128, "gemma2-2b": 256, "gemma2-9b": 256}
    assert {name: Source(f"config:{name}").config.head_dim for name in heads} == heads
