"""A dense checkpoint as one whose modalities have weights of their own, each of them those that were there."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from model.config import Architecture
from model.hf.check import Agreement
from model.hf.loading import load_source
from model.hf.names import parameter_shapes
from model.hf.source import Source, Weights
from model.initialisation import Normal, draw
from model.settings import architecture_tables, build_architecture
from model.towers import tied
from model.untie import UntieConfig, UntiedPart
from parallel.rows import VOCABULARY
from trainer.convert import Say
from trainer.remaking import Change, remake

SPREAD = 0.1
"""A new id begins with the mean row of the others, and this part of their spread, drawn."""


@dataclass(frozen=True)
class Modalities:
    """What `headway upcycle mot` is told of them.

    Attributes:
        new_ids: so many new token ids for each modality after the first; none: the data says which modality a token is
            of, and ids are those of the model.
        markers: so many new ids after those, of the first modality: what opens and closes an image.
    """

    count: int
    new_ids: list[int] = field(default_factory=list)
    markers: int = 0
    names: list[str] = field(default_factory=list)
    parts: list[UntiedPart] = field(default_factory=lambda: UntieConfig().parts)

    @property
    def more_ids(self) -> int:
        return sum(self.new_ids) + self.markers

    def ranges(self, vocab_size: int) -> list[list[int]]:
        """Of a model that had so many ids."""
        if not self.new_ids:
            return []
        bounds = [vocab_size]
        for count in self.new_ids:
            bounds.append(bounds[-1] + count)
        markers = [bounds[-1], bounds[-1] + self.markers] if self.markers else []
        return [[0, vocab_size, *markers], *([begin, end] for begin, end in pairwise(bounds))]


def to_mot(
    model: Path,
    out: Path,
    modalities: Modalities,
    *,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    say: Say = print,
) -> Agreement:
    """Write MODEL with weights for each modality, all of which begin as the model's, as `remake` does.

    Whatever the modalities of the tokens are, logits of the model's ids are those of the model: that is what is
    compared.
    """

    def change_of(dense: Architecture) -> Change:
        untied = with_towers(dense, modalities)
        return Change(
            untied,
            weights=lambda weights: _Towers(weights, dense, untied),
            words=lambda _: f"; {_said(untied)}",
            said=lambda same: f"logits of the source, and of the result with its tokens of any modality: {same}",
            logits=_any_modality,
        )

    return remake(model, out, change_of, dtype=dtype, max_shard_size=max_shard_size, overwrite=overwrite, say=say)


def with_towers(dense: Architecture, modalities: Modalities) -> Architecture:
    """The same model with weights for each modality.

    Raises:
        ValueError: with every reason why it cannot be.
    """
    count, faults = modalities.count, []
    if dense.untied is not None:
        faults.append(f"it has weights for {dense.untied.modalities} modalities already: begin with a model for one.")
    if count < 2:
        faults.append(f"--modalities {count}: one is the model itself; the nearest that works is 2.")
    elif modalities.new_ids and len(modalities.new_ids) != count - 1:
        faults.append(
            f"--new-ids {' '.join(map(str, modalities.new_ids))}: each modality after the first has some, so "
            f"--modalities {count} wants {count - 1} of these numbers."
        )
    if wrong := [number for number in modalities.new_ids if number < 1]:
        faults.append(f"--new-ids {wrong[0]}: a modality has at least 1 id.")
    if modalities.markers < 0 or (modalities.markers and not modalities.new_ids):
        faults.append(f"--markers {modalities.markers}: so many ids more, not below 0, where there are --new-ids.")
    if faults:
        raise ValueError("\n".join(faults))
    tables, vocab_size = architecture_tables(dense), dense.model.vocab_size
    tables["model"]["vocab_size"] = vocab_size + modalities.more_ids
    tables["untie"] = {
        "modalities": count,
        "parts": list(modalities.parts),
        "ranges": modalities.ranges(vocab_size),
        "names": list(modalities.names),
    }
    _, untied = build_architecture(tables, faults)
    if untied is None or faults:
        raise ValueError("\n".join(faults))
    return untied


class _Towers(Weights):
    """The weights of a model, each as often as there are modalities, and rows for new ids."""

    def __init__(self, dense: Weights, before: Architecture, after: Architecture):
        self._dense, self._after = dense, parameter_shapes(after)
        self._grown = VOCABULARY if after.model.vocab_size > before.model.vocab_size else ()

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        return {name: self._read(name) for name in names}

    def _read(self, name: str) -> Tensor:
        taken = tied(name)
        # A copy has memory of its own: a file of weights takes no tensor twice.
        tensor = self._dense.read([taken])[taken].clone()
        return torch.cat((tensor, self._new_rows(name, tensor))) if name in self._grown else tensor

    def _new_rows(self, name: str, known: Tensor) -> Tensor:
        shape = torch.Size((self._after[name][0] - len(known), known.shape[1]))
        wide = known.float()
        drawn = draw(f"new rows of {name}", Normal(SPREAD), shape, seed=0)
        return (wide.mean(0) + wide.std(0) * drawn).to(known.dtype)


def _any_modality(made: Source, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """Logits in fp32 of tokens that are of all modalities in turn."""
    model = load_source(made, dtype=dtype).to(torch.float32)
    assert model.architecture.untie is not None
    modalities = torch.arange(tokens.numel()).view(tokens.shape) % model.architecture.untie.modalities
    with torch.no_grad():
        return model(tokens, modalities=modalities)


def _said(untied: Architecture) -> str:
    """Whose weights there are, and whose ids, in words."""
    untie = untied.untie
    assert untie is not None
    parts = f"{', '.join(untie.parts)} for each of {untie.modalities} modalities"
    if not untie.by_ids:
        return f"{parts}; the data says which one a token is of"
    ids = [
        f"{name} {', '.join(f'{a} to {b - 1}' for a, b in zip(bounds[::2], bounds[1::2], strict=True))}"
        for name, bounds in zip(untie.called, untie.ranges, strict=True)
    ]
    return f"{parts}; ids: {'; '.join(ids)}"
