"""What kernels are told about queries: which keys they see, and which of them a head is asked for.

All of it is made and stays where the tensors are; nothing waits to know it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.attention.visible import Visible

LONGEST_TILE = 128
"""Of queries; the length of every tile divides it."""


@dataclass(frozen=True)
class Ranges:
    """The keys that queries see, int32. Tables of queries are as long as `table_length` says.

    Attributes:
        num_queries: N.
        low, high: `[B or 1, space]`, first and end, which rise; 0 for what is no query.
        rising: `[B]`, whether that is all. If not, a query sees those between of its own document.
        ids, key_ids: documents, `[B, space]` and `[B, M]`, or None.
        both_sides: whether keys before those of a query may be hidden from it.
    """

    num_queries: int
    low: Tensor
    high: Tensor
    rising: Tensor | None
    ids: Tensor | None
    key_ids: Tensor | None
    both_sides: bool

    @classmethod
    def of(cls, visible: Visible, device: torch.device) -> Ranges:
        places_N = torch.arange(visible.num_queries, device=device) + visible.first_index
        low, high = torch.zeros_like(places_N), torch.full_like(places_N, visible.num_keys)
        if visible.causal:
            high = (places_N + 1).clamp(max=visible.num_keys)
        if visible.window is not None:
            low = (places_N - visible.window + 1).clamp(min=0)
            if not visible.causal:
                high = (places_N + visible.window).clamp(max=visible.num_keys)
        low, high = low[None], high[None]
        ids, key_ids, rising = visible.documents, visible.key_documents, None
        if ids is not None and key_ids is not None:
            key_ids = key_ids.contiguous()
            rising = (ids.diff() >= 0).all(1) & (key_ids.diff() >= 0).all(1)
            # Where they do not rise there is no range, and what is found here means nothing.
            first, end = (torch.searchsorted(key_ids, ids.contiguous(), right=right) for right in (False, True))
            low = torch.where(rising[:, None], torch.maximum(low, first), low)
            high = torch.where(rising[:, None], torch.minimum(high, end), high)
            rising, ids = rising.int(), _spaced(ids)
        both = visible.window is not None or ids is not None
        return cls(visible.num_queries, _spaced(low.int()), _spaced(high.int()), rising, ids, key_ids, both)

    @property
    def stride(self) -> int:
        """From row to row of `low` and `high`, which all rows may share."""
        return 0 if self.low.shape[0] == 1 else self.low.shape[1]

    def counts(self) -> Tensor:
        """How many keys each query sees, `[B or 1, space]`."""
        if self.ids is None or self.key_ids is None:
            return (self.high - self.low).clamp(min=0)
        # Keys in the order of their documents and, within one, of their places: what a query sees is a range of them.
        sorted_ids = self.key_ids.sort(1).values
        rank, key_rank = (torch.searchsorted(sorted_ids, x) for x in (self.ids, self.key_ids))
        num_keys = self.key_ids.shape[1]
        ordered = (key_rank * (num_keys + 1) + torch.arange(num_keys, device=rank.device)).sort(1).values
        first, end = (torch.searchsorted(ordered, rank * (num_keys + 1) + x) for x in (self.low, self.high))
        known = sorted_ids.gather(1, rank.clamp(max=num_keys - 1)) == self.ids
        return torch.where(known, end - first, 0).clamp(min=0)

    def bounds(self, num_keys: int, tile: int) -> Tensor:
        """Of each tile of keys, int32 `[B or 1, tiles, 4]`: the first query that sees one of them, first and end of
        those that see all, and the end."""
        low, high = (x[:, : self.num_queries].contiguous() for x in (self.low, self.high))
        first = torch.arange(0, num_keys, tile, device=low.device, dtype=torch.int32)
        first = first.expand(low.shape[0], -1).contiguous()
        end = (first + tile).clamp(max=num_keys)
        begin = torch.searchsorted(high, first, right=True)
        clear = torch.searchsorted(high, end)
        clear_end = torch.searchsorted(low, first, right=True)
        last = torch.searchsorted(low, end)
        if self.rising is not None:
            risen = self.rising.bool()[:, None]
            clear, clear_end = torch.where(risen, clear, begin), torch.where(risen, clear_end, begin)
        return torch.stack((begin, clear, clear_end, last), 2).int()


class Selection(NamedTuple):
    """The selected queries of each head, in order.

    Attributes:
        index: int32 `[B, H, space]`, which query is the r-th, and N beyond their number.
        before: int32 `[B, H, N + 1]`, how many of the queries before the n-th are selected.
    """

    index: Tensor
    before: Tensor


def selection_of(selected_BNH: Tensor) -> Selection:
    rows, n, heads = selected_BNH.shape
    selected_BHN = selected_BNH.transpose(1, 2)
    before = F.pad(selected_BHN.cumsum(2, dtype=torch.int32), (1, 0))
    # Those that are not selected all go, as none, to the last place, which no row has.
    space = table_length(n)
    places = torch.where(selected_BHN, before[..., :-1], space - 1).long()
    queries = torch.where(selected_BHN, torch.arange(n, device=places.device, dtype=torch.int32), n)
    return Selection(queries.new_full((rows, heads, space), n).scatter_(2, places, queries), before)


def table_length(num_queries: int) -> int:
    """The length of tables: tiles divide it, and there is room for an entry that is no query's."""
    return (num_queries // LONGEST_TILE + 1) * LONGEST_TILE


def _spaced(x_BN: Tensor) -> Tensor:
    return F.pad(x_BN, (0, table_length(x_BN.shape[1]) - x_BN.shape[1]))
