"""Modules of which each modality has one (Mixture-of-Transformers, arXiv 2411.04996, section 2.2).

They sort the tokens by modality, go through the rows of each with its own weights, and put them back: so what mixes
tokens is over all of them in their order. The sorting is shared by all layers of a forward pass.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from kernels.grouped import Groups, each_its_own
from model.initialisation import Init

MARK = "towers"
"""`layers.0.mixer.q.towers.1.weight` is that of modality 1."""


class Current:
    """The tokens, by modality, that the towers of a layer have before them. Whoever runs the layer says so."""

    groups: Groups | None = None

    def begin(self, groups: Groups | None) -> None:
        """These, from now on."""
        self.groups = groups
        if groups is not None:
            groups.forget()


class Towers(nn.Module):
    """Modules of one kind, each for the tokens of one modality.

    Args:
        one: what they are to be: each is a copy of it. inits: its initial values by the names of its parameters; each
            tower draws its own.
    """

    def __init__(self, one: nn.Module, count: int, inits: Mapping[str, Init], current: Current):
        super().__init__()
        self.towers = nn.ModuleList(copy.deepcopy(one) for _ in range(count))
        self.inits, self.current = dict(inits), current

    def init_weights(self) -> dict[str, Init]:
        return {f"{MARK}.{m}.{name}": init for m in range(len(self.towers)) for name, init in self.inits.items()}

    # How many tokens each has is known only when they come: a compiler's graph breaks here.
    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        """`[B, N, ...]` -> `[B, N, ...]`."""
        groups = self.current.groups
        assert groups is not None, "nobody has said which tokens are of which modality"
        return groups.restore(self._on_rows(groups.sort(x), groups))

    def _on_rows(self, rows: Tensor, groups: Groups) -> Tensor:
        parts = rows.split(groups.sizes)
        return torch.cat([tower(part) for tower, part in zip(self.towers, parts, strict=True)])


class LinearTowers(Towers):
    """Linear maps."""

    @property
    def weight(self) -> Tensor:
        """Of one of them: all have its shape."""
        return self.towers[0].weight

    def _on_rows(self, rows: Tensor, groups: Groups) -> Tensor:
        return each_its_own([*self.towers], rows, groups)


def tied(name: str) -> str:
    """A parameter's name as it was before it became one for each modality: `q.towers.1.weight` -> `q.weight`."""
    before, found, behind = name.partition(f".{MARK}.")
    return f"{before}.{behind.partition('.')[2]}" if found else name
