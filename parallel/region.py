"""How the residual stream gets into the parts that tensor parallelism spreads, and out again."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from model.context import WholeHeads
from parallel.collectives import Enter, Gather, Sum, SumPiece


@dataclass(frozen=True)
class Region:
    """The tensor-parallel ranks around this one.

    Inside the region each rank has all tokens and its share of the heads (or hidden channels, or vocabulary). Outside,
    in the residual stream, each has all channels: of its own piece of the sequence where `cuts_sequence` (sequence
    parallelism), of all tokens otherwise.
    """

    group: str
    rank: int
    size: int
    cuts_sequence: bool

    def enter(self, x: Tensor) -> Tensor:
        """From the residual stream `[B, n, ...]` to all tokens `[B, N, ...]`."""
        return Gather.apply(x, self.group, self.size) if self.cuts_sequence else Enter.apply(x, self.group)

    def leave(self, partial: Tensor) -> Tensor:
        """Sum what the ranks have for all tokens; into the residual stream."""
        return SumPiece.apply(partial, self.group, self.size) if self.cuts_sequence else Sum.apply(partial, self.group)

    def piece(self, x_BN: Tensor) -> Tensor:
        """This rank's piece of what every rank has alike."""
        return x_BN.chunk(self.size, dim=1)[self.rank] if self.cuts_sequence else x_BN

    def share(self, length: int) -> range:
        """This rank's part of so many rows, heads or columns: equal parts, rounded up, the last may be shorter."""
        each = -(-length // self.size)
        return range(min(self.rank * each, length), min((self.rank + 1) * each, length))


@dataclass(frozen=True)
class SpreadHeads(WholeHeads):
    """The heads of a layer, of which every rank of a region has its share."""

    region: Region

    def gather(self, x_BNh: Tensor) -> Tensor:
        return Gather.apply(x_BNh.transpose(1, 2), self.region.group, self.region.size).transpose(1, 2)

    def stream_piece(self, x_BN: Tensor) -> Tensor:
        return self.region.piece(x_BN)
