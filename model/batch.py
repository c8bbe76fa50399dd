"""What a step is fed with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass
class Batch:
    """Rows of tokens, each with what is to be predicted from it. All int64 [B, N] but `counted`.

    `counted` bool [B, N]: whether the prediction of targets[b, i] from token i enters the loss.
    `documents`: which document a token belongs to, non-decreasing from 0 in every row; None when documents are not
    isolated. `positions`: from 0 at every document, or, when they are not isolated, at every row. `modalities` and
    `target_modalities`: of which modality the tokens and the targets are; None where a model does not tell them apart.

    Where the sequence is cut, `documents` alone stays that of whole rows.
    """

    tokens: Tensor
    targets: Tensor
    counted: Tensor
    documents: Tensor | None
    positions: Tensor
    modalities: Tensor | None = None
    target_modalities: Tensor | None = None

    def rows(self, rows: slice) -> Batch:
        """Some of the rows."""
        return Batch(*(None if tensor is None else tensor[rows] for tensor in self._tensors()))

    def cut_by(self, piece: Callable[[Tensor], Tensor]) -> Batch:
        """The same with a piece of each row's tokens, as `piece` cuts it from whole rows."""
        whole = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "documents"}
        return replace(self, **{name: piece(tensor) for name, tensor in whole.items() if tensor is not None})

    def to(self, device: torch.device) -> Batch:
        """The same on a device; the copy may still be under way."""
        moved = (None if tensor is None else tensor.to(device, non_blocking=True) for tensor in self._tensors())
        return Batch(*moved)

    def micro_batches(self, count: int) -> Iterator[Batch]:
        """`count` equal parts along B."""
        size = self.tokens.shape[0] // count
        for first in range(0, count * size, size):
            yield self.rows(slice(first, first + size))

    def _tensors(self) -> list:
        return [getattr(self, field.name) for field in fields(self)]
