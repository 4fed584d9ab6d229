"""Does a model's folder hold what it says? Checks the values in its configuration, and its weights against them."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn

AT_LEAST_ONE = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
ADAPTER = "adapter_config.json"  # peft's
WEIGHTS = (  # one file, or several with an index
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
_SCALE = re.compile(  # of FP8, of bitsandbytes, of MLX, of others
    r"\.weight[._](scale|zero_point|absmax|quant|packed)|\.(SCB|scales|scale_weight)$"
)
_ADAPTED = re.compile(r"\.(lora|ia3|vera|oft|boft|hada|lokr)_[a-zA-Z]")  # as loralib and peft name what they add
MOST_LAYERS = 10_000  # no model has as many, and to build more takes hours


def mended(config: Any, name: str) -> Any:
    """A transformers configuration from which models can be built.

    A negative padding id, as in the first conversions of LLaMA, means none.

    Raises:
        ValueError: no model can have one of the values.
    """
    for part in (config, config.get_text_config()):
        values = {key: vars(part).get(part.attribute_map.get(key, key)) for key in (*AT_LEAST_ONE, "pad_token_id")}
        for key in AT_LEAST_ONE:
            if isinstance(values[key], int) and values[key] < 1:
                raise _wrong(name, key, values[key], "it must be at least 1")
        layers = values["num_hidden_layers"]
        if isinstance(layers, int) and layers > MOST_LAYERS:
            raise _wrong(name, "num_hidden_layers", layers, f"it must be at most {MOST_LAYERS:,}")
        heads, shared = values["num_attention_heads"], values["num_key_value_heads"]
        if isinstance(heads, int) and isinstance(shared, int) and heads % shared:
            raise _wrong(name, "num_key_value_heads", shared, f"it must divide the {heads} attention heads")
        pad, entries = values["pad_token_id"], values["vocab_size"]
        if isinstance(pad, int) and isinstance(entries, int) and pad >= entries:
            raise _wrong(name, "pad_token_id", pad, f"it must be one of the {entries:,} entries of the vocabulary")
        if isinstance(pad, int) and pad < 0:
            part.pad_token_id = None
    return config


def _wrong(name: str, key: str, value: Any, rule: str) -> ValueError:
    return ValueError(
        f"can't use the model {name!r}: {key} in its config.json is {value}, but {rule}; correct it there"
    )


def check_whole(name: str, folder: Path | None, config: Any) -> None:
    """Check that a checkpoint has weights that can be trained: neither quantized ones nor an adapter's, nor two sets.

    Raises:
        ValueError: it has not.
    """
    if folder is not None:
        check_one_set(name, folder)
        _check_beside(name, "config.json", [getattr(config, "transformers_weights", None)])
    said = getattr(config, "quantization_config", None)
    if said:
        kind = (said if isinstance(said, dict) else vars(said)).get("quant_method") or "quantization_config"
        raise _quantized(name, f"config.json says that its weights are quantized ({getattr(kind, 'value', kind)})")
    if folder is not None:
        _check_numbers(name, folder)


def check_one_set(name: str, folder: Path) -> None:
    """Check that a folder has one set of weights, all of it there, and not an adapter's: transformers puts one that
    lies beside a model into it, and freezes all else.

    Raises:
        ValueError: it has not.
    """
    if (folder / ADAPTER).is_file():
        raise ValueError(
            f"can't use the model {name!r}: the folder has an adapter ({ADAPTER}); merge it into its model with "
            "peft's merge_and_unload(), and give the folder where that is saved"
        )
    for whole, index in WEIGHTS:
        if (folder / whole).is_file() and (folder / index).is_file():
            raise ValueError(
                f"can't load the model {name!r}: the folder has its weights twice, in {whole} and in the files of "
                f"{index}, and one of them may be old: remove one"
            )
        _check_inside(name, folder / index)


def _check_inside(name: str, index: Path) -> None:
    """Check that an index names files beside it: the digest of a folder, by which runs know a model, has no others, so
    that weights from elsewhere could change, and would pass for the same."""
    try:
        files = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    except (OSError, ValueError, RecursionError, LookupError, TypeError, AttributeError):  # told by who reads
        return
    _check_beside(name, index.name, files)


def _check_numbers(name: str, folder: Path) -> None:
    """Check that weights aren't whole numbers: those are codes, which would be loaded as weights of -127 to 127."""
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                kinds = {key: file.get_slice(key).get_dtype() for key in file.keys() if key.endswith(".weight")}  # noqa: SIM118
        except (OSError, SafetensorError):  # told by who reads
            continue
        codes = next((key for key, kind in kinds.items() if kind.startswith(("I", "U"))), None)
        if codes is not None:
            raise _quantized(name, f"weights are quantized, and whole numbers ({codes} in {path.name})")


def not_read(folder: Path) -> list[str]:
    """Weights in another format that lie beside those which transformers reads: they may be the newer ones."""
    first, second = ([file for file in files if (folder / file).is_file()] for files in WEIGHTS)
    return second if first else []


def _check_beside(name: str, where: str, files: Iterable[Any]) -> None:
    outside = next((file for file in files if isinstance(file, str) and Path(file).name != file), None)
    if outside is not None:
        raise ValueError(
            f"can't load the model {name!r}: {where} names {outside!r}, which isn't beside it in the folder: move that "
            "file there, and correct the name"
        )


def check_complete(name: str, unexpected: Sequence[str]) -> None:
    """Check that weights are what they say, whatever became of the configuration of what belongs to them.

    Args:
        name: of the model.
        unexpected: names that the checkpoint has and the model hasn't.

    Raises:
        ValueError: there are scales, without which the weights would be loaded as numbers of another size; or adapters
            inside of the model, without which it would be the one that they were trained on.
    """
    scale = next(filter(_SCALE.search, unexpected), None)
    if scale is not None:
        raise _quantized(name, f"weights are quantized, and have scales ({scale})")
    adapter = next(filter(_ADAPTED.search, unexpected), None)
    if adapter is not None:
        raise ValueError(
            f"can't use the model {name!r}: its weights have an adapter beside them ({adapter}), which would be left "
            "out; merge it into them, and give the folder where that is saved"
        )


def _quantized(name: str, why: str) -> ValueError:
    return ValueError(
        f"can't use the model {name!r}: its {why}; give the model that it was made from: qlora quantizes by itself"
    )


def check_loaded(
    name: str, model: nn.Module, new: Iterable[str], shapes: Mapping[str, Sequence[Any]], *, to_train: bool = True
) -> None:
    """Check that a checkpoint lacks nothing but a head, which it may lack if the model is going to be trained.

    Args:
        name: of the model.
        model: as loaded.
        new: names of its parameters that the checkpoint doesn't have, or not in that shape.
        shapes: for those with another shape: the checkpoint's and the model's.
        to_train: and not only to be scored.

    Raises:
        ValueError: something else is missing, and would be random.
    """
    own = {key for key, _ in model.named_parameters()}
    inside = sorted(own.intersection(new) - (_heads(model) if to_train else set()))
    if not inside:
        return
    first = inside[0]
    found, wanted = (str(tuple(shape)) for shape in shapes.get(first, ((), ())))
    why = f"is {found} there and {wanted} in config.json" if first in shapes else "is missing"
    where = " in embeddings and layers" if to_train else ""
    raise ValueError(
        f"the weights of {name!r} don't match its config.json: {len(inside):,} of {len(own):,} tensors{where} "
        f"are missing or have another shape ({first} {why}), and would be random; "
        f"give the folder as it was saved{', or config:NAME for random weights' if to_train else ''}"
    )


def of_layers(model: Any, names: Iterable[str]) -> list[str]:
    """The names in a checkpoint that belong to layers, with or without the bare model's prefix."""
    lists = [f"{name}." for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    prefixes = (*lists, *(name.removeprefix(f"{model.base_model_prefix}.") for name in lists))
    return [name for name in names if name.startswith(prefixes)]


def _heads(model: Any) -> set[str]:
    """Parameters outside the bare model, and those of linear modules in it that are called, or come as, poolers: after
    all layers."""
    prefix = f"{model.base_model_prefix}."
    modules = [(name, isinstance(module, nn.ModuleList)) for name, module in model.named_modules()]
    last = max((place for place, (_, is_list) in enumerate(modules) if is_list), default=-1)
    later = {name for name, _ in modules[last + 1 :]}
    outside = {name: name.rpartition(".")[0] for name in outside_of_layers(model)}
    poolers = {name for name, module in outside.items() if module in later or "pooler" in module.split(".")}
    names = [name for name, _ in model.named_parameters()]
    return poolers | {
        name for name in names if not name.startswith(prefix) and any(n.startswith(prefix) for n in names)
    }


def outside_of_layers(model: nn.Module) -> set[str]:
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
