"""Losses of routers in a model that is spread (the equations are in `model/routing.py`), and what balances without one.

Sequences are spread by data parallelism, their tokens where they are cut, layers by a pipeline. Tensor-parallel ranks
all route all tokens, so the gradient that each of them enters is a part of it. Over the global batch, how often each
unit is chosen has to be known before the first backward: it is counted in a forward pass of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from model.layer import FeedForward
from model.observer import EnterBackward
from model.routing import Balance, Part, Routing
from model.stack import Model
from parallel.auxiliary import OneForward, StepFacts
from parallel.collectives import sum_over
from parallel.mesh import Mesh

Place = tuple[int, int]
"""Where a router is: its global layer, and its modality where each has one."""


class RouterLoss:
    """A loss on what routers say, of some layers of a model.

    Attributes:
        name: of its value among the metrics.
        part: whose routers they are.
        layers: by router, whichever process has it, what the loss is to be there.
    """

    name: str
    part: Part
    layers: Mapping[Place, Any]

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

    def derivative(self, place: Place, routing: Routing) -> Tensor:
        """Of the whole loss, by that of a token; float64, as large as it or to be expanded."""
        raise NotImplementedError

    def entering(self, derivative: Tensor) -> Tensor:
        """The part of a derivative that this process enters into backward."""
        return derivative * (self._facts.gradient_divisor / self.mesh.layout.tp)

    def count(self, quantity: Tensor, derivative: Tensor) -> None:
        """Add the loss of these tokens to that of the step."""
        if self.mesh.rank("tp") == 0:
            self._sum += (quantity.detach().double() * derivative).sum()

    @staticmethod
    def routed(quantity: Tensor, routing: Routing) -> Tensor:
        """What is `[B, N, ...]` of the tokens that the router has before it; of others, 0."""
        if routing.routed_BN is None:
            return quantity
        return quantity * routing.routed_BN.view(*routing.routed_BN.shape, *[1] * (quantity.dim() - 2))

    def num_tokens(self, routing: Routing) -> tuple[int, int]:
        """Of a whole sequence, and of the global batch."""
        n = routing.chosen_BNU.shape[1] * self.mesh.layout.cp
        return n, n * self._facts.sequences


class SpreadZLoss(RouterLoss):
    """The mean of logsumexp(scores)^2 of all layers whose routers' scores are to stay small."""

    name, part = "router_z_loss", "feedforward"

    def __init__(self, layers: dict[Place, float], mesh: Mesh, device: torch.device):
        super().__init__(mesh, device)
        self.layers = layers

    def quantity(self, routing: Routing) -> Tensor:
        return self.routed(routing.scores_BNU.logsumexp(-1).square(), routing)

    def derivative(self, place: Place, routing: Routing) -> Tensor:
        weight = self.layers[place] / self.num_tokens(routing)[1]
        return torch.full((1, 1), weight, dtype=torch.float64, device=self.device)


class SpreadBalance(RouterLoss):
    """The balance of all layers of a model whose routers are trained to choose evenly."""

    def __init__(self, part: Part, layers: dict[Place, Balance], mesh: Mesh, device: torch.device):
        super().__init__(mesh, device)
        self.part, self.layers = part, layers
        self.name = {"mixer": "head_balance_loss", "feedforward": "expert_balance_loss"}[part]
        # Of routers that are balanced over the global batch: how many of its tokens choose each unit, and all of them.
        self._counts: dict[Place, tuple[Tensor, Tensor]] = {}

    @property
    def counts_first(self) -> bool:
        """Whether a forward pass has to count, before each training step."""
        return any(balance.over == "global_batch" for balance in self.layers.values())

    def quantity(self, routing: Routing) -> Tensor:
        return self.routed(routing.probabilities(), routing)

    def take_counts(self, counter: ChoiceCounter) -> None:
        """What a counting pass over the global batch has found. Collective."""
        places = {place: balance for place, balance in self.layers.items() if balance.over == "global_batch"}
        units = {place: balance.num_units for place, balance in places.items()}
        for place, found in counter.whole(self.part, units).items():
            self._counts[place] = found[:-1].double(), found[-1].double()

    def derivative(self, place: Place, routing: Routing) -> Tensor:
        balance = self.layers[place]
        if balance.over == "global_batch":
            counts_U, tokens = self._counts[place]
            share_B1U, whole = counts_U[None, None] / tokens.clamp(min=1), tokens
        else:
            share_B1U, whole = self._of_sequences(routing)
        factor = balance.factor / (len(self.layers) if balance.shared_out else 1)
        return share_B1U * (factor / whole.clamp(min=1))

    def _of_sequences(self, routing: Routing) -> tuple[Tensor, Tensor]:
        """Of each sequence, fp64: the share of its tokens that choose each unit, `[B, 1, U]`; and how many tokens all
        sequences would have if they had as many. One without tokens for this router has no share."""
        counts_B1U, (n, _) = routing.chosen_BNU.sum(1, keepdim=True).double(), self.num_tokens(routing)
        tokens_B11 = counts_B1U.new_full((1, 1, 1), n)
        if routing.routed_BN is not None:
            tokens_B11 = routing.routed_BN.sum(1)[:, None, None].double()
        if self.mesh.layout.cp > 1:
            group = self.mesh.group("cp").group_name
            if routing.routed_BN is not None:
                tokens_B11 = sum_over(tokens_B11, group)
            counts_B1U = sum_over(counts_B1U, group)
        return counts_B1U / tokens_B11.clamp(min=1), tokens_B11 * self._facts.sequences


class _OneForward(OneForward):
    """In recomputation it finds the derivatives of the first time."""

    def __init__(self, loss: RouterLoss):
        self.loss = loss
        self.derivatives: dict[Place, Tensor] = {}

    def routing(self, layer: int, found: Routing) -> Tensor:
        place = (layer, found.tower)
        if found.part != self.loss.part or place not in self.loss.layers:
            return found.scores_BNU
        quantity = self.loss.quantity(found)
        if not self.closed:
            derivative = self.loss.derivative(place, found)
            self.loss.count(quantity, derivative)
            self.derivatives[place] = self.loss.entering(derivative).to(quantity.dtype)
        return EnterBackward.apply(found.scores_BNU, quantity, self.derivatives[place])


def router_losses(uncut: Model, mesh: Mesh, device: torch.device) -> list[RouterLoss]:
    """Those of a whole model."""
    losses: list[RouterLoss] = []
    mixers = {(block.layer, 0): block.mixer.balance for block in uncut.layers.values()}
    feedforwards = _feedforwards(uncut)
    found: dict[Part, dict[Place, Balance | None]] = {
        "mixer": mixers,
        "feedforward": {place: feedforward.balance for place, feedforward in feedforwards.items()},
    }
    for part, balances in found.items():
        layers = {place: balance for place, balance in balances.items() if balance is not None and balance.factor > 0}
        if layers:
            losses.append(SpreadBalance(part, layers, mesh, device))
    weights = {place: feedforward.z_loss_weight for place, feedforward in feedforwards.items()}
    if kept := {place: weight for place, weight in weights.items() if weight > 0}:
        losses.append(SpreadZLoss(kept, mesh, device))
    return losses


def _feedforwards(uncut: Model) -> dict[Place, FeedForward]:
    """All of a model, those of each modality by themselves."""
    return {
        (block.layer, tower): feedforward
        for block in uncut.layers.values()
        for tower, feedforward in block.feedforward.by_tower.items()
    }


class ChoiceCounter(OneForward):
    """Counts how often each unit is chosen, on one of the processes that have the same tokens.

    Attributes:
        counts: (part, place) -> int64 `[U + 1]`; the last one is that of the tokens.
    """

    def __init__(self, mesh: Mesh, counts: dict[tuple[Part, Place], Tensor] | None = None):
        self.mesh = mesh
        self.counts = {} if counts is None else counts

    def routing(self, layer: int, found: Routing) -> Tensor:
        if self.mesh.rank("tp") == 0 and not self.closed:
            chosen_TU, key = found.chosen_BNU.flatten(0, 1), (found.part, (layer, found.tower))
            tokens = chosen_TU.new_tensor(len(chosen_TU), dtype=torch.int64)
            if found.routed_BN is not None:
                tokens = found.routed_BN.sum()
            counts = torch.cat((chosen_TU.sum(0), tokens[None]))
            self.counts[key] = self.counts.get(key, 0) + counts
        return found.scores_BNU

    def whole(self, part: Part, units: dict[Place, int]) -> dict[Place, Tensor]:
        """The counts of all processes, of routers of so many units. Collective."""
        nothing = {place: torch.zeros(n + 1, dtype=torch.int64) for place, n in units.items()}
        found = torch.cat([self.counts.get((part, place), counts).cpu() for place, counts in nothing.items()])
        dist.all_reduce(found)
        return dict(zip(units, found.split([n + 1 for n in units.values()]), strict=True))


class SelectionBias:
    """Balances experts without a loss: what is added to their scores moves against their loads, after each update.

    With c_i the number of tokens of the global batch that chose expert i, b_i += rate sign(mean_j c_j - c_i)
    (arXiv 2408.15664). A step that is skipped moves nothing.

    Attributes:
        layers: router -> (name of the parameter, rate, number of experts).
    """

    def __init__(self, uncut: Model, mesh: Mesh):
        self.mesh = mesh
        self.layers: dict[Place, tuple[str, float, int]] = {}
        names = {parameter: name for name, parameter in uncut.named_parameters()}
        for place, feedforward in _feedforwards(uncut).items():
            settings = feedforward.config
            if (rate := getattr(settings, "bias_rate", 0.0)) > 0:
                name = names[feedforward.get_parameter("router.selection_bias")]
                self.layers[place] = (name, rate, settings.num_experts)
        self._counts: dict[tuple[Part, Place], Tensor] = {}
        self.moves: dict[str, Tensor] = {}

    def begin(self, facts: StepFacts) -> None:
        self._counts, self.moves = {}, {}

    def one_forward(self) -> OneForward:
        return ChoiceCounter(self.mesh, self._counts)

    def finish(self) -> None:
        """All micro-batches have been through: how each number is to move. Collective."""
        counted = ChoiceCounter(self.mesh, self._counts)
        units = {place: experts for place, (_, _, experts) in self.layers.items()}
        for place, found in counted.whole("feedforward", units).items():
            name, rate, _ = self.layers[place]
            counts_E = found[:-1].double()
            self.moves[name] = rate * torch.sign(counts_E.mean() - counts_E)
