"""The balance of routers in a model that is spread (the equations are in `model/routing.py`).

Sequences are spread by data parallelism, their tokens where they are cut, layers by a pipeline. Tensor-parallel ranks
all route all tokens, so the gradient that each of them enters is a part of it. Over the global batch, how often each
unit is chosen has to be known before the first backward: it is counted in a forward pass of its own.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from model.observer import EnterBackward, Observer
from model.routing import Balance, Routing
from model.stack import Model
from parallel.auxiliary import OneForward, StepFacts
from parallel.collectives import sum_over
from parallel.mesh import Mesh


class SpreadBalance:
    """The balance of all layers of a model whose routers are trained to choose evenly.

    Attributes:
        name: of its value among the metrics.
        layers: by global layer, whichever process has it.
    """

    name = "head_balance_loss"

    def __init__(self, layers: dict[int, Balance], mesh: Mesh, device: torch.device):
        self.layers, self.mesh, self.device = layers, mesh, device
        self._facts = StepFacts(1, 1)
        self._sum = torch.zeros((), dtype=torch.float64, device=device)
        # Of layers that are balanced over the global batch: the share of its tokens that choose each unit.
        self._shares: dict[int, Tensor] = {}

    @classmethod
    def of(cls, uncut: Model, mesh: Mesh, device: torch.device) -> SpreadBalance | None:
        """That of a whole model; None where nothing is to be balanced."""
        found = {block.layer: block.mixer.balance for block in uncut.layers.values()}
        layers = {layer: balance for layer, balance in found.items() if balance is not None and balance.weight > 0}
        return cls(layers, mesh, device) if layers else None

    @property
    def counts_first(self) -> bool:
        """Whether a forward pass has to count, before each training step."""
        return any(balance.over == "global_batch" for balance in self.layers.values())

    def begin(self, facts: StepFacts) -> None:
        self._facts = facts
        self._sum = torch.zeros_like(self._sum)

    def one_forward(self) -> OneForward:
        return _OneForward(self)

    def finish(self) -> float:
        dist.all_reduce(self._sum)
        return self._sum.item()

    def take_counts(self, counter: ChoiceCounter) -> None:
        """What a counting pass over the global batch has found. Collective."""
        layers = [layer for layer, balance in self.layers.items() if balance.over == "global_batch"]
        units = [self.layers[layer].num_units for layer in layers]
        # The last of each layer's counts is that of its tokens.
        counts = torch.cat(
            [
                counter.counts.get(layer, torch.zeros(n + 1, dtype=torch.int64, device=self.device))
                for layer, n in zip(layers, units, strict=True)
            ]
        )
        dist.all_reduce(counts)
        for layer, found in zip(layers, counts.split([n + 1 for n in units]), strict=True):
            self._shares[layer] = found[:-1].double() / found[-1]

    def derivative(self, layer: int, routing: Routing) -> Tensor:
        """Of the whole loss, by a token's probabilities: `[B or 1, 1, U]`, float64."""
        balance, n = self.layers[layer], routing.chosen_BNU.shape[1] * self.mesh.layout.cp
        if balance.over == "global_batch":
            share_B1U = self._shares[layer][None, None]
        else:
            counts_B1U = routing.chosen_BNU.sum(1, keepdim=True).double()
            if self.mesh.layout.cp > 1:
                counts_B1U = sum_over(counts_B1U, self.mesh.group("cp").group_name)
            share_B1U = counts_B1U / n
        weight = balance.weight * balance.num_units / len(self.layers)
        return share_B1U * (weight / (n * self._facts.sequences))

    def entering(self, derivative: Tensor) -> Tensor:
        """The part of a derivative that this process enters into backward."""
        return derivative * (self._facts.gradient_divisor / self.mesh.layout.tp)

    def count(self, probabilities_BNU: Tensor, derivative: Tensor) -> None:
        """Add the loss of these tokens, which is linear in their probabilities, to that of the step."""
        if self.mesh.rank("tp") == 0:
            self._sum += (probabilities_BNU.detach().double() * derivative).sum()


class _OneForward(OneForward):
    """In recomputation it finds the derivatives of the first time."""

    def __init__(self, spread: SpreadBalance):
        self.spread = spread
        self.derivatives: dict[int, Tensor] = {}

    def routing(self, layer: int, found: Routing) -> Tensor:
        if layer not in self.spread.layers:
            return found.scores_BNU
        probabilities_BNU = found.scores_BNU.softmax(-1)
        if not self.closed:
            derivative = self.spread.derivative(layer, found)
            self.spread.count(probabilities_BNU, derivative)
            self.derivatives[layer] = self.spread.entering(derivative).to(probabilities_BNU.dtype)
        return EnterBackward.apply(found.scores_BNU, probabilities_BNU, self.derivatives[layer])


class ChoiceCounter(Observer):
    """Counts how often each unit is chosen, on one of the processes that have the same tokens.

    Attributes:
        counts: layer -> int64 `[U + 1]`; the last one is that of the tokens.
    """

    def __init__(self, mesh: Mesh):
        self.mesh = mesh
        self.counts: dict[int, Tensor] = {}

    def routing(self, layer: int, found: Routing) -> Tensor:
        if self.mesh.rank("tp") == 0:
            chosen_TU = found.chosen_BNU.flatten(0, 1)
            counts = torch.cat((chosen_TU.sum(0), chosen_TU.new_tensor([len(chosen_TU)], dtype=torch.int64)))
            self.counts[layer] = self.counts.get(layer, 0) + counts
        return found.scores_BNU
