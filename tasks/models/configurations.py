"""Configurations of published models, as in their official `config.json`: what determines shapes, but no weights."""

from typing import Any


def llama(
    hidden: int,
    feed_forward: int,
    layers: int,
    heads: int,
    key_heads: int | None = None,
    *,
    vocabulary: int = 32_000,
    positions: int = 4096,
    eps: float = 1e-5,
    tied: bool = False,
    **more: Any,
) -> dict[str, Any]:
    """A LLaMA configuration, by its sizes."""
    return {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": feed_forward,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads or heads,
        "max_position_embeddings": positions,
        "rms_norm_eps": eps,
        "tie_word_embeddings": tied,
        **more,
    }


def _rotary(theta: float, factor: float | None = None) -> dict[str, Any]:
    """Rotary positions; with a factor, stretched as in Llama 3.1."""
    if factor is None:
        return {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}
    frequencies = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    return {"rope_parameters": {"rope_type": "llama3", "rope_theta": theta, "factor": factor, **frequencies}}


def _llama3(*shape: int, positions: int = 131_072, factor: float | None = 8.0, **more: Any) -> dict[str, Any]:
    return llama(*shape, vocabulary=128_256, positions=positions, **more) | _rotary(5e5, factor)


def _qwen2(*shape: int, vocabulary: int = 151_936, positions: int = 131_072, tied: bool = True) -> dict[str, Any]:
    return llama(*shape, vocabulary=vocabulary, positions=positions, eps=1e-6, tied=tied) | _rotary(1e6)


def _gemma2(*shape: int) -> dict[str, Any]:
    own = {"head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 4096}
    return llama(*shape, vocabulary=256_000, positions=8192, eps=1e-6, tied=True) | own


def _galore(*shape: int) -> dict[str, Any]:
    """The LLaMA sizes that GaLore's authors pretrain (Zhao et al., 2024, arXiv 2403.03507, Table 5)."""
    return llama(*shape, positions=2048, eps=1e-6)


# name: (transformers' model type, differences from its defaults)
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {}),  # transformers' defaults are GPT-2 small
    "llama2-7b": ("llama", llama(4096, 11_008, 32, 32)),
    "llama2-13b": ("llama", llama(5120, 13_824, 40, 40)),
    "llama2-70b": ("llama", llama(8192, 28_672, 80, 64, 8)),
    "llama3-8b": ("llama", _llama3(4096, 14_336, 32, 32, 8, positions=8192, factor=None)),
    "llama3-70b": ("llama", _llama3(8192, 28_672, 80, 64, 8, positions=8192, factor=None)),
    "llama3.1-8b": ("llama", _llama3(4096, 14_336, 32, 32, 8)),
    "llama3.1-70b": ("llama", _llama3(8192, 28_672, 80, 64, 8)),
    "llama3.2-1b": ("llama", _llama3(2048, 8192, 16, 32, 8, head_dim=64, tied=True, factor=32.0)),
    "llama3.2-3b": ("llama", _llama3(3072, 8192, 28, 24, 8, head_dim=128, tied=True, factor=32.0)),
    "qwen2.5-0.5b": ("qwen2", _qwen2(896, 4864, 24, 14, 2, positions=32_768)),
    "qwen2.5-1.5b": ("qwen2", _qwen2(1536, 8960, 28, 12, 2)),
    "qwen2.5-3b": ("qwen2", _qwen2(2048, 11_008, 36, 16, 2, positions=32_768)),
    "qwen2.5-7b": ("qwen2", _qwen2(3584, 18_944, 28, 28, 4, vocabulary=152_064, tied=False)),
    "gemma2-2b": ("gemma2", _gemma2(2304, 9216, 26, 8, 4)),
    "gemma2-9b": ("gemma2", _gemma2(3584, 14_336, 42, 16, 8)),
    "mistral-7b": ("mistral", llama(4096, 14_336, 32, 32, 8, positions=32_768, sliding_window=4096)),
    "tinyllama": ("llama", llama(2048, 5632, 22, 32, 4, positions=2048)),
    "llama-60m": ("llama", _galore(512, 1376, 8, 8)),
    "llama-130m": ("llama", _galore(768, 2048, 12, 12)),
    "llama-350m": ("llama", _galore(1024, 2736, 24, 16)),
    "llama-1b": ("llama", _galore(2048, 5461, 24, 32)),
    "llama-7b": ("llama", _galore(4096, 11_008, 32, 32)),
}
