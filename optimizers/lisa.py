"""LISA: layerwise importance-sampled AdamW (Pan et al., NeurIPS 2024, arXiv 2403.17919)."""

from __future__ import annotations

from torch import nn

from optimizers.base import check_choice, check_count
from optimizers.registry import register
from optimizers.shared.blocks import matching, outside_layers, shuffled, split_into_blocks, without
from optimizers.shared.drawn import DrawnBlocks
from optimizers.shared.draws import Draws, drop_state
from optimizers.shared.inner import InnerAdamW

RESETS = ("sampled", "all", "none")


@register("lisa")
class LISA(DrawnBlocks):
    """LISA (Algorithm 1): AdamW on gamma of N layers, drawn uniformly every K steps, and on all outside the layers.

    Trains gamma layers at a time; embeddings, final norm and head at every step. Keeps 8 bytes per weight (12 with an
    fp32 master) of what is being trained. In an 8B model most of that belongs to embeddings and head.

    The paper doesn't say what happens to the state of a layer that leaves. `reset="sampled"` drops it, but keeps that
    of a layer drawn again in the next draw and of what is always trained, so the state never grows. "all" drops all
    state at each draw, like runs that reload the model for each interval. "none" drops nothing: in the end this is
    AdamW's full state.

    Args:
        model: the model to train; its layers are in `nn.ModuleList`s.
        lr: learning rate.
        weight_decay: decoupled; for tensors of two or more dimensions, biases excepted.
        betas, eps: as in Adam.
        layers: gamma, how many layers are trained at a time.
        switch_every: K, optimizer steps between draws.
        reset: "sampled", "all" or "none".
        always_train: name patterns of further parameters to train at every step; needed for a new classification head
            if `train_embeddings` is False.
        train_embeddings: train everything outside the layers (embeddings, final norm, head) at every step; False
            freezes it.
        in_backward: update inside the backward pass, so that only one gradient exists at a time.
        master_weights: fp32 moments and masters for what is being trained, if the model is in low precision.
        fp32_gradients: fp32 gradients for low-precision weights.
        states: "full", or "8bit": AdamW's moments in 8 bits, 2.03 bytes per weight instead of 8.
        stochastic_rounding: round bf16 weights up or down at random, instead of keeping masters.
        seed: for the draws.

    Raises:
        ValueError: a value is out of range, a pattern matches nothing, or the model has no list of layers.
    """

    summary = "AdamW on a few layers drawn at random every K steps, and on embeddings and head"
    paper = "Pan, Liu, Diao, Pi, Zhang, Han & Zhang, NeurIPS 2024, arXiv 2403.17919"
    trains = "gamma of N layers at a time; embeddings, final norm and head always"
    keeps = "8 B per trained weight (12 B with an fp32 master)"
    excludes = (
        "frozen embeddings: re-entrant gradient checkpointing; in_backward: accumulation, loop clipping, fp16 scaling"
    )
    varies_with = "the layers that are drawn"
    example = {"lr": 1e-2, "layers": 1, "switch_every": 3}
    added_later = ("states", "stochastic_rounding")

    def __init__(
        self,
        model: nn.Module,
        lr: float = 2e-5,
        weight_decay: float = 0.01,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        layers: int = 2,
        switch_every: int = 20,
        reset: str = "sampled",
        always_train: tuple[str, ...] = (),
        train_embeddings: bool = True,
        in_backward: bool = False,
        master_weights: bool = True,
        fp32_gradients: bool = False,
        states: str = "full",
        stochastic_rounding: bool = False,
        seed: int = 0,
    ):
        check_count("layers", layers)
        check_count("switch_every", switch_every)
        check_choice("reset", reset, RESETS)
        before, after = outside_layers(model)
        self._always = {*matching(model, always_train), *([*before, *after] if train_embeddings else ())}
        self._all_blocks = split_into_blocks(model, leave_out=self._always)
        self.blocks = self._all_blocks
        self.layers, self.reset, self.seed = layers, reset, seed
        self._check_layers()
        self.adamw = InnerAdamW(
            model, master_weights=master_weights, states=states, stochastic_rounding=stochastic_rounding
        )
        self._draws = Draws(self.blocks, self._draw, switch_every)
        super().__init__(
            model,
            {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay},
            may_train=[*self._always, *(p for params in self.blocks.values() for p in params)],
            in_backward=in_backward,
            fp32_gradients=fp32_gradients,
        )
        self._begin(before)

    def _leave_out(self, unreached: set[nn.Parameter]) -> None:
        self.blocks = without(self._all_blocks, unreached)
        self._check_layers()
        self._draws = Draws(self.blocks, self._draw, self._draws.every)
        self._train_drawn()

    def _check_layers(self) -> None:
        if self.layers > len(self.blocks):
            raise ValueError(
                f"layers must be at most {len(self.blocks)}, the number that the model has, not {self.layers}"
            )

    def _draw(self, number: int) -> tuple[int, ...]:
        return shuffled(len(self.blocks), self.seed, number)[: self.layers]

    @property
    def selection(self) -> str:
        """The names of the layers being trained."""
        return ", ".join(self._draws.names[i] for i in self._draws.drawn)

    @property
    def worst_cases(self) -> int:
        return self._mixtures * (4 if len(set(self._recomputed())) > 1 else 1)

    @property
    def _mixtures(self) -> int:
        sizes = self._sizes()
        return self.layers + 1 + (self.layers if sizes[0] < sorted(sizes)[-self.layers] else 0)

    def _sizes(self) -> list[int]:
        return [sum(p.numel() for p in params) for params in self.blocks.values()]

    def _recomputed(self) -> list[bool]:
        """Of each layer, is it recomputed in the backward pass?"""
        layers = map(self.model.get_submodule, self.blocks)
        return [any(vars(part).get("gradient_checkpointing") for part in layer.modules()) for layer in layers]

    def worst_case(self, number: int = 0) -> None:
        """Train the largest layers; among equal ones the first and, for `number` of them, the last. If the first of all
        isn't among them, there are as many cases again with it, in which the backward pass goes furthest. If only some
        are recomputed in the backward pass, the others, whose activations are there, are tried as the first, as the
        last, and as both.

        At any moment of the backward pass a trained layer holds its gradients if it has been passed, and otherwise the
        inputs that its matrices need. Where activations outweigh gradients, the peak is early and the first layers hold
        most; otherwise, as with checkpointing, the last ones do, or a mixture of both. With `reset="none"` all layers
        get the state that they will have in the end.
        """
        self._reach.at_worst = True
        blocks, sizes = list(self.blocks.values()), self._sizes()
        kept, number = divmod(number, self._mixtures)
        furthest, number = divmod(number, self.layers + 1)
        of_none, recomputed = [False] * len(blocks), self._recomputed()
        not_first, not_last = recomputed if kept & 1 else of_none, recomputed if kept & 2 else of_none
        others, left = range(furthest, len(blocks)), self.layers - furthest - number
        first = sorted(others, key=lambda i: (-sizes[i], not_first[i], i))[:left]
        last = sorted(set(others).difference(first), key=lambda i: (-sizes[i], not_last[i], -i))[:number]
        self._draws.take([*range(furthest), *first, *last])
        self._select()
        if self.reset == "none":
            for p in (p for params in blocks for p in params if not self.state[p]):
                self.adamw.init_state(self.state[p], p)

    def _select(self) -> None:
        active = self._train_drawn()
        if self.reset != "none":
            drop_state(self.state, keep=active if self.reset == "sampled" else ())
