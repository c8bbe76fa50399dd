"""What decoding remembers: growing keys and values, fixed states, and how far each sequence has come."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class GrowingTensor:
    """A tensor that grows along dimension 1; room is doubled, so appending costs amortised constant time."""

    def __init__(self) -> None:
        self._room: Tensor | None = None
        self._length = 0

    def append(self, part: Tensor) -> Tensor:
        """Append `[B, n, ...]` and return all `[B, M, ...]` so far."""
        needed = self._length + part.shape[1]
        if self._room is None or needed > self._room.shape[1]:
            grown = part.new_empty(part.shape[0], max(needed, 2 * self._length, 64), *part.shape[2:])
            if self._room is not None:
                grown[:, : self._length] = self._room[:, : self._length]
            self._room = grown
        self._room[:, self._length : needed] = part
        self._length = needed
        return self._room[:, :needed]

    def index_select(self, dim: int, index: Tensor) -> GrowingTensor:
        """The same for the sequences `index` (dim 0) of the batch."""
        assert dim == 0
        chosen = GrowingTensor()
        chosen._length = self._length
        chosen._room = None if self._room is None else self._room.index_select(0, index)
        return chosen


class Cache:
    """Decoding state of a batch of sequences; it belongs to the caller, so generations can be interleaved.

    Attributes:
        layers: layer index -> what that layer's mixer keeps (it alone knows the keys).
        lengths: `[B]`, tokens of the current document consumed so far: the next token's position.
        documents: `[B, M]`, document ids of every token consumed.
    """

    def __init__(self) -> None:
        self.layers: dict[int, dict[str, Any]] = {}
        self.lengths: Tensor | None = None
        self.isolated = False  # whether the caller ever told documents apart
        self._documents = GrowingTensor()
        self.documents: Tensor | None = None

    def layer(self, index: int) -> dict[str, Any]:
        """What the mixer of layer `index` keeps; empty at first."""
        return self.layers.setdefault(index, {})

    @property
    def num_tokens(self) -> int:
        """Tokens consumed, padding included."""
        return 0 if self.documents is None else self.documents.shape[1]

    def last_documents(self, batch_size: int, device: torch.device) -> Tensor:
        """Document id `[B]` that a token following the cached ones belongs to unless it says otherwise."""
        if self.documents is None:
            return torch.zeros(batch_size, dtype=torch.int64, device=device)
        return self.documents[:, -1]

    def advance(self, positions: Tensor, documents: Tensor) -> None:
        """Take note that tokens `[B, n]` at these positions, of these documents, were consumed."""
        self.documents = self._documents.append(documents)
        self.lengths = positions[:, -1] + 1

    def reorder(self, index: Tensor) -> None:
        """Sequence `index[i]` (int64, any number of them) of the batch goes on as number i: for beam search."""
        self.layers = {
            layer: {key: kept.index_select(0, index) for key, kept in remembered.items()}
            for layer, remembered in self.layers.items()
        }
        self._documents = self._documents.index_select(0, index)
        self.documents = None if self.documents is None else self.documents.index_select(0, index)
        self.lengths = None if self.lengths is None else self.lengths.index_select(0, index)
