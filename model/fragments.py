"""Parts of parameters as ZeRO cuts them: a run of elements of the flattened parameter, which may begin in mid-row.

A run of a matrix is up to three boxes: the rest of a row, whole rows, the beginning of a row. As boxes they stand in a
checkpoint beside those of every other layout, and are read from whatever boxes another has written.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType


class Box(NamedTuple):
    """A part of a tensor: where it begins, and its values, which share memory with whom they were taken from."""

    offsets: tuple[int, ...]
    values: Tensor


@dataclass(frozen=True)
class Fragment:
    """What this process has of one parameter, or of a moment of it.

    Attributes:
        shape: of the whole.
        begin: of the flattened whole, the first element here.
        values: `[n]`, contiguous; none at all is possible.
    """

    shape: torch.Size
    begin: int
    values: Tensor

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def size(self) -> torch.Size:
        """Of the whole, as torch.distributed.checkpoint asks for it."""
        return self.shape

    def boxes(self) -> Iterator[Box]:
        """The same elements as boxes of the whole, from the first to the last."""
        return _boxes(self.shape, self.begin, self.values)

    # What torch.distributed.checkpoint asks of whatever is to be stored in parts.

    def __create_write_items__(self, fqn: str, _: object) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, TensorProperties(dtype=self.values.dtype), self.shape),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(box.offsets), box.values.shape) for box in self.boxes()]

    def box_at(self, offsets: Sequence[int]) -> Tensor:
        """The values of the box that begins there."""
        return next(box.values for box in self.boxes() if box.offsets == tuple(offsets))


def _boxes(shape: torch.Size, begin: int, values: Tensor) -> Iterator[Box]:
    if values.numel() == 0:
        return
    if len(shape) == 1:
        yield Box((begin,), values)
        return
    inner = shape[1:]
    row_size = math.prod(inner)
    row, within = divmod(begin, row_size)
    if within:
        rest, values = values[: row_size - within], values[row_size - within :]
        yield from (Box((row, *box.offsets), box.values[None]) for box in _boxes(inner, within, rest))
        row += 1
    if whole := values.numel() // row_size:
        yield Box((row, *[0] * len(inner)), values[: whole * row_size].view(whole, *inner))
    beginning = values[whole * row_size :]
    yield from (Box((row + whole, *box.offsets), box.values[None]) for box in _boxes(inner, 0, beginning))


class SavePlanner(DefaultSavePlanner):
    """torch's, which also finds the boxes of fragments."""

    def lookup_object(self, index: MetadataIndex) -> Any:
        found = self.state_dict[index.fqn]
        return found.box_at(index.offset or ()) if isinstance(found, Fragment) else super().lookup_object(index)


class LoadPlanner(DefaultLoadPlanner):
    """torch's, which also finds the boxes of fragments."""

    def set_up_planner(self, state_dict: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        # torch exchanges, in what it is given, whatever it does not know for None.
        flat, _ = flatten_state_dict(state_dict)
        fragments = {fqn: found for fqn, found in flat.items() if isinstance(found, Fragment)}
        super().set_up_planner({fqn: found for fqn, found in flat.items() if fqn not in fragments}, *args, **kwargs)
        self.state_dict |= fragments

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        found = self.state_dict[index.fqn]
        return found.box_at(index.offset or ()) if isinstance(found, Fragment) else super().lookup_tensor(index)
