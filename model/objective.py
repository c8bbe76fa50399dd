"""Objectives: what is minimised. An objective is an object with one method."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.fused.cross_entropy import linear_cross_entropy
from model.batch import Batch

IGNORED = -100
"""The target of a prediction that does not count."""

CrossEntropy = Callable[[Tensor, Tensor], Tensor]
"""Logits `[T, V]` and targets `[T]` (`IGNORED` where nothing counts) -> nats `[T]`, 0 where nothing counts, fp32 or
wider."""


def cross_entropy(logits_TV: Tensor, targets_T: Tensor) -> Tensor:
    """The plain form; `parallel/` has one for logits of which each rank holds a part of the vocabulary."""
    wide_TV = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))
    return F.cross_entropy(wide_TV, targets_T, ignore_index=IGNORED, reduction="none")


class Objective(Protocol):
    """A loss for each token that counts; the caller adds up, and divides by their number in the global batch.

    Attributes:
        takes_head: whether it makes the losses of the stream and the head's weight, so that there are no logits.
    """

    takes_head: bool

    def nats(self, logits_BNV: Tensor, targets_BN: Tensor, counted_BN: Tensor) -> Tensor:
        """`[B, N]`, fp32 or wider: nats of each prediction, 0 where it does not count."""
        ...

    def head_nats(
        self, x_BND: Tensor, weight_VD: Tensor, targets_BN: Tensor, counted_BN: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The sum of all nats, and those of each prediction `[B, N]`, through which nothing is differentiated."""
        ...


class NextToken:
    """Cross-entropy of the next token.

    Args:
        cross_entropy: for the logits of a model. takes_head: where the head's weight is whole, it may go without.
    """

    def __init__(self, cross_entropy: CrossEntropy = cross_entropy, *, takes_head: bool = False):
        self.cross_entropy, self.takes_head = cross_entropy, takes_head

    def nats(self, logits_BNV: Tensor, targets_BN: Tensor, counted_BN: Tensor) -> Tensor:
        targets_BN = torch.where(counted_BN, targets_BN, IGNORED)
        return self.cross_entropy(logits_BNV.flatten(0, 1), targets_BN.flatten()).view(targets_BN.shape)

    def head_nats(
        self, x_BND: Tensor, weight_VD: Tensor, targets_BN: Tensor, counted_BN: Tensor
    ) -> tuple[Tensor, Tensor]:
        targets_BN = torch.where(counted_BN, targets_BN, IGNORED)
        total, nats_T = linear_cross_entropy(x_BND.flatten(0, 1), weight_VD, targets_BN.flatten(), ignored=IGNORED)
        return total, nats_T.view(targets_BN.shape)


OBJECTIVES: dict[str, Callable[..., Objective]] = {"next_token": NextToken}


def token_nats(model: nn.Module, objective: Objective, batch: Batch) -> Tensor:
    """Nats `[B, N]` of each prediction of a batch, 0 where it does not count."""
    logits = model(batch.tokens, documents=batch.documents, positions=batch.positions, modalities=batch.modalities)
    return objective.nats(logits, batch.targets, batch.counted)


def batch_nats(model: nn.Module, objective: Objective, batch: Batch) -> tuple[Tensor, Tensor]:
    """The sum of a batch's nats, to be differentiated, and `token_nats`, which then may not be."""
    if not objective.takes_head:
        nats_BN = token_nats(model, objective, batch)
        return nats_BN.sum(), nats_BN
    return model(
        batch.tokens,
        documents=batch.documents,
        positions=batch.positions,
        modalities=batch.modalities,
        head_loss=lambda x_BND, weight: objective.head_nats(x_BND, weight, batch.targets, batch.counted),
    )


def sums(values_BN: Tensor, modalities_BN: Tensor | None, count: int) -> Tensor:
    """fp64 `[1 + count]`: the sum over all tokens, and that of each of so many modalities."""
    values_BN = values_BN.detach().double()
    parts = [values_BN.sum()]
    if modalities_BN is not None:
        parts += [(values_BN * (modalities_BN == modality)).sum() for modality in range(count)]
    return torch.stack(parts)
