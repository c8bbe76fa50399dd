"""Which keys each query of causal, windowed, packed attention sees, for a few queries at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

VISIBLE_SCHEMA = "Tensor? documents, Tensor? key_documents, SymInt first_index, bool causal, SymInt? window"
_WIDEST_HEAD = 256


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

    @classmethod
    def from_arguments(cls, q_BNHd: Tensor, k_BMGd: Tensor, *arguments: Any) -> Visible:
        """The inverse of `arguments`, of these queries and keys."""
        documents, key_documents, first_index, causal, window = arguments
        return cls(q_BNHd.shape[1], k_BMGd.shape[1], first_index, causal, window, documents, key_documents)

    @property
    def arguments(self) -> tuple[Any, ...]:
        """What an operator is told beside queries and keys, as `VISIBLE_SCHEMA` declares it."""
        return self.documents, self.key_documents, self.first_index, self.causal, self.window

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


def attention_faults(q: Tensor, k: Tensor, v: Tensor, visible: Visible) -> list[str]:
    """Why queries `[B, N, H, d]`, keys `[B, M, G, d]` and values `[B, M, G, e]` do not fit together, in sentences.

    Looks at shapes and dtypes only, never at values.
    """
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        return [
            f"q must be [B, N, H, d], k [B, M, G, d] and v [B, M, G, e]; received {list(q.shape)}, {list(k.shape)} and "
            f"{list(v.shape)}."
        ]
    faults = []
    if k.shape[:3] != v.shape[:3] or k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        faults.append(f"k {list(k.shape)} and v {list(v.shape)} do not fit q {list(q.shape)}: B, M, G or d differ.")
    if q.shape[2] % k.shape[2]:
        faults.append(f"{k.shape[2]} heads of keys cannot be shared equally by {q.shape[2]} heads of queries.")
    if not (q.dtype == k.dtype == v.dtype and q.is_floating_point()):
        faults.append(f"q, k and v must share one floating-point dtype, received {q.dtype}, {k.dtype}, {v.dtype}.")
    if (visible.num_queries, visible.num_keys) != (q.shape[1], k.shape[1]):
        faults.append(
            f"visible speaks of {visible.num_queries} queries and {visible.num_keys} keys, q and k have {q.shape[1]} "
            f"and {k.shape[1]}."
        )
    return faults


def triton_faults(q: Tensor, v: Tensor, scale: float) -> str:
    """Why the Triton form takes no queries `[B, N, H, d]` and values `[B, M, G, e]` like these; "" if it does."""
    if max(q.shape[3], v.shape[3]) > _WIDEST_HEAD:
        return f"heads are wider than {_WIDEST_HEAD}"
    if q.numel() == 0 or v.numel() == 0:
        return "there is nothing to compute"
    # The largest score is looked for before scores are scaled.
    return "" if scale > 0 else "the scale is not above 0"
