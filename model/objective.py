"""Objectives: what is minimised. An objective is an object with one method."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Objective(Protocol):
    """Sums a loss over the tokens that count; the caller divides by their number in the global batch."""

    def loss_sum(self, logits_BNV: Tensor, targets_BN: Tensor, counted_BN: Tensor) -> Tensor:
        """Scalar, fp32 or wider: nats summed over the counted tokens."""
        ...


class NextToken:
    """Cross-entropy of the next token."""

    def loss_sum(self, logits_BNV: Tensor, targets_BN: Tensor, counted_BN: Tensor) -> Tensor:
        wide = logits_BNV.to(torch.promote_types(logits_BNV.dtype, torch.float32))
        targets = torch.where(counted_BN, targets_BN, -100)
        return F.cross_entropy(wide.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")


OBJECTIVES: dict[str, type[Objective]] = {"next_token": NextToken}
