"""Which pairs of queries and keys there are, in few and large parts, of which most need no mask."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from kernels.attention.visible import Visible

# Fewer keys than these are not worth a call of their own without a mask.
_FEWEST_KEYS = 128


@dataclass(frozen=True)
class SeenPart:
    """Queries first .. end - 1 with keys first_key .. end_key - 1, of which each sees all, or some (`masked`)."""

    first: int
    end: int
    first_key: int
    end_key: int
    masked: bool


@dataclass(frozen=True)
class Sight:
    """What the queries see, of one row or of rows that are alike.

    Attributes:
        visible: its documents, if any, are of one row.
        ids: document of each query.
        documents: for each query the first and end of its document's keys.
    """

    visible: Visible
    ids: list[int] | None = None
    documents: list[tuple[int, int]] | None = None

    def reach(self, first: int, end: int) -> tuple[int, int]:
        """First and end of the keys among which are all that one of these queries sees."""
        reach = self.visible.reach(first, end)
        if self.documents is None:
            return reach
        return _overlap(reach, (self.documents[first][0], self.documents[end - 1][1]))

    def common(self, first: int, end: int) -> tuple[int, int]:
        """First and end of keys that each of these queries sees; where causal, those before the first query."""
        place, last = first + self.visible.first_index, end - 1 + self.visible.first_index
        low, high = 0, place if self.visible.causal else self.visible.num_keys
        if self.visible.window is not None:
            low, high = max(low, last - self.visible.window + 1), min(high, place + self.visible.window)
        if self.documents is None or self.ids is None:
            return (low, high) if self.ids is None else (0, 0)
        return _overlap((low, high), self.documents[first]) if self.ids[first] == self.ids[end - 1] else (0, 0)

    def parts(self, first: int, end: int, keys: tuple[int, int], square: int) -> Iterator[SeenPart]:
        """Every pair of these queries and keys that can see each other, once.

        What all of the queries see is one part. What is left is that of either half of them, until they are `square`.
        """
        low, high = _overlap(self.reach(first, end), keys)
        left = [(low, high)]
        a, b = _overlap(self.common(first, end), (low, high))
        if b - a >= _FEWEST_KEYS:
            yield SeenPart(first, end, a, b, masked=False)
            left = [(low, a), (b, high)]
        middle = first + -(-(end - first) // (2 * square)) * square
        for some in left:
            if some[0] >= some[1]:
                continue
            if end - first <= square:
                yield SeenPart(first, end, *some, masked=True)
            else:
                yield from self.parts(first, middle, some, square)
                yield from self.parts(middle, end, some, square)


def _overlap(a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
    first = max(a[0], b[0])
    return first, max(first, min(a[1], b[1]))


def sights(visible: Visible, rows: int) -> Iterator[tuple[slice, Sight]]:
    """Rows that see alike, and what they see: all together, or with documents each by itself."""
    if visible.documents is None or visible.key_documents is None:
        yield slice(0, rows), Sight(visible)
        return
    for row in range(rows):
        ids_N, ids_M = visible.documents[row].contiguous(), visible.key_documents[row].contiguous()
        of_row = replace(visible, documents=ids_N[None], key_documents=ids_M[None])
        documents = None
        # Documents follow each other, but where numbers do not rise all that is lost is time.
        if bool((ids_N.diff() >= 0).all() & (ids_M.diff() >= 0).all()):
            firsts_N, ends_N = (torch.searchsorted(ids_M, ids_N, right=right).tolist() for right in (False, True))
            documents = list(zip(firsts_N, ends_N, strict=True))
        yield slice(row, row + 1), Sight(of_row, ids_N.tolist(), documents)


def whole_triangle(visible: Visible) -> bool | None:
    """Whether attention without a mask is causal (True) or not (False); None if this needs a mask."""
    if visible.documents is not None or visible.window is not None:
        return None
    if not visible.causal or visible.first_index >= visible.num_keys - 1:
        return False
    return True if visible.first_index == 0 and visible.num_queries == visible.num_keys else None
