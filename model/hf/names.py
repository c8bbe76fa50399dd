"""Headway's parameter names and those of Hugging Face checkpoints, both ways.

Only names and layouts: no value changes, no file is opened, nothing is loaded. Inside a layer the names are those of
the layer's own `hf` table; what stands around the layers, and where a family lays a matrix out in another way, is said
here, once for each family.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Collection
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from model.config import Architecture
from model.layer import HFName, Packed, Transposed
from model.stack import Model


@dataclass(frozen=True)
class Place:
    """Where a parameter lies in a checkpoint: the whole tensor `name`, or one of its equal row groups.

    Attributes:
        part, parts: which of how many row groups, counted as Headway lays rows out.
        transposed: the checkpoint holds `[inputs, outputs]`, so groups of rows are groups of columns there.
        middle_axis: the checkpoint holds `[H, d]` as `[H, 1, d]`.
    """

    name: str
    part: int = 0
    parts: int = 1
    transposed: bool = False
    middle_axis: bool = False

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of the whole tensor there, from that of the parameter here."""
        whole = (shape[0] * self.parts, *shape[1:])
        if self.middle_axis:
            whole = (whole[0], 1, *whole[1:])
        return whole[::-1] if self.transposed else whole

    def lay_out(self, parts: list[Tensor]) -> Tensor:
        """The whole tensor there, from its parts here in their order."""
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        if self.middle_axis:
            whole = whole.unsqueeze(1)
        return whole.t() if self.transposed else whole

    def take(self, whole: Tensor) -> Tensor:
        """The parameter here, from the whole tensor there."""
        whole = whole.t() if self.transposed else whole
        if self.middle_axis:
            whole = whole.squeeze(1)
        return whole.chunk(self.parts)[self.part].contiguous()


@dataclass(frozen=True)
class Family:
    """What a family of checkpoints calls the parts around the layers.

    Attributes:
        base: prefix of all but the head. A checkpoint of the model without its head may leave it out.
        modules: Headway's module name -> the name there; `{}` is the layer. What is missing has no name there.
        layer: prefix of what stands inside a layer.
        places: name in a layer's `hf` table -> where this family keeps it instead.
        buffers: patterns of tensors that are no parameters, which older checkpoints hold.
    """

    base: str
    modules: dict[str, str]
    layer: str
    places: dict[str, Place] = field(default_factory=dict)
    buffers: tuple[str, ...] = ()


HEAD = "lm_head.weight"

# Wherever a Lightning layer stands: its angles have an axis between heads and channels there.
_EVERYWHERE = {"token_mixer.lrpe.theta": Place("token_mixer.lrpe.theta", middle_axis=True)}

FAMILIES = {
    "llama": Family(
        base="model.",
        modules={
            "embedding": "model.embed_tokens",
            "layers.{}.mixer_norm": "model.layers.{}.input_layernorm",
            "layers.{}.feedforward_norm": "model.layers.{}.post_attention_layernorm",
            "final_norm": "model.norm",
            "head": "lm_head",
        },
        layer="model.layers.{}.",
        places=_EVERYWHERE,
        buffers=("model.layers.*.self_attn.rotary_emb.inv_freq",),
    ),
    # Its norms have no weights, unless another kind was chosen.
    "transnormer": Family(
        base="model.",
        modules={
            "embedding": "model.embed_tokens",
            "layers.{}.mixer_norm": "model.layers.{}.token_norm",
            "layers.{}.feedforward_norm": "model.layers.{}.channel_norm",
            "final_norm": "model.final_norm",
            "head": "lm_head",
        },
        layer="model.layers.{}.",
        places=_EVERYWHERE,
    ),
    "gpt2": Family(
        base="transformer.",
        modules={
            "embedding": "transformer.wte",
            "positions": "transformer.wpe",
            "layers.{}.mixer_norm": "transformer.h.{}.ln_1",
            "layers.{}.feedforward_norm": "transformer.h.{}.ln_2",
            "final_norm": "transformer.ln_f",
            "head": "lm_head",
        },
        layer="transformer.h.{}.",
        places=_EVERYWHERE
        | {
            f"self_attn.{x}_proj.{kind}": Place(f"attn.c_attn.{kind}", part, 3, transposed=kind == "weight")
            for part, x in enumerate("qkv")
            for kind in ("weight", "bias")
        }
        | {
            "self_attn.o_proj.weight": Place("attn.c_proj.weight", transposed=True),
            "self_attn.o_proj.bias": Place("attn.c_proj.bias"),
        },
        buffers=("transformer.h.*.attn.bias", "transformer.h.*.attn.masked_bias"),
    ),
}


def to_hf(tensors: dict[str, Tensor], architecture: Architecture, family: str) -> dict[str, Tensor]:
    """A model's parameters under the names and in the layouts of a family of Hugging Face checkpoints.

    Args:
        tensors: every parameter of the model by Headway's name, each whole (no DTensor).
        family: `llama` (also Qwen3, whose layers are named alike), `transnormer` or `gpt2`.

    Returns:
        Contiguous tensors of unchanged dtype; they may share memory with the given ones. A head that is tied to the
        embedding is left out, as `save_pretrained` does.

    Raises:
        ValueError: an unknown family; parameters that have no name in it or that it cannot pack; or tensors missing,
            left over or of another shape than the architecture says, all of them named.
    """
    known, shapes = places(architecture, family), parameter_shapes(architecture)
    _check(tensors, shapes, "this model")
    groups: dict[str, dict[int, str]] = {}
    for name, place in known.items():
        groups.setdefault(place.name, {})[place.part] = name
    out = {}
    for outside, parts in groups.items():
        names = [parts[part] for part in sorted(parts)]
        out[outside] = known[names[0]].lay_out([tensors[name] for name in names]).contiguous()
    return out


def from_hf(tensors: dict[str, Tensor], architecture: Architecture, family: str) -> dict[str, Tensor]:
    """A model's parameters by Headway's names, from the tensors of a Hugging Face checkpoint.

    Args:
        tensors: everything the checkpoint holds. Buffers of older versions are passed over, a head that is tied may
            be there or not, and so may the family's prefix (`transformer.wte.weight` or `wte.weight`).
        family: as in `to_hf`.

    Returns:
        Contiguous tensors of unchanged dtype; they may share memory with the given ones.

    Raises:
        ValueError: as `to_hf`; or a head that differs from the embedding in a model that ties them.
    """
    known, shapes = places(architecture, family), parameter_shapes(architecture)
    given = _parameters_of(tensors, architecture, FAMILIES[family])
    _check(given, {place.name: place.shape(shapes[name]) for name, place in known.items()}, "the checkpoint")
    return {name: place.take(given[place.name]) for name, place in known.items()}


def parameter_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter of the model by its name."""
    with torch.device("meta"):
        model = Model(architecture)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def places(architecture: Architecture, family: str) -> dict[str, Place]:
    """Where each parameter of the model, by Headway's name, lies in a checkpoint of the family.

    Raises:
        ValueError: an unknown family, or parameters that have no name in it or that it cannot pack, all of them named.
    """
    if family not in FAMILIES:
        near = difflib.get_close_matches(family, FAMILIES, n=1, cutoff=0.0)
        raise ValueError(
            f"{family!r} is no family of checkpoints: expected one of {', '.join(FAMILIES)}; the nearest is {near[0]}."
        )
    shapes = parameter_shapes(architecture)
    found = {name: _place(name, architecture, FAMILIES[family]) for name in shapes}
    nameless = [name for name, place in found.items() if place is None]
    if nameless:
        raise ValueError(
            f"checkpoints of the family {family} have no name for {', '.join(nameless)}: "
            "choose another family, or other settings for the layers concerned."
        )
    known = {name: place for name, place in found.items() if place is not None}
    if faults := _packing_faults(known, shapes):
        raise ValueError(" ".join(faults))
    return known


def _place(name: str, architecture: Architecture, family: Family) -> Place | None:
    """Where one parameter lies; None where the family has no name for it."""
    module, _, kind = name.rpartition(".")
    if not name.startswith("layers."):
        return Place(f"{family.modules[module]}.{kind}") if module in family.modules else None
    _, layer, part, inside = name.split(".", 3)
    if part.endswith("_norm"):
        outside = family.modules[f"layers.{{}}.{part}"]
        return Place(f"{outside}.{inside}".format(layer))
    names, parts = (
        (architecture.mixer_names, architecture.mixers)
        if part == "mixer"
        else (architecture.feedforward_names, architecture.feedforwards)
    )
    layer_class, _ = parts[names[int(layer)]]
    declared = layer_class.hf.get(inside)
    if declared is None:
        return None
    place = family.places.get(declared, _declared(declared)) if isinstance(declared, str) else _declared(declared)
    return replace(place, name=family.layer.format(layer) + place.name)


def _declared(name: HFName) -> Place:
    """What a layer's own table says."""
    if isinstance(name, Packed):
        return Place(name.name, name.part, name.parts)
    if isinstance(name, Transposed):
        return Place(name.name, transposed=True)
    return Place(name)


def _packing_faults(known: dict[str, Place], shapes: dict[str, tuple[int, ...]]) -> list[str]:
    """Matrices that cannot be the equal parts of one."""
    groups: dict[str, list[str]] = {}
    for name, place in known.items():
        groups.setdefault(place.name, []).append(name)
    faults = []
    for outside, names in groups.items():
        wanted = list(range(known[names[0]].parts))
        assert sorted(known[name].part for name in names) == wanted, f"{outside} is made of {names}"
        if len({shapes[name] for name in names}) > 1:
            listed = ", ".join(f"{name} {list(shapes[name])}" for name in names)
            faults.append(
                f"{outside} packs {len(names)} matrices of one shape, and these differ: {listed}; equal widths and "
                "head counts of queries, keys and values work."
            )
    return faults


def _parameters_of(tensors: dict[str, Tensor], architecture: Architecture, family: Family) -> dict[str, Tensor]:
    """The checkpoint's parameters under their full names: without buffers, and without a head that is tied."""
    bare = not any(name.startswith(family.base) for name in tensors)
    given = {family.base + name if bare and name != HEAD else name: tensor for name, tensor in tensors.items()}
    given = {
        name: tensor
        for name, tensor in given.items()
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in family.buffers)
    }
    embedding = given.get(family.modules["embedding"] + ".weight")
    if architecture.model.tie_embeddings and HEAD in given and embedding is not None:
        if not torch.equal(given[HEAD], embedding):
            raise ValueError(
                f"model.tie_embeddings = true, but the checkpoint's {HEAD} differs from its "
                f"{family.modules['embedding']}.weight: set model.tie_embeddings = false."
            )
        del given[HEAD]
    return given


def _check(given: dict[str, Tensor], wanted: dict[str, tuple[int, ...]], what: str) -> None:
    """Raise ValueError naming every tensor that is missing, left over or of another shape."""
    faults = []
    if missing := _listed(wanted.keys() - given.keys()):
        faults.append(f"missing from {what}: {missing}.")
    if left_over := _listed(given.keys() - wanted.keys()):
        faults.append(f"left over in {what}, since the configuration has no place for them: {left_over}.")
    faults += [
        f"{name} in {what} is {list(given[name].shape)}, expected {list(shape)}."
        for name, shape in wanted.items()
        if name in given and tuple(given[name].shape) != shape
    ]
    if faults:
        raise ValueError(" ".join(faults))


def _listed(names: Collection[str]) -> str:
    return ", ".join(sorted(names))
