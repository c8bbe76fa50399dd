"""Tensor and sequence parallelism: a model is cut as its layers' `sharding` tables say.

A layer runs unchanged on its share of the heads or hidden channels. What changes stands at the borders: a layer's input
is gathered (or its gradient summed), the output projection's summands are summed (Megatron-LM, arXiv 1909.08053; with
the sequence cut in between, arXiv 2205.05198). Parameters become plain tensors of their local shapes; what they are of
the whole model is noted in `Cuts`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.layer import CUT_DIMENSION, Layer, Mixer
from model.norms import SimpleRMSNorm
from model.stack import Model
from model.untied import maps_out
from parallel.collectives import Enter
from parallel.norms import DeferredNorm
from parallel.region import Region, SpreadHeads
from parallel.vocabulary import VocabularyEmbedding


@dataclass
class Cuts:
    """What the parameters of a cut model are of the whole.

    Attributes:
        shapes: name -> shape in the whole model.
        dimensions: name -> the dimension along which tensor parallelism cuts it, None where it does not.
        summed: names of uncut parameters whose gradient on a rank is a summand only: of its heads, or of its piece of
            the sequence.
    """

    shapes: dict[str, torch.Size]
    dimensions: dict[str, int | None]
    summed: set[str] = field(default_factory=set)

    @classmethod
    def none(cls, model: Model) -> Cuts:
        """Of a model that is not cut."""
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        return cls(shapes, dict.fromkeys(shapes))


def sharding_faults(model: Model) -> list[str]:
    """Why layers, a user's own perhaps, cannot be cut, in sentences."""
    faults: dict[str, None] = {}
    for block in model.layers.values():
        for layer in (block.mixer, block.feedforward):
            faults |= dict.fromkeys(f"parallel.tp: {type(layer).__name__} {fault}" for fault in _layer_faults(layer))
    return list(faults)


def _layer_faults(layer: Layer) -> Iterator[str]:
    """What a layer leaves unsaid, and what it says that would come out wrong."""
    for name, _ in chain(layer.named_parameters(), layer.named_buffers()):
        word = layer.sharding.get(name)
        if word not in CUT_DIMENSION:
            said = "does not say how" if word is None else f"says {word!r}, which is no way in which"
            yield f"{said} {name} is cut: its sharding table has to have one of {', '.join(CUT_DIMENSION)}."
    projections, modules = maps_out(layer), dict(layer.named_modules())
    rows = {name.rpartition(".")[0] for name, word in layer.sharding.items() if word == "row"}
    if others := sorted(rows - set(projections)):
        yield (
            f'says "row" for {", ".join(others)}, but only its output projection, {", ".join(projections)}, is summed '
            "over ranks."
        )
    for projection in projections:
        if type(found := modules.get(projection)) is not nn.Linear:
            yield (
                f"has a {type(found).__name__} for its output projection, {projection}: only an nn.Linear can be "
                "summed."
            )
        elif (word := layer.sharding.get(f"{projection}.weight")) not in (None, "row"):
            yield f'says {word!r} for {projection}.weight, but what {projection} gives is summed over ranks: say "row".'
    if isinstance(layer, Mixer) and layer.full_width_norm is not None:
        norm = getattr(layer, layer.full_width_norm)
        if not isinstance(norm, SimpleRMSNorm | nn.Identity):
            yield f"has a {type(norm).__name__} for its norm over all heads: only a root mean square can come after."


def cut(model: Model, region: Region) -> Cuts:
    """Cut a model on the meta device in place, so that it computes one rank's part of what it did."""
    cuts = Cuts.none(model)
    model.heads = SpreadHeads(region)
    for index, block in model.layers.items():
        for part in ("mixer", "feedforward"):
            _cut_layer(getattr(block, part), f"layers.{index}.{part}.", region, cuts)
    _cut_vocabulary(model, region, cuts)
    if region.cuts_sequence:
        layers = tuple(f"layers.{index}.{part}." for index in model.layers for part in ("mixer", "feedforward"))
        outside = [name for name in cuts.shapes if not name.startswith(layers)]
        cuts.summed |= {name for name in outside if cuts.dimensions[name] is None}
    return cuts


def _cut_layer(layer: Layer, prefix: str, region: Region, cuts: Cuts) -> None:
    projections = maps_out(layer)
    together = projections != [layer.output_projection]
    norm = _defer_norm(layer)
    inside = region.cuts_sequence or (together and norm is None)
    outside = set() if inside else {f"{projection}.bias" for projection in projections}
    for name, _ in list(layer.named_parameters()):
        dimension = CUT_DIMENSION[layer.sharding[name]]
        cuts.dimensions[prefix + name] = dimension
        if dimension is not None:
            _keep_share(layer, name, dimension, region)
        elif name not in outside:
            # Inside, each rank uses it for its own heads; the projection's bias is added outside.
            cuts.summed.add(prefix + name)
    maps = [layer.get_submodule(projection) for projection in projections]
    if not together:
        SummedLinear.of(maps[0], region, norm)
    else:
        partial_maps = [PartialLinear.of(each, region, biased=norm is None) for each in maps]
        layer.register_forward_hook(_leave(region, norm, partial_maps))
    layer.remake_buffers = _cut_buffers(layer, layer.remake_buffers, region)  # type: ignore[method-assign]
    layer.remake_buffers()
    layer.register_forward_pre_hook(_enter(region), with_kwargs=True)


def _defer_norm(layer: Layer) -> DeferredNorm | None:
    """Let a mixer's norm over all heads, if it has one, come after the projection; what finishes it."""
    if not isinstance(layer, Mixer) or layer.full_width_norm is None:
        return None
    plain = getattr(layer, layer.full_width_norm)
    if isinstance(plain, nn.Identity):
        return None
    norm = DeferredNorm(plain)
    setattr(layer, layer.full_width_norm, norm)
    return norm


def _leave(region: Region, norm: DeferredNorm | None, maps: list[PartialLinear]) -> Callable[..., Tensor]:
    """What several output projections have added up to is summed over ranks; after a norm, each token's bias is added,
    that of its modality's."""

    def leave(layer: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        if norm is None:
            return region.leave(out)
        out = norm.finish(out, region)
        if maps[0].bias is None:
            return out
        # Maps out before which there is a norm over all heads are those of modalities.
        whose_BNM = F.one_hot(region.piece(args[1].modalities), len(maps)).to(out.dtype)
        return out + whose_BNM @ torch.stack([each.bias for each in maps])

    return leave


def _enter(region: Region) -> Callable[..., Any]:
    """A layer's input comes from the residual stream; of gates by head, a rank takes those of its heads."""

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        x, *others = args
        if len(others) == 3 and others[2] is not None:
            gates = Enter.apply(others[2], region.group)
            share = region.share(gates.shape[-1])
            others[2] = gates[..., share.start : share.stop]
        return (region.enter(x), *others), kwargs

    return enter


def _cut_buffers(layer: Layer, remake: Callable[[], None], region: Region) -> Callable[[], None]:
    """Buffers are made from global indices (decay slopes of all heads); of those, a rank keeps its share."""

    def remake_and_cut() -> None:
        remake()
        for name, buffer in list(layer.named_buffers()):
            if CUT_DIMENSION[layer.sharding[name]] == 0:
                share = region.share(buffer.shape[0])
                owner, _, last = name.rpartition(".")
                setattr(layer.get_submodule(owner), last, buffer[share.start : share.stop].clone())

    return remake_and_cut


def _keep_share(module: nn.Module, name: str, dimension: int, region: Region) -> None:
    owner_name, _, last = name.rpartition(".")
    owner = module.get_submodule(owner_name)
    whole = getattr(owner, last)
    share = region.share(whole.shape[dimension])
    part = whole.detach().narrow(dimension, share.start, len(share)).clone()
    setattr(owner, last, nn.Parameter(part, requires_grad=whole.requires_grad))
    if isinstance(owner, nn.Linear) and last == "weight":
        owner.out_features, owner.in_features = part.shape


class SummedLinear(nn.Linear):
    """An output projection whose inputs are spread over ranks: summands are summed, then the bias is added.

    Attributes:
        norm: the full-width norm before it, whose factor is applied here; a tuple, so that it is no child of this.
    """

    region: Region
    norm: tuple[DeferredNorm, ...]

    @classmethod
    def of(cls, plain: nn.Module, region: Region, norm: DeferredNorm | None) -> SummedLinear:
        """A plain projection with cut weights, made one that sums."""
        plain.__class__ = cls
        assert isinstance(plain, cls)
        plain.region, plain.norm = region, () if norm is None else (norm,)
        return plain

    def forward(self, x: Tensor) -> Tensor:
        partial = F.linear(x, self.weight)
        out = self.norm[0].finish(partial, self.region) if self.norm else self.region.leave(partial)
        return out if self.bias is None else out + self.bias


class PartialLinear(nn.Linear):
    """One of several output projections that are weighted and added up before anything is summed over ranks.

    What one rank gives is a summand. The bias is added on the first one only: the others give zero times theirs, so
    that the gradient of it, which is summed, is there on all of them. Where it is not `biased`, whoever sums adds it.
    """

    adds_bias: float | None

    @classmethod
    def of(cls, plain: nn.Module, region: Region, *, biased: bool) -> PartialLinear:
        """A plain projection with cut weights, made one of several."""
        plain.__class__ = cls
        assert isinstance(plain, cls)
        plain.adds_bias = float(region.rank == 0) if biased else None
        return plain

    def forward(self, x: Tensor) -> Tensor:
        outside = self.bias is None or self.adds_bias is None
        return F.linear(x, self.weight, None if outside else self.bias * self.adds_bias)


def _cut_vocabulary(model: Model, region: Region, cuts: Cuts) -> None:
    """Embedding and head by rows of the vocabulary. Stages of a pipeline have one of them, or none."""
    vocab_size = model.architecture.model.vocab_size
    for name in ("embedding", "head"):
        if getattr(model, name, None) is not None:
            cuts.dimensions[f"{name}.weight"] = 0
            _keep_share(model, f"{name}.weight", 0, region)
    if model.embedding is not None:
        model.embedding.__class__ = VocabularyEmbedding
        model.embedding.region, model.embedding.share = region, region.share(vocab_size)
    if model.positions is not None:
        model.positions.register_forward_hook(lambda module, args, out: region.piece(out))
    if model.final_norm is not None:
        # What follows is the head, whose rows are spread.
        model.final_norm.register_forward_hook(lambda module, args, out: region.enter(out))
