"""Weights per modality: the `[untie]` section, and which modality a token is of (Mixture-of-Transformers,
arXiv 2411.04996)."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

UntiedPart = Literal["qkv", "o", "feedforward", "norms"]


@dataclass
class UntieConfig:
    """`[untie]`"""

    modalities: int = 1
    """How many. Each has weights of its own in the parts named below; attention is over all tokens."""
    parts: list[UntiedPart] = field(default_factory=lambda: ["qkv", "o", "feedforward", "norms"])
    """qkv: linear maps into a mixer (not routers); o: those out of it; feedforward; norms: those of the residual stream
    and of queries and keys. With none of them, modalities share all weights and are told apart in metrics alone."""
    ranges: list[list[int]] = field(default_factory=list)
    """For each modality its token ids: first, one beyond the last, and so on for several ranges. Default: the data says
    which modality each token is of."""
    names: list[str] = field(default_factory=list)
    """What the modalities are called in metrics and messages. Default: their numbers from 0."""
    feedforwards: dict[str, str] = field(default_factory=dict)
    """Modality -> the name of a [feedforwards.NAME] that it has in the place of the pattern's."""

    @property
    def called(self) -> list[str]:
        """The names of the modalities."""
        return self.names or [str(number) for number in range(self.modalities)]

    @property
    def by_ids(self) -> bool:
        """Whether a token's id says its modality; otherwise the data does."""
        return bool(self.ranges)

    def spans(self) -> list[tuple[int, int, int]]:
        """(first id, one beyond the last, modality), in the order of ids."""
        return sorted(
            (first, end, modality)
            for modality, bounds in enumerate(self.ranges)
            for first, end in zip(bounds[::2], bounds[1::2], strict=True)
        )

    def of_tokens(self, tokens: Tensor) -> Tensor:
        """The modality of each token, int64, by its id."""
        assert self.by_ids, "the data says which modality a token is of"
        found = torch.zeros_like(tokens)
        for first, end, modality in self.spans():
            if modality:
                found = torch.where((tokens >= first) & (tokens < end), modality, found)
        return found

    def faults(self, vocab_size: int) -> list[str]:
        """Why weights cannot be untied so, in sentences."""
        count = self.modalities
        faults = []
        if count < 1:
            return [f"untie.modalities = {count} must be at least 1."]
        if self.names and len(self.names) != count:
            faults.append(f"untie.names has {len(self.names)} names for modalities = {count}.")
        if doubled := sorted({name for name in self.names if self.names.count(name) > 1}):
            faults.append(f"untie.names has {', '.join(map(repr, doubled))} more than once.")
        if broken := [name for name in self.names if not name or "/" in name]:
            faults.append(
                f'untie.names has {broken[0]!r}: a name stands in metrics, so it must have letters and no "/".'
            )
        for name in self.feedforwards:
            if name not in self.called:
                faults.append(f"untie.feedforwards names {name!r}, which is no modality: they are {self._listed()}.")
        if self.feedforwards and "feedforward" not in self.parts:
            faults.append('untie.feedforwards is set, but "feedforward" is not among untie.parts: add it.')
        return faults + (self._range_faults(vocab_size) if self.ranges else [])

    def _listed(self) -> str:
        return ", ".join(self.called)

    def _range_faults(self, vocab_size: int) -> list[str]:
        if len(self.ranges) != self.modalities:
            return [
                f"untie.ranges has {len(self.ranges)} entries for modalities = {self.modalities}: give each modality "
                "its [first id, one beyond the last]."
            ]
        faults = [
            f"untie.ranges: {bounds} of {name} must be pairs of a first id and a larger one beyond the last."
            for name, bounds in zip(self.called, self.ranges, strict=False)
            if not bounds or len(bounds) % 2 or any(a >= b for a, b in zip(bounds[::2], bounds[1::2], strict=True))
        ]
        if faults or len(self.called) != self.modalities:
            return faults
        spans = self.spans()
        for (_, end, one), (second, other_end, other) in pairwise(spans):
            if second < end:
                faults.append(
                    f"untie.ranges: ids {second} to {min(end, other_end) - 1} are {self.called[one]}'s and "
                    f"{self.called[other]}'s: ranges may not overlap."
                )
        faults += [
            f"untie.ranges: ids {first} to {end - 1} of {self.called[modality]} reach beyond model.vocab_size = "
            f"{vocab_size}."
            for first, end, modality in spans
            if first < 0 or end > vocab_size
        ]
        reached = 0
        for first, end, _ in [*spans, (vocab_size, vocab_size, 0)]:
            if first > reached:
                which = f"id {reached} is" if first == reached + 1 else f"ids {reached} to {first - 1} are"
                faults.append(
                    f"untie.ranges: {which} in no range: every id below model.vocab_size = {vocab_size} has to be in "
                    "one."
                )
            reached = max(reached, end)
        return faults
