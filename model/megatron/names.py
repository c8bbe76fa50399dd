"""Headway's parameters and the tensors of Megatron's GPTModel: names, packing, and how tensor parallelism cuts them.

Names are those of megatron-core's distributed checkpoints, with the layer's global number
(`decoder.layers.3.self_attention.linear_qkv.weight`). They are TransformerEngine's: a norm is fused into the linear map
after it. The local implementation keeps norms apart in files of ranks; `canonical` knows both.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from model.config import Architecture
from model.hf.names import parameter_shapes

EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"
LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")

# The local implementation's name inside a layer -> TransformerEngine's.
LOCAL = {
    f"{norm}.{kind}": f"{fused}.layer_norm_{kind}"
    for norm, fused in (("input_layernorm", "self_attention.linear_qkv"), ("pre_mlp_layernorm", "mlp.linear_fc1"))
    for kind in ("weight", "bias")
}


@dataclass(frozen=True)
class Held:
    """A tensor of a Megatron checkpoint.

    Attributes:
        name: there, of the whole tensor.
        parts: the parameters it is made of, by Headway's names, in their order.
        groups: its rows are so many equal spans, each with some rows of every part: `[G, q.. k v]` for attention.
        spans: tensor parallelism cuts so many equal spans of rows one by one: gate and up are cut each for itself.
        cut: the dimension along which tensor parallelism cuts it; None: every rank has all of it.
        padded: it has more rows than the parameter, so that their number is a round one.
    """

    name: str
    parts: tuple[str, ...]
    groups: int = 1
    spans: int = 1
    cut: Literal[0, 1] | None = None
    padded: bool = False

    def shape(self, shapes: dict[str, tuple[int, ...]], rows: int) -> tuple[int, ...]:
        """Of the whole tensor, from those of the parameters; of `rows` rows where it is padded."""
        count = rows if self.padded else sum(shapes[part][0] for part in self.parts)
        return (count, *shapes[self.parts[0]][1:])

    def pack(self, parts: list[Tensor], rows: int) -> Tensor:
        """The whole tensor, from its parts. Rows that it has beyond the parameter's are zeros."""
        whole = torch.cat([part.unflatten(0, (self.groups, -1)) for part in parts], dim=1).flatten(0, 1)
        if self.padded and rows > len(whole):
            whole = torch.cat((whole, whole.new_zeros(rows - len(whole), *whole.shape[1:])))
        return whole

    def take(self, part: str, whole: Tensor, shapes: dict[str, tuple[int, ...]]) -> Tensor:
        """One of its parts, from the whole tensor."""
        if self.padded:
            return whole[: shapes[part][0]].contiguous()
        rows = [shapes[name][0] // self.groups for name in self.parts]
        place = self.parts.index(part)
        taken = whole.unflatten(0, (self.groups, -1)).narrow(1, sum(rows[:place]), rows[place])
        return taken.flatten(0, 1).contiguous()

    def merge(self, shards: list[Tensor]) -> Tensor:
        """The whole tensor, from what each rank of tensor parallelism has of it."""
        if self.cut == 0:
            return torch.cat([shard.unflatten(0, (self.spans, -1)) for shard in shards], dim=1).flatten(0, 1)
        if self.cut == 1:
            return torch.cat(shards, dim=1)
        return shards[0]

    def merged_shape(self, shards: list[tuple[int, ...]]) -> tuple[int, ...]:
        """That of `merge`, from those of the shards."""
        shape = list(shards[0])
        if self.cut is not None:
            shape[self.cut] = sum(shard[self.cut] for shard in shards)
        return tuple(shape)


def held_tensors(architecture: Architecture) -> dict[str, Held]:
    """The tensors of a Megatron checkpoint of this model, by name. `arguments_of` has found that there is one."""
    shapes = parameter_shapes(architecture)
    found = [
        Held(EMBEDDING, ("embedding.weight",), cut=0, padded=True),
        Held("embedding.position_embeddings.weight", ("positions.weight",)),
        Held("decoder.final_layernorm.weight", ("final_norm.weight",)),
        Held("decoder.final_layernorm.bias", ("final_norm.bias",)),
        Held(HEAD, ("head.weight",), cut=0, padded=True),
    ]
    for layer, mixer in enumerate(architecture.mixer_names):
        found += _layer(
            layer, architecture.mixers[mixer][1].groups, f"layers.{layer}.feedforward.gate.weight" in shapes
        )
    known = {held.name: held for held in found if held.parts[0] in shapes}
    named = {part for held in known.values() for part in held.parts}
    assert named == set(shapes), f"without a name in Megatron: {sorted(named ^ set(shapes))}"
    return known


def _layer(layer: int, groups: int, gated: bool) -> list[Held]:
    """What a layer may hold; some of it only with biases, or with a norm of queries and keys."""
    here, there = f"layers.{layer}.", f"decoder.layers.{layer}."
    attention, mlp = there + "self_attention.", there + "mlp."
    into = ("gate", "up") if gated else ("up",)
    found = [Held(f"{attention}{x}_layernorm.weight", (f"{here}mixer.{x}_norm.weight",)) for x in "qk"]
    for kind in ("weight", "bias"):
        row: Literal[1] | None = 1 if kind == "weight" else None
        gate_up = tuple(f"{here}feedforward.{x}.{kind}" for x in into)
        queries_keys_values = tuple(f"{here}mixer.{x}.{kind}" for x in "qkv")
        found += [
            Held(f"{attention}linear_qkv.layer_norm_{kind}", (f"{here}mixer_norm.{kind}",)),
            Held(f"{attention}linear_qkv.{kind}", queries_keys_values, groups, cut=0),
            Held(f"{attention}linear_proj.{kind}", (f"{here}mixer.o.{kind}",), cut=row),
            Held(f"{mlp}linear_fc1.layer_norm_{kind}", (f"{here}feedforward_norm.{kind}",)),
            Held(f"{mlp}linear_fc1.{kind}", gate_up, spans=len(gate_up), cut=0),
            Held(f"{mlp}linear_fc2.{kind}", (f"{here}feedforward.down.{kind}",), cut=row),
        ]
    return found


def canonical(name: str) -> str:
    """The name that we go by, of one that either implementation of Megatron uses."""
    match = LAYER.fullmatch(name)
    return f"decoder.layers.{match[1]}.{LOCAL.get(match[2], match[2])}" if match else name


def local_name(name: str) -> str:
    """What the local implementation calls it."""
    match = LAYER.fullmatch(name)
    fused = {theirs: ours for ours, theirs in LOCAL.items()}
    return f"decoder.layers.{match[1]}.{fused.get(match[2], match[2])}" if match else name
