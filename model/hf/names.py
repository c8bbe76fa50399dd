"""Headway's parameter names and those of Hugging Face checkpoints, both ways.

Only names and layouts: no value changes, no file is opened, nothing is loaded. Inside a layer the names are those of
the layer's own `hf` table; what stands around the layers, and where a family lays a matrix out in another way, is said
here, once for each family.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from model.config import Architecture
from model.layer import HFName, Packed, Transposed
from model.order import Order, order_of
from model.stack import Model


@dataclass(frozen=True)
class Place:
    """Where a parameter lies in a checkpoint: the whole tensor `name`, or one of its equal row groups.

    Attributes:
        part, parts: which of how many row groups, counted as Headway lays rows out.
        heads: the groups lie one after the other in each of so many equal spans of rows.
        transposed: the checkpoint holds `[inputs, outputs]`, so groups of rows are groups of columns there.
        middle_axis: the checkpoint holds `[H, d]` as `[H, 1, d]`.
        order: how heads are kept here that lie there as they are numbered.
    """

    name: str
    part: int = 0
    parts: int = 1
    heads: int = 1
    transposed: bool = False
    middle_axis: bool = False
    order: Order | None = None

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of the whole tensor there, from that of the parameter here."""
        whole = (shape[0] * self.parts, *shape[1:])
        if self.middle_axis:
            whole = (whole[0], 1, *whole[1:])
        return whole[::-1] if self.transposed else whole

    def lay_out(self, parts: list[Tensor]) -> Tensor:
        """The whole tensor there, from its parts here in their order."""
        whole = parts[0] if self.order is None else self.order.inverse.apply(parts[0])
        if len(parts) > 1:
            # [heads, parts, rows, ...]
            whole = torch.stack([part.unflatten(0, (self.heads, -1)) for part in parts], dim=1).flatten(0, 2)
        if self.middle_axis:
            whole = whole.unsqueeze(1)
        return whole.t() if self.transposed else whole

    def take(self, whole: Tensor) -> Tensor:
        """The parameter here, from the whole tensor there."""
        whole = whole.t() if self.transposed else whole
        if self.middle_axis:
            whole = whole.squeeze(1)
        taken = whole.unflatten(0, (self.heads, self.parts, -1))[:, self.part].flatten(0, 1)
        return (taken if self.order is None else self.order.apply(taken)).contiguous()


@dataclass(frozen=True)
class Family:
    """What a family of checkpoints calls the parts around the layers.

    Attributes:
        base: prefix of all but the head. A checkpoint of the model without its head may leave it out.
        modules: Headway's module name -> the name there; `{}` is the layer. What is missing has no name there.
        layer: prefix of what stands inside a layer.
        places: name in a layer's `hf` table -> where this family keeps it instead.
        buffers: patterns of tensors that are no parameters, which some checkpoints hold: passed over.
        fillers: a matrix of one row that a checkpoint holds beside the other one named, with as many columns, and
            whose values make no difference. Both are names inside a layer. Passed over, and written as zeros.
    """

    base: str
    modules: dict[str, str]
    layer: str
    places: dict[str, Place] = field(default_factory=dict)
    buffers: tuple[str, ...] = ()
    fillers: dict[str, str] = field(default_factory=dict)


HEAD = "lm_head.weight"

OWN = "headway"
"""The family that keeps our own names, below the prefix of the class of transformers around the model."""

# Wherever a Lightning layer stands: its angles have an axis between heads and channels there.
_EVERYWHERE = {"token_mixer.lrpe.theta": Place("token_mixer.lrpe.theta", middle_axis=True)}

_LLAMA_MODULES = {
    "embedding": "model.embed_tokens",
    "layers.{}.mixer_norm": "model.layers.{}.input_layernorm",
    "layers.{}.feedforward_norm": "model.layers.{}.post_attention_layernorm",
    "final_norm": "model.norm",
    "head": "lm_head",
}

FAMILIES = {
    "llama": Family(
        base="model.",
        modules=_LLAMA_MODULES,
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
    # As transformers 5 writes it; in memory it renames and packs the experts.
    "mixtral": Family(
        base="model.",
        modules=_LLAMA_MODULES,
        layer="model.layers.{}.",
        places=_EVERYWHERE,
        buffers=("model.layers.*.self_attn.rotary_emb.inv_freq",),
    ),
    # Likewise. Every feed-forward is a mixture there; a plain one is that of one expert, since the router says 1 then
    # whatever its weights are.
    "minimax": Family(
        base="model.",
        modules=_LLAMA_MODULES,
        layer="model.layers.{}.",
        places=_EVERYWHERE
        | {
            f"mlp.{ours}_proj.weight": Place(f"block_sparse_moe.experts.0.{theirs}.weight")
            for ours, theirs in (("gate", "w1"), ("up", "w3"), ("down", "w2"))
        },
        # What they hold follows from the decay schedule: transformers computes it where it is missing.
        buffers=tuple(
            f"model.layers.*.self_attn.{name}" for name in ("slope_rate", "query_decay", "key_decay", "diagonal_decay")
        ),
        fillers={"block_sparse_moe.gate.weight": "block_sparse_moe.experts.0.w1.weight"},
    ),
}


def to_hf(tensors: dict[str, Tensor], architecture: Architecture, family: str) -> dict[str, Tensor]:
    """A model's parameters under the names and in the layouts of a family of Hugging Face checkpoints.

    Args:
        tensors: every parameter of the model by Headway's name, each whole (no DTensor).
        family: `llama` (also Qwen3, whose layers are named alike), `transnormer`, `gpt2`, `mixtral` or `minimax`.

    Returns:
        Contiguous tensors of unchanged dtype; they may share memory with the given ones. A head that is tied to the
        embedding is left out, as `save_pretrained` does.

    Raises:
        ValueError: an unknown family; parameters that have no name in it or that it cannot pack; or tensors missing,
            left over or of another shape than the architecture says, all of them named.
    """
    known, shapes = places(architecture, family), parameter_shapes(architecture)
    check_tensors({name: tuple(tensor.shape) for name, tensor in tensors.items()}, shapes, "this model")
    out = {
        outside: known[names[0]].lay_out([tensors[name] for name in names]).contiguous()
        for outside, names in made_of(known).items()
    }
    some = next(iter(out.values()))
    return out | {name: some.new_zeros(shape) for name, shape in fillers(architecture, family).items()}


def from_hf(tensors: dict[str, Tensor], architecture: Architecture, family: str) -> dict[str, Tensor]:
    """A model's parameters by Headway's names, from the tensors of a Hugging Face checkpoint; see `match`.

    Returns:
        Contiguous tensors of unchanged dtype; they may share memory with the given ones.
    """
    known = places(architecture, family)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    keys = match(shapes, tensors.__getitem__, architecture, family)
    return {name: place.take(tensors[keys[place.name]]) for name, place in known.items()}


def match(
    given: Mapping[str, tuple[int, ...]], read: Callable[[str], Tensor], architecture: Architecture, family: str
) -> dict[str, str]:
    """Which tensor of a Hugging Face checkpoint is which: name in the family -> key in this checkpoint.

    Args:
        given: shapes of everything the checkpoint holds. What stands for no parameter is passed over, a head that is
            tied may be there or not, and so may the family's prefix (`transformer.wte.weight` or `wte.weight`).
        read: gives a tensor by its key.
        family: as in `to_hf`.

    Raises:
        ValueError: as `to_hf`; a head that differs from the embedding in a model that ties them; or several experts
            where the architecture has a plain feed-forward.
    """
    known, shapes = places(architecture, family), parameter_shapes(architecture)
    keys = _parameter_keys(given, read, architecture, family, {place.name for place in known.values()})
    found = {name: given[key] for name, key in keys.items()}
    check_tensors(found, {place.name: place.shape(shapes[name]) for name, place in known.items()}, "the checkpoint")
    return keys


def fillers(architecture: Architecture, family: str) -> dict[str, tuple[int, ...]]:
    """Shapes of tensors that a checkpoint of the family holds and no parameter stands for: zeros say nothing there."""
    if family == OWN:
        return {}
    shapes, known = parameter_shapes(architecture), places(architecture, family)
    wholes = {place.name: place.shape(shapes[name]) for name, place in known.items()}
    layers = [FAMILIES[family].layer.format(layer) for layer in range(architecture.model.num_layers)]
    return {
        layer + name: (1, *wholes[layer + beside][1:])
        for layer in layers
        for name, beside in FAMILIES[family].fillers.items()
        if layer + beside in wholes and layer + name not in wholes
    }


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
    if family == OWN:
        names = parameter_shapes(architecture)
        return {name: Place(f"model.{name}", order=order_of(architecture, name)) for name in names}
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


def made_of(known: dict[str, Place]) -> dict[str, list[str]]:
    """Each tensor of a checkpoint by its name there -> the parameters it is made of, in the order of their parts."""
    found: dict[str, list[str]] = {}
    for name, place in known.items():
        found.setdefault(place.name, []).append(name)
    return {outside: sorted(names, key=lambda name: known[name].part) for outside, names in found.items()}


def _place(name: str, architecture: Architecture, family: Family) -> Place | None:
    """Where one parameter lies; None where the family has no name for it."""
    module, _, kind = name.rpartition(".")
    if not name.startswith("layers."):
        return Place(f"{family.modules[module]}.{kind}") if module in family.modules else None
    _, layer, part, inside = name.split(".", 3)
    if part.endswith("_norm"):
        outside = family.modules.get(f"layers.{{}}.{part}")
        return None if outside is None else Place(f"{outside}.{inside}".format(layer))
    names, parts = (
        (architecture.mixer_names, architecture.mixers)
        if part == "mixer"
        else (architecture.feedforward_names, architecture.feedforwards)
    )
    layer_class, settings = parts[names[int(layer)]]
    declared = layer_class.hf_name(inside, settings)
    if declared is None:
        return None
    place = _declared(declared, settings)
    if isinstance(declared, str):
        place = family.places.get(declared, place)
    order = order_of(architecture, name)
    assert order is None or place.parts == 1, f"{name} is packed with others, and its heads are kept in another order"
    return replace(place, name=family.layer.format(layer) + place.name, order=order)


def _declared(name: HFName, settings: Any) -> Place:
    """What a layer's own table says."""
    if isinstance(name, Packed):
        return Place(name.name, name.part, name.parts, heads=settings.num_heads if name.per_head else 1)
    if isinstance(name, Transposed):
        return Place(name.name, transposed=True)
    return Place(name)


def _packing_faults(known: dict[str, Place], shapes: dict[str, tuple[int, ...]]) -> list[str]:
    """Matrices that cannot be the equal parts of one."""
    faults = []
    for outside, names in made_of(known).items():
        wanted = list(range(known[names[0]].parts))
        assert sorted(known[name].part for name in names) == wanted, f"{outside} is made of {names}"
        if len({shapes[name] for name in names}) > 1:
            listed = ", ".join(f"{name} {list(shapes[name])}" for name in names)
            faults.append(
                f"{outside} packs {len(names)} matrices of one shape, and these differ: {listed}; equal widths and "
                "head counts of queries, keys and values work."
            )
    return faults


def _parameter_keys(
    given: Mapping[str, tuple[int, ...]],
    read: Callable[[str], Tensor],
    architecture: Architecture,
    name: str,
    wanted: set[str],
) -> dict[str, str]:
    """Full name -> key of the checkpoint's parameters: without what is passed over, and a head that is tied.

    What is `wanted`, names in the family, is never passed over.
    """
    if name == OWN:
        return {key: key for key in given}
    family = FAMILIES[name]
    bare = not any(key.startswith(family.base) for key in given)
    keys = {family.base + key if bare and key != HEAD else key: key for key in given}
    routers = _matching(keys, [family.layer.format("*") + filler for filler in family.fillers]) - wanted
    for full in sorted(routers):
        if (experts := given[keys[full]][0]) != 1:
            raise ValueError(
                f"{keys[full]} in the checkpoint chooses among {experts} experts, where the configuration has a plain "
                f"feed-forward: num_local_experts = {experts} would say what the checkpoint is."
            )
    passed_over = routers | _matching(keys, family.buffers)
    keys = {full: key for full, key in keys.items() if full not in passed_over}
    embedding = keys.get(family.modules["embedding"] + ".weight")
    if architecture.model.tie_embeddings and HEAD in keys and embedding is not None:
        if not torch.equal(read(keys[HEAD]), read(embedding)):
            raise ValueError(
                f"model.tie_embeddings = true, but the checkpoint's {HEAD} differs from its "
                f"{family.modules['embedding']}.weight: set model.tie_embeddings = false."
            )
        del keys[HEAD]
    return keys


def _matching(names: Iterable[str], patterns: Collection[str]) -> set[str]:
    return {name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)}


def check_tensors(given: Mapping[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]], what: str) -> None:
    """Raise ValueError naming every tensor that is missing, left over or of another shape."""
    faults = []
    if missing := _listed(wanted.keys() - given.keys()):
        faults.append(f"missing from {what}: {missing}.")
    if left_over := _listed(given.keys() - wanted.keys()):
        faults.append(f"left over in {what}, since the configuration has no place for them: {left_over}.")
    faults += [
        f"{name} in {what} is {list(given[name])}, expected {list(shape)}."
        for name, shape in wanted.items()
        if name in given and given[name] != shape
    ]
    if faults:
        raise ValueError(" ".join(faults))


def _listed(names: Collection[str]) -> str:
    return ", ".join(sorted(names))
