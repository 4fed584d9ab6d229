"""Causal language models, for all tasks that train them: model, tokenizer, loss and scores."""

import functools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto import modeling_auto

from tasks.data import cache
from tasks.models import tokenization
from tasks.models.arguments import TaskArguments
from tasks.models.loading import quiet
from tasks.models.modes import evaluation
from tasks.models.source import Source, check_positions, ids_of, longest_sequence, own_generator, without_dropout
from tasks.models.tokenization import beginning, byte_level_bpe, choose_tokenizer, tokenize, with_ids_of

Batch = dict[str, Tensor]

KIND = transformers.AutoModelForCausalLM
END_OF_TEXT = "<|endoftext|>"
IGNORED = -100  # the label of a token that the loss leaves out: torch's own ignore_index
EVALUATION_TOKENS = 2048  # per batch: with a vocabulary of 32,000, 0.26 GB of fp32 logits

# Architectures of transformers that are no causal language models, though it has such a class of them
ENCODERS = {*modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, "bert-generation"}  # unless they are made decoders
SEEING = {"cpmant", "xlm", "xlnet"}
DECODERS = {*modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, "trocr", "whisper"}
WINDOWS = ("sliding_window", "attention_chunk_size")  # what configurations call the tokens that a layer looks back on

TRAINING_TEXTS = 20_000  # the most a tokenizer is trained on


class LanguageModel:
    """A causal language model, and its tokenizer.

    Args:
        given: the model, its tokenizer, the tokens per sequence, the seed and dtype of the weights.
        texts: what to train a tokenizer on, if the model is a built-in one without a tokenizer.
        data_sha256: identifies `texts`.
        dropout: as its configuration says; False: none.

    Raises:
        ValueError: the model isn't causal, the tokenizer is missing or has no end-of-text token, or a sequence is
            longer than the model's positions.
    """

    def __init__(
        self, given: TaskArguments, *, texts: Callable[[], Iterable[str]], data_sha256: str, dropout: bool = True
    ):
        self.source = Source(given.model, given.trust_remote_code)
        self.seed, self.dtype = given.seed, given.dtype
        _check_causal(self.source)
        self.tokenizer, self._tokenizer_said = choose_tokenizer(
            self.source,
            given.tokenizer,
            lambda size: train_tokenizer(texts, size, data_sha256),
            "GaLore's LLaMA models have google-t5/t5-base; config:llama-tiny needs none",
        )
        if self.tokenizer.eos_token_id is None:
            raise ValueError(
                f"the tokenizer of {given.model} has no end-of-text token (eos_token), which separates texts"
            )
        self._settings = {} if dropout else without_dropout(self.source.config)
        skeleton: Any = self.source.skeleton(KIND)
        self.entries: int = skeleton.get_input_embeddings().num_embeddings
        self._needed = ids_of(self.tokenizer)
        check_positions(given.model, skeleton, given.sequence_length)
        self.positions = longest_sequence(skeleton)
        self.attention: str = skeleton.config._attn_implementation

    @property
    def end(self) -> int:
        """The end-of-text token."""
        return self.tokenizer.eos_token_id

    @property
    def from_scratch(self) -> bool:
        return self.source.from_scratch

    @functools.cached_property
    def head(self) -> tuple[str, ...]:
        """See `tasks.Task.head`."""
        return self.source.head(KIND)

    @property
    def grows(self) -> bool:
        """Does the tokenizer have ids for which the model has no embedding?"""
        return self._needed > self.entries

    def check_packing(self, longest: int) -> None:
        """Check that in a row with others a text of `longest` tokens is to the model what it is alone.

        A mask decides that for attention alone, and takes the place of a mask that only looks back on a few tokens.

        Raises:
            ValueError: it isn't.
        """
        model: Any = self.source.skeleton(KIND)
        config, name = model.config.get_text_config(decoder=True), self.source.name
        kinds = getattr(config, "layer_types", None) or ()
        convolutions = (one for one in model.get_decoder().modules() if isinstance(one, nn.Conv1d))
        if model._is_stateful or any("linear" in kind for kind in kinds) or any(convolutions):
            raise ValueError(
                f"{name} ({config.model_type}) can't keep packed texts apart, since not all of its layers are "
                "attention, which has a mask: leave the option packing out"
            )
        if config.model_type == "bloom" or getattr(config, "alibi", False):
            raise ValueError(
                f"{name} ({config.model_type}) counts positions by its mask (ALiBi), which that of packed texts does "
                "not tell: leave the option packing out"
            )
        if not _takes_pairs(model):
            raise ValueError(
                f"{name} ({config.model_type}) takes no mask of each pair of tokens, which keeps packed texts apart: "
                "leave the option packing out"
            )
        window = min((size for one in WINDOWS if isinstance(size := getattr(config, one, None), int)), default=longest)
        if window < longest and set(kinds) != {"full_attention"}:
            raise ValueError(
                f"{name} ({config.model_type}) looks back on {window:,} tokens, but the mask of packed texts would let "
                f"it see all of a text, and the longest has {longest:,}: leave the option packing out, or give "
                f"--sequence-length {window}"
            )

    @property
    def guess(self) -> float:
        """The perplexity of guessing, all tokens being as likely: about that of random weights."""
        return float(len(self.tokenizer))

    @property
    def notes(self) -> list[str]:
        """What a reader of the results must know."""
        grown = f"the embedding grew from {self.entries:,} to {self._needed:,} entries, to match the tokenizer"
        off = f"no dropout ({', '.join(self._settings)}), nor in a model that is saved"
        of_tokens = tokenization.notes(self.tokenizer)
        return [
            *of_tokens,
            *([grown] if self.grows else []),
            *([off] if self._settings else []),
            *self.source.notes(KIND),
        ]

    def identity(self, of_data: Mapping[str, str | None]) -> dict[str, str | None]:
        """See `tasks.HasIdentity`: that `of_data` and of the model."""
        return {**of_data, "model_revision": self.source.revision, "tokenizer": self._tokenizer_said}

    def provenance(
        self, of_data: Mapping[str, str | None], notes: Sequence[str], tokens: np.ndarray | None
    ) -> dict[str, str | None]:
        """See `tasks.Task.provenance`: that `of_data` and of the model; notes on both, and on its training `tokens`."""
        of_tokens = [] if tokens is None else tokenization.unknown(self.tokenizer, tokens)
        return {
            **self.identity(of_data),
            "attention": self.attention,
            "notes": "; ".join([*self.notes, *notes, *of_tokens]) or None,
        }

    def build_model(self) -> nn.Module:
        """A new model on the CPU; the same for the same model and seed."""
        return with_ids_of(self.tokenizer, self._build())

    def _build(self) -> nn.Module:
        if not self.grows:
            return self.source.build(KIND, self.seed, self.dtype, **self._settings)
        if self.from_scratch:
            settings = {**self._settings, "vocab_size": self._needed}
            return self.source.build(KIND, self.seed, self.dtype, **settings)
        model: Any = self.source.build(KIND, self.seed, "float32", **self._settings)
        with own_generator(self.seed), quiet():
            model.resize_token_embeddings(self._needed)
        return self.source.cast(model, KIND, self.dtype, **self._settings)

    @property
    def fingerprint(self) -> str:
        """A digest of everything that the tokenizer does."""
        if self.tokenizer.is_fast:
            words = self.tokenizer.backend_tokenizer.to_str()
        else:  # its rules aren't in the vocabulary, but in files: a folder's have a digest, the hub's a commit
            rules = {**self.tokenizer.init_kwargs, "membench": self._tokenizer_said}
            words = json.dumps([self.tokenizer.get_vocab(), rules], default=str)
        special = json.dumps(self.tokenizer.special_tokens_map, sort_keys=True, default=str)
        return cache.digest(words, special, str(self.tokenizer.chat_template))

    def documents(self, texts: Sequence[str]) -> list[list[int]]:
        """Each text's ids after the token with which the model's texts begin, without which Gemma predicts hardly
        anything; none where it is the end of the text before."""
        begin = [token for token in beginning(self.tokenizer) if token != self.end]
        return [[*begin, *ids] for ids in self.tokens(texts)]

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Each text's ids, without special tokens; a special token's name within a text is plain text."""
        if not texts:
            return []
        encoded = tokenize(
            self.tokenizer,
            list(texts),
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # it would warn about every text longer than the model's context
        )
        return encoded["input_ids"]


def train_tokenizer(texts: Callable[[], Iterable[str]], size: int, data_sha256: str) -> Any:
    """A tokenizer like GPT-2's, a byte-level BPE with one special token; the same for the same texts."""
    key = cache.digest("byte-level BPE, 1", str(size), data_sha256, tokenizers.__version__)

    def train() -> str:
        return byte_level_bpe(islice(texts(), TRAINING_TEXTS), size, [END_OF_TEXT], add_prefix_space=False).to_str()

    bpe = tokenizers.Tokenizer.from_str(cache.text(key, train))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )


def _check_causal(source: Source) -> None:
    """Raises ValueError for what can be built with a head that predicts tokens, but not to predict the next one."""
    kind, values = source.config.model_type, source.config.to_dict()
    why = None
    if kind in SEEING or (kind in ENCODERS and not values.get("is_decoder")) or values.get("is_causal") is False:
        why = "sees the tokens that it has to predict"
    elif kind in DECODERS:
        why = "is for decoders of an encoder's output: its loss asks for the token that was just read, not for the next"
    if why is not None:
        raise ValueError(f"model {source.name!r} ({kind}) {why}: give a causal language model such as Llama or GPT-2")


# ---- loss and scores


def inputs(batch: Batch, dtype: torch.dtype) -> Batch:
    """A batch in the form that models accept: for packed texts, a mask that keeps them apart.

    Texts are packed if the batch has `position_ids`, which start again at 0 with each text. The mask is then (batch,
    1, tokens, tokens): 0 where a token may attend - to its own text, up to itself - and `dtype`'s minimum elsewhere.
    """
    if "position_ids" not in batch:
        return batch
    text = (batch["position_ids"] == 0).cumsum(1)  # number of a token's text, (batch, tokens)
    own = text[:, :, None] == text[:, None, :]
    allowed = own.tril()[:, None]
    mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(~allowed, torch.finfo(dtype).min)
    return {**batch, "attention_mask": mask}


def _takes_pairs(skeleton: nn.Module) -> bool:
    """Does a model take `inputs` of packed texts? False if it fails with them, and not with a plain text."""
    ids = torch.zeros(1, 2, dtype=torch.int64, device="meta")

    def runs(**given: Tensor) -> bool:
        try:
            skeleton(**given, use_cache=False)
        except Exception:  # whatever a model, or what can't do without values, raises
            return False
        return True

    with torch.no_grad(), quiet():
        packed = inputs({"input_ids": ids, "position_ids": ids}, _dtype(skeleton))
        return runs(**packed) or not runs(input_ids=ids, attention_mask=torch.ones_like(ids))


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross entropy of the tokens that have a label, a scalar: the model's own loss.

    Args:
        model: a causal language model of transformers.
        batch: `input_ids`, `attention_mask`, `labels` (batch, tokens), with `position_ids` if texts are packed.
    """
    return model(**inputs(batch, _dtype(model)), use_cache=False).loss


def full_batch(rows: np.ndarray) -> Batch:
    """A batch of sequences without padding, (batch, tokens) int64, in which every token is also a label."""
    ids = torch.from_numpy(rows)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def full_batches(rows: np.ndarray) -> Iterator[Batch]:
    """The same for any number of sequences, in batches for scoring."""
    size = max(1, EVALUATION_TOKENS // rows.shape[1])
    return (full_batch(rows[start : start + size]) for start in range(0, len(rows), size))


class Scorer:
    """Scores models on held-out sequences: the same ones each time, in the same order."""

    def __init__(self) -> None:
        self._sums: list[float] = []  # of the losses of each sequence, by the last model
        self.before: list[float] | None = None  # the same of the model before training

    def remember(self) -> None:
        """The last scores were those before training."""
        self.before = self._sums

    def score(self, model: nn.Module, batches: Iterable[Batch]) -> dict[str, float]:
        """`loss` and `token_accuracy` over all tokens with a label, every token weighted equally, and `perplexity`.

        Of two sequences or more also `loss_standard_error`, what so few of them leave uncertain of the loss, and
        `loss_change_standard_error`, of its difference from that before training, if this is known. Runs on the model's
        device, in evaluation mode.
        """
        self._sums, counts, right = _losses(model, batches)
        count, mean = sum(counts), math.fsum(self._sums) / sum(counts)
        scores = {
            "loss": mean,
            "perplexity": math.exp(mean) if mean < 700 else math.inf,
            "token_accuracy": right / count,
        }
        errors = {"loss_standard_error": standard_error(self._sums, counts)}
        if self.before is not None:
            changes = [after - before for after, before in zip(self._sums, self.before, strict=True)]
            errors["loss_change_standard_error"] = standard_error(changes, counts)
        return scores | {name: error for name, error in errors.items() if error is not None}


@torch.no_grad()
def _losses(model: nn.Module, batches: Iterable[Batch]) -> tuple[list[float], list[int], int]:
    """The sum of the losses of each sequence, the number of its tokens, and how many of all tokens are predicted."""
    device = next(model.parameters()).device
    right = 0
    sums: list[float] = []
    counts: list[int] = []
    with evaluation(model):
        for batch in batches:
            moved = {key: value.to(device) for key, value in batch.items()}
            labels = moved.pop("labels")[:, 1:]
            logits = model(**inputs(moved, _dtype(model)), use_cache=False).logits[:, :-1]
            counted = labels != IGNORED
            logits, labels = logits[counted].float(), labels[counted]
            losses = nn.functional.cross_entropy(logits, labels, reduction="none")
            lengths = counted.sum(1).tolist()
            sums += [float(part.sum()) for part in losses.cpu().double().split(lengths)]
            counts += lengths
            right += int((logits.argmax(1) == labels).sum())
    return sums, counts, right


def standard_error(sums: Sequence[float], counts: Sequence[int]) -> float | None:
    """Of sum(sums) / sum(counts), a ratio over independent sequences (Cochran 1977, section 6.4); None of one."""
    if len(sums) < 2:
        return None
    mean, n = math.fsum(sums) / sum(counts), len(sums)
    squares = math.fsum((one - mean * count) ** 2 for one, count in zip(sums, counts, strict=True))
    return math.sqrt(n / (n - 1) * squares) / sum(counts)


def _dtype(model: nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype
