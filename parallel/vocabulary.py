"""The embedding and the loss where each rank holds a part of the vocabulary. Logits are never gathered.

The parts follow the true vocabulary, the last may be shorter: no rows are added to make it divide, so none can get into
the softmax, a checkpoint or an export.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.objective import IGNORED
from parallel.collectives import max_over, sum_over
from parallel.region import Region


class VocabularyEmbedding(nn.Embedding):
    """An embedding of which this rank holds the rows `share`; tokens outside of it are zero before ranks are summed."""

    region: Region
    share: range

    def forward(self, tokens_BN: Tensor) -> Tensor:
        local_BN, inside_BN = _local(tokens_BN, self.share)
        rows_BND = F.embedding(local_BN, self.weight) * inside_BN[..., None]
        return self.region.leave(rows_BND)


class VocabularyCrossEntropy:
    """Cross-entropy over logits `[T, V / tp]`, in fp32 or wider: two collectives of one and of two numbers a token."""

    def __init__(self, region: Region, vocab_size: int):
        self.region, self.share = region, region.share(vocab_size)

    def __call__(self, logits_TV: Tensor, targets_T: Tensor) -> Tensor:
        wide_TV = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))
        return _Nats.apply(wide_TV, targets_T, self.region.group, self.share)


class _Nats(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_TV: Tensor, targets_T: Tensor, group: str, share: range) -> Tensor:
        local_T, inside_T = _local(targets_T, share)
        counted_T = targets_T != IGNORED
        top_T1 = max_over(logits_TV.amax(-1, keepdim=True), group)
        odds_TV = (logits_TV - top_T1).exp_()
        own_T = (logits_TV.gather(1, local_T[:, None]) - top_T1)[:, 0] * inside_T
        sum_T, target_T = sum_over(torch.stack((odds_TV.sum(-1), own_T)), group)
        ctx.save_for_backward(odds_TV.div_(sum_T[:, None]), local_T, inside_T, counted_T)
        return torch.where(counted_T, sum_T.log() - target_T, 0)

    @staticmethod
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor, None, None, None]:
        probabilities_TV, local_T, inside_T, counted_T = ctx.saved_tensors
        grad_TV = probabilities_TV.scatter_add(1, local_T[:, None], -inside_T[:, None].to(probabilities_TV.dtype))
        return grad_TV.mul_((grad_T * counted_T)[:, None]), None, None, None


def _local(ids: Tensor, share: range) -> tuple[Tensor, Tensor]:
    """Ids counted from the beginning of this rank's share (0 for those outside), and which are inside."""
    inside = (ids >= share.start) & (ids < share.stop)
    return torch.where(inside, ids - share.start, 0), inside
