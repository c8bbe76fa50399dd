"""megatron-core's distributed checkpoints (`torch_dist`), read and written with torch alone.

Such a folder holds `metadata.json`, `common.pt` (arguments and counters), and a checkpoint of
torch.distributed.checkpoint whose tensors are whole: how many ranks wrote it makes no difference. Layers that are alike
lie in one tensor with an axis more, `decoder.layers.mlp.linear_fc2.weight [L, ...]`, each a chunk of its own; others
have a number in their names.
"""

from __future__ import annotations

import json
import pickle
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from model.megatron.names import LAYER, Held, canonical
from model.megatron.pickled import load
from model.shards import TensorReader

BACKEND = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
COMMON, METADATA = "common.pt", "metadata.json"

# Entries beside the model: of optimizers, generators, and what watches a run.
_BESIDE = ("optimizer", "chained_", "rng_state", "rerun_state", "opt_param_scheduler", "dataloader")


class MegatronReader(TensorReader):
    """Metadata of Megatron's: it has entries that are no tensors, and the plans of those who wrote."""

    allowed = TensorReader.allowed | {
        ("torch.distributed.checkpoint.metadata", "BytesStorageMetadata"),
        *(
            ("torch.distributed.checkpoint.planner", name)
            for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData")
        ),
        ("torch", "float8_e4m3fn"),
        ("torch", "float8_e5m2"),
    }
    whose = "Megatron's"


class DistributedFiles:
    """The model's tensors in a distributed checkpoint, by canonical names, layer by layer.

    Attributes:
        tp: ranks of tensor parallelism that have to be put together: the tensors are whole.
        content: arguments and counters.
        numbered: whether every layer has tensors of its own, named by its number.

    Raises:
        ValueError: another backend, metadata that cannot be read, or files that are missing or cut short.
    """

    tp = 1

    def __init__(self, folder: Path):
        self.folder = folder
        _check_backend(folder)
        self._reader = MegatronReader(folder)
        try:
            self._metadata = self._reader.read_metadata()
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            raise ValueError(f"{folder / '.metadata'} cannot be read: {error}.") from error
        self._check_files()
        self.content = load(folder / COMMON)
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
        # Canonical name -> entry, and the layer in it where it holds several.
        self._entries: dict[str, tuple[str, int | None]] = {}
        for key, entry in self._metadata.state_dict_metadata.items():
            if isinstance(entry, TensorStorageMetadata) and not key.startswith(_BESIDE):
                self._note(key, entry)
        self.numbered = any(LAYER.fullmatch(key) for key, _ in self._entries.values())

    def _check_files(self) -> None:
        ends: dict[str, int] = {}
        for place in self._metadata.storage_data.values():
            ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
        files = {name: self.folder / name for name in [*ends, COMMON]}
        faults = [f"{path} is missing." for path in files.values() if not path.is_file()]
        faults += [
            f"{files[name]} is cut short: {size:,} bytes, and {end:,} are to be there."
            for name, end in ends.items()
            if files[name].is_file() and (size := files[name].stat().st_size) < end
        ]
        if faults:
            raise ValueError(" ".join(faults))

    def _note(self, key: str, entry: TensorStorageMetadata) -> None:
        if not key.startswith("decoder.layers.") or LAYER.fullmatch(key):
            self._entries[canonical(key)] = (key, None)
            return
        inside = key.removeprefix("decoder.layers.")
        for layer in range(entry.size[0]):
            self._entries[canonical(f"decoder.layers.{layer}.{inside}")] = (key, layer)

    @property
    def names(self) -> set[str]:
        """Canonical names of all tensors."""
        return set(self._entries)

    def dtype(self, name: str) -> torch.dtype:
        """That it is stored in."""
        return self._metadata.state_dict_metadata[self._entries[name][0]].properties.dtype

    def agree(self, held: Held) -> bool:
        """Whether ranks have alike what they should: of each tensor there is one."""
        return True

    def whole_shape(self, held: Held) -> tuple[int, ...]:
        """That of `whole`."""
        key, layer = self._entries[held.name]
        size = tuple(self._metadata.state_dict_metadata[key].size)
        return size if layer is None else size[1:]

    def whole(self, held: Held) -> Tensor:
        """One tensor, in the dtype it is stored in."""
        key, layer = self._entries[held.name]
        entry = self._metadata.state_dict_metadata[key]
        offsets, sizes = [0] * len(entry.size), list(entry.size)
        if layer is not None:
            offsets[0], sizes[0] = layer, 1
        wanted = torch.empty(sizes, dtype=entry.properties.dtype)
        chunk = ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=torch.Size(sizes))
        plan = LoadPlan(create_read_items_for_chunk_list(key, entry, [chunk]))
        self._reader.read_data(self._reader.prepare_local_plan(plan), _Into(wanted)).wait()
        return wanted if layer is None else wanted[0]


class _Into(DefaultLoadPlanner):
    """Reads chunks into one tensor."""

    def __init__(self, wanted: Tensor):
        super().__init__()
        self.wanted = wanted

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.wanted


def _check_backend(folder: Path) -> None:
    path = folder / METADATA
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        backend = found["sharded_backend"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read: {type(error).__name__}, {error}.") from error
    if backend != BACKEND["sharded_backend"]:
        raise ValueError(
            f"{path}: sharded_backend = {backend!r}, expected 'torch_dist'; Megatron-LM writes that with "
            "--ckpt-format torch_dist, and reads the other."
        )


def write_distributed(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    read: Callable[[str], Tensor],
    common: dict[str, Any],
) -> None:
    """Write a distributed checkpoint whose tensors need not all be in memory before.

    Args:
        folder: to fill.
        shapes: of the tensors by their canonical names; every layer has the same ones.
        read: gives one of them.
        common: what `common.pt` says.
    """
    planner = _Planner(shapes, dtype, read)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        dcp.save({}, storage_writer=dcp.FileSystemWriter(folder), planner=planner, no_dist=True)
    torch.save(common, folder / COMMON)
    (folder / METADATA).write_text(json.dumps(BACKEND), encoding="utf-8")


class _Planner(DefaultSavePlanner):
    """Every layer's part of a stacked tensor is a chunk, read when its turn has come."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, read: Callable[[str], Tensor]):
        super().__init__()
        self._shapes, self._dtype, self._read = shapes, dtype, read
        self._layers = 1 + max(int(match[1]) for name in shapes if (match := LAYER.fullmatch(name)))
        self._names: dict[MetadataIndex, str] = {}

    def create_local_plan(self) -> SavePlan:
        items = [self._item(name, shape) for name, shape in self._shapes.items()]
        items += [WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO) for key in self._extra_states()]
        self.plan = SavePlan(items, planner_data={})
        return self.plan

    def _item(self, name: str, shape: tuple[int, ...]) -> WriteItem:
        match = LAYER.fullmatch(name)
        key, offsets, sizes, size = name, [0] * len(shape), list(shape), list(shape)
        if match:
            key = f"decoder.layers.{match[2]}"
            offsets, sizes, size = [int(match[1]), *offsets], [1, *sizes], [self._layers, *size]
        index = MetadataIndex(key, torch.Size(offsets))
        self._names[index] = name
        data = TensorWriteData(
            chunk=ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=torch.Size(sizes)),
            properties=TensorProperties(dtype=self._dtype),
            size=torch.Size(size),
        )
        return WriteItem(index, WriteItemType.SHARD, tensor_data=data)

    def _extra_states(self) -> list[str]:
        """Modules that have more than weights under fp8: megatron-core asks for what they say, and it is nothing."""
        norms = {
            name.split(".", 3)[3].rpartition(".")[0] for name in self._shapes if name.endswith("k_layernorm.weight")
        }
        norms |= {norm.replace(".k_", ".q_") for norm in norms}
        linear = {f"self_attention.{x}" for x in ("linear_qkv", "linear_proj", "core_attention")}
        inside = sorted(linear | norms | {"mlp.linear_fc1", "mlp.linear_fc2"})
        count = self._layers
        keys = [f"decoder.layers.{one}._extra_state/shard_{i}_{count}" for one in inside for i in range(count)]
        return [*keys, "decoder.final_layernorm._extra_state/shard_0_1"]

    def lookup_object(self, index: MetadataIndex) -> Any:
        if index not in self._names:
            return [None]
        whole = self._read(self._names[index]).to(self._dtype)
        return whole[None] if index.fqn.startswith("decoder.layers.") else whole
