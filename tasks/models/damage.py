"""The border where any exception from a model's folder or configuration becomes one sentence.

A folder's contents were written by others. Nobody can list all the ways in which reading them fails: a damaged file, a
value that the model's code divides by, a pickle that isn't only tensors, a template that calls something undefined.
"""

import contextlib
import json
import pickle
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

LONGEST = 240  # characters in a reason
NOT_ALL_TENSORS = "holds more than tensors, and the rest would be run as code: save the model as safetensors"


@contextlib.contextmanager
def said_in_a_sentence(
    what: str,
    name: str,
    way_out: str,
    *,
    folder: str | None = None,
    file: str = "",
    values: Mapping[str, Any] | None = None,
) -> Iterator[None]:
    """Raises ValueError for whatever goes wrong inside, except for lack of memory.

    Args:
        what: "model" or "tokenizer".
        name: the name that the user gave.
        way_out: what to give instead.
        folder: where its files are, to find the damaged one.
        file: the file being read, if it is a single one.
        values: of its configuration, to find the unknown one.
    """
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise
        damage = damaged_file(Path(folder)) if folder else None
        reason = damage or _unknown(error, values or {}) or f"{file}{reason_of(error)}"
        raise ValueError(f"can't load the {what} {name[:100]!r}: {reason.rstrip('.')}; give {way_out}") from error


def is_out_of_memory(error: Exception) -> bool:
    """Is it a lack of memory? That isn't the fault of any file."""
    texts = ("can't allocate memory", "not enough memory", "out of memory", "_STATUS_ALLOC_FAILED", "ALLOCATION_FAILED")
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in texts)


def _unknown(error: Exception, values: Mapping[str, Any]) -> str | None:
    """The value in a configuration for which a table has no entry."""
    if not isinstance(error, KeyError):
        return None
    return next(
        (f"its {name}, {value!r}, is unknown" for name, value in values.items() if value == error.args[0]),
        None,
    )


def reason_of(error: Exception) -> str:
    """An error's reason in one line. Some have it on their second line, some only in their type."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].endswith(":"):  # the next line has the reason
        text = re.sub(r"^\w+: ", "", lines[1])
    elif isinstance(error, OSError | ValueError | ImportError) and lines:
        text = lines[0]
    elif isinstance(error, KeyError):
        text = f"it names {lines[0]}, which is unknown"
    else:
        text = f"{type(error).__name__}: {lines[0] if lines else ''}".removesuffix(": ")
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def damaged_file(folder: Path) -> str | None:
    """The first file of a folder that can't be read as what its name says, and why; None if all can."""
    for pattern, read in READERS.items():
        for path in sorted(folder.glob(pattern)):
            why = read(path)
            if why is not None:
                return f"{path.name} {why}"
    return None


def check_settings(folder: Path, *names: str) -> None:
    """Raises ValueError where a file of settings gives one of them two values, of which transformers takes the last."""
    for path in [folder / name for name in names]:
        try:
            json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_object)
        except _TwiceError:
            raise
        except (OSError, ValueError, RecursionError):  # told by who reads
            continue


class _TwiceError(ValueError):
    """A name that an object has twice, with different values."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    twice = next((name for name, value in pairs if value != values[name]), None)
    if twice is not None:
        raise _TwiceError(f"has {twice!r} twice, with different values")
    return values


def _read_json(path: Path) -> str | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_object)
    except _TwiceError as error:
        return str(error)
    except OSError as error:
        return f"can't be read ({error.strerror})"
    except json.JSONDecodeError as error:
        return f"isn't valid JSON (line {error.lineno}: {error.msg})"
    except UnicodeDecodeError:
        return "isn't UTF-8 text"
    except RecursionError:
        return "is nested too deeply"
    except ValueError:  # Python reads no number of thousands of digits
        return "has a number with too many digits"
    return _incomplete(path, content)


def _incomplete(path: Path, content: Any) -> str | None:
    if not isinstance(content, dict):
        return f"must hold an object, not a {type(content).__name__}"
    if not path.name.endswith(".index.json"):
        return None
    for name in ("metadata", "weight_map"):
        if not isinstance(content.get(name), dict):
            return f"has no {name!r}, which an index of weights has"
    missing = [name for name in content["weight_map"].values() if not (path.parent / str(name)).is_file()]
    return f"names {missing[0]}, which is missing" if missing else None


def _read_safetensors(path: Path) -> str | None:
    try:
        with safe_open(path, framework="pt"):
            return None
    except SafetensorError as error:
        return f"isn't a complete safetensors file ({reason_of(ValueError(str(error)))})"


def _read_pickle(path: Path) -> str | None:
    try:
        torch.load(path, weights_only=True, map_location="meta")
        return None
    except pickle.UnpicklingError as error:
        return NOT_ALL_TENSORS if "GLOBAL" in str(error) else "wasn't written by torch.save"
    except Exception as error:  # a zip, a pickle or a tensor can be broken, each in a different way
        return f"can't be read ({reason_of(error)})"


READERS: dict[str, Callable[[Path], str | None]] = {
    "config.json": _read_json,
    "generation_config.json": _read_json,
    "tokenizer.json": _read_json,
    "tokenizer_config.json": _read_json,
    "special_tokens_map.json": _read_json,
    "*.index.json": _read_json,
    "*.safetensors": _read_safetensors,
    "pytorch_model*.bin": _read_pickle,
}
