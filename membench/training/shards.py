"""Checkpoints of a run whose model is sharded: each rank writes its own shards, by torch's distributed checkpoints.

They are in safetensors files beside the checkpoint's own, which is written last and has the rest, their folder and
their digests: until then the one before stands. Any number of processes can continue from them.
"""

import hashlib
import shutil
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import checkpoint as distributed_checkpoint
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from membench.config.errors import UserError, explain
from membench.config.run import shards_of
from membench.training import checkpoint, parallel
from optimizers import MemoryEfficientOptimizer

_SHARDS = "shards"  # of a checkpoint: their folder and the digests of its files; of a tensor: its name in them
_FILE_BYTES = 2**30  # of whole tensors, about as many as share a file of each rank, which is made in memory


def save(state: dict[str, Any], path: Path, step: int) -> None:
    """Write the state of all ranks, at the same time on all of them; see `checkpoint.save`.

    Raises:
        UserError: it can't be written.
    """
    shards: dict[str, DTensor] = {}
    rest = _without(state, "", shards)
    if shards:
        folder = _folder(path, step)
        rest[_SHARDS] = {"folder": folder.name, "digests": _write(shards, folder, path)}
    if parallel.rank() == 0:
        checkpoint.save(rest, path)
        if shards:
            for old in set(folder.parent.iterdir()) - {folder}:
                shutil.rmtree(old)


def load(path: Path, model: nn.Module, optimizer: MemoryEfficientOptimizer) -> dict[str, Any] | None:
    """What was saved, with the shards that `model` and `optimizer` take in this process; None if nothing was.

    Raises:
        UserError: it can't be read, is damaged, belongs to another run, or isn't there for all ranks.
    """
    state = checkpoint.load(path)
    if len(set(parallel.of_all_ranks(None if state is None else state["progress"]["step"]))) > 1:
        raise UserError(f"not all machines find the same checkpoint {path}: put --out on a disk that they share")
    if state is None or _SHARDS not in state:
        return state
    saved = state.pop(_SHARDS)
    folder = _folder(path, saved["folder"])
    _check(folder, saved["digests"], path)
    places: dict[str, Tensor] = {}
    named, params = model.state_dict(), [p for group in optimizer.param_groups for p in group["params"]]
    state["model"] = _with_places(state["model"], named, places)
    for number, entries in state["optimizer"]["state"].items():
        state["optimizer"]["state"][number] = _with_places(entries, dict.fromkeys(entries, params[number]), places)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a single process is what we want where there is one
        distributed_checkpoint.load(places, storage_reader=HuggingFaceStorageReader(str(folder)))
    return state


def _folder(path: Path, step: int | str) -> Path:
    return shards_of(path) / str(step)


def _without(state: Any, name: str, shards: dict[str, DTensor]) -> Any:
    """The state with a name in the place of each sharded tensor, which goes into `shards`."""
    if isinstance(state, DTensor):
        shards[name] = state
        return {_SHARDS: name, "dtype": str(state.dtype).removeprefix("torch.")}
    if isinstance(state, dict):
        return {key: _without(value, f"{name}/{key}", shards) for key, value in state.items()}
    return [_without(one, f"{name}/{at}", shards) for at, one in enumerate(state)] if isinstance(state, list) else state


def _with_places(values: dict[str, Any], like: Mapping[str, Tensor], places: dict[str, Tensor]) -> dict[str, Any]:
    """The values with a tensor in the place of each name, sharded as one of `like` is, to be filled from `places`."""
    filled = dict(values)
    for key, value in values.items():
        if isinstance(value, dict) and _SHARDS in value:
            filled[key] = torch.empty_like(like[key], dtype=getattr(torch, value["dtype"]), requires_grad=False)
            places[value[_SHARDS]] = filled[key]
    return filled


def _write(shards: dict[str, DTensor], folder: Path, path: Path) -> dict[str, str]:
    """Write all ranks' shards; the digests of the files, by their names."""
    if parallel.rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)  # what an earlier attempt has left
        folder.mkdir(parents=True)
    parallel.of_all_ranks(None)
    files, bytes_before = {}, 0
    for name, tensor in shards.items():
        files[name] = 1 + bytes_before // _FILE_BYTES
        bytes_before += tensor.nbytes
    writer = HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=files, save_distributed=True)
    try:
        distributed_checkpoint.save(shards, storage_writer=writer)
    except CheckpointException as error:
        why = explain(next(iter(error.failures.values()))[0])
        raise UserError(checkpoint.UNWRITTEN.format(path=path, why=why)) from error
    return _digests(folder, [file.name for file in folder.glob(f"shard-{1 + parallel.rank():05}-*")])


def _digests(folder: Path, mine: Iterable[str]) -> dict[str, str]:
    """Of some files, each of which is read by one rank."""
    found = {}
    for name in mine:
        with (folder / name).open("rb") as content:
            found[name] = hashlib.file_digest(content, "sha256").hexdigest()
    return {name: digest for part in parallel.of_all_ranks(found) for name, digest in part.items()}


def _check(folder: Path, digests: dict[str, str], path: Path) -> None:
    """Raises UserError unless the files are those that were written."""
    here = {file.name for file in folder.iterdir()} if folder.is_dir() else set()
    mine = sorted(digests)[parallel.rank() :: parallel.ranks()]
    if _digests(folder, here.intersection(mine)) != digests or here - digests.keys():
        raise UserError(f"checkpoint {path} is damaged: {checkpoint.WAY_OUT}")
