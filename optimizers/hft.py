"""HFT: half fine-tuning (Hui et al., 2024, arXiv 2404.18466)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from optimizers.base import check_count
from optimizers.registry import register
from optimizers.shared.blocks import matching, outside_layers, shuffled
from optimizers.shared.drawn import DrawnBlocks
from optimizers.shared.draws import Draws
from optimizers.shared.inner import InnerAdamW
from optimizers.shared.layer_parts import CATEGORIES, parts_of_layers, parts_without


@register("hft")
class HFT(DrawnBlocks):
    """HFT: AdamW on half of each layer, drawn by category: attention matrices, MLP matrices, norms.

    Half of the parts in each category are trained; an odd number is rounded up in a random half of the layers and down
    in the rest: 2 of {q, k, v, o}; 2 or 1 of {gate, up, down}; 1 of 2 norms. Fused matrices count as one part: 1 of
    GPT-2's {qkv, o}, 1 of its MLP's two matrices. Biases go with their matrix. A round lasts `switch_every` steps; the
    next one is drawn independently.

    Trains half of each layer, and everything outside the layers (embeddings, final norm, head). Keeps 8 bytes per
    weight (12 with an fp32 master) of what is being trained. Parts that leave lose their state (the paper's rounds are
    separate trainings, each with a new optimizer); parts drawn again in the next round keep theirs.

    Args:
        model: the model to train; its layers are in `nn.ModuleList`s.
        lr: learning rate.
        weight_decay: decoupled; for tensors of two or more dimensions, biases excepted.
        betas, eps: as in Adam.
        switch_every: optimizer steps per round; None: one draw for the whole training.
        always_train: name patterns of further parameters, inside the layers, to train at every step.
        in_backward: update inside the backward pass, so that only one gradient exists at a time.
        master_weights: fp32 moments and masters for what is being trained, if the model is in low precision.
        fp32_gradients: fp32 gradients for low-precision weights.
        states: "full", or "8bit": AdamW's moments in 8 bits, 2.03 bytes per weight instead of 8.
        stochastic_rounding: round bf16 weights up or down at random, instead of keeping masters.
        seed: for the draws.

    Raises:
        ValueError: a value is out of range, a pattern matches nothing, or the model has no list of layers or
            nothing in them to draw from.
    """

    summary = "AdamW on half of each layer, drawn by category and redrawn each round"
    paper = "Hui, Zhang, Wang, Xu, Sun & Wu, 2024, arXiv 2404.18466"
    trains = "half of each layer at a time; embeddings, final norm and head always"
    keeps = "8 B per trained weight (12 B with an fp32 master)"
    excludes = "in_backward: accumulation, loop clipping, fp16 scaling"
    example = {"lr": 1e-2, "switch_every": 3}
    added_later = ("states", "stochastic_rounding")

    def __init__(
        self,
        model: nn.Module,
        lr: float = 2e-5,
        weight_decay: float = 0.01,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        switch_every: int | None = None,
        always_train: tuple[str, ...] = (),
        in_backward: bool = False,
        master_weights: bool = True,
        fp32_gradients: bool = False,
        states: str = "full",
        stochastic_rounding: bool = False,
        seed: int = 0,
    ):
        check_count("switch_every", switch_every, optional=True)
        before, after = outside_layers(model)
        self._always = {*matching(model, always_train), *before, *after}
        self._all_parts = parts_of_layers(model, leave_out=self._always)
        self.parts, self._layers = self._all_parts
        self.seed = seed
        self.adamw = InnerAdamW(
            model, master_weights=master_weights, states=states, stochastic_rounding=stochastic_rounding
        )
        self._draws = Draws(self.parts, self._draw, switch_every)
        super().__init__(
            model,
            {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay},
            in_backward=in_backward,
            fp32_gradients=fp32_gradients,
        )
        self._begin(before)

    def _leave_out(self, unreached: set[nn.Parameter]) -> None:
        self.parts, self._layers = parts_without(*self._all_parts, unreached)
        self._draws = Draws(self.parts, self._draw, self._draws.every)
        self._train_drawn()

    def _draw(self, number: int) -> list[int]:
        """The parts of draw `number`: a function of it and the seed."""
        key = (self.seed, number)
        return self._halves(
            lambda category: shuffled(len(self._layers), *key, category),
            lambda parts, *place: [parts[i] for i in shuffled(len(parts), *key, *place)],
        )

    def _halves(
        self, layer_order: Callable[[int], Sequence[int]], part_order: Callable[[list[int], int, int], Sequence[int]]
    ) -> list[int]:
        """Half of each category in each layer: the first in `part_order`, rounded up in the first of `layer_order`."""
        chosen: list[int] = []
        for category in range(len(CATEGORIES)):
            larger = set(layer_order(category)[: (len(self._layers) + 1) // 2])
            for number, layer in enumerate(self._layers):
                count = (len(layer[category]) + (number in larger)) // 2
                chosen += part_order(layer[category], category, number)[:count]
        return chosen

    @property
    def selection(self) -> str:
        """How many parts are being trained, out of how many."""
        return f"{len(self._draws.drawn)} of {len(self.parts)} parts"

    @property
    def worst_cases(self) -> int:
        return 1 if self._draws.every is None else 4

    def worst_case(self, number: int = 0) -> None:
        """Train the largest parts (among equal ones the last, whose inputs differ most), and more in the first layers.

        `number` 1 and 3: more in the last layers, whose gradients exist the longest. 2 and 3: among parts with matrices
        of equal size the last, whatever their biases. Another draw can need a few tenths of a percent more. Training
        with a single draw keeps that draw.
        """
        if self._draws.every is None:
            return
        self._reach.at_worst = True
        least = 2 if number >= 2 else 0  # dimensions
        sizes = [sum(p.numel() for p in params if p.dim() >= least) for params in self.parts.values()]
        self._draws.take(
            self._halves(
                lambda category: range(len(self._layers))[:: -1 if number % 2 else 1],
                lambda parts, *place: sorted(parts, key=lambda i: (sizes[i], i), reverse=True),
            )
        )
        self._select()
