"""The packages that we race against, each behind the interface of our training step.

If a package has a defect that would end the race or make it unfair, the adapter works around it, and a comment says
so; the notes in `races.py` are printed with the results.
"""

from __future__ import annotations

import itertools
import sys
import time
import types
import warnings
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from membench.memory.stock import StockOptimizer
from optimizers.apollo import random_projection
from optimizers.shared.blocks import find_layers
from optimizers.shared.matrices import layer_matrices
from optimizers.shared.subspace import randomized_vectors


def fused_adamw(params: Iterable[nn.Parameter], weight_decay: float = 0.0, **settings: Any) -> StockOptimizer:
    """`torch.optim.AdamW(fused=True)` with the usual two groups: vectors don't decay."""
    return StockOptimizer(torch.optim.AdamW(two_groups(params, weight_decay), fused=True, **settings))


class MeZOInPlace(StockOptimizer):
    """MeZO as its authors run it: all weights are moved by eps z, by -2 eps z and back, with z made anew each time."""

    asks_losses = True

    def __init__(self, model: nn.Module, lr: float, eps: float):
        super().__init__(torch.optim.SGD(model.parameters(), lr=lr))  # for its groups: it never steps
        self.model, self.lr, self.eps = model, lr, eps
        self.step = self._step
        self._seed, self._slope = 0, torch.zeros(())

    @torch.no_grad()
    def ask(self, closure: Callable[[], Tensor]) -> Tensor:
        """Both losses, in evaluation mode; returns their mean."""
        self.model.eval()
        losses = []
        for distance in (self.eps, -2 * self.eps):
            self._move(distance)
            losses.append(closure())
        self._move(self.eps)
        self.model.train()
        self._slope = (losses[0] - losses[1]) / (2 * self.eps)
        return (losses[0] + losses[1]) / 2

    def _step(self) -> None:
        self._move(-self.lr * self._slope.item())
        self._seed += 1

    @torch.no_grad()
    def _move(self, distance: float) -> None:
        device = self.trainable[0].device
        generator = torch.Generator(device).manual_seed(self._seed)
        for p in self.trainable:
            p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype, device=device), alpha=distance)


def two_groups(params: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay, vectors don't."""
    params = list(params)
    groups = [
        {"params": [p for p in params if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def sgd(model: nn.Module, **settings: Any) -> StockOptimizer:
    """`torch.optim.SGD`, with the kernel that it chooses itself."""
    return StockOptimizer(torch.optim.SGD(model.parameters(), **settings))


def adafactor_of_torch(model: nn.Module, weight_decay: float, **settings: Any) -> StockOptimizer:
    """`torch.optim.Adafactor`."""
    return StockOptimizer(torch.optim.Adafactor(two_groups(model.parameters(), weight_decay), **settings))


def adafactor_of_transformers(model: nn.Module, weight_decay: float, **settings: Any) -> StockOptimizer:
    """`transformers.Adafactor` as the Trainer makes it."""
    from transformers import Adafactor

    groups = two_groups(model.parameters(), weight_decay)
    return StockOptimizer(Adafactor(groups, relative_step=False, scale_parameter=False, **settings))


def adam_mini(model: nn.Module, width: int, heads: int, lr: float, weight_decay: float) -> StockOptimizer:
    """Adam-mini from its package, which computes the size of a head from width and heads."""
    from adam_mini import Adam_mini

    named = list(model.named_parameters())
    return StockOptimizer(Adam_mini(named, lr=lr, weight_decay=weight_decay, dim=width, n_heads=heads, verbose=False))


def adamw8bit(model: nn.Module, weight_decay: float, **settings: Any) -> StockOptimizer:
    """`bitsandbytes.optim.AdamW8bit`."""
    from bitsandbytes.optim import AdamW8bit

    return StockOptimizer(AdamW8bit(two_groups(model.parameters(), weight_decay), **settings))


def train_same(model: nn.Module, ours: nn.Module) -> list[nn.Parameter]:
    """Freeze in `model` what is currently frozen in `ours`; returns the rest."""
    for p, q in zip(model.parameters(), ours.parameters(), strict=True):
        p.requires_grad_(q.requires_grad)
    return [p for p in model.parameters() if p.requires_grad]


class Peer(StockOptimizer):
    """A third-party optimizer, with what it has beyond torch's interface."""

    optimizer: Any
    step: Any
    zero_grad: Any


class SeveralPeers(Peer):
    """Several optimizers, each with its own parameters, as one."""

    def __init__(self, *optimizers: torch.optim.Optimizer):
        self.optimizers = optimizers

    @property
    def state(self) -> dict[Tensor, dict[str, Any]]:
        return {p: state for optimizer in self.optimizers for p, state in optimizer.state.items()}

    @property
    def trainable(self) -> list[nn.Parameter]:
        return [p for one in self.optimizers for group in one.param_groups for p in group["params"]]

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()


def with_adamw_on_the_rest(matrices: type[torch.optim.Optimizer], model: nn.Module, **settings: Any) -> SeveralPeers:
    """`matrices` on the matrices of the layers and torch's fused AdamW, at a rate of 3e-4, on the rest."""
    inside = layer_matrices(model)
    chosen = set(inside)
    rest = fused_adamw((p for p in model.parameters() if p not in chosen), settings["weight_decay"], lr=3e-4)
    return SeveralPeers(matrices(inside, **settings), rest.optimizer)


# ---- badam


class BlockPeer(Peer):
    """`badam.BlockOptimizer`: its state belongs to fp32 copies, behind the model's low-precision parameters."""

    @property
    def state(self) -> dict[Tensor, dict[str, Any]]:
        block = self.optimizer
        pairs = zip(block.param_idx2lp.values(), block.param_idx2hp.values(), strict=True)
        return {p: {"master": master, **block.base_optimizer.state[master]} for p, master in pairs}

    @property
    def trainable(self) -> list[nn.Parameter]:
        return list(self.optimizer.param_idx2lp.values())

    def advance(self) -> None:
        self.optimizer.switch_trainable_params()


def badam(model: nn.Module, blocks: list[str], switch_every: int, **settings: Any) -> BlockPeer:
    """BAdam from its package, blocks in ascending order, around torch's fused kernel.

    Args:
        model: the model.
        blocks: the names of the blocks. The package's own are made by a pattern that only fits Llama, and names match
            anywhere in a parameter's name ("layers.1" in "layers.10"), so each gets a dot at its end.
        switch_every: K.
        settings: for `torch.optim.AdamW`; its groups are overwritten, and everything decays as `defaults` say.
    """
    from badam import BlockOptimizer

    class Quiet(BlockOptimizer):
        def switch_trainable_params(self, verbose: int | None = 0) -> None:
            super().switch_trainable_params(verbose=0)

    base = torch.optim.AdamW(model.parameters(), fused=True, **settings)
    with warnings.catch_warnings(action="ignore"):  # it warns that the weights are in fp32
        return BlockPeer(
            Quiet(
                base,
                named_parameters_list=list(model.named_parameters()),
                block_prefix_list=[[f"{name}."] for name in blocks],
                switch_block_every=switch_every,
                switch_mode="ascending",
                verbose=0,
            )
        )


# ---- galore-torch


def import_galore() -> Any:
    """The package `galore_torch`; it imports bitsandbytes (43 MB), which only its 8-bit optimizer needs."""
    stubs = {} if find_spec("bitsandbytes") else _empty_bitsandbytes()
    sys.modules.update(stubs)
    try:
        import galore_torch.adamw
    finally:
        for name in stubs:  # others, including peft, check whether it is there
            del sys.modules[name]
    return galore_torch


def _empty_bitsandbytes() -> dict[str, types.ModuleType]:
    names = ("bitsandbytes", "bitsandbytes.optim", "bitsandbytes.optim.optimizer")
    stubs = {name: types.ModuleType(name) for name in names}
    stubs[names[-1]].__dict__["Optimizer2State"] = torch.optim.Optimizer
    return stubs


class GalorePeer(Peer):
    """`galore_torch.GaLoreAdamW`, optionally with the subspaces that ours chooses.

    Its own method takes a full SVD of each matrix in the first step: minutes for a model of 100M parameters. With
    `shared_subspaces` its projector calls our randomised method instead, with the same seed, so that both sides start
    from the same subspaces, and only the rest of the step is timed.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, shared_subspaces: bool):
        super().__init__(optimizer)
        if shared_subspaces:
            self._adamw = import_galore().adamw
            self._projector = _shared_projector(self._adamw.GaLoreProjector)
            self.step = self._step

    def _step(self) -> None:
        with mock.patch.object(self._adamw, "GaLoreProjector", self._projector):
            self.optimizer.step()


def _shared_projector(base: type) -> type:
    numbers = itertools.count()  # projectors are made in the order of the matrices, in which ours are numbered

    class Shared(base):
        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **kwargs)
            self.number = next(numbers)

        def get_orthogonal_matrix(self, weights: Tensor, rank: int, type: str) -> Any:
            key = (0, 0, self.number)
            vectors = randomized_vectors(weights.float(), rank, type != "right", type != "left", key)
            left, right = (None if one is None else one.to(weights.dtype) for one in vectors)
            return {"left": left, "right": right, "full": (left, right)}[type]

    return Shared


def galore(
    model: nn.Module, rank: int, update_every: int, scale: float, shared_subspaces: bool, **settings: Any
) -> GalorePeer:
    """GaLore from its package, on the same matrices as ours."""
    package = import_galore()
    projected = layer_matrices(model)
    chosen = set(projected)
    groups = [
        {"params": projected, "rank": rank, "update_proj_gap": update_every, "scale": scale, "proj_type": "std"},
        {"params": [p for p in model.parameters() if p not in chosen]},
    ]
    return GalorePeer(package.GaLoreAdamW(groups, no_deprecation_warning=True, **settings), shared_subspaces)


# ---- fira


def fira(model: nn.Module, rank: int, **settings: Any) -> StockOptimizer:
    """Fira from its package, on the same matrices as ours and with the subspaces that ours chooses first."""
    from fira import FiraAdamW
    from fira.gradient_projection import GradientProjector

    projected = layer_matrices(model)
    chosen = set(projected)
    group = {"params": projected, "rank": rank, "update_proj_gap": 10**9, "alpha": 1.0, "proj_type": "std"}
    groups = [group, {"params": [p for p in model.parameters() if p not in chosen]}]
    optimizer = FiraAdamW(groups, no_deprecation_warning=True, **settings)
    shared = _shared_projector(GradientProjector)
    for p in projected:
        optimizer.state[p]["projector"] = shared(rank, update_proj_gap=10**9)
    return StockOptimizer(optimizer)


# ---- apollo-torch


def apollo(model: nn.Module, rank: int, scale: float, scale_type: str, update_every: int) -> StockOptimizer:
    """APOLLO from its package, on the same matrices as ours and with ours' first projections."""
    from apollo_torch import APOLLOAdamW
    from apollo_torch.random_projector import GradientProjector

    projected = layer_matrices(model)
    chosen = set(projected)
    settings = {"rank": rank, "update_proj_gap": update_every, "scale": scale, "scale_type": scale_type}
    groups = [
        {"params": projected, **settings, "proj": "random", "proj_type": "std"},
        {"params": [p for p in model.parameters() if p not in chosen]},
    ]
    optimizer = APOLLOAdamW(groups, lr=1e-4, eps=1e-12)

    class Shared(GradientProjector):
        def get_orthogonal_matrix(self, weights: Tensor, rank: int, type: str, seed: int) -> Tensor:
            short = min(weights.shape)
            projection = random_projection(rank, short, weights, (0, seed - 1, 0))  # it numbers from 1
            return projection.t().contiguous() if type == "left" else projection

    def of_group(group: dict[str, Any], state: dict[str, Any]) -> Shared:
        return Shared(rank, update_proj_gap=update_every, proj_type="std", seed=state["seed"])

    optimizer._initialize_projector = of_group
    return StockOptimizer(optimizer)


# ---- lomo-optim


class LomoPeer(Peer):
    """`lomo_optim.Lomo` and `AdaLomo`: `step()` raises, so the step is `fused_backward`, which takes the rate."""

    in_backward = True

    def __init__(self, optimizer: Any):
        super().__init__(optimizer)
        self.step = self.zero_grad = lambda: None

    @property
    def state(self) -> dict[Tensor, dict[str, Any]]:
        kept = {name: value for name, value in vars(self.optimizer).items() if name.startswith("exp_avg_sq")}
        return {next(iter(self.optimizer.param_groups[0]["params"])): kept}

    @property
    def hook_seconds(self) -> float:
        return self.optimizer.hook_seconds

    def backward(self, loss: Tensor) -> None:
        if self.optimizer.clip_grad_norm is not None:
            self.optimizer.grad_norm(loss)
        self.optimizer.fused_backward(loss, self.optimizer.lr)


def lomo(model: nn.Module, lr: float, clip_norm: float | None = None) -> LomoPeer:
    """LOMO from its package."""
    from lomo_optim import Lomo

    return LomoPeer(_with_timed_hooks(Lomo)(model, lr=lr, clip_grad_norm=clip_norm))


def adalomo(model: nn.Module, lr: float) -> LomoPeer:
    """AdaLomo from its package, which puts its factors on a GPU wherever the model is."""
    from lomo_optim import AdaLomo

    on_cpu = mock.patch.object(torch.Tensor, "cuda", lambda tensor: tensor)
    with on_cpu if next(model.parameters()).device.type == "cpu" else warnings.catch_warnings():
        return LomoPeer(_with_timed_hooks(AdaLomo)(model, lr=lr))


def _with_timed_hooks(base: type) -> type:
    class Timed(base):
        hook_seconds = 0.0

        def fuse_update(self) -> Any:
            update = super().fuse_update()

            def timed(gradient: Any) -> Any:
                start = time.perf_counter()
                result = update(gradient)
                self.hook_seconds += time.perf_counter() - start
                return result

            return timed

    return Timed


# ---- peft


def qlora(model: nn.Module, rank: int, **settings: Any) -> tuple[nn.Module, StockOptimizer]:
    """LoRA from peft on bitsandbytes' NF4 linear modules, as `BitsAndBytesConfig(load_in_4bit=True)` makes them."""
    from bitsandbytes.nn import Linear4bit

    settings_of_base = {"compress_statistics": False, "quant_type": "nf4"}
    for layer in find_layers(model).values():
        for name, dense in list(layer.named_modules()):
            if isinstance(dense, nn.Linear):
                shape = (dense.in_features, dense.out_features, dense.bias is not None)
                quantized = Linear4bit(*shape, compute_dtype=dense.weight.dtype, **settings_of_base)
                quantized.load_state_dict(dense.state_dict())
                quantized.to(dense.weight.device)  # quantises
                quantized.register_buffer("magnitudes", quantized.weight.quant_state.absmax)  # for the meter to see
                layer.set_submodule(name, quantized)
    return lora(model, rank, **settings)


OF_LAYERS: dict[str, Any] = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}  # keeps the head out


def lora(model: nn.Module, rank: int, **settings: Any) -> tuple[nn.Module, StockOptimizer]:
    """LoRA from peft and torch's fused AdamW."""
    from peft import LoraConfig

    return _with_fused_adamw(model, LoraConfig(r=rank, lora_alpha=4 * rank, **OF_LAYERS), settings)


def vera(model: nn.Module, rank: int, **settings: Any) -> tuple[nn.Module, StockOptimizer]:
    """VeRA from peft and torch's fused AdamW."""
    from peft import VeraConfig

    return _with_fused_adamw(model, VeraConfig(r=rank, **OF_LAYERS), settings)


def lora_fa(model: nn.Module, rank: int, lr: float) -> tuple[nn.Module, StockOptimizer]:
    """LoRA-FA from peft, with its optimizer."""
    from peft import LoraConfig
    from peft.optimizers import create_lorafa_optimizer

    adapted = _adapted(model, LoraConfig(r=rank, lora_alpha=4 * rank, **OF_LAYERS))
    return adapted, StockOptimizer(create_lorafa_optimizer(adapted, r=rank, lora_alpha=4 * rank, lr=lr))


def _with_fused_adamw(model: nn.Module, config: Any, settings: dict[str, Any]) -> tuple[nn.Module, StockOptimizer]:
    adapted = _adapted(model, config)
    return adapted, fused_adamw((p for p in adapted.parameters() if p.requires_grad), **settings)


def _adapted(model: nn.Module, config: Any) -> Any:
    from peft import get_peft_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return get_peft_model(model, config)
