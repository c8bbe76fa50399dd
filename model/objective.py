"""Objectives: what is minimised. An objective is an object with one method."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.batch import Batch

IGNORED = -100
"""The target of a prediction that does not count."""

CrossEntropy = Callable[[Tensor, Tensor], Tensor]
"""Logits `[T, V]` and targets `[T]` (`IGNORED` where nothing counts) -> nats, summed: a scalar, fp32 or wider."""


def cross_entropy(logits_TV: Tensor, targets_T: Tensor) -> Tensor:
    """The plain form; `parallel/` has one for logits of which each rank holds a part of the vocabulary."""
    wide_TV = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))
    return F.cross_entropy(wide_TV, targets_T, ignore_index=IGNORED, reduction="sum")


class Objective(Protocol):
    """Sums a loss over the tokens that count; the caller divides by their number in the global batch."""

    def loss_sum(self, logits_BNV: Tensor, targets_BN: Tensor, counted_BN: Tensor) -> Tensor:
        """Scalar, fp32 or wider: nats summed over the counted tokens."""
        ...


class NextToken:
    """Cross-entropy of the next token."""

    def __init__(self, cross_entropy: CrossEntropy = cross_entropy):
        self.cross_entropy = cross_entropy

    def loss_sum(self, logits_BNV: Tensor, targets_BN: Tensor, counted_BN: Tensor) -> Tensor:
        targets_BN = torch.where(counted_BN, targets_BN, IGNORED)
        return self.cross_entropy(logits_BNV.flatten(0, 1), targets_BN.flatten())


OBJECTIVES: dict[str, Callable[[CrossEntropy], Objective]] = {"next_token": NextToken}


def loss_sum(model: nn.Module, objective: Objective, batch: Batch) -> Tensor:
    """Nats summed over the counted tokens of a batch."""
    logits = model(batch.tokens, documents=batch.documents, positions=batch.positions)
    return objective.loss_sum(logits, batch.targets, batch.counted)
