"""QLoRA: LoRA on a base in 4 bits (Dettmers, Pagnoni, Holtzman & Zettlemoyer, NeurIPS 2023, arXiv 2305.14314)."""

from __future__ import annotations

from torch import nn

from optimizers.lora import LoRA
from optimizers.registry import register
from optimizers.shared.adapters import ALL_LINEAR


@register("qlora")
class QLoRA(LoRA):
    """QLoRA: LoRA whose frozen weights are in NF4, dequantised to the compute dtype at each product.

    It is `lora` with `base="nf4"` and the paper's hyper-parameters: rank 64, alpha 16 and dropout .1 on all linear
    modules of the layers, a constant rate of 2e-4 (the loop's schedule decides), no weight decay. A matrix of the
    layers takes .516 bytes per weight (.5625 without double quantisation), plus a dequantised copy while it is used;
    embeddings, norms, biases and head stay in the dtype of the model. (peft's `prepare_model_for_kbit_training` casts
    these to fp32.)

    Trains the adapters, and `always_train`. Keeps what `lora` keeps. `finish()` returns dense weights: the values of
    the 4-bit codes, with the adapters merged.

    Args:
        model: the model to train, built in full; its layers are in `nn.ModuleList`s, or `targets` are named.
        lr: learning rate.
        weight_decay: decoupled; for tensors of two or more dimensions, biases excepted.
        betas, eps: as in Adam.
        rank: r.
        alpha: the additions are scaled by alpha / r.
        dropout: on the adapters' input.
        targets: as for `lora`.
        double_quantization: the magnitudes of NF4's blocks in 8 bits.
        kernels: as for `lora`: "torch", or "bitsandbytes", whose compiled kernel dequantises the same bytes.
        always_train: name patterns of parameters to train directly, without adapters.
        master_weights: fp32 moments and masters, if the model is in low precision.
        fp32_gradients: fp32 gradients for low-precision weights.
        seed: for the adapters' first values.

    Raises:
        ValueError: a value is out of range, a pattern matches nothing, the model already has adapters, or bitsandbytes
            is asked for and can't be used.
    """

    summary = "LoRA on frozen weights in 4 bits (NF4)"
    paper = "Dettmers, Pagnoni, Holtzman & Zettlemoyer, NeurIPS 2023, arXiv 2305.14314"
    trains = "r (m + n) new weights for each linear module (m, n) of the layers"
    keeps = (
        "8 B per new weight (12 B with an fp32 master), the new weights, and .516 B per weight of the layers' matrices"
    )
    excludes = "weights outside linear modules (fused experts)"
    example = {"lr": 1e-2, "rank": 4, "dropout": 0.0}
    added_later = ("kernels",)

    def __init__(
        self,
        model: nn.Module,
        lr: float = 2e-4,
        weight_decay: float = 0.0,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        rank: int = 64,
        alpha: float = 16.0,
        dropout: float = 0.1,
        targets: str | tuple[str, ...] = ALL_LINEAR,
        double_quantization: bool = True,
        kernels: str = "torch",
        always_train: tuple[str, ...] = (),
        master_weights: bool = True,
        fp32_gradients: bool = False,
        seed: int = 0,
    ):
        super().__init__(
            model,
            lr,
            weight_decay,
            betas=betas,
            eps=eps,
            rank=rank,
            alpha=alpha,
            dropout=dropout,
            targets=targets,
            base="nf4",
            double_quantization=double_quantization,
            kernels=kernels,
            always_train=always_train,
            master_weights=master_weights,
            fp32_gradients=fp32_gradients,
            seed=seed,
        )
