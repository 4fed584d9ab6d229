"""Default learning rates, in one visible table, and the hyper-parameters of a method in a comparison."""

import inspect
from collections.abc import Collection, Mapping
from math import isfinite
from typing import Any, NamedTuple

from torch import nn

import optimizers
from membench.config.assignments import ALL_METHODS
from membench.config.errors import UserError
from membench.config.values import annotations, convert, shortened

NARROW = 512  # a pretrained model with a smaller hidden size moves less at the same rate: it takes larger ones


class Rates(NamedTuple):
    """A method's learning rates.

    Attributes:
        pretrained: to fine-tune pretrained weights.
        narrow: to fine-tune a model narrower than `NARROW`; chosen on all-MiniLM-L6-v2 (384) by the trials of
            docs/studies/encoder.md, on held-out training examples of CB and RTE (`studies.rates.chosen`).
        classification: for a classifier from random weights.
        language: for a language model from random weights, whatever it is trained on.
    """

    pretrained: float
    narrow: float
    classification: float
    language: float


# other methods use their own defaults
LEARNING_RATES = {
    "adamw": Rates(2e-5, 6e-5, 3e-4, 1e-3),
    "adamw8bit": Rates(2e-5, 6e-5, 3e-4, 1e-3),
    "sgd": Rates(1e-2, 3e-2, 2e-3, 1e-1),
    "badam": Rates(2e-5, 6e-4, 8e-4, 2e-3),
    "blockllm": Rates(3e-5, 3e-4, 7e-4, 2e-3),
    "lisa": Rates(2e-5, 6e-5, 1e-3, 1e-3),
    "galore": Rates(1e-4, 1e-3, 1e-3, 4e-3),
    "fira": Rates(1e-4, 3e-4, 1e-3, 4e-3),
    "lora": Rates(2e-4, 6e-4, 1e-3, 1e-3),
    "lora:variant=vera": Rates(4e-3, 6e-2, 1e-2, 1e-2),
    "qlora": Rates(2e-4, 2e-3, 4e-3, 4e-3),
    "lomo": Rates(3e-2, 3e-2, 1e-1, 1e-1),
    "adalomo": Rates(5e-4, 1.5e-3, 3e-3, 1e-2),
    "hft": Rates(2e-5, 2e-4, 1e-3, 1e-3),
    "mezo": Rates(1e-6, 1e-3, 1e-3, 3e-4),
    "adafactor": Rates(5e-5, 5e-5, 5e-4, 2e-3),
    "adam-mini": Rates(2e-5, 6e-5, 2e-4, 1e-3),
    "apollo": Rates(1e-4, 1e-3, 2e-3, 1e-2),
    "muon": Rates(2e-4, 2e-3, 1e-2, 2e-2),
    "sinkgd": Rates(4e-4, 1.2e-3, 1e-2, 2e-2),
    "welore": Rates(5e-5, 6e-5, 1e-3, 2e-3),
    "scale": Rates(6e-4, 2e-3, 5e-3, 1e-2),
}
# what else suits a variant better than its method's own default
OF_VARIANTS: dict[str, dict[str, Any]] = {"lora:variant=vera": {"rank": 256}}
# what a method needs to fine-tune a language model, besides a rate: unclipped, LOMO may lose all that the model knew
# at its paper's rate, with one seed of two in docs/studies/instruct.md; the paper clips
OF_LANGUAGE: dict[str, dict[str, Any]] = {"lomo": {"clip_norm": 1.0}}
# of fine-tuning's rate, on pretrained weights: trl's defaults are 2e-5 for instructions and 1e-6 for DPO, whose loss
# is of sums over tokens, not means
PREFERENCE_SHARE = 1 / 20


def check_targets(methods: Collection[str], given: Mapping[str, Mapping[str, Any]]) -> None:
    """Every given hyper-parameter must belong to a method, including those that aren't among `methods` now.

    Raises:
        ValueError: one belongs to none.
        UserError: one has another value in the method's name, of which the row would go on telling.
    """
    for method, values in given.items():
        if method != ALL_METHODS:
            optimizers.resolve(method, **values)
            for key in optimizers.split(method)[1].keys() & values.keys():
                raise UserError(
                    f"{method}: {key} has a value in the method's name, and {shortened(values[key])} is given or tried "
                    "besides: leave one of them out"
                )
    for key in given.get(ALL_METHODS, {}):
        if not any(key in optimizers.resolve(method) for method in methods):
            raise UserError(f"--set {key}: none of {', '.join(methods)} has a hyper-parameter with that name")


def hyperparameters(
    method: str,
    given: Mapping[str, Mapping[str, Any]],
    *,
    learning_rate: float | None,
    seed: int,
    from_scratch: bool,
    head: tuple[str, ...] = (),
    kind: str = "classification",
    width: int | None = None,
) -> dict[str, Any]:
    """Every hyper-parameter of `method`: as given, else what suits the kind of training, else its own default.

    Hyper-parameters added to the method later are left out while at their defaults, so that runs keep their ids.

    `width` is the model's hidden size, if it is known.

    A new head (name patterns) is always trained; so are random embeddings, by methods that have the choice.

    Raises:
        UserError: a value of the wrong type.
        ValueError: an unknown method or hyper-parameter.
    """
    known = inspect.signature(optimizers.get(method)).parameters
    base, own = optimizers.split(method)
    of_method = {**given.get(base, {}), **own, **(given.get(method, {}) if own else {})}
    told = {**given.get(ALL_METHODS, {}), **of_method}
    variant = f"{base}:variant={told.get('variant')}"
    chosen: dict[str, Any] = {"seed": seed, **OF_VARIANTS.get(variant, {})}
    if from_scratch:
        chosen["train_embeddings"] = True
    if kind == "language" and not from_scratch and told.get("clip_value") in (None, "none"):  # LOMO takes one of both
        chosen |= OF_LANGUAGE.get(base, {})
    rates = LEARNING_RATES.get(variant, LEARNING_RATES.get(base))
    if rates:
        chosen["lr"] = _rate(rates, kind, from_scratch, width)
    # for methods with a separate rate for what AdamW trains
    chosen["adamw_lr"] = _rate(LEARNING_RATES["adamw"], kind, from_scratch, width)
    if learning_rate is not None:
        chosen["lr"] = learning_rate
    chosen = {key: value for key, value in {**chosen, **given.get(ALL_METHODS, {})}.items() if key in known}
    values = _typed(base, optimizers.resolve(method, **{**chosen, **of_method}))
    if "always_train" in known:
        values["always_train"] = tuple(dict.fromkeys([*head, *values["always_train"]]))
    return optimizers.in_use(method, values)


def _rate(rates: Rates, kind: str, from_scratch: bool, width: int | None) -> float:
    if from_scratch:
        return rates.classification if kind == "classification" else rates.language
    rate = rates.narrow if width is not None and width < NARROW else rates.pretrained
    return float(f"{rate * PREFERENCE_SHARE:.3g}") if kind == "preference" else rate


def _told(rates: Rates) -> str:
    return (
        f"{rates.pretrained:g} to fine-tune pretrained weights ({rates.narrow:g} if the model is narrower than "
        f"{NARROW}; for dpo a twentieth), from random weights {rates.classification:g} for a classifier and "
        f"{rates.language:g} for a language model"
    )


def _variants(method: str, table: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """What a table has for variants of a method: `variant=vera`, and that."""
    return [(name.partition(":")[2], found) for name, found in table.items() if name.startswith(f"{method}:")]


def in_comparison(method: str, name: str) -> str | None:
    """What the runs of a comparison have as this hyper-parameter where nobody gives it; None if it is its default."""
    rates = LEARNING_RATES.get({"lr": method, "adamw_lr": "adamw"}.get(name, ""))
    if rates:
        of_variants = {one: _told(other) for one, other in _variants(method, LEARNING_RATES) if name == "lr"}
        return "; ".join([_told(rates), *(f"with {variant} {told}" for variant, told in of_variants.items())])
    if others := [f"{values[name]} with {one}" for one, values in _variants(method, OF_VARIANTS) if name in values]:
        return ", ".join(others)
    if name in OF_LANGUAGE.get(method, {}):
        return f"{OF_LANGUAGE[method][name]:g} for a pretrained language model"
    if name == "train_embeddings":
        return None if inspect.signature(optimizers.get(method)).parameters[name].default else "true for random weights"
    return {"seed": "the run's", "always_train": "a new head, also besides what you give"}.get(name)


def trained_from_scratch(method: str, model: nn.Module) -> tuple[str, ...]:
    """Embeddings and norms with random weights, which a method without a `train_embeddings` must train."""
    known = inspect.signature(optimizers.get(method)).parameters
    if "always_train" not in known or "train_embeddings" in known:
        return ()
    return tuple(name for name, module in model.named_modules() if _is_embedding_or_norm(module))


def _is_embedding_or_norm(module: nn.Module) -> bool:
    of_that_kind = isinstance(module, nn.Embedding) or "norm" in type(module).__name__.lower()
    return of_that_kind and any(True for _ in module.parameters())


def _is_bounded(value: Any) -> bool:
    """Can a record hold it? Neither infinity nor whole numbers that no machine counts to."""
    if isinstance(value, list | tuple):
        return all(map(_is_bounded, value))
    return not isinstance(value, int | float) or abs(value) < 2**63 or (isinstance(value, float) and isfinite(value))


def _typed(method: str, values: dict[str, Any]) -> dict[str, Any]:
    types = annotations(optimizers.get(method))
    for key, value in values.items():
        if value is inspect.Parameter.empty:
            raise UserError(f"{method} needs a value for {key}: --set {method}.{key}=VALUE")
        try:
            values[key] = convert(value, types.get(key, Any))
        except TypeError as error:
            raise UserError(f"{method}.{key} must be {error}, not {shortened(value)}") from error
        if not _is_bounded(values[key]):
            raise UserError(f"{method}.{key} must be finite, and below 2^63, not {shortened(value)}")
    return values
