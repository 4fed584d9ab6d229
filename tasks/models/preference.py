"""DPO: a loss on pairs of answers (Rafailov et al., NeurIPS 2023, arXiv 2305.18290), and its relatives.

    -log sigmoid(beta (log pi(w|x) / ref(w|x) - log pi(l|x) / ref(l|x)))

for a prompt x with a chosen answer w and a rejected one l, where ref is the model before training.
"""

import math
from dataclasses import dataclass

from torch import Tensor, nn

from tasks.models.loss_chunks import IGNORED
from tasks.models.token_losses import token_losses

FORMS = ("sigmoid", "ipo")
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Preference:
    """A form of the loss.

    Args:
        beta: how strongly the model is held to its reference; for "ipo" the paper's tau.
        label_smoothing: the share of pairs presumed to be the wrong way round (cDPO, Mitchell, 2023), below .5.
        form: "sigmoid" is DPO. "ipo" (Azar et al., 2023, arXiv 2310.12036) asks for a margin of 1 / (2 beta) between
            log-ratios per token, as its authors confirmed to trl: (margin - 1 / (2 beta))^2.

    Raises:
        ValueError: a value is out of range, or has no effect.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    form: str = "sigmoid"

    def __post_init__(self) -> None:
        if not (self.beta > 0 and math.isfinite(self.beta)):
            raise ValueError(f"dpo: the option beta must be more than 0, not {self.beta}")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(
                f"dpo: the option label_smoothing must be at least 0, below .5, not {self.label_smoothing}"
            )
        if self.form not in FORMS:
            raise ValueError(f"dpo: the option loss must be {' or '.join(FORMS)}, not {self.form!r}")
        if self.label_smoothing and self.form != "sigmoid":
            raise ValueError(f"dpo: label_smoothing has no effect on the loss {self.form}: leave it out")

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean over pairs, a scalar.

        Args:
            model: a causal language model of transformers.
            batch: of B pairs, a chosen and a rejected answer each, so that the rows of a batch can be divided among
                processes: `input_ids`, `attention_mask` and `targets` (B, 2, tokens), the ids in answers and `IGNORED`
                elsewhere; and `reference` (B, 2) fp32, from `log_probabilities`.
        """
        log_ratios = log_probabilities(model, batch) - batch["reference"].flatten()
        return self.losses(log_ratios.view(-1, 2), answer_tokens(batch).view(-1, 2)).mean()

    def losses(self, log_ratios: Tensor, tokens: Tensor) -> Tensor:
        """The loss of each pair, (B,), from answers' log-ratios and their numbers of tokens, both (B, 2)."""
        if self.form == "ipo":
            return (_margin(log_ratios / tokens) - 1 / (2 * self.beta)).square()
        reward = self.reward_margins(log_ratios)
        right, wrong = nn.functional.logsigmoid(reward), nn.functional.logsigmoid(-reward)
        return -(1 - self.label_smoothing) * right - self.label_smoothing * wrong

    def reward_margins(self, log_ratios: Tensor) -> Tensor:
        """By how much a chosen answer's implicit reward, beta times its log-ratio, exceeds a rejected one's, (B,)."""
        return self.beta * _margin(log_ratios)


def _margin(both: Tensor) -> Tensor:
    chosen, rejected = both.unbind(1)
    return chosen - rejected


def log_probabilities(model: nn.Module, batch: Batch) -> Tensor:
    """The log-probability of each answer, in pairs or not: the sum over its tokens, (answers,) fp32."""
    flat = {name: batch[name].flatten(0, -2) for name in ("input_ids", "attention_mask", "targets")}
    targets = flat.pop("targets")
    return -token_losses(model, flat, targets).sum(1)


def answer_tokens(batch: Batch) -> Tensor:
    """How many tokens each answer has, (answers,)."""
    return (batch["targets"] != IGNORED).sum(-1).flatten()
