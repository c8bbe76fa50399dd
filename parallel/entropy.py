"""The penalty on attention entropies in a model that is spread: what each process sees of it, and their sum.

Heads are spread by tensor parallelism, layers by a pipeline, sequences by data parallelism, and queries of a sequence
where it is cut. The gradient with respect to queries and keys enters backward where the entropies arise, in whatever
stage and micro-batch. Values, and gradients of the thresholds, are added up beside that, and summed over all
processes once a step.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.attention import AttentionMap
from model.entropy import EntropyPenalty, Penalties, keys_seen, query_entropies
from model.observer import EnterBackward
from model.stack import Model
from parallel.auxiliary import OneForward, StepFacts
from parallel.collectives import sum_over
from parallel.mesh import Mesh
from parallel.region import Region


def threshold_name(layer: int) -> str:
    """The name of a layer's thresholds, `[H]`, among what is trained beside the model."""
    return f"layers.{layer}.mixer.entropy_threshold"


class SpreadEntropyPenalty:
    """An `EntropyPenalty` over all processes.

    Attributes:
        name: of its value among the metrics.
        thresholds: by global layer, those that have attention weights: theta of all its heads, whole on every process.
    """

    name = "entropy_loss"

    def __init__(
        self,
        penalty: EntropyPenalty,
        uncut: Model,
        mesh: Mesh,
        region: Region | None,
        device: torch.device,
        dtype: torch.dtype,
    ):
        self.penalty, self.mesh, self.region = penalty, mesh, region
        self.thresholds: dict[int, nn.Parameter] = {}
        for block in uncut.layers.values():
            if block.mixer.has_attention_map:
                heads = len(block.mixer.head_numbers)
                initial = torch.full((heads,), penalty.threshold, dtype=dtype, device=device)
                self.thresholds[block.layer] = nn.Parameter(initial)
        assert self.thresholds, "no layer has attention weights"
        # Of the penalties (weighted), and of their derivatives by each threshold, in this order.
        self._sum = torch.zeros((), dtype=torch.float64, device=device)
        self._by_threshold: dict[int, Tensor] = {}
        self._facts = StepFacts(1, 1)

    def begin(self, facts: StepFacts) -> None:
        self._facts = facts
        self._sum = torch.zeros_like(self._sum)
        self._by_threshold = {
            layer: torch.zeros_like(theta, dtype=torch.float64, requires_grad=False)
            for layer, theta in self.thresholds.items()
        }

    def one_forward(self) -> OneForward:
        return _OneForward(self)

    def finish(self) -> float:
        """Give the thresholds their gradients; return the weighted mean of the penalties. Collective."""
        found = torch.cat((self._sum[None], *self._by_threshold.values()))
        dist.all_reduce(found)
        total, *gradients = found.split([1, *(theta.numel() for theta in self.thresholds.values())])
        for theta, gradient in zip(self.thresholds.values(), gradients, strict=True):
            theta.grad = gradient.to(theta.dtype, copy=True) if theta.requires_grad else None
        return total.item()

    def heads_here(self, layer: int) -> slice:
        """Which of a layer's heads this process has."""
        if self.region is None:
            return slice(None)
        share = self.region.share(self.thresholds[layer].numel())
        return slice(share.start, share.stop)

    def sum_pieces(self, x: Tensor) -> Tensor:
        """Sum over the processes that have the other pieces of the same rows."""
        return x if self.mesh.layout.cp == 1 else sum_over(x, self.mesh.group("cp").group_name)

    def share_of_mean(self, layer: int) -> float:
        """What one head's penalty weighs: lambda over heads, layers, and sequences of the global batch."""
        share = self.penalty.weight / (self.thresholds[layer].numel() * len(self.thresholds))
        return share / self._facts.sequences if self.penalty.reduction == "mean" else share

    def derivative(self, layer: int, penalties: Penalties) -> Tensor:
        """By the entropies, as it is to enter backward."""
        return penalties.by_entropy_BHN * (self.share_of_mean(layer) * self._facts.gradient_divisor)

    def count(self, layer: int, penalties: Penalties) -> None:
        """Add these penalties to those of the step."""
        if self.penalty.reduction == "mean" and self.mesh.rank("cp") > 0:
            return  # Every piece of a row knows the penalty of the whole row.
        share = self.share_of_mean(layer)
        self._sum += penalties.sum_H.double().sum() * share
        self._by_threshold[layer][self.heads_here(layer)] += penalties.by_threshold_H.double() * share


class _OneForward(OneForward):
    """In recomputation it finds the derivatives of the first time."""

    def __init__(self, spread: SpreadEntropyPenalty):
        self.spread = spread
        self.derivatives: dict[int, Tensor] = {}

    def attention(self, layer: int, weights: AttentionMap) -> Tensor:
        penalty = self.spread.penalty
        entropies_BHN = query_entropies(weights, penalty.queries_at_once)
        if not self.closed:
            theta_H = self.spread.thresholds[layer].detach()[self.spread.heads_here(layer)]
            length = weights.q_BNHd.shape[1] * self.spread.mesh.layout.cp
            seen_B1N = keys_seen(weights, penalty.queries_at_once)
            penalties = penalty.penalties(entropies_BHN.detach(), seen_B1N, theta_H, length, self.spread.sum_pieces)
            self.derivatives[layer] = self.spread.derivative(layer, penalties)
            self.spread.count(layer, penalties)
        return EnterBackward.apply(weights.q_BNHd, entropies_BHN, self.derivatives[layer])
