"""Models: an id of the hub, a folder, a packaged one, or a built-in configuration with random weights."""

import contextlib
import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn

from tasks.models import packaged
from tasks.models.configurations import PUBLISHED, llama
from tasks.models.loading import FOLDER, cannot_load, locate, quiet
from tasks.names import suggestion

PREFIX = "config:"
VOCABULARY_SIZE = 1024  # of roberta-tiny and of the tokenizer that is trained for it
LANGUAGE_VOCABULARY_SIZE = 1024  # of llama-tiny
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Configuration:
    """A built-in architecture."""

    model_type: str  # of transformers
    values: dict[str, Any]
    own_vocabulary: int | None = None  # entries of the tokenizer to train for it; None: it needs a published one

    def build(self) -> transformers.PretrainedConfig:
        return transformers.AutoConfig.for_model(self.model_type, **self.values)


def _roberta(layers: int, hidden: int, heads: int, vocabulary: int = 50_265, positions: int = 514) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "intermediate_size": 4 * hidden,
        "vocab_size": vocabulary,
        "max_position_embeddings": positions,
        "type_vocab_size": 1,
        "layer_norm_eps": 1e-5,
    }


TINY_LLAMA = llama(192, 512, 4, 3, vocabulary=LANGUAGE_VOCABULARY_SIZE, positions=2048)
# No dropout: it only delays what a few hundred steps can learn. Weights about as large as 1/sqrt(width): with RoBERTa's
# .02 at this width, gradients of the lower layers vanish, and a method without Adam's scaling learns nothing.
TINY = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.1}
CONFIGURATIONS = {
    "roberta-tiny": Configuration("roberta", _roberta(4, 192, 3, VOCABULARY_SIZE) | TINY, VOCABULARY_SIZE),
    "llama-tiny": Configuration("llama", TINY_LLAMA, LANGUAGE_VOCABULARY_SIZE),
    "roberta-base": Configuration("roberta", _roberta(12, 768, 12)),
    "roberta-large": Configuration("roberta", _roberta(24, 1024, 16)),
    **{name: Configuration(*row) for name, row in PUBLISHED.items()},
}


class Source:
    """Where a model's configuration and weights come from.

    Args:
        name: `config:NAME`, a key of `packaged.PACKAGED`, an id of the hub (`ID` or `ID@REVISION`), or a folder.
        trust_remote_code: run code that comes with a model.

    Raises:
        ValueError: there is no such configuration, or no model of that name can be loaded.
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
            self.path, self.revision = packaged.locate(name) if name in packaged.PACKAGED else locate(name)
            self.config = self._load(transformers.AutoConfig)

    @property
    def own_tokenizer(self) -> str:
        """The name of the tokenizer that comes with a packaged model, a folder or a revision of a model of the hub."""
        if self.name in packaged.PACKAGED:
            return self.name
        return self.path if (self.revision or "").startswith(FOLDER) else f"{self.path}@{self.revision}"

    def build(self, kind: Any, seed: int, dtype: str, **settings: Any) -> nn.Module:
        """A new model on the CPU. What is random in it is a function of `seed`; the global generator stays as it is.

        Args:
            kind: an auto class such as `transformers.AutoModelForSequenceClassification`.
            seed: of whatever the checkpoint doesn't have (of everything in a built-in configuration).
            dtype: a key of `DTYPES`.
            settings: of the configuration, e.g. `num_labels`.
        """
        with own_generator(seed):
            model = self._new(kind, settings) if self.from_scratch else self._pretrained(kind, settings)[0]
        return model.to(DTYPES[dtype])

    def skeleton(self, kind: Any, **settings: Any) -> nn.Module:
        """The same model without values, on the meta device.

        Raises:
            ValueError: `kind` doesn't know the architecture.
        """
        with torch.device("meta"):
            return self._new(kind, settings)

    def head(self, kind: Any, **settings: Any) -> tuple[str, ...]:
        """Names of the outermost modules (or parameters) of which the checkpoint has nothing, e.g. ("classifier",).

        With random weights: what lies outside embeddings and layers.
        """
        return _head(self.name, self.revision, self.trust_remote_code, kind, tuple(settings.items()))

    def _new(self, kind: Any, settings: dict[str, Any]) -> nn.Module:
        config = self._configured(settings)
        try:
            return kind.from_config(config, trust_remote_code=self.trust_remote_code)
        except ValueError as error:
            raise self._unsuitable(kind) from error

    def _pretrained(self, kind: Any, settings: dict[str, Any]) -> tuple[nn.Module, set[str]]:
        """The model, and the names of the parameters that are new in it."""
        model, report = self._load(
            kind,
            config=self._configured(settings),
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # a head for another number of classes is replaced
        )
        return model, {*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}

    def _configured(self, settings: dict[str, Any]) -> transformers.PretrainedConfig:
        config = type(self.config).from_dict(self.config.to_dict())
        config.update(settings)
        return config

    def _load(self, kind: Any, **given: Any) -> Any:
        try:
            with quiet():
                return kind.from_pretrained(
                    self.path, revision=self.revision, trust_remote_code=self.trust_remote_code, **given
                )
        except (OSError, ValueError, ImportError) as error:
            raise cannot_load("model", self.name, error, "config:NAME for random weights") from error

    def _unsuitable(self, kind: Any) -> ValueError:
        causal = kind is transformers.AutoModelForCausalLM
        examples = "a causal language model such as Llama or GPT-2" if causal else "an encoder such as RoBERTa or BERT"
        return ValueError(
            f"model {self.name!r} ({self.config.model_type}) can't be built with {kind.__name__}, as this task needs: "
            f"give {examples}"
        )


@functools.lru_cache(maxsize=32)  # a checkpoint must be loaded to know; every run of a comparison asks
def _head(
    name: str, revision: str | None, trust_remote_code: bool, kind: Any, settings: tuple[tuple[str, Any], ...]
) -> tuple[str, ...]:
    source = Source(name, trust_remote_code)
    skeleton = source.skeleton(kind, **dict(settings))
    if source.from_scratch:
        return outermost(skeleton, _outside_of_layers(skeleton))
    return outermost(skeleton, source._pretrained(kind, dict(settings))[1])


def _built_in(name: str) -> Configuration:
    if name not in CONFIGURATIONS:
        known = {one: PREFIX + one for one in CONFIGURATIONS}
        raise ValueError(f"unknown model {PREFIX + name!r}. {suggestion(name, known.values(), known)}")
    return CONFIGURATIONS[name]


@contextlib.contextmanager
def own_generator(seed: int) -> Iterator[None]:
    """Random numbers from `seed` inside, and the global generator as it was afterwards."""
    # not torch.manual_seed(): that also seeds every GPU, which nothing would put back
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def outermost(model: nn.Module, names: Iterable[str]) -> tuple[str, ...]:
    """The outermost modules all of whose parameters are among `names`, and single names elsewhere."""
    names, all_names = set(names), [name for name, _ in model.named_parameters()]
    old = [name for name in all_names if name not in names]
    found: dict[str, None] = {}
    for name in all_names:
        parts = name.split(".")
        prefixes = (".".join(parts[:end]) for end in range(1, len(parts) + 1))
        if name in names:
            found[next(p for p in prefixes if not any(other == p or other.startswith(f"{p}.") for other in old))] = None
    return tuple(found)


def _outside_of_layers(model: nn.Module) -> set[str]:
    """Parameters of modules that hold neither layers nor embeddings nor norms: poolers and classifiers."""
    return {
        f"{name}.{parameter}"
        for name, module in model.named_modules()
        for parameter, _ in module.named_parameters(recurse=False)
        if isinstance(module, nn.Linear) and not _in_layers(model, name)
    }


def _in_layers(model: nn.Module, name: str) -> bool:
    parts = name.split(".")
    parents = (".".join(parts[:end]) for end in range(1, len(parts)))
    return any(isinstance(model.get_submodule(parent), nn.ModuleList) for parent in parents)


def longest_sequence(model: nn.Module) -> int | None:
    """Tokens for which the model has learned positions; None where positions are computed.

    RoBERTa numbers positions from its padding index + 1, so 514 embeddings serve 512 tokens.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.endswith(("position_embeddings", "embed_positions", "wpe")):
            return module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
    return None


def check_fit(name: str, model: Any, *, tokenizer: Any, sequence_length: int) -> None:
    """Check that a tokenizer's ids and a sequence's positions exist in a model (which may be on the meta device).

    Raises:
        ValueError: they don't.
    """
    entries = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > entries:
        raise ValueError(
            f"the tokenizer has {len(tokenizer):,} entries and {name} only {entries:,} embeddings: "
            "give --tokenizer the one that belongs to the model, or leave it out"
        )
    check_positions(name, model, sequence_length)


def check_positions(name: str, model: nn.Module, sequence_length: int) -> None:
    """Raises ValueError where a sequence is longer than the positions that a model has learned."""
    longest = longest_sequence(model)
    if longest is not None and sequence_length > longest:
        raise ValueError(f"sequence_length {sequence_length} is too long for {name}, which has {longest} positions")
