"""Reading torch.distributed.checkpoint files without trusting them, and writing them tensor by tensor.

The library pickles `.metadata` and every entry that is no tensor, and loads both without restriction. Ours hold
tensors only: `.metadata` is read with an allow-list of types, in which those of other entries are missing.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from model.fragments import LoadPlanner

_ALLOWED = frozenset(
    {
        ("torch.distributed.checkpoint.metadata", "Metadata"),
        ("torch.distributed.checkpoint.metadata", "TensorStorageMetadata"),
        ("torch.distributed.checkpoint.metadata", "TensorProperties"),
        ("torch.distributed.checkpoint.metadata", "ChunkStorageMetadata"),
        ("torch.distributed.checkpoint.metadata", "MetadataIndex"),
        ("torch.distributed.checkpoint.metadata", "StorageMeta"),
        ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch.distributed.checkpoint.filesystem", "StorageMeta"),
        ("torch", "Size"),
        ("torch", "device"),
        ("torch.serialization", "_get_layout"),
        ("pathlib", "PosixPath"),
        ("pathlib", "Path"),
        ("collections", "OrderedDict"),
        *(
            ("torch", dtype)
            for dtype in ("float64", "float32", "bfloat16", "float16", "int64", "int32", "uint8", "bool")
        ),
    }
)


class _Restricted(pickle.Unpickler):
    def __init__(self, file: BinaryIO, allowed: frozenset[tuple[str, str]], whose: str):
        super().__init__(file)
        self._allowed, self._whose = allowed, whose

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._allowed:
            raise ValueError(
                f"checkpoint metadata asks for {module}.{name}, which no checkpoint of {self._whose} holds: refused."
            )
        return super().find_class(module, name)


class TensorReader(FileSystemReader):
    """A `FileSystemReader` for checkpoints that hold tensors only.

    Attributes:
        allowed: (module, name) of everything that its metadata may be made of.
        whose: checkpoints it reads, for a message.
    """

    allowed = _ALLOWED
    whose = "ours"

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The metadata, read under the allow-list. Raises ValueError for anything that is not on it."""
        path = Path(self.path) / ".metadata"
        with path.open("rb") as file:
            metadata = _Restricted(file, self.allowed, self.whose).load()
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def read_tensors(
    state: dict[str, Any], folder: Path, *, alone: bool = False, reader: TensorReader | None = None
) -> None:
    """Read the entries of `state` from a step folder, into the tensors that stand there, in whatever layout they are.

    Collective, unless `alone`. `reader`: of a folder that is not ours.
    """
    with torch.no_grad(), warnings.catch_warnings():
        # Without a process group, torch warns that it assumes what is said here.
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        dcp.load(state, storage_reader=reader or TensorReader(folder), planner=LoadPlanner(), no_dist=alone)


class _LazyPlanner(DefaultSavePlanner):
    """Plans with tensors on the meta device, and asks for the values of each when its turn has come."""

    def __init__(self, read: Callable[[str], Tensor]):
        super().__init__()
        self.read = read

    def lookup_object(self, index: Any) -> Any:
        return self.read(index.fqn)


def write_tensors(folder: Path, tensors: dict[str, Tensor], read: Callable[[str], Tensor]) -> None:
    """Write a checkpoint of tensors that need not all be in memory before.

    Args:
        tensors: by full name (`model.layers.0.mixer.q.weight`), on the meta device: shapes and dtypes.
        read: gives the values of one of them.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        dcp.save(tensors, storage_writer=dcp.FileSystemWriter(folder), planner=_LazyPlanner(read), no_dist=True)


def tensor_shapes(folder: Path, prefix: str) -> dict[str, tuple[int, ...]]:
    """Names (less the prefix) and shapes of the tensors stored under `prefix`."""
    entries = TensorReader(folder).read_metadata().state_dict_metadata
    return {name.removeprefix(prefix): tuple(entry.size) for name, entry in entries.items() if name.startswith(prefix)}


def tensor_dtypes(folder: Path, prefix: str) -> dict[str, torch.dtype]:
    """Names (less the prefix) and dtypes of the tensors stored under `prefix`."""
    entries = TensorReader(folder).read_metadata().state_dict_metadata
    return {
        name.removeprefix(prefix): entry.properties.dtype
        for name, entry in entries.items()
        if name.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
    }


def shape_faults(folder: Path, wanted: dict[str, tuple[int, ...]]) -> list[str]:
    """How the model stored in `folder` differs from the wanted one, tensor by tensor, with both shapes."""
    stored = tensor_shapes(folder, "model.")
    faults = [f"{name}: not in {folder}." for name in wanted if name not in stored]
    faults += [
        f"{name} {list(stored[name])} of {folder} has no place in this model." for name in stored if name not in wanted
    ]
    faults += [
        f"{name}: {list(stored[name])} in {folder}, but {list(shape)} in this model."
        for name, shape in wanted.items()
        if name in stored and stored[name] != shape
    ]
    return faults
