"""Models: a hub id, a folder, a packaged one, or a built-in configuration with random weights."""

import contextlib
import difflib
import functools
import re
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto

from tasks.data.rows import listed
from tasks.models import packaged
from tasks.models.checks import (
    check_complete,
    check_loaded,
    check_whole,
    mended,
    not_read,
    of_layers,
    outside_of_layers,
)
from tasks.models.configurations import PUBLISHED, llama
from tasks.models.damage import check_settings, said_in_a_sentence
from tasks.models.loading import FOLDER, is_folder, locate, quiet
from tasks.names import suggestion

PREFIX = "config:"
UNKNOWN_TO_KIND = "Unrecognized configuration class"  # in the message of a transformers auto class
WAY_OUT = "a folder as transformers saves it, or config:NAME for random weights"
# What training needs, whatever the base model was used for: outputs by name, and none that nobody reads.
PLAIN = {"return_dict": True, "output_attentions": False, "output_hidden_states": False}
VOCABULARY_SIZE = 1024  # of roberta-tiny and the tokenizer that is trained for it
LANGUAGE_VOCABULARY_SIZE = 1024  # of llama-tiny and llama-4m
STATED_POSITIONS = ("max_position_embeddings", "n_positions", "seq_length", "max_seq_len")  # what configurations say
POSITIONS = ("position_embeddings", "embed_positions", "wpe", "positions_embed")  # the names that models use
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Configuration:
    """A built-in architecture."""

    model_type: str  # of transformers
    values: dict[str, Any]
    own_vocabulary: int | None = None  # size of the tokenizer to train for it; None: it needs a published one

    def build(self) -> transformers.PretrainedConfig:
        return transformers.AutoConfig.for_model(self.model_type, **self.values)


def _roberta(layers: int, hidden: int, heads: int, vocabulary: int = 50_265) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "intermediate_size": 4 * hidden,
        "vocab_size": vocabulary,
        "max_position_embeddings": 514,  # padding takes the first two
        "type_vocab_size": 1,
        "layer_norm_eps": 1e-5,
    }


TINY_LLAMA = llama(192, 512, 4, 3, vocabulary=LANGUAGE_VOCABULARY_SIZE, positions=2048)
# No dropout: it only delays what a few hundred steps can learn. Weights of about 1/sqrt(width): with RoBERTa's .02 at
# this width, gradients of the lower layers vanish, and a method without Adam's scaling learns nothing.
TINY = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.1}
CONFIGURATIONS = {
    "roberta-tiny": Configuration("roberta", _roberta(4, 192, 3, VOCABULARY_SIZE) | TINY, VOCABULARY_SIZE),
    "llama-tiny": Configuration("llama", TINY_LLAMA, LANGUAGE_VOCABULARY_SIZE),
    "llama-4m": Configuration(
        "llama", llama(256, 688, 4, 4, vocabulary=LANGUAGE_VOCABULARY_SIZE, positions=2048), LANGUAGE_VOCABULARY_SIZE
    ),
    "roberta-base": Configuration("roberta", _roberta(12, 768, 12)),
    "roberta-large": Configuration("roberta", _roberta(24, 1024, 16)),
    **{name: Configuration(*row) for name, row in PUBLISHED.items()},
}


class Source:
    """Where a model's configuration and weights come from.

    Args:
        name: `config:NAME`, a key of `packaged.PACKAGED`, a hub id (`ID` or `ID@REVISION`), or a folder.
        trust_remote_code: run code that comes with a model.

    Raises:
        ValueError: there is no such configuration, or no model with that name can be loaded.
    """

    def __init__(self, name: str, trust_remote_code: bool = False):
        self.name = name
        self.from_scratch = name.startswith(PREFIX)
        self.trust_remote_code = trust_remote_code
        if self.from_scratch:
            self.revision: str | None = None
            self.configuration = _built_in(name.removeprefix(PREFIX))
            self.config = self.configuration.build()
        else:
            _check_spelling(name)
            self.path, self.revision = packaged.locate(name) if name in packaged.PACKAGED else locate(name)
            if self._folder is not None and not (self._folder / "config.json").exists():
                check_whole(name, self._folder, None)
                inside = listed(sorted(path.name for path in self._folder.iterdir()))
                raise ValueError(
                    f"can't load the model {name!r}: there is no config.json, only {inside}; give {WAY_OUT}"
                )
            self.config = mended(self._load(transformers.AutoConfig), name)

    @property
    def is_causal(self) -> bool:
        """Does the model see only what precedes a token? Encoders, and models with an encoder, see everything."""
        kind = self.config.model_type
        return not self.config.is_encoder_decoder and kind not in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES

    @property
    def width(self) -> int | None:
        """The hidden size, where the configuration says it."""
        size = getattr(self.config, "hidden_size", None)
        return size if isinstance(size, int) else None

    @property
    def own_tokenizer(self) -> str:
        """The name of the tokenizer that comes with a packaged model, a folder, or a revision on the hub."""
        if self.name in packaged.PACKAGED:
            return self.name
        return self.path if (self.revision or "").startswith(FOLDER) else f"{self.path}@{self.revision}"

    def build(self, kind: Any, seed: int, dtype: str, **settings: Any) -> nn.Module:
        """A new model on the CPU. Its random values are a function of `seed`; the global generator isn't affected.

        Args:
            kind: an auto class such as `transformers.AutoModelForSequenceClassification`.
            seed: for whatever the checkpoint doesn't have (everything, for a built-in configuration).
            dtype: a key of `DTYPES`.
            settings: for the configuration, e.g. `num_labels`.
        """
        with own_generator(seed):
            model = self._new(kind, settings) if self.from_scratch else self._pretrained(kind, settings)[0]
        return self.cast(model, kind, dtype, **settings)

    def cast(self, model: nn.Module, kind: Any, dtype: str, **settings: Any) -> nn.Module:
        """The model in `dtype`, as transformers loads it in that: frequencies of rotary positions stay in fp32, whose
        values in 16 bits would turn distant positions by another angle, and so do routers' biases."""
        if dtype == "float32":
            return model
        with torch.device("meta"):
            made = self._new(kind, settings, dtype=DTYPES[dtype])
        own = {name: tensor.dtype for name, tensor in _tensors(made) if tensor.dtype != DTYPES[dtype]}
        own |= dict.fromkeys(kept_in_fp32(model, DTYPES[dtype]), torch.float32)
        kept = {name: tensor.data for name, tensor in _tensors(model) if name in own}
        for name, tensor in _tensors(model.to(DTYPES[dtype])):
            if name in kept:
                tensor.data = kept[name].to(own[name])
        return model

    def skeleton(self, kind: Any, **settings: Any) -> nn.Module:
        """The same model without values, on the meta device.

        Raises:
            ValueError: `kind` doesn't know the architecture.
        """
        with torch.device("meta"):
            return self._new(kind, settings)

    def head(self, kind: Any, **settings: Any) -> tuple[str, ...]:
        """Names of the outermost modules (or parameters) that aren't in the checkpoint at all, e.g. ("classifier",).

        With random weights: everything outside embeddings and layers.
        """
        return self._compared(kind, settings).head

    def notes(self, kind: Any, **settings: Any) -> list[str]:
        """What is new in a pretrained model, and what of its folder isn't used: layers that its configuration leaves
        out, and weights in another format."""
        if self.from_scratch:
            return []
        found = self._compared(kind, settings)
        new = [f"new in the model, with random values: {', '.join(found.head)}"] if found.head else []
        apart = (
            ["the head has weights of its own, though config.json ties it to the embeddings"] if found.untied else []
        )
        beside = [] if self._folder is None else not_read(self._folder)
        other = [f"not read, since the weights are also there as safetensors: {listed(beside)}"] if beside else []
        more = f"{len(found.left_out):,} tensors of layers that aren't in its config.json are left out"
        return [*new, *apart, *other, *([f"{more} ({found.left_out[0]})"] if found.left_out else [])]

    def _compared(self, kind: Any, settings: dict[str, Any]) -> "Compared":
        return _compared(self.name, self.revision, self.trust_remote_code, kind, tuple(settings.items()))

    def _new(self, kind: Any, settings: dict[str, Any], **given: Any) -> nn.Module:
        try:
            with self._border():
                return kind.from_config(self._configured(settings), trust_remote_code=self.trust_remote_code, **given)
        except ValueError as error:
            if UNKNOWN_TO_KIND in str(error):
                raise self.unsuitable(kind) from error
            raise

    def _pretrained(self, kind: Any, settings: dict[str, Any]) -> tuple[nn.Module, set[str], list[str]]:
        """The model, the names of its new parameters, and the names that only the checkpoint has.

        Raises:
            ValueError: the new parameters include embeddings or layers: the weights don't match the configuration; or
                they are none that can be trained.
        """
        check_whole(self.name, self._folder, self.config)
        model, report = self._load(
            kind,
            config=self._configured(settings),
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # a head for another number of classes is replaced
        )
        check_complete(self.name, sorted(report["unexpected_keys"]))
        shapes = {key: shapes for key, *shapes in report["mismatched_keys"]}
        new = {*report["missing_keys"], *shapes}
        check_loaded(self.name, model, new, shapes)
        if self._is_untied(model, kind, settings):  # or what ties the two next, a larger vocabulary, would overwrite it
            for config in (model.config, model.config.get_text_config()):
                config.tie_word_embeddings = False
        return model, new, sorted(report["unexpected_keys"])

    def _is_untied(self, model: Any, kind: Any, settings: dict[str, Any]) -> bool:
        """Does a checkpoint have a head of its own, though its configuration ties it to the embeddings?"""
        return _has_own_head(model) and not _has_own_head(self.skeleton(kind, **settings))

    def _configured(self, settings: dict[str, Any]) -> transformers.PretrainedConfig:
        config = type(self.config).from_dict(self.config.to_dict())
        config.update(PLAIN | settings)
        if "pad_token_id" in settings:
            config.get_text_config().pad_token_id = settings["pad_token_id"]
        return config

    def _load(self, kind: Any, **given: Any) -> Any:
        with self._border(self.path), quiet():
            if self._folder is not None:
                check_settings(self._folder, "config.json")
            return kind.from_pretrained(
                self.path, revision=self.revision, trust_remote_code=self.trust_remote_code, **given
            )

    @property
    def _folder(self) -> Path | None:
        """Where its files are, if that is known."""
        return Path(self.path) if is_folder(self.path) else None

    def _border(self, path: str | None = None) -> AbstractContextManager[None]:
        folder = path if path is not None and is_folder(path) else None
        values = {} if "config" not in vars(self) else self.config.to_dict()
        file = "" if values or folder is None else "config.json: "
        return said_in_a_sentence("model", self.name, WAY_OUT, folder=folder, file=file, values=values)

    def unsuitable(self, kind: Any) -> ValueError:
        """What to say of an architecture that an auto class of transformers doesn't know."""
        causal = kind is transformers.AutoModelForCausalLM
        examples = "a causal language model such as Llama or GPT-2" if causal else "an encoder such as RoBERTa or BERT"
        return ValueError(
            f"model {self.name!r} ({self.config.model_type}) can't be built with {kind.__name__}, as this task needs: "
            f"give {examples}"
        )


class Compared(NamedTuple):
    """A model against its checkpoint."""

    head: tuple[str, ...]  # see `Source.head`
    left_out: tuple[str, ...]  # tensors of layers that the model doesn't have
    untied: bool  # see `Source._is_untied`


@functools.lru_cache(maxsize=32)  # finding out means loading a checkpoint, and every run of a comparison asks
def _compared(
    name: str, revision: str | None, trust_remote_code: bool, kind: Any, settings: tuple[tuple[str, Any], ...]
) -> Compared:
    source = Source(name, trust_remote_code)
    skeleton = source.skeleton(kind, **dict(settings))
    if source.from_scratch:
        return Compared(outermost(skeleton, outside_of_layers(skeleton)), (), False)
    model, new, beyond = source._pretrained(kind, dict(settings))
    untied = source._is_untied(model, kind, dict(settings))
    return Compared(outermost(skeleton, new), tuple(of_layers(skeleton, beyond)), untied)


def _has_own_head(model: Any) -> bool:
    """Are a language model's head and its embeddings two tensors?"""
    head = getattr(model.get_output_embeddings(), "weight", None)
    return head is not None and head is not model.get_input_embeddings().weight


def _check_spelling(name: str) -> None:
    """Raises ValueError for a near miss of a built-in model's name, before the hub is asked for it."""
    known = {one: PREFIX + one for one in CONFIGURATIONS} | {one: one for one in packaged.PACKAGED}
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.9)
    if close and name not in close and not is_folder(name):
        raise ValueError(f"unknown model {name!r}. {suggestion(name, known.values(), known)}")


def _built_in(name: str) -> Configuration:
    if name not in CONFIGURATIONS:
        known = {one: PREFIX + one for one in CONFIGURATIONS}
        raise ValueError(f"unknown model {PREFIX + name!r}. {suggestion(name, known.values(), known)}")
    return CONFIGURATIONS[name]


def without_dropout(config: transformers.PretrainedConfig) -> dict[str, float]:
    """What to change in a configuration, so that nothing is dropped in training."""
    given = config.to_dict().items()
    return {name: 0.0 for name, value in given if "drop" in name and isinstance(value, float) and value}


def _tensors(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def kept_in_fp32(model: Any, dtype: torch.dtype) -> list[str]:
    """The names of tensors that transformers leaves in fp32 when it loads a checkpoint in `dtype`."""
    parts = model._get_dtype_plan(dtype)  # of names
    kept = re.compile("|".join(part.replace("*", ".*") for part in parts) or "(?!)")
    return [name for name, _ in _tensors(model) if kept.search(name)]


@contextlib.contextmanager
def own_generator(seed: int) -> Iterator[None]:
    """Random numbers from `seed` within this context; afterwards the global generator is as before."""
    # not torch.manual_seed(), which also seeds every GPU, and nothing would restore those
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def outermost(model: nn.Module, names: Iterable[str]) -> tuple[str, ...]:
    """The outermost modules whose parameters are all in `names`, and the remaining names."""
    names, all_names = set(names), [name for name, _ in model.named_parameters()]
    old = [name for name in all_names if name not in names]
    found: dict[str, None] = {}
    for name in all_names:
        parts = name.split(".")
        prefixes = (".".join(parts[:end]) for end in range(1, len(parts) + 1))
        if name in names:
            found[next(p for p in prefixes if not any(other == p or other.startswith(f"{p}.") for other in old))] = None
    return tuple(found)


def longest_sequence(model: nn.Module) -> int | None:
    """How many tokens the model has positions for, learned or in a table; None if they are computed.

    RoBERTa numbers positions from its padding index + 1, so 514 embeddings are enough for 512 tokens; OPT and BART
    have an offset of 2.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.endswith(POSITIONS):
            before = vars(module).get("offset", 0) if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - before
    return next((len(table) for name, table in model.named_buffers() if name.endswith(POSITIONS)), None)


def longest_input(name: str, trust_remote_code: bool = False) -> int | None:
    """Tokens that a model takes, as its positions and its configuration have it; None where neither says."""
    source = Source(name, trust_remote_code)
    return longest_stated(source.config, source.skeleton(transformers.AutoModel))


def longest_stated(config: transformers.PretrainedConfig, model: nn.Module) -> int | None:
    """The same of a model that is there."""
    known = [longest_sequence(model), *(getattr(config, name, None) for name in STATED_POSITIONS)]
    return min((count for count in known if isinstance(count, int) and count > 0), default=None)


def check_fit(name: str, model: Any, *, tokenizer: Any, sequence_length: int) -> None:
    """Check that a tokenizer's ids and a sequence's positions exist in a model (which may be on the meta device).

    Raises:
        ValueError: they don't.
    """
    entries = entries_of(model)
    if entries is not None and ids_of(tokenizer) > entries:
        raise ValueError(
            f"the tokenizer has {ids_of(tokenizer):,} entries, but {name} has only {entries:,} embeddings: "
            "give --tokenizer the one that belongs to the model, or leave it out"
        )
    check_positions(name, model, sequence_length)


def ids_of(tokenizer: Any) -> int:
    """How many rows of an embedding a tokenizer's ids need: one more than the highest, since there may be gaps."""
    return max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=0))


def entries_of(model: Any) -> int | None:
    """How many ids have an embedding; None if it hasn't a table of them, as CANINE, or one of its own kind (I-BERT)."""
    try:
        return model.get_input_embeddings().num_embeddings
    except (NotImplementedError, AttributeError):
        return None


def check_positions(name: str, model: nn.Module, sequence_length: int) -> None:
    """Raises ValueError if a sequence is longer than the positions that a model has learned."""
    longest = longest_sequence(model)
    if longest is not None and sequence_length > longest:
        raise ValueError(f"sequence_length {sequence_length} is too long for {name}, which has {longest} positions")
