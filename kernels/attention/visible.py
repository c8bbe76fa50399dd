"""Which keys each query of causal, windowed, packed attention sees, for a few queries at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Visible:
    """Which of M keys each of N queries sees.

    Attributes:
        num_queries, num_keys: N and M.
        first_index: index among the M of the first query.
        causal: whether a query sees only itself and what comes before it.
        window: it sees itself and window - 1 tokens before it (and after it, where not causal); None: all of them.
        documents, key_documents: ids `[B, N]` and `[B, M]`; a query sees those of its own. None: all of them.
    """

    num_queries: int
    num_keys: int
    first_index: int = 0
    causal: bool = True
    window: int | None = None
    documents: Tensor | None = None
    key_documents: Tensor | None = None

    def of(self, queries_R: Tensor, keys: tuple[int, int] | None = None) -> Tensor:
        """Bool `[B or 1, 1, R, M]`, of the queries with these indices among the N.

        Args:
            keys: first and end of those among the M that are asked about. Default: all of them.
        """
        first, end = (0, self.num_keys) if keys is None else keys
        places = (queries_R + self.first_index)[:, None]
        keys_M = torch.arange(first, end, device=queries_R.device)[None, :]
        seen = (keys_M <= places) if self.causal else torch.ones_like(keys_M <= places)
        if self.window is not None:
            seen = seen & (places - keys_M < self.window)
            if not self.causal:
                seen = seen & (keys_M - places < self.window)
        seen = seen[None]
        if self.documents is not None:
            assert self.key_documents is not None
            seen = seen & (self.documents[:, queries_R, None] == self.key_documents[:, None, first:end])
        return seen[:, None]

    def reach(self, first: int, end: int) -> tuple[int, int]:
        """First and end of the keys among which are all that the queries first .. end - 1 see, in whatever document."""
        lowest, highest = 0, self.num_keys
        if self.window is not None:
            lowest = max(0, first + self.first_index - self.window + 1)
            highest = min(highest, end + self.first_index + self.window - 1)
        if self.causal:
            highest = min(highest, end + self.first_index)
        return min(lowest, highest), highest
