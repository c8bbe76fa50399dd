"""Losses of routers in a model that is spread (the equations are in `model/routing.py`), and what balances without one.

Sequences are spread by data parallelism, their tokens where they are cut, layers by a pipeline. Tensor-parallel ranks
all route all tokens, so the gradient that each of them enters is a part of it. Over the global batch, how often each
unit is chosen has to be known before the first backward: it is counted in a forward pass of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from model.observer import EnterBackward
from model.routing import Balance, Part, Routing
from model.stack import Model
from parallel.auxiliary import OneForward, StepFacts
from parallel.collectives import sum_over
from parallel.mesh import Mesh


class RouterLoss:
    """A loss on what routers say, of some layers of a model.

    Attributes:
        name: of its value among the metrics.
        part: whose routers they are.
        layers: by global layer, whichever process has it, what the loss is to be there.
    """

    name: str
    part: Part
    layers: Mapping[int, Any]

    def __init__(self, mesh: Mesh, device: torch.device):
        self.mesh, self.device = mesh, device
        self._facts = StepFacts(1, 1)
        self._sum = torch.zeros((), dtype=torch.float64, device=device)

    def begin(self, facts: StepFacts) -> None:
        self._facts = facts
        self._sum = torch.zeros_like(self._sum)

    def one_forward(self) -> OneForward:
        return _OneForward(self)

    def finish(self) -> float:
        dist.all_reduce(self._sum)
        return self._sum.item()

    def quantity(self, routing: Routing) -> Tensor:
        """What the loss is linear in, `[B, N, ...]`, once the derivative is known."""
        raise NotImplementedError

    def derivative(self, layer: int, routing: Routing) -> Tensor:
        """Of the whole loss, by that of a token; float64, as large as it or to be expanded."""
        raise NotImplementedError

    def entering(self, derivative: Tensor) -> Tensor:
        """The part of a derivative that this process enters into backward."""
        return derivative * (self._facts.gradient_divisor / self.mesh.layout.tp)

    def count(self, quantity: Tensor, derivative: Tensor) -> None:
        """Add the loss of these tokens to that of the step."""
        if self.mesh.rank("tp") == 0:
            self._sum += (quantity.detach().double() * derivative).sum()

    def num_tokens(self, routing: Routing) -> tuple[int, int]:
        """Of a whole sequence, and of the global batch."""
        n = routing.chosen_BNU.shape[1] * self.mesh.layout.cp
        return n, n * self._facts.sequences


class SpreadZLoss(RouterLoss):
    """The mean of logsumexp(scores)^2 of all layers whose routers' scores are to stay small."""

    name, part = "router_z_loss", "feedforward"

    def __init__(self, layers: dict[int, float], mesh: Mesh, device: torch.device):
        super().__init__(mesh, device)
        self.layers = layers

    def quantity(self, routing: Routing) -> Tensor:
        return routing.scores_BNU.logsumexp(-1).square()

    def derivative(self, layer: int, routing: Routing) -> Tensor:
        weight = self.layers[layer] / self.num_tokens(routing)[1]
        return torch.full((1, 1), weight, dtype=torch.float64, device=self.device)


class SpreadBalance(RouterLoss):
    """The balance of all layers of a model whose routers are trained to choose evenly."""

    def __init__(self, part: Part, layers: dict[int, Balance], mesh: Mesh, device: torch.device):
        super().__init__(mesh, device)
        self.part, self.layers = part, layers
        self.name = {"mixer": "head_balance_loss", "feedforward": "expert_balance_loss"}[part]
        # Of layers that are balanced over the global batch: the share of its tokens that choose each unit.
        self._shares: dict[int, Tensor] = {}

    @property
    def counts_first(self) -> bool:
        """Whether a forward pass has to count, before each training step."""
        return any(balance.over == "global_batch" for balance in self.layers.values())

    def quantity(self, routing: Routing) -> Tensor:
        return routing.probabilities()

    def take_counts(self, counter: ChoiceCounter) -> None:
        """What a counting pass over the global batch has found. Collective."""
        layers = {layer: balance for layer, balance in self.layers.items() if balance.over == "global_batch"}
        units = {layer: balance.num_units for layer, balance in layers.items()}
        for layer, found in counter.whole(self.part, units).items():
            self._shares[layer] = found[:-1].double() / found[-1]

    def derivative(self, layer: int, routing: Routing) -> Tensor:
        balance, (n, whole) = self.layers[layer], self.num_tokens(routing)
        if balance.over == "global_batch":
            share_B1U = self._shares[layer][None, None]
        else:
            counts_B1U = routing.chosen_BNU.sum(1, keepdim=True).double()
            if self.mesh.layout.cp > 1:
                counts_B1U = sum_over(counts_B1U, self.mesh.group("cp").group_name)
            share_B1U = counts_B1U / n
        factor = balance.factor / (len(self.layers) if balance.shared_out else 1)
        return share_B1U * (factor / whole)


class _OneForward(OneForward):
    """In recomputation it finds the derivatives of the first time."""

    def __init__(self, loss: RouterLoss):
        self.loss = loss
        self.derivatives: dict[int, Tensor] = {}

    def routing(self, layer: int, found: Routing) -> Tensor:
        if found.part != self.loss.part or layer not in self.loss.layers:
            return found.scores_BNU
        quantity = self.loss.quantity(found)
        if not self.closed:
            derivative = self.loss.derivative(layer, found)
            self.loss.count(quantity, derivative)
            self.derivatives[layer] = self.loss.entering(derivative).to(quantity.dtype)
        return EnterBackward.apply(found.scores_BNU, quantity, self.derivatives[layer])


def router_losses(uncut: Model, mesh: Mesh, device: torch.device) -> list[RouterLoss]:
    """Those of a whole model."""
    losses: list[RouterLoss] = []
    parts: tuple[Part, ...] = get_args(Part)
    for part in parts:
        found = {block.layer: getattr(block, part).balance for block in uncut.layers.values()}
        layers = {layer: balance for layer, balance in found.items() if balance is not None and balance.factor > 0}
        if layers:
            losses.append(SpreadBalance(part, layers, mesh, device))
    weights = {block.layer: block.feedforward.z_loss_weight for block in uncut.layers.values()}
    if kept := {layer: weight for layer, weight in weights.items() if weight > 0}:
        losses.append(SpreadZLoss(kept, mesh, device))
    return losses


class ChoiceCounter(OneForward):
    """Counts how often each unit is chosen, on one of the processes that have the same tokens.

    Attributes:
        counts: (part, layer) -> int64 `[U + 1]`; the last one is that of the tokens.
    """

    def __init__(self, mesh: Mesh, counts: dict[tuple[Part, int], Tensor] | None = None):
        self.mesh = mesh
        self.counts = {} if counts is None else counts

    def routing(self, layer: int, found: Routing) -> Tensor:
        if self.mesh.rank("tp") == 0 and not self.closed:
            chosen_TU, key = found.chosen_BNU.flatten(0, 1), (found.part, layer)
            counts = torch.cat((chosen_TU.sum(0), chosen_TU.new_tensor([len(chosen_TU)], dtype=torch.int64)))
            self.counts[key] = self.counts.get(key, 0) + counts
        return found.scores_BNU

    def whole(self, part: Part, units: dict[int, int]) -> dict[int, Tensor]:
        """The counts of all processes, of layers with so many units. Collective."""
        nothing = {layer: torch.zeros(n + 1, dtype=torch.int64) for layer, n in units.items()}
        found = torch.cat([self.counts.get((part, layer), counts).cpu() for layer, counts in nothing.items()])
        dist.all_reduce(found)
        return dict(zip(units, found.split([n + 1 for n in units.values()]), strict=True))


class SelectionBias:
    """Balances experts without a loss: what is added to their scores moves against their loads, after each update.

    With c_i the number of tokens of the global batch that chose expert i, b_i += rate sign(mean_j c_j - c_i)
    (arXiv 2408.15664). A step that is skipped moves nothing.

    Attributes:
        layers: global layer -> (name of the parameter, rate, number of experts).
    """

    def __init__(self, uncut: Model, mesh: Mesh):
        self.mesh = mesh
        self.layers: dict[int, tuple[str, float, int]] = {}
        for block in uncut.layers.values():
            settings = block.feedforward.config
            if (rate := getattr(settings, "bias_rate", 0.0)) > 0:
                name = f"layers.{block.layer}.feedforward.router.selection_bias"
                self.layers[block.layer] = (name, rate, settings.num_experts)
        self._counts: dict[tuple[Part, int], Tensor] = {}
        self.moves: dict[str, Tensor] = {}

    def begin(self, facts: StepFacts) -> None:
        self._counts, self.moves = {}, {}

    def one_forward(self) -> OneForward:
        return ChoiceCounter(self.mesh, self._counts)

    def finish(self) -> None:
        """All micro-batches have been through: how each number is to move. Collective."""
        counted = ChoiceCounter(self.mesh, self._counts)
        units = {layer: experts for layer, (_, _, experts) in self.layers.items()}
        for layer, found in counted.whole("feedforward", units).items():
            name, rate, _ = self.layers[layer]
            counts_E = found[:-1].double()
            self.moves[name] = rate * torch.sign(counts_E.mean() - counts_E)
