"""BlockLLM: train the few tensors that matter most at the moment (Ramesh et al., 2024, arXiv 2406.17296)."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from optimizers.base import MemoryEfficientOptimizer, check_choice, check_count, check_share
from optimizers.registry import register
from optimizers.shared.blockllm_rules import RULES, PaperRule
from optimizers.shared.blocks import matching, shuffled, split_into_blocks
from optimizers.shared.checkpointing import keep_backward_short
from optimizers.shared.inner import InnerAdamW
from optimizers.shared.largest import largest_entries
from optimizers.shared.norms import norm_of
from optimizers.shared.partial import (
    marked_state,
    marks_are_smaller,
    trained_rows,
    update_entries,
    update_marked,
    update_rows,
)
from optimizers.shared.ranks import mean_loss
from optimizers.shared.reach import REENTRANT, Reach
from optimizers.shared.row_groups import Cuts, count_groups, cuts_of, largest_groups, shape_of
from optimizers.shared.sharded import gathered, has_values, placed
from optimizers.shared.values import check_indices

# What of a tensor is trained, and the entry of its state by which that is known, the most telling first.
PARTS = {"whole": None, "entries": "index", "rows": "groups", "marked": "exp_avg_sq"}


@register("blockllm")
class BlockLLM(MemoryEfficientOptimizer):
    """BlockLLM: AdamW on a share 1 - s of the weights, chosen again when the loss stops improving.

    `rule="paper"` (Algorithms 1 and 2): tensors are chosen by the largest ||g|| / f, f = 1 + how often the tensor was
    chosen, until they hold a share 1 - s of the weights; of their entries only those with the largest |g| at the first
    step after the choice are trained, exactly round((1 - s) n) of n weights in all. A new choice is made when the loss
    is not below the mean of the last `patience` losses. `rule="release"` is what the authors' package does: whole
    tensors, by ||g|| / exp(f / step), rechosen at most every `update_every` steps (`optimizers.shared.blockllm_rules`).

    Where the paper is silent: the norms of untrained tensors are measured on `probe` further tensors per step, in turn,
    so each norm is an estimate of known age and no full gradient ever exists (the authors' scripts compute one for each
    choice); a probed tensor gets a gradient but isn't updated; one without a norm yet ranks last. All moments are
    dropped at a new choice: the entries of a tensor share a step count, so mixing old and new moments would break
    Adam's bias correction.

    Trains the tensors of the layers, and `always_train` throughout. Keeps, for each trained entry, its position (int32)
    and two moments: 12 bytes in fp32, 16 with an fp32 master; or, if that is less, two moments for each weight of the
    chosen tensors, 8 bytes (12), those of untrained entries marked so that nothing moves them: then nothing is gathered
    either. With `rows` 4 bytes per trained entry less, plus 4 per group; for `always_train` the same as AdamW.

    Args:
        model: the model to train; its layers are in `nn.ModuleList`s.
        lr: learning rate.
        weight_decay: decoupled; for trained entries of tensors of two or more dimensions, biases excepted.
        betas, eps: as in Adam.
        sparsity: s, the share of the layers' weights that is not being trained at any time.
        patience: m, how many past losses the newest is compared with.
        rule: "paper" or "release".
        probe: how many further tensors get a gradient, for its norm, at a step with probes.
        probe_every: steps between probes; None for 1 (paper) or 20 (release).
        update_every: for rule "release": a new choice is made only at steps divisible by it.
        always_train: name patterns of parameters that are trained at every step, dense.
        train_embeddings: also choose among embeddings, final norm and head.
        master_weights: fp32 moments and masters for what is being trained, if the model is in low precision.
        fp32_gradients: fp32 gradients for low-precision weights.
        stochastic_rounding: round bf16 weights up or down at random, instead of keeping masters.
        seed: for the first choice and the order of the probes.
        rows: for rule "paper": train whole groups of this many consecutive rows, those with the largest mean g^2,
            instead of single entries. They are updated in place: no positions are kept and nothing is gathered.

    Raises:
        ValueError: a value is out of range, a pattern matches nothing, or the model has no list of layers.
        RuntimeError: in `step()`, when the gradients were not computed by `backward(loss)`, which passes it the loss.
    """

    summary = "AdamW on the few weights with the largest gradients, chosen again when the loss stalls"
    paper = "Ramesh, Ganapathiraman, Laradji & Schmidt, 2024, arXiv 2406.17296"
    trains = "a share 1 - s of the weights at a time"
    keeps = (
        "12 B per trained weight, or 8 B per weight of the chosen tensors if that is less; with `rows` 8 B per trained "
        "weight and 4 B per group (4 B per weight more with an fp32 master)"
    )
    excludes = "re-entrant gradient checkpointing; loss.backward() instead of backward(loss)"
    varies_with = "the tensors that are chosen"
    example = {"lr": 1e-2, "sparsity": 0.7, "patience": 3, "update_every": 2}
    added_later = ("stochastic_rounding", "rows")
    needs_loss = True

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-3,
        weight_decay: float = 0.01,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        sparsity: float = 0.95,
        patience: int = 100,
        rule: str = "paper",
        probe: int = 1,
        probe_every: int | None = None,
        update_every: int = 1000,
        always_train: tuple[str, ...] = (),
        train_embeddings: bool = False,
        master_weights: bool = True,
        fp32_gradients: bool = False,
        stochastic_rounding: bool = False,
        seed: int = 0,
        rows: int | None = None,
    ):
        check_choice("rule", rule, tuple(RULES))
        check_count("rows", rows, optional=True)
        if rows is not None and not RULES[rule].masks_entries:
            raise ValueError(f"rows={rows} needs rule='paper': with rule={rule!r} whole tensors are trained")
        check_share("sparsity", sparsity)
        for name, count in (("patience", patience), ("probe", probe), ("update_every", update_every)):
            check_count(name, count)
        check_count("probe_every", probe_every, optional=True)
        self._always = matching(model, always_train)
        blocks = split_into_blocks(model, embeddings=train_embeddings, leave_out=self._always)
        self._all_in_blocks = [p for params in blocks.values() for p in params]
        self._pool = self._all_in_blocks
        super().__init__(
            model,
            {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay},
            may_train=[*self._always, *self._pool],
            fp32_gradients=fp32_gradients,
        )
        self._new_rule = functools.partial(RULES[rule], sparsity=sparsity, patience=patience, update_every=update_every)
        self.rule: PaperRule = self._new_rule([p.numel() for p in self._pool])
        self.seed, self.probe, self.rows = seed, probe, rows
        self._cuts: dict[Tensor, Cuts] = {}  # of what is being trained, if `rows` is given
        self.adamw = InnerAdamW(model, master_weights=master_weights, stochastic_rounding=stochastic_rounding)
        self.probe_every = probe_every or self.rule.probe_every
        self._hooks.append(keep_backward_short(model))
        self._loss: Tensor | None = None  # of the current step
        self._probed: list[int] = []
        self._probes_done = 0
        self._reach = Reach(model, self._leave_out, self.on_any_replica, self.worst_case)
        self._hooks.append(self._reach)
        self._choose_first()

    def _choose_first(self) -> None:
        self._choose(self.rule.first(shuffled(len(self._pool), self.seed)))

    def _leave_out(self, unreached: set[nn.Parameter]) -> None:
        self._pool = [p for p in self._all_in_blocks if p not in unreached]
        if not self._pool:
            raise ValueError("none of the layers that the loss reaches has anything to train")
        self.rule = self._new_rule([p.numel() for p in self._pool])
        self._choose_first()

    @property
    def selection(self) -> str:
        """How many tensors are chosen, out of how many."""
        return f"{len(self.rule.chosen)} of {len(self._pool)} tensors"

    @property
    def block_coverage(self) -> float:
        """Share of the tensors chosen at least once."""
        return sum(count > 0 for count in self.rule.counts) / len(self._pool)

    def before_backward(self, loss: Tensor) -> None:
        super().before_backward(loss)
        if all(p.grad is None for p in self.trainable):  # of a step that was skipped, by model.zero_grad()
            self._loss = None

    def note_loss(self, loss: Tensor) -> None:
        """Micro-batches' losses, each divided by their number, add up."""
        self._loss = mean_loss(self, loss.detach()) + (0.0 if self._loss is None else self._loss)

    def drop_step(self) -> None:
        self._loss = None

    def before_update(self) -> None:
        if self._loss is None:
            raise RuntimeError("BlockLLM must see the loss: call optimizer.backward(loss) instead of loss.backward()")
        self._measure(self._probed)
        for i in self._probed:  # they were computed for their norms only
            self._pool[i].grad = None
        if self.rule.masks_entries and not any(self.state.get(self._pool[i]) for i in self.rule.chosen):
            self._mask()

    def update(self, params: list[Tensor], grads: list[Tensor], group: dict[str, Any]) -> None:
        parts = [self._part_of(p) for p in params]
        for part in PARTS:
            chosen = [i for i, one in enumerate(parts) if one == part]
            if chosen:
                self._update_part(part, [params[i] for i in chosen], [grads[i] for i in chosen], group)

    def _part_of(self, p: Tensor) -> str | None:
        """Which part of `p` is trained, one of `PARTS`; None if it has no entry among the largest."""
        if p in self._dense:
            return "whole"
        state = self.state.get(p, {})
        return next((part for part, name in PARTS.items() if name in state), None)

    def _update_part(self, part: str, params: list[Tensor], grads: list[Tensor], group: dict[str, Any]) -> None:
        states, keys = [self.state[p] for p in params], self.rounding_keys(params)
        if part == "entries":
            for state, p, g, key in zip(states, params, grads, keys, strict=True):
                update_entries(self.adamw, state, p, g, group, key)
        elif part == "rows":
            update_rows(self.adamw, states, params, grads, [self._cuts_of(p) for p in params], group, keys)
        elif part == "marked" and not self._trains_all_chosen():
            update_marked(self.adamw, states, params, grads, group)
        else:
            self.adamw.update(states, params, grads, group, keys)

    def after_step(self) -> None:
        loss = self._loss.item() if self._loss is not None and has_values(self._loss) else 0.0
        self._loss = None
        if self.rule.is_time(loss):
            self._check_reached()
            self.advance()
        else:
            if len(self.rule.losses) == self.rule.patience:  # long enough, though others may lower the loss forever
                self._check_reached()
            self._probed = self._next_probes()
            self._activate()

    def _check_reached(self) -> None:
        if not any(self.state.get(self._pool[i]) for i in self.rule.chosen):
            raise RuntimeError(
                f"no gradient reached any of the {len(self.rule.chosen)} tensors being trained: the loss doesn't "
                "depend on them (freeze what it doesn't reach before building BlockLLM), or the model uses "
                f"{REENTRANT}"
            )

    def advance(self) -> None:
        """Choose again by the known norms; all moments are dropped."""
        self._reach.at_worst = False
        self._measure(self.rule.chosen)
        self._choose(self.rule.choose(shuffled(len(self._pool), self.seed, 2, self.rule.steps)))

    @property
    def worst_cases(self) -> int:
        return 2 if self.rule.masks_entries else 1

    def worst_case(self, number: int = 0) -> None:
        """Choose the largest tensors, among equal ones those of the first layers; the largest others are probed.

        The largest come last, when the positions of the others' entries are held already. `number` 1: as many weights
        as the rule can choose, since the tensor that reaches the budget may be the largest of all, and each chosen one
        has a dense gradient.
        """
        self._reach.at_worst = True
        largest = sorted(range(len(self._pool)), key=lambda i: -self._pool[i].numel())
        chosen = self.rule.first(self.rule.fullest(largest) if number else largest)
        self._choose(sorted(chosen, key=lambda i: self._pool[i].numel(), reverse=True)[::-1])

    def extra_state(self) -> dict[str, Any]:
        sizes = [p.numel() for p in self._pool]
        return {
            "sizes": sizes,
            "probed": self._probed,
            "probes_done": self._probes_done,
            **self.rule.state(),
            **self._reach.state(),
        }

    def load_extra_state(self, extra: dict[str, Any]) -> None:
        self._reach.load_state(extra)
        if extra["sizes"] != [p.numel() for p in self._pool]:
            raise ValueError(
                "this state was saved for other tensors: always_train, train_embeddings or the model differs"
            )
        check_indices("probed", extra["probed"], len(self._pool))
        self.rule.load_state(extra)
        self._cuts.clear()
        self._probed, self._probes_done = list(extra["probed"]), extra["probes_done"]
        self._activate()

    def expected_state(self, p: nn.Parameter, saved: dict[str, Any]) -> dict[str, Any]:
        name = "index" if self.rows is None else "groups"
        kept = saved.get(name)
        if not self.rule.masks_entries or p in set(self._always) or not torch.is_tensor(kept) or kept.dim() != 1:
            return self.adamw.expected_state(p)
        limit = p.numel() if self.rows is None else count_groups(p, self.rows)
        if not len(kept) or kept[0] < 0 or kept[-1] >= limit or not (kept.diff() > 0).all():
            raise ValueError(f"this state is damaged: {name} must be increasing numbers below {limit}")
        shape = (len(kept),) if self.rows is None else shape_of(kept.tolist(), self.rows, p)
        adam = self.adamw.expected_state(p, saved, *shape)
        return {**adam, name: torch.empty(len(kept), dtype=torch.int32, device="meta")}

    def weights_with_master(self, p: nn.Parameter) -> Tensor:
        state = self.state[p]
        if "index" in state:
            return p.reshape(-1).index_select(0, state["index"])
        return trained_rows(p, self._cuts_of(p)) if "groups" in state else p

    def _choose(self, chosen: list[int]) -> None:
        for p in self._pool:
            self.state.pop(p, None)
        self._cuts.clear()
        self.rule.take(chosen)
        self._probed = [] if self.rule.keeps_probes else self._next_probes()
        self._activate()

    def _next_probes(self) -> list[int]:
        """The tensors that get a gradient at the next step just for its norm."""
        if self._reach.at_worst:
            unchosen = set(range(len(self._pool))).difference(self.rule.chosen)
            return sorted(unchosen, key=lambda i: (-self._pool[i].numel(), i))[: self.probe]
        if self.rule.steps % self.probe_every:
            return self._probed if self.rule.keeps_probes else []
        return self._random_probes() if self.rule.keeps_probes else self._probes_in_turn()

    def _probes_in_turn(self) -> list[int]:
        """The next ones in a random order that cycles through all tensors."""
        probed: list[int] = []
        unchosen = len(self._pool) - len(self.rule.chosen)
        while len(probed) < min(self.probe, unchosen):
            epoch, place = divmod(self._probes_done, len(self._pool))
            candidate = shuffled(len(self._pool), self.seed, 1, epoch)[place]
            self._probes_done += 1
            if candidate not in self.rule.chosen and candidate not in probed:
                probed.append(candidate)
        return probed

    def _random_probes(self) -> list[int]:
        """Random ones among those not chosen, redrawn each time."""
        unchosen = [i for i in range(len(self._pool)) if i not in self.rule.chosen]
        start = self._probes_done
        self._probes_done += self.probe
        numbers = range(start, self._probes_done)
        drawn = (unchosen[shuffled(len(unchosen), self.seed, 1, number)[0]] for number in numbers if unchosen)
        return list(dict.fromkeys(drawn))

    def _activate(self) -> None:
        chosen = [self._pool[i] for i in self.rule.chosen]
        self._dense = {*self._always, *(() if self.rule.masks_entries else chosen)}
        self.train_only({*self._always, *chosen, *(self._pool[i] for i in self._probed)})

    def _measure(self, indices: list[int]) -> None:
        """Note ||g|| of the tensors that hold a gradient; without values the size stands in for it: the worst case."""
        for i in indices:
            grad = self._pool[i].grad
            if grad is not None:
                norm = gathered(norm_of(grad))
                self.rule.norms[i] = norm.item() if has_values(norm) else float(grad.numel())

    def _mask(self) -> None:
        """Keep the entries with the largest gradients over all chosen tensors, as many as the budget allows."""
        chosen = [self._pool[i] for i in self.rule.chosen]
        pairs = [(p, p.grad) for p in chosen if p.grad is not None]
        if not pairs:
            return
        grads = [grad for _, grad in pairs]
        budget = min(self.rule.budget, sum(grad.numel() for grad in grads))
        if self.rows is None:
            marks = marks_are_smaller(self.adamw, [p for p, _ in pairs], budget)
            for (p, _), positions in zip(pairs, largest_entries(grads, budget), strict=True):
                if marks:
                    state = marked_state(self.adamw, gathered(p.detach()), positions)
                    self.state[p] = {key: placed(value, p) for key, value in state.items()}
                elif len(positions):
                    self.state[p]["index"] = positions
        else:
            for (p, _), groups in zip(pairs, largest_groups(grads, self.rows, budget), strict=True):
                if groups:
                    self.state[p]["groups"] = torch.tensor(groups, dtype=torch.int32, device=p.device)
                    self._cuts[p] = cuts_of(groups, self.rows, p)

    def _trains_all_chosen(self) -> bool:
        chosen = [self._pool[i] for i in self.rule.chosen]
        return sum(p.numel() for p in chosen if self.state.get(p)) <= self.rule.budget

    def _cuts_of(self, p: Tensor) -> Cuts:
        if p not in self._cuts:  # after a state was loaded
            assert self.rows is not None
            self._cuts[p] = cuts_of(self.state[p]["groups"].tolist(), self.rows, p)
        return self._cuts[p]
