"""Checkpoints on disk: one file, or a folder of shards; whole or not there, and checked when read.

A file holds everything. A folder (`strategies.FSDP2Strategy`, `sharded_checkpoints`) holds a file
of tensors per process, `rest.pt` for everything else, and `checksums.json`. Both read as the same
dict, by any number of processes.
"""

from __future__ import annotations

import json
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from sso_lightning.errors import InputError
from sso_lightning.processes import Processes
from sso_lightning.records import replace_file
from sso_lightning.sources import parse_json

_REST, _SUMS = "rest.pt", "checksums.json"

Place = Callable[[str, torch.Size, torch.dtype], Tensor]
"""Gives the tensor that a stored one, known by name, shape and type, is read into."""


def is_checkpoint(path: Path) -> bool:
    """Whether something that could be a checkpoint is there."""
    return path.is_file() or (path / _REST).is_file()


def read_checkpoint(path: Path, place: Place | None = None) -> dict[str, Any]:
    """Read a checkpoint; the tensors of a file stay on disk until they are used.

    Args:
        path: A `.ckpt` file or folder.
        place: Where the tensors of a folder go, under the names of `flat_tensors`; all processes
            call this together then. Without it they are read whole, by this process alone.

    Raises:
        InputError: It cannot be read, or holds something else.
    """
    content = _read(path)
    if path.is_dir():
        try:
            tensors = _nested(_read_shards(path, place))
        except Exception as error:
            raise InputError(f"{path} is damaged or not a checkpoint") from error
        content["state_dict"] = tensors.get("state_dict", {})
        for index, optimizer in enumerate(content.get("optimizer_states", [])):
            for key, values in tensors.get("optimizer", {}).get(str(index), {}).items():
                optimizer["state"].setdefault(int(key), {}).update(values)
    return content


def checkpoint_step(path: Path) -> int:
    """The optimizer step of a checkpoint, read without its tensors.

    Raises:
        InputError: It cannot be read, or holds something else.
    """
    step: int = _read(path)["global_step"]
    return step


def checkpoint_epochs(path: Path) -> int | None:
    """Epochs that were done when a checkpoint was saved; None if it was within one.

    Raises:
        InputError: It cannot be read, or holds something else.
    """
    progress = _read(path)["loops"]["fit_loop"]["epoch_progress"]["current"]
    done: int = progress["processed"]
    return done if progress["ready"] == done else None


def _read(path: Path) -> dict[str, Any]:
    """A file, or a folder without its tensors."""
    found = path / _REST if path.is_dir() else path
    try:
        content = torch.load(found, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a flipped bit can surface as almost any of them
        raise InputError(f"{path} is damaged or not a checkpoint") from error
    wanted = {"global_step"} if path.is_dir() else {"global_step", "state_dict"}
    if not isinstance(content, dict) or not wanted <= content.keys():
        raise InputError(f"{path} is not a checkpoint")
    return content


def _read_shards(path: Path, place: Place | None) -> dict[str, Tensor]:
    reader = FileSystemReader(path)
    stored = reader.read_metadata().state_dict_metadata
    tensors = {}
    for name, about in stored.items():
        assert isinstance(about, TensorStorageMetadata)
        make = place or (lambda _, size, dtype: torch.empty(size, dtype=dtype))
        tensors[name] = make(name, about.size, about.properties.dtype)
    load(dict(tensors), storage_reader=reader, no_dist=place is None)
    return tensors


def _nested(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Undo `flat_tensors`: `state_dict/NAME` and `optimizer/INDEX/PARAMETER/KEY` as dicts."""
    out: dict[str, Any] = {}
    for path, tensor in tensors.items():
        kind, _, rest = path.partition("/")
        at = out.setdefault(kind, {})
        *keys, last = rest.split("/") if kind == "optimizer" else [rest]
        for key in keys:
            at = at.setdefault(key, {})
        at[last] = tensor
    return out


def flat_tensors(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """Take the tensors of weights and optimizers out of a checkpoint, by names."""
    tensors = {f"state_dict/{name}": value for name, value in checkpoint.pop("state_dict").items()}
    for index, optimizer in enumerate(checkpoint.get("optimizer_states", [])):
        for parameter, values in optimizer["state"].items():
            for key in [key for key, value in values.items() if isinstance(value, Tensor)]:
                tensors[f"optimizer/{index}/{parameter}/{key}"] = values.pop(key)
    return tensors


def write_shards(checkpoint: dict[str, Any], path: Path) -> None:
    """Write a checkpoint as a folder that appears whole; all processes call this together.

    Args:
        checkpoint: What the trainer dumped, with sharded tensors; it is emptied of them.
        path: The folder, on a disk that all processes see. An old one is replaced.
    """
    processes = Processes.current()
    partial_ = path.with_name(f"{path.name}.partial")
    with processes.together():
        if processes.first and partial_.exists():
            shutil.rmtree(partial_)
    save(dict(flat_tensors(checkpoint)), storage_writer=FileSystemWriter(partial_))
    with processes.together():
        if processes.first:
            replace_file(partial_ / _REST, partial(torch.save, checkpoint))
    mine = processes.share(sorted(p.name for p in partial_.iterdir()))
    sums = {name: _checksum(partial_ / name) for name in mine}
    everywhere = processes.gather(sums)
    with processes.together():
        if processes.first:
            found = {name: value for sums in everywhere for name, value in sums.items()}
            replace_file(partial_ / _SUMS, json.dumps(found, indent=1).encode())
            old = path.with_name(f"{path.name}.old")
            if path.exists():
                path.rename(old)
            partial_.rename(path)
            shutil.rmtree(old, ignore_errors=True) if old.is_dir() else old.unlink(missing_ok=True)


def check_checkpoint(path: Path) -> None:
    """Make sure that a checkpoint is whole, before a large model is loaded.

    Args:
        path: A `.ckpt` file or folder.

    Raises:
        InputError: It is cut off, has a flipped bit, or is not a checkpoint.
    """
    if not is_checkpoint(path):
        raise InputError(f"no checkpoint {path}")
    if path.is_dir():
        _check_folder(path)
        return
    # torch writes a zip archive with a checksum of every tensor but is built not to check them: a
    # flipped bit in a weight would be trained on. This reads the file once, in pieces; reading it
    # for the run then finds it in the system's file cache and maps it, also for many processes.
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except Exception as error:  # a flipped bit can surface as almost any of them
        raise InputError(f"{path} is damaged or not a checkpoint") from error
    if broken:
        raise InputError(f"{path} is damaged ({broken} has another checksum)")
    read_checkpoint(path)


def _check_folder(path: Path) -> None:
    if not (path / _SUMS).is_file():
        raise InputError(f"{path} is damaged or not a checkpoint")
    for name, wanted in parse_json((path / _SUMS).read_bytes(), str(path / _SUMS)).items():
        found = _checksum(path / name) if (path / name).is_file() else None
        if found != wanted:
            raise InputError(f"{path} is damaged ({name} has another checksum)")


def _checksum(path: Path) -> int:
    value = 0
    for block in _blocks(path):
        value = zlib.crc32(block, value)
    return value


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            yield block
