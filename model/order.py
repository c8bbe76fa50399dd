"""The order in which a mixer keeps its heads, where that is not the one in which they are numbered.

A mixer whose settings have `group_order` keeps each key and value head, with its query heads, at the place where that
list has its number. In Hugging Face folders heads lie as they are numbered, and another model may keep them otherwise:
here is which parts of which parameters change places.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model.config import Architecture, expand_pattern
from model.layer import CUT_DIMENSION
from model.towers import tied


@dataclass(frozen=True)
class Order:
    """Equal spans of a parameter along a dimension: place i has the span of number `spans[i]`."""

    dimension: int
    spans: tuple[int, ...]

    @property
    def inverse(self) -> Order:
        """From places back to numbers."""
        return Order(self.dimension, tuple(sorted(range(len(self.spans)), key=self.spans.__getitem__)))

    def apply(self, numbered: Tensor) -> Tensor:
        """By places, from a tensor by numbers."""
        by_span = numbered.unflatten(self.dimension, (len(self.spans), -1))
        chosen = by_span.index_select(self.dimension, torch.tensor(self.spans, device=numbered.device))
        return chosen.flatten(self.dimension, self.dimension + 1)


def order_of(architecture: Architecture, name: str) -> Order | None:
    """How the parameter `name` is kept; None as it is numbered."""
    return change_of(architecture, name, [None] * architecture.model.num_layers)


def change_of(architecture: Architecture, name: str, theirs: list[list[int] | None]) -> Order | None:
    """From the parameter as another model keeps it, with these `group_order`s by layer, to how it is kept in this one;
    None where that is the same."""
    part = name.split(".", 3)
    if part[0] != "layers" or part[2] != "mixer":
        return None
    layer = int(part[1])
    mixer, settings = architecture.mixers[architecture.mixer_names[layer]]
    ours = getattr(settings, "group_order", None)
    if ours is None and theirs[layer] is None:
        return None
    # A layer that is made of others says how it is cut only once it is built; it keeps heads as they are numbered.
    dimension = CUT_DIMENSION.get(mixer.sharding.get(tied(part[3]), "replicate"))
    if dimension is None:
        return None
    count = len(ours or theirs[layer] or ())
    numbers = list(range(count))
    before, after = theirs[layer] or numbers, ours or numbers
    if before == after or sorted(before) != numbers:
        return None
    return Order(dimension, tuple(before.index(number) for number in after))


def orders_of(tables: dict[str, Any]) -> list[list[int] | None]:
    """The `group_order` of each layer, from the tables of a configuration."""
    model, mixers = tables["model"], tables["mixers"]
    names, _ = expand_pattern("", model.get("pattern", ["softmax"]), model["num_layers"], mixers)
    return [mixers[name].get("group_order") for name in names]
