"""From texts to batches of tokens."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Encoder:
    """Tokenises pairs of texts, each once, and pads them into batches.

    Args:
        tokenizer: of transformers.
        model: what the batches are for; decides whether they have token types. May be on the meta device.
        sequence_length: tokens of a sequence, special ones included; the longer text of a pair is cut first.

    Raises:
        ValueError: `sequence_length` leaves no room for text.
    """

    def __init__(self, tokenizer: Any, model: Any, sequence_length: int):
        special = tokenizer.num_special_tokens_to_add(pair=True)
        if sequence_length <= special + 1:
            raise ValueError(f"sequence_length {sequence_length} leaves no room for text: use at least {special + 2}")
        self.tokenizer, self.sequence_length = tokenizer, sequence_length
        # RoBERTa has one token type, and many tokenizers offer two to every model
        has_types = model.config.to_dict().get("type_vocab_size", 0) > 1
        self.keys = ("input_ids", "token_type_ids") if has_types else ("input_ids",)
        self._known: dict[tuple[str, str], Tensor] = {}  # (len(keys), tokens) int32

    def tokens(self, first: str, second: str) -> Tensor:
        """The tokens of a text, or of a pair if `second` isn't empty: (1, n) int32, or (2, n) with token types."""
        if (first, second) not in self._known:
            encoded = self.tokenizer(
                first,
                second or None,
                truncation="longest_first",
                max_length=self.sequence_length,
                return_token_type_ids=len(self.keys) > 1,
                split_special_tokens=True,  # names of control tokens in a text are text
            )
            self._known[first, second] = torch.tensor([encoded[key] for key in self.keys], dtype=torch.int32)
        return self._known[first, second]

    def cuts(self, first: str, second: str) -> bool:
        """Is the text, or the pair, longer than a sequence?"""
        if self.tokens(first, second).shape[1] < self.sequence_length:
            return False
        whole = self.tokenizer(first, second or None, split_special_tokens=True, verbose=False)["input_ids"]
        return len(whole) > self.sequence_length

    def batch(self, pairs: Sequence[tuple[str, str]], length: int | None = None) -> dict[str, Tensor]:
        """Pairs as model inputs, each (pairs, length) int64, padded on the right.

        Args:
            pairs: of texts.
            length: tokens of a row, by default `sequence_length`: batches of one shape make memory and time of a step
                the same from step to step, and comparable between methods.
        """
        length = length or self.sequence_length
        padding = (self.tokenizer.pad_token_id, 0)
        inputs = {key: torch.full((len(pairs), length), pad) for key, pad in zip(self.keys, padding, strict=False)}
        inputs["attention_mask"] = torch.zeros(len(pairs), length, dtype=torch.int64)
        for row, pair in enumerate(pairs):
            tokens = self.tokens(*pair)
            for key, values in zip(self.keys, tokens, strict=True):
                inputs[key][row, : len(values)] = values
            inputs["attention_mask"][row, : tokens.shape[1]] = 1
        return inputs
