"""From texts to batches of tokens."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tasks.models.tokenization import tokenize


def has_token_types(config: Any) -> bool:
    """Do batches of a model tell its two kinds of tokens apart? RoBERTa has one, whatever its tokenizer returns."""
    return (config.to_dict().get("type_vocab_size") or 0) > 1


class Encoder:
    """Tokenises pairs of texts, each once, and pads them into batches.

    Args:
        tokenizer: of transformers.
        model: the model to receive the batches; decides whether they have token types. May be on the meta device.
        sequence_length: tokens per sequence, special ones included; the longer text of a pair is cut first.
        pairs: do some examples have a second text? Encoder-decoders, which count the ends, then treat all as pairs.

    Raises:
        ValueError: `sequence_length` leaves no room for text.
    """

    def __init__(self, tokenizer: Any, model: Any, sequence_length: int, *, pairs: bool = False):
        special = tokenizer.num_special_tokens_to_add(pair=True)
        if sequence_length <= special + 1:
            raise ValueError(f"sequence_length {sequence_length} leaves no room for text: use at least {special + 2}")
        self.tokenizer, self.sequence_length = tokenizer, sequence_length
        values = model.config.to_dict()
        self._always_pairs = pairs and bool(values.get("is_encoder_decoder"))
        # XLNet classifies by the last position, whatever is in it
        self._pads_left = values.get("summary_type") == "last"
        self.keys = ("input_ids", "token_type_ids") if has_token_types(model.config) else ("input_ids",)
        self._known: dict[tuple[str, str], Tensor] = {}  # (len(keys), tokens) int32

    def tokens(self, first: str, second: str) -> Tensor:
        """The tokens of a text, or of a pair if `second` isn't empty: (1, n) int32, or (2, n) with token types."""
        if (first, second) not in self._known:
            given = {"truncation": "longest_first", "max_length": self.sequence_length}
            encoded = self._encode(first, second, return_token_type_ids=len(self.keys) > 1, **given)
            nothing = (self.tokenizer.pad_token_id, 0)  # for an empty text
            rows = [encoded[key] or [stand_in] for key, stand_in in zip(self.keys, nothing, strict=False)]
            self._known[first, second] = torch.tensor(rows, dtype=torch.int32)
        return self._known[first, second]

    @property
    def separates(self) -> bool:
        """Does anything stand between the two texts of a pair? GPT-2's tokenizer puts nothing there."""
        single, pair = (self.tokenizer.num_special_tokens_to_add(pair=pair) for pair in (False, True))
        return bool(pair > single)

    def cuts(self, first: str, second: str) -> bool:
        """Is the text, or the pair, longer than a sequence?"""
        if self.tokens(first, second).shape[1] < self.sequence_length:
            return False
        return len(self._encode(first, second, verbose=False)["input_ids"]) > self.sequence_length

    def _encode(self, first: str, second: str, **given: Any) -> dict[str, list[int]]:
        others = [second] if second or self._always_pairs else None
        # names of control tokens are text; in a list, since transformers treats an empty second text as none
        encoded = tokenize(self.tokenizer, [first], others, split_special_tokens=True, **given)
        return {key: rows[0] for key, rows in encoded.items()}

    def batch(self, pairs: Sequence[tuple[str, str]], length: int | None = None) -> dict[str, Tensor]:
        """Pairs as model inputs, each (pairs, length) int64, padded on the right (for XLNet on the left).

        Args:
            pairs: of texts.
            length: tokens per row, by default `sequence_length`: with batches of one shape, a step's memory and time
                are the same at every step, and comparable between methods.
        """
        length = length or self.sequence_length
        padding = (self.tokenizer.pad_token_id, 0)
        inputs = {key: torch.full((len(pairs), length), pad) for key, pad in zip(self.keys, padding, strict=False)}
        inputs["attention_mask"] = torch.zeros(len(pairs), length, dtype=torch.int64)
        for row, pair in enumerate(pairs):
            tokens = self.tokens(*pair)
            count = tokens.shape[1]
            place = slice(length - count, length) if self._pads_left else slice(count)
            for key, values in zip(self.keys, tokens, strict=True):
                inputs[key][row, place] = values
            inputs["attention_mask"][row, place] = 1
        return inputs
