"""A feed-forward for each modality."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from model.context import Context
from model.feedforward.experts import Several
from model.layer import FeedForward, Sharding, Site
from model.towers import MARK


class FeedForwardTowers(FeedForward):
    """A feed-forward for each modality; a mixture of experts among them routes the tokens of its modality alone."""

    def __init__(self, made: Sequence[FeedForward], site: Site):
        super().__init__([tower.config for tower in made], site)
        self.towers = Several({str(modality): tower for modality, tower in enumerate(made)})

    @property
    def by_tower(self) -> dict[int, FeedForward]:
        return {int(modality): tower for modality, tower in self.towers.items()}

    @property
    def sharding(self) -> dict[str, Sharding]:  # type: ignore[override]
        words = {m: tower.sharding.items() for m, tower in self.by_tower.items()}
        return {f"{MARK}.{m}.{name}": word for m, found in words.items() for name, word in found}

    @property
    def output_projections(self) -> list[str]:
        return [f"{MARK}.{m}.{name}" for m, tower in self.by_tower.items() for name in tower.output_projections]

    # As in `Towers`.
    @torch.compiler.disable
    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        groups = ctx.groups
        assert groups is not None, "nobody has said which tokens are of which modality"
        inside = [replace(ctx, tower=m) for m in range(len(self.towers))]
        return groups.restore(self.towers(groups.sort(x), groups.sizes, inside))

    def flops(self, n: int) -> float:
        """The mean of those of the modalities: how many tokens each will have is not known here."""
        return sum(tower.flops(n) for tower in self.towers.values()) / len(self.towers)
