"""The races: each method, and what a user would pick instead, as rows of data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from benchmarks import peers
from benchmarks.models import Size, build
from benchmarks.side import Side, with_timed_hooks
from optimizers import (
    APOLLO,
    HFT,
    LISA,
    LOMO,
    SCALE,
    SGD,
    Adafactor,
    AdaLomo,
    AdamMini,
    AdamW,
    AdamW8bit,
    BAdam,
    BlockLLM,
    Fira,
    GaLore,
    LoRA,
    MeZO,
    Muon,
    QLoRA,
    SinkGD,
    WeLore,
)
from optimizers.shared.blocks import split_into_blocks
from optimizers.shared.low_rank_linear import factorize_linears

NEVER = 10**9  # steps: no switch during a race
EVERY = 5  # K of BAdam: a race goes through several blocks

Pair = tuple[nn.Module, Any]  # a model (it may have been wrapped) and its optimizer


@dataclass(frozen=True)
class Race:
    """A method against its peer.

    Attributes:
        peer: what it is raced against.
        package: the module that must be installed for it.
        ours: makes our optimizer for a model.
        theirs: makes the peer for a model with the same weights, given our optimizer, whose selection it may copy.
        same_weights: the largest difference allowed between the two's weights after the race; None: they compute
            different things.
        update_limit: for the ratio of update times; None for a comparison that isn't between equals.
        same_gradients: compare the weights in separate steps, in which both get the gradients of ours.
        memory_limit: for the ratio of peaks.
        fake: meter the memory on fake tensors: the peer would take minutes to compute.
        tokens: per example, instead of the size's few, where the step is what is raced.
        notes: workarounds, and what one must know to read the numbers.
    """

    peer: str
    package: str
    ours: Callable[[nn.Module, Size], Any]
    theirs: Callable[[nn.Module, Size, Any], Pair]
    same_weights: float | None = 0.0
    update_limit: float | None = 1.0
    same_gradients: bool = False
    memory_limit: float = 1.0
    fake: bool = False
    tokens: int | None = None
    notes: tuple[str, ...] = ()

    @property
    def installed(self) -> bool:
        """Can the peer be imported?"""
        return find_spec(self.package) is not None

    def sides(self, size: Size) -> tuple[Side, Side]:
        """Ours and theirs, ready to start from the same weights."""
        size = replace(size, tokens=self.tokens or size.tokens)
        model = build(size)
        ours = Side(model, self.ours(model, size), size)
        return ours, Side(*self.theirs(build(size), size, ours.optimizer), size)


def _started(optimizer: BAdam) -> BAdam:
    """One step into its first block: the package counts from 1, so there the first block gets K - 1 steps."""
    state = optimizer.state_dict()
    state["extra"]["steps"] = 1
    optimizer.load_state_dict(state)
    return optimizer


def _badam(model: nn.Module, size: Size) -> BAdam:
    return _started(BAdam(model, lr=1e-4, weight_decay=0.0, switch_every=EVERY, order="ascending"))


def _their_badam(model: nn.Module, size: Size, ours: BAdam) -> Pair:
    return model, peers.badam(model, list(split_into_blocks(model)), EVERY, lr=1e-4, weight_decay=0.0)


def _galore(model: nn.Module, size: Size) -> GaLore:
    return GaLore(model, lr=1e-4, eps=1e-12, rank=size.rank, update_every=NEVER, scale=0.25)


def _their_galore(model: nn.Module, size: Size, ours: GaLore) -> Pair:
    return model, peers.galore(model, size.rank, NEVER, 0.25, shared_subspaces=True, lr=1e-4, eps=1e-12)


def _on_the_same(model: nn.Module, size: Size, ours: Any) -> Pair:
    """Torch's fused AdamW on what ours is training."""
    return model, peers.fused_adamw(peers.train_same(model, ours.model), lr=1e-4, weight_decay=0.01)


def _on_the_same_factors(model: nn.Module, size: Size, ours: WeLore) -> Pair:
    factorize_linears(model, ours.ranks)
    return _on_the_same(model, size, ours)


def _lomo(clip_norm: float | None) -> dict[str, Any]:
    return {
        "ours": lambda model, size: with_timed_hooks(LOMO)(model, lr=1e-2, clip_norm=clip_norm),
        "theirs": lambda model, size, ours: (model, peers.lomo(model, 1e-2, clip_norm)),
    }


def _qlora(kernels: str) -> dict[str, Any]:
    given = {"rank": 8, "alpha": 32.0, "dropout": 0.0, "double_quantization": False, "kernels": kernels}
    return {
        "ours": lambda model, size: QLoRA(model, lr=1e-4, **given),
        "theirs": lambda model, size, ours: peers.qlora(model, 8, lr=1e-4),
        "update_limit": 1.02,
    }


FUSED = "torch.optim.AdamW(fused=True)"
NO_PACKAGE = f"there is no package to install: raced against {FUSED} on the weights being trained"
SAME_GRADIENTS = (
    "weights are compared in steps in which both get the same gradients: where a gradient is zero except for rounding, "
    "a step is as large as any other"
)
OF_QLORA = (
    "without double quantisation: on a CPU its kernel for 8 bits is coarser than on a GPU, so that magnitudes would "
    "differ",
    "the update is the adapters' only; the cost of 4 bits is in the step",
)
IN_HOOKS = "the update is the time spent in the hooks of the backward pass"

_OF_APOLLO: dict[str, Any] = {
    "same_weights": 1e-5,
    "same_gradients": True,
    "notes": (
        "it is given our projections, which ours regenerates at every step while it keeps them",
        "for what isn't projected it adds eps before the bias correction, ours after it: eps is 1e-12 on both sides",
        SAME_GRADIENTS,
    ),
}
UNEQUAL: dict[str, Any] = {"same_weights": None, "update_limit": None}


def _against_fused(ours: Callable[[nn.Module, Size], Any], **given: Any) -> Race:
    """Against torch's fused AdamW on what ours is training."""
    return Race(FUSED, "torch", ours, **{"theirs": _on_the_same, **given})


RACES: dict[str, Race] = {
    "adamw": _against_fused(
        ours=lambda model, size: AdamW(model, lr=1e-4, weight_decay=0.01),
        update_limit=1.02,
    ),
    "adamw8bit": Race(
        "bitsandbytes 0.50.2",
        "bitsandbytes",
        ours=lambda model, size: AdamW8bit(model, lr=1e-4, weight_decay=0.01),
        theirs=lambda model, size, ours: (model, peers.adamw8bit(model, lr=1e-4, weight_decay=0.01)),
        same_weights=None,
        memory_limit=1.05,
        notes=(
            "the meter sees our temporaries, 1.1 MB, but not its own: on a CPU, several fp32 copies of a tensor inside "
            "one operation",
            "on a CPU its kernel for 8 bits is coarser than on a GPU, so that weights differ; with its kernels of "
            "plain torch they are the same (tests/test_adamw8bit.py)",
        ),
    ),
    "sgd": Race(
        "torch.optim.SGD",
        "torch",
        ours=lambda model, size: SGD(model, lr=1e-2, momentum=0.9),
        theirs=lambda model, size, ours: (model, peers.sgd(model, lr=1e-2, momentum=0.9)),
        update_limit=1.02,
    ),
    "badam": Race(
        "badam 1.4",
        "badam",
        ours=_badam,
        theirs=_their_badam,
        notes=(
            f"K = {EVERY}, ascending blocks; torch's fused AdamW inside the package's BlockOptimizer, as in ours",
            "its first block gets K - 1 steps: so does ours, by loading a state that is one step old",
            "it overwrites the groups, so that norms decay too: no weight decay on either side",
            "it is given the names of the blocks: its own pattern only fits Llama's names",
            "it also makes an fp32 master of fp32 weights, which costs it memory that ours doesn't take",
        ),
    ),
    "galore": Race(
        "galore-torch 1.0",
        "galore_torch",
        ours=_galore,
        theirs=_their_galore,
        same_weights=1e-5,
        same_gradients=True,
        fake=True,
        notes=(
            "its first step would take a full SVD of each matrix, minutes: it is given the subspaces that ours "
            "chooses; the refresh is timed separately",
            "it adds eps before the bias correction, ours after it: eps is 1e-12 on both sides",
            "weights are compared in steps in which both get the same gradients: with such a small eps Adam turns the "
            "rounding noise of a zero gradient into full steps",
            "memory is metered on fake tensors, with its own SVDs",
            "bitsandbytes, which only its 8-bit optimizer uses, is replaced by an empty module if it is missing",
        ),
    ),
    "fira": Race(
        "fira 1.0.2",
        "fira",
        ours=lambda model, size: Fira(model, lr=1e-4, eps=1e-12, rank=size.rank, update_every=NEVER),
        theirs=lambda model, size, ours: (model, peers.fira(model, size.rank, lr=1e-4, eps=1e-12)),
        same_weights=1e-5,
        same_gradients=True,
        notes=(
            "its first step would take a full SVD of each matrix, minutes: it is given the subspaces that ours chooses",
            "it adds eps before the bias correction, ours after it: eps is 1e-12 on both sides",
            SAME_GRADIENTS,
        ),
    ),
    "lora": Race(
        f"peft + {FUSED}",
        "peft",
        ours=lambda model, size: LoRA(model, lr=1e-4, weight_decay=0.01, rank=8),
        theirs=lambda model, size, ours: peers.lora(model, 8, lr=1e-4, weight_decay=0.01),
        update_limit=1.02,
        notes=('without a task type, peft\'s "all-linear" would adapt the head too: it is given one',),
    ),
    "lora-fa": Race(
        "peft's LoraFAOptimizer",
        "peft",
        ours=lambda model, size: LoRA(model, lr=1e-4, weight_decay=0.0, eps=1e-6, rank=8, variant="lora-fa"),
        theirs=lambda model, size, ours: peers.lora_fa(model, 8, lr=1e-4),
        same_weights=None,
        memory_limit=1.001,
        notes=(
            "it corrects gradients in bf16, and adds eps before the bias correction, so that weights differ; without "
            "the two they are the same (tests/test_lora.py)",
            "its step counts aren't tensors: ours are, of 4 bytes each",
        ),
    ),
    "vera": Race(
        f"peft + {FUSED}",
        "peft",
        ours=lambda model, size: LoRA(model, lr=1e-4, rank=64, variant="vera"),
        theirs=lambda model, size, ours: peers.vera(model, 64, lr=1e-4),
        update_limit=1.02,
    ),
    "qlora": Race(
        f"peft on bitsandbytes 0.50.2 + {FUSED}",
        "bitsandbytes",
        **_qlora("torch"),
        memory_limit=1.01,
        notes=(
            "its kernel needs no extra memory; ours, in plain torch, needs half a megabyte while it dequantises",
            *OF_QLORA,
        ),
    ),
    "qlora-512-tokens": Race(
        f"peft on bitsandbytes 0.50.2 + {FUSED}",
        "bitsandbytes",
        **_qlora("torch"),
        memory_limit=1.01,
        tokens=512,
        notes=("as `qlora`, but with as many tokens as one trains on, among which dequantising is shared", *OF_QLORA),
    ),
    "qlora-bitsandbytes": Race(
        f"peft on bitsandbytes 0.50.2 + {FUSED}",
        "bitsandbytes",
        **_qlora("bitsandbytes"),
        notes=('ours with kernels="bitsandbytes": both sides dequantise by the same kernel', *OF_QLORA),
    ),
    "lomo": Race(
        "lomo-optim 0.1.1",
        "lomo_optim",
        **_lomo(None),
        notes=(IN_HOOKS, "its step() raises: the step is fused_backward(loss, lr), which takes the rate"),
    ),
    "lomo-clipped": Race(
        "lomo-optim 0.1.1",
        "lomo_optim",
        **_lomo(1.0),
        same_weights=1e-5,
        notes=(IN_HOOKS, "clip_norm 1.0: two backward passes on both sides; they add up the norms in different orders"),
    ),
    "adalomo": Race(
        "lomo-optim 0.1.1",
        "lomo_optim",
        ours=lambda model, size: with_timed_hooks(AdaLomo)(model, lr=5e-4),
        theirs=lambda model, size, ours: (model, peers.adalomo(model, 5e-4)),
        same_weights=1e-4,
        notes=(
            IN_HOOKS,
            "it puts its factors on a GPU wherever the model is: on a CPU `.cuda()` does nothing while it is made",
        ),
    ),
    "adafactor": Race(
        "transformers.Adafactor",
        "transformers",
        ours=lambda model, size: Adafactor(model, lr=1e-4, weight_decay=0.01),
        theirs=lambda model, size, ours: (model, peers.adafactor_of_transformers(model, lr=1e-4, weight_decay=0.01)),
        same_weights=1e-6,
        same_gradients=True,
        notes=("relative_step=False and scale_parameter=False, as its Trainer runs it", SAME_GRADIENTS),
    ),
    "adafactor-torch": Race(
        "torch.optim.Adafactor",
        "torch",
        ours=lambda model, size: Adafactor(model, lr=1e-3, weight_decay=0.01, rule="torch"),
        theirs=lambda model, size, ours: (model, peers.adafactor_of_torch(model, lr=1e-3, weight_decay=0.01)),
        same_weights=1e-6,
        same_gradients=True,
        notes=(SAME_GRADIENTS,),
    ),
    "adam-mini": Race(
        "adam-mini 1.1.1",
        "adam_mini",
        ours=lambda model, size: AdamMini(model, lr=1e-4, weight_decay=0.01),
        theirs=lambda model, size, ours: (model, peers.adam_mini(model, size.width, size.heads, 1e-4, 0.01)),
        same_weights=1e-6,
        same_gradients=True,
        notes=("on a Llama whose heads are width / heads wide, for which its rule is right", SAME_GRADIENTS),
    ),
    "apollo": Race(
        "apollo-torch 1.0.3",
        "apollo_torch",
        ours=lambda model, size: APOLLO(model, lr=1e-4, eps=1e-12, update_every=NEVER),
        theirs=lambda model, size, ours: (model, peers.apollo(model, size.width // 4, 1.0, "channel", NEVER)),
        **_OF_APOLLO,
    ),
    "apollo-mini": Race(
        "apollo-torch 1.0.3",
        "apollo_torch",
        ours=lambda model, size: APOLLO(model, lr=1e-4, eps=1e-12, update_every=NEVER, scale_type="tensor"),
        theirs=lambda model, size, ours: (model, peers.apollo(model, 1, 128.0, "tensor", NEVER)),
        **_OF_APOLLO,
    ),
    "mezo": Race(
        "MeZO as its authors run it",
        "torch",
        ours=lambda model, size: MeZO(model, lr=1e-6),
        theirs=lambda model, size, ours: (model, peers.MeZOInPlace(model, lr=1e-6, eps=1e-3)),
        same_weights=None,
        update_limit=1.02,
        memory_limit=1.2,
        notes=(
            "there is no package to install: its rule is written out in benchmarks/peers.py",
            "the two draw different directions; ours keeps a copy of one module's weights, to put them back exactly",
            "the update is the move along the direction; both losses are in the step",
        ),
    ),
    "muon": Race(
        f"torch.optim.Muon and {FUSED}",
        "torch",
        ours=lambda model, size: Muon(model, lr=1e-3, weight_decay=0.1),
        theirs=lambda model, size, ours: (
            model,
            peers.with_adamw_on_the_rest(torch.optim.Muon, model, lr=1e-3, weight_decay=0.1),
        ),
        notes=(
            "Newton-Schulz iteration in bf16 on both sides: on a CPU without native bf16 a step of the full size takes "
            "an hour, so race it with --model small --steps 5",
        ),
    ),
    "sinkgd": _against_fused(
        ours=lambda model, size: SinkGD(model, lr=0.02),
        **UNEQUAL,
        notes=(f"{NO_PACKAGE}, which is another method: no race between equals",),
    ),
    "scale": _against_fused(
        ours=lambda model, size: SCALE(model, lr=0.02),
        **UNEQUAL,
        notes=(f"{NO_PACKAGE}, which is another method: no race between equals",),
    ),
    "welore": _against_fused(
        ours=lambda model, size: WeLore(model, lr=1e-4, weight_decay=0.01),
        theirs=_on_the_same_factors,
        update_limit=1.02,
        notes=("there is no package to install: raced against torch's AdamW on a model with the same factors",),
    ),
    "lisa": _against_fused(
        ours=lambda model, size: LISA(model, lr=1e-4, weight_decay=0.01, switch_every=NEVER),
        update_limit=1.02,
        notes=(NO_PACKAGE,),
    ),
    "hft": _against_fused(
        ours=lambda model, size: HFT(model, lr=1e-4, weight_decay=0.01),
        update_limit=1.02,
        notes=(NO_PACKAGE,),
    ),
    "blockllm-rows": _against_fused(
        ours=lambda model, size: BlockLLM(model, lr=1e-4, weight_decay=0.01, patience=NEVER, rows=64),
        same_weights=None,
        notes=(f"{NO_PACKAGE}, dense; ours trains groups of 64 rows of them",),
    ),
    "blockllm": _against_fused(
        ours=lambda model, size: BlockLLM(model, lr=1e-4, weight_decay=0.01, patience=NEVER),
        same_weights=None,
        update_limit=None,
        notes=(
            f"{NO_PACKAGE}, dense; ours trains single entries of them, which dense AdamW can't, "
            "so this is the price of the method, not a race between equals",
        ),
    ),
}
