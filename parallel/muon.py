"""Muon for the matrices of layers, beside AdamW for all other parameters, the same in every layout.

Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) updates a matrix by its momentum with all singular values
brought near 1. That is a function of the whole matrix: of a share taken by itself, something else comes out. So the
shares of a matrix are gathered on one of the processes that hold them, and what it makes of them is handed back.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from parallel.collectives import exchange
from parallel.data import local
from parallel.spread import Spread

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of x, x^3 and x^5 in an iteration: steep at 0, so that small singular values grow fast."""
SMALLEST_NORM = 1e-7

AdjustLR = Literal["match_rms_adamw", "original"]


def orthogonalise(matrix_AB: Tensor, steps: int) -> Tensor:
    """From U S V^T to U S' V^T by Newton-Schulz iterations; after 5, S' is within 0.3 of 1 unless S is tiny.

    Args:
        matrix_AB: in the dtype to compute in; it is not changed.
    """
    a, b, c = COEFFICIENTS
    tall = matrix_AB.shape[0] > matrix_AB.shape[1]
    x = matrix_AB.T if tall else matrix_AB
    # No singular value is above the Frobenius norm, and what begins below 1 stays bounded.
    x = x / x.norm().clamp(min=SMALLEST_NORM)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def learning_rate_factor(shape: torch.Size, adjust_lr: AdjustLR) -> float:
    """By how much the learning rate is multiplied for a matrix that is [A, B] in the whole model.

    "match_rms_adamw": 0.2 sqrt(max(A, B)), which makes the update's root mean square that of AdamW's updates
    (arXiv 2502.16982, section 2.2). "original": sqrt(max(1, A / B)).
    """
    rows, columns = shape
    return 0.2 * math.sqrt(max(rows, columns)) if adjust_lr == "match_rms_adamw" else math.sqrt(max(1, rows / columns))


class Muon(torch.optim.Optimizer):
    """Muon and an AdamW in one: the groups are Muon's one and then AdamW's, the state is that of both.

    With gradient g and momentum m of a matrix W, and O for `orthogonalise`, as in torch.optim.Muon:

        m <- momentum m + (1 - momentum) g
        d  = momentum m + (1 - momentum) g, or m without nesterov
        W <- (1 - lr weight_decay) W - lr learning_rate_factor(W) O(d)

    O is computed in the precision of the model's matrix products; m is as wide as W.

    Args:
        names: of the parameters that Muon updates, matrices of layers.
        adamw: the optimizer of all others.
    """

    def __init__(
        self,
        model: Spread,
        names: list[str],
        adamw: torch.optim.AdamW,
        *,
        lr: float,
        weight_decay: float,
        momentum: float,
        nesterov: bool,
        ns_steps: int,
        adjust_lr: AdjustLR,
    ):
        self.model, self.names, self.adamw = model, sorted(names), adamw
        self.momentum, self.nesterov, self.ns_steps, self.adjust_lr = momentum, nesterov, ns_steps, adjust_lr
        meshes = {name: model.holders(name) for name in self.names}
        known = {mesh: Holders(mesh) for mesh in meshes.values()}
        self.holders = {name: known[mesh] for name, mesh in meshes.items()}
        matrices = [model.parameters[name] for name in self.names]
        super().__init__([{"params": matrices}], {"lr": lr, "weight_decay": weight_decay})
        # The same objects, so that a learning rate set in a group is set for whoever updates by it.
        self.param_groups += adamw.param_groups
        self.state = adamw.state
        for matrix in matrices:
            self.state[matrix] = {"momentum_buffer": torch.zeros_like(matrix)}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Update every parameter that has a gradient. Collective among the processes of a pipeline stage."""
        assert closure is None, "gradients are there before a step"
        # What forward did not use has no gradient on any process; AdamW leaves that alone, too.
        trained = [name for name in self.names if self.model.parameters[name].grad is not None]
        for name in trained:
            gradient, momentum = self._gradient_and_momentum(name)
            momentum.lerp_(gradient, 1 - self.momentum)
        replicas = self.model.layout.dp_replicate
        for rounds in self._rounds(trained):
            for first in range(0, len(rounds), replicas):
                self._update(rounds[first : first + replicas])
        self.adamw.step()

    def _rounds(self, names: list[str]) -> list[list[list[str]]]:
        """By who holds them, what the holders of matrices compute at one time: one each, all of one shape and cut in
        the same way.

        Nobody ever has more than a few whole matrices. The rounds are the same on all of their holders.
        """
        rounds: dict[Holders, list[list[str]]] = {}
        alike: dict[tuple[Holders, torch.Size, int | None], list[str]] = {}
        for name in names:
            key = (self.holders[name], self.model.cuts.shapes[name], self.model.cuts.dimensions[name])
            alike.setdefault(key, []).append(name)
        for (holders, *_), found in alike.items():
            several = [found[first : first + holders.size] for first in range(0, len(found), holders.size)]
            rounds.setdefault(holders, []).extend(several)
        return list(rounds.values())

    def _update(self, rounds: list[list[str]]) -> None:
        """Every replica computes one of these rounds; all take what came of each."""
        holders = self.holders[rounds[0][0]]
        mine = holders.replica
        computed = self._computed(rounds[mine]) if mine < len(rounds) else None
        for replica, names in enumerate(rounds):
            updates = computed if replica == mine and computed is not None else self._no_pieces(names[0])
            holders.copy_from_replica(replica, updates)
            for name, update in zip(names, updates, strict=False):
                self._apply(name, update)

    def _computed(self, names: list[str]) -> Tensor:
        """The orthogonalised matrices of a round, of each this process's piece `[holders, rows, columns]`."""
        shape, dimension = self.model.cuts.shapes[names[0]], self.model.cuts.dimensions[names[0]]
        holders, pieces = self.holders[names[0]], self._no_pieces(names[0])
        for piece, name in zip(pieces, names, strict=False):
            gradient, momentum = self._gradient_and_momentum(name)
            direction = gradient.lerp(momentum, self.momentum) if self.nesterov else momentum
            piece[: len(direction)] = direction
        matrix = holders.gather(pieces, shape, dimension)
        if holders.index < len(names):
            matrix = orthogonalise(matrix, self.ns_steps)
        return holders.hand_out(matrix, dimension)

    def _apply(self, name: str, update: Tensor) -> None:
        group = self.param_groups[0]
        factor = learning_rate_factor(self.model.cuts.shapes[name], self.adjust_lr)
        parameter = local(self.model.parameters[name])
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update[: len(parameter)], alpha=-group["lr"] * factor)

    def _gradient_and_momentum(self, name: str) -> tuple[Tensor, Tensor]:
        """What this process has of them."""
        parameter = self.model.parameters[name]
        assert parameter.grad is not None
        return local(parameter.grad), local(self.state[parameter]["momentum_buffer"])

    def _no_pieces(self, name: str) -> Tensor:
        """Zeros for the pieces of a round of matrices like this one."""
        shape = self.holders[name].pieces_shape(self.model.cuts.shapes[name], self.model.cuts.dimensions[name])
        return torch.zeros(shape, dtype=self.model.dtype, device=self.model.device)


class Holders:
    """The processes that hold a matrix between them, and its replicas.

    A matrix [A, B] is cut into `tp` shares, along its dimension 0 or 1 or (None) not at all, and each share into
    `shards` pieces of its rows, of equal size but for the last ones, which are filled up with zeros on the way.

    Attributes:
        size: processes that hold a matrix once; `index` is this one's place among them.
        replicas: how often it is held; `replica` is which of them is held here.
    """

    def __init__(self, mesh: DeviceMesh):
        self.replicas, self.tp, self.shards = mesh.shape
        self.replica, self.tp_rank, shard_rank = mesh.get_coordinate()
        self.size, self.index = self.tp * self.shards, shard_rank * self.tp + self.tp_rank
        self._replica_group, self._tp_group, self._shard_group = mesh.get_all_groups()

    def pieces_shape(self, shape: torch.Size, dimension: int | None) -> tuple[int, int, int]:
        """[holders, rows, columns] of a piece of as many matrices as there are holders, one for each of them."""
        rows, columns = self._share_shape(shape, dimension)
        return self.size, -(-rows // self.shards), columns

    def gather(self, pieces: Tensor, shape: torch.Size, dimension: int | None) -> Tensor:
        """From a piece of each holder's matrix `[holders, rows, columns]` to the whole of one's own `[A, B]`."""
        rows, _ = self._share_shape(shape, dimension)
        received = _exchange(pieces.unflatten(0, (self.shards, self.tp)), self._shard_group)
        shares = received.transpose(0, 1).flatten(1, 2)[:, :rows]
        if dimension is None:
            return shares[self.tp_rank]
        return torch.cat(tuple(_exchange(shares, self._tp_group)), dimension)

    def hand_out(self, matrix: Tensor, dimension: int | None) -> Tensor:
        """From one's own matrix `[A, B]` to a piece of each holder's."""
        shares = [matrix] * self.tp if dimension is None else matrix.chunk(self.tp, dimension)
        received = _exchange(torch.stack(tuple(shares)), self._tp_group)
        filled = F.pad(received, (0, 0, 0, -received.shape[1] % self.shards))
        pieces = filled.unflatten(1, (self.shards, -1)).transpose(0, 1)
        return _exchange(pieces, self._shard_group).flatten(0, 1)

    def copy_from_replica(self, replica: int, tensor: Tensor) -> None:
        """What one replica has in `tensor`, for all of them."""
        if self.replicas > 1:
            dist.broadcast(tensor, group=self._replica_group, group_src=replica)

    def _share_shape(self, shape: torch.Size, dimension: int | None) -> tuple[int, int]:
        assert dimension is None or shape[dimension] % self.tp == 0, "shares of a layer's matrices are equal"
        rows, columns = (size // self.tp if place == dimension else size for place, size in enumerate(shape))
        return rows, columns


def _exchange(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Entry i goes to rank i of the group; entry i of the result came from there."""
    return tensor if group.size() == 1 else exchange(tensor, group.group_name, group.size())
