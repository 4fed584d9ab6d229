"""LoRA (Hu et al., ICLR 2022, arXiv 2106.09685) and its relatives, built through `peft`."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from optimizers.base import (
    MemoryEfficientOptimizer,
    check_choice,
    check_count,
    check_hyperparameters,
    check_positive,
    check_share,
)
from optimizers.registry import register
from optimizers.shared.adapters import (
    ALL_LINEAR,
    CallsOfAdapters,
    adapted_modules,
    corrected_gradients,
    find_targets,
    freeze_a,
    frozen_linears,
    inject,
    inject_vera,
    merged_state_dict,
)
from optimizers.shared.arithmetic import adamw_update, expected_adam_state
from optimizers.shared.blocks import matching
from optimizers.shared.nf4 import KERNELS, check_bitsandbytes
from optimizers.shared.nf4_linear import quantize_linears
from optimizers.shared.reach import warn_of_idle
from optimizers.shared.saved_states import check_same_settings
from optimizers.shared.stand_ins import restore_linears

# what each variant asks of peft
VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa_niter_4"},
    "lora+": {},
    "lora-fa": {},
    "vera": {},
}


BASES = ("full", "nf4")


@register("lora")
class LoRA(MemoryEfficientOptimizer):
    """LoRA: a frozen weight W (m, n) plus s B A, where AdamW trains B (m, r) and A (r, n), and s = alpha / r.

    `variant="rslora"` has s = alpha / sqrt(r) (Kalajdzievski, arXiv 2312.03732). "dora" also trains the length of each
    row of W + s B A (Liu et al., arXiv 2402.09353). "pissa" starts A and B at the leading singular vectors of W and
    subtracts their product from W at construction (Meng et al., arXiv 2404.02948). "lora+" trains B at
    `lora_plus_ratio` times the rate (Hayou et al., arXiv 2402.12354). "lora-fa" freezes A, so that no input of an
    adapted module is kept for the backward pass, and corrects B's gradient to g (A A^T)^-1 / s^2, which moves W as
    closely along its own gradient as B A can (Zhang et al., arXiv 2308.03303).

    "vera" (Kopiczko et al., ICLR 2024, arXiv 2310.11454) adds diag(b) B diag(d) A: a single frozen random pair, A
    (r, n) and B (m, r) of the largest n and m, is shared by all modules, which train only b (m) and d (r). It has no
    alpha. The paper's ranks are 256 and more, its rates ten times LoRA's.

    The adapters are inserted into the given model. They rename its parameters and add to its `state_dict`, so build it
    again in the same way before loading; `finish()` merges them and restores the names.

    Trains the adapters, and `always_train`. Keeps 8 bytes per weight of these (12 with an fp32 master); the adapters
    themselves, in the dtype of W, are r (m + n) more weights. "lora-fa" trains r m of these; "vera" trains m + r,
    beside r (m + n) shared weights for the whole model. Weights outside linear modules (a tensor that holds the
    matrices of several experts) can't be adapted.

    `base="nf4"` holds the layers' linear modules in 4 bits (QLoRA: see `qlora.py`), with any variant. The model is
    built in full first, so the full weights must fit where it is built; the adapters are initialised from them, too.

    Args:
        model: the model to train.
        lr: learning rate.
        weight_decay: decoupled; for tensors of two or more dimensions, biases excepted, so for A and B.
        betas, eps: as in Adam.
        rank: r.
        alpha: None means 4 r; "vera" has none.
        dropout: on the adapters' input.
        targets: name patterns of the linear modules to adapt ("q_proj", "layers.3.*"), as a tuple or separated by
            commas; "all-linear" means all in the model's layers, so neither embeddings nor head. Frozen ones and those
            in `always_train` are left out.
        variant: "lora", "rslora", "dora", "pissa", "lora+", "lora-fa" or "vera".
        lora_plus_ratio: for "lora+": the rate of B over that of A.
        base: "full", or "nf4": frozen linear modules of the layers, adapted or not, in NF4.
        double_quantization: for "nf4": the magnitudes of its blocks in 8 bits.
        kernels: for "nf4": "torch", or "bitsandbytes", which must be installed: its compiled kernel dequantises the
            same bytes to the same values, on a CPU with AVX-512 three times as fast. What it can't (float64, matrices
            that aren't of whole blocks of 64 weights) is left to torch.
        always_train: name patterns of parameters to train directly, without adapters.
        master_weights: fp32 moments and masters, if the model is in low precision.
        fp32_gradients: fp32 gradients for low-precision weights.
        seed: for the adapters' first values.

    Raises:
        ValueError: a value is out of range, a pattern matches nothing, the model already has adapters, or bitsandbytes
            is asked for and can't be used.
    """

    summary = "AdamW on low-rank additions to frozen weights"
    paper = "Hu et al., ICLR 2022, arXiv 2106.09685"
    trains = "r (m + n) new weights for each linear module (m, n) of the layers (lora-fa: r m; vera: m + r)"
    keeps = "8 B per trained weight (12 B with an fp32 master), and the new weights (vera: r (m + n) shared ones too)"
    excludes = "weights outside linear modules (fused experts)"
    only_linear = True
    example = {"lr": 1e-2, "rank": 4}
    added_later: ClassVar[tuple[str, ...]] = ("base", "double_quantization", "kernels")
    adds_parameters = True

    def __init__(
        self,
        model: nn.Module,
        lr: float = 2e-4,
        weight_decay: float = 0.01,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        rank: int = 8,
        alpha: float | None = None,
        dropout: float = 0.0,
        targets: str | tuple[str, ...] = ALL_LINEAR,
        variant: str = "lora",
        lora_plus_ratio: float = 16.0,
        base: str = "full",
        double_quantization: bool = True,
        kernels: str = "torch",
        always_train: tuple[str, ...] = (),
        master_weights: bool = True,
        fp32_gradients: bool = False,
        seed: int = 0,
    ):
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        check_hyperparameters(defaults)  # every check comes before the model is changed
        check_count("rank", rank)
        check_choice("variant", variant, tuple(VARIANTS))
        check_choice("base", base, BASES)
        check_choice("kernels", kernels, KERNELS)
        if base == "full" and kernels != "torch":
            raise ValueError(f"kernels={kernels!r} is for base='nf4': with base='full' leave it out")
        if variant == "vera" and alpha is not None:
            raise ValueError(f"variant='vera' has no alpha, so alpha={alpha} would do nothing: leave it out")
        alpha = 4.0 * rank if alpha is None else alpha
        check_positive("alpha", alpha)
        check_positive("lora_plus_ratio", lora_plus_ratio)
        check_share("dropout", dropout)
        self.variant, self.lora_plus_ratio, self.master_weights = variant, lora_plus_ratio, master_weights
        self.base = base
        always = matching(model, always_train)
        names = find_targets(model, targets, always)
        frozen = frozen_linears(model, names, always) if base == "nf4" else []
        if kernels == "bitsandbytes":
            check_bitsandbytes({next(model.get_submodule(name).parameters()).device for name in frozen})
        before = {p: p.requires_grad for p in model.parameters()}
        if variant == "vera":
            adapters: Any = inject_vera(model, names, {"r": rank, "vera_dropout": dropout}, seed)
        else:
            settings = {"r": rank, "lora_alpha": alpha, "lora_dropout": dropout, **VARIANTS[variant]}
            adapters = inject(model, names, settings, seed)
        self._adapters = adapters
        self._frozen_a = freeze_a(model) if variant == "lora-fa" else {}
        quantize_linears(model, frozen, double=double_quantization, kernels=kernels)
        for p in always:
            p.requires_grad_(True)
        super().__init__(model, defaults, fp32_gradients=fp32_gradients)
        self._hooks.append(CallsOfAdapters(model))
        self._requires_grad = before
        self._looked = False  # were gradients looked for, at the first step?

    def group_parameters(self, model: nn.Module, defaults: dict[str, Any]) -> list[dict[str, Any]]:
        """As for every method; "lora+" adds a third group, of all B, at its own rate."""
        groups = super().group_parameters(model, defaults)
        if self.variant != "lora+":
            return groups
        matrices, *others = groups
        of_b = [(name, p) for name, p in matrices["params"] if ".lora_B." in name]
        rest = [(name, p) for name, p in matrices["params"] if ".lora_B." not in name]
        return [{"params": rest}, *others, {"params": of_b, "lr": defaults["lr"] * self.lora_plus_ratio}]

    @property
    def elementwise(self) -> bool:
        return not self._frozen_a

    def update(self, params: list[Tensor], grads: list[Tensor], group: dict[str, Any]) -> None:
        grads = corrected_gradients(self._frozen_a, params, grads)
        adamw_update([self.state[p] for p in params], params, grads, group, self.master_weights)

    def expected_state(self, p: nn.Parameter, saved: dict[str, Any]) -> dict[str, Any]:
        return expected_adam_state(p, self.master_weights)

    def before_update(self) -> None:
        if not self._looked:
            self._looked = True
            own = self._group_of.keys()
            parts = {n: [p for p in m.parameters() if p in own] for n, m in adapted_modules(self.model).items()}
            warn_of_idle("adapters", parts, "leave them out of targets")

    def finished_state_dict(self) -> dict[str, Tensor]:
        return merged_state_dict(self.model)

    def extra_state(self) -> dict[str, Any]:
        return {"variant": self.variant, "base": None if self.base == "full" else self.base}

    def load_extra_state(self, extra: dict[str, Any]) -> None:
        saved = {**extra, "base": extra.get("base") or "full"}
        check_same_settings(saved, {"variant": self.variant, "base": self.base})

    @torch.no_grad()
    def finish(self) -> nn.Module:
        """End the training: merge the adapters into the weights and return the model in its original form.

        NF4 weights become dense with the values of their 4-bit codes, since that is the function that was trained.
        """
        model = super().finish()
        restore_linears(model)
        self._adapters.merge_and_unload()
        return model
