"""The one file that does mesh arithmetic: which layouts are legal, and the device mesh of a legal one."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from parallel.config import ParallelConfig

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from model.config import Architecture


@dataclass(frozen=True)
class Layout:
    """A resolved layout: every factor a number."""

    dp_replicate: int
    dp_shard: int
    pp: int
    cp: int
    tp: int
    ep: int
    microbatches: int

    @property
    def data_parallel(self) -> int:
        """Into how many shares the global batch is cut."""
        return self.dp_replicate * self.dp_shard

    @property
    def world_size(self) -> int:
        return self.dp_replicate * self.dp_shard * self.pp * self.cp * self.tp


def resolve_layout(config: ParallelConfig, world_size: int) -> Layout:
    """Fill in `dp_shard = -1` and the default number of micro-batches; the result may be illegal (`layout_faults`)."""
    others = config.dp_replicate * config.pp * config.cp * config.tp
    dp_shard = max(1, world_size // max(1, others)) if config.dp_shard == -1 else config.dp_shard
    microbatches = config.microbatches or (2 * config.pp if config.pp > 1 else 1)
    return Layout(config.dp_replicate, dp_shard, config.pp, config.cp, config.tp, config.ep, microbatches)


def layout_faults(
    config: ParallelConfig, world_size: int, architecture: Architecture, *, seq_len: int, global_batch_size: int
) -> list[str]:
    """Why this layout cannot carry this model and batch: all reasons, each with its numbers and a legal choice."""
    sizes = {name: getattr(config, name) for name in ("dp_replicate", "dp_shard", "pp", "cp", "tp", "ep")}
    wrong = [name for name, size in sizes.items() if size < 1 and not (name == "dp_shard" and size == -1)]
    if wrong:
        return [f"parallel.{name} = {sizes[name]} must be at least 1." for name in wrong]
    layout = resolve_layout(config, world_size)
    faults = _world_faults(layout, world_size)
    faults += _batch_faults(layout, global_batch_size)
    faults += _model_faults(layout, architecture)
    if seq_len % layout.cp:
        faults.append(
            f"parallel.cp = {layout.cp} does not divide data.seq_len = {seq_len}: "
            f"the largest cp that does is {largest_divisor(seq_len, layout.cp)}."
        )
    elif config.sequence_parallel and layout.tp > 1 and (seq_len // layout.cp) % layout.tp:
        faults.append(
            f"parallel.sequence_parallel cuts data.seq_len / cp = {seq_len // layout.cp} tokens into tp = {layout.tp} "
            f"pieces: the largest tp that divides it is {largest_divisor(seq_len // layout.cp, layout.tp)}, "
            "or set sequence_parallel = false."
        )
    if (layout.dp_shard * layout.cp) % layout.ep:
        faults.append(
            f"parallel.ep = {layout.ep} does not divide dp_shard x cp = {layout.dp_shard} x {layout.cp}: "
            f"the largest ep that does is {largest_divisor(layout.dp_shard * layout.cp, layout.ep)}."
        )
    return faults


def unbuilt_faults(config: ParallelConfig) -> list[str]:
    """What is legal, but not carried by this version."""
    faults = [
        f"parallel.{name} = {getattr(config, name)}: this version spreads over dp_replicate and dp_shard only; "
        f"set {name} = 1."
        for name in ("tp", "pp", "cp", "ep")
        if getattr(config, name) > 1
    ]
    if config.engine != "torch":
        faults.append(f'parallel.engine = "{config.engine}": this version has the engine "torch" only.')
    return faults


def _world_faults(layout: Layout, world_size: int) -> list[str]:
    if layout.world_size == world_size:
        return []
    factors = {name: getattr(layout, name) for name in ("dp_replicate", "dp_shard", "pp", "cp", "tp")}
    product = " x ".join(f"{name} {size}" for name, size in factors.items())
    others = prod(size for name, size in factors.items() if name != "dp_shard")
    if world_size % others == 0:
        hint = f"with dp_shard = {world_size // others} (or -1) it fits"
    else:
        hint = f"start a multiple of {others} processes, or lower one of the factors"
    return [f"parallel: {product} = {layout.world_size}, but {world_size} processes were started: {hint}."]


def _batch_faults(layout: Layout, global_batch_size: int) -> list[str]:
    parts = layout.data_parallel * layout.microbatches
    if layout.microbatches < 1:
        return [f"parallel.microbatches = {layout.microbatches} must be at least 1."]
    faults = []
    if global_batch_size % parts:
        near = max(1, round(global_batch_size / parts)) * parts
        faults.append(
            f"data.global_batch_size = {global_batch_size} cannot be cut into dp_replicate x dp_shard x microbatches = "
            f"{layout.dp_replicate} x {layout.dp_shard} x {layout.microbatches} = {parts} equal parts: "
            f"the nearest size that can is {near}."
        )
    if layout.pp > 1 and layout.microbatches < layout.pp:
        faults.append(
            f"parallel.microbatches = {layout.microbatches} leaves stages of parallel.pp = {layout.pp} idle: "
            f"take at least {layout.pp}."
        )
    return faults


def _model_faults(layout: Layout, architecture: Architecture) -> list[str]:
    faults = []
    num_layers = architecture.model.num_layers
    if layout.pp > num_layers:
        faults.append(f"parallel.pp = {layout.pp} is more than model.num_layers = {num_layers}: at most {num_layers}.")
    for section, parts in (("mixers", architecture.mixers), ("feedforwards", architecture.feedforwards)):
        for name, (_, settings) in parts.items():
            units: dict[str, int] = getattr(settings, "tensor_parallel_units", dict)()
            for key, count in units.items():
                if count % layout.tp:
                    faults.append(
                        f"parallel.tp = {layout.tp} does not divide {section}.{name}.{key} = {count}: "
                        f"the largest tp that does is {largest_divisor(count, layout.tp)}."
                    )
    return faults


def largest_divisor(number: int, at_most: int) -> int:
    """The largest divisor of `number` that is not above `at_most`."""
    return next(d for d in range(min(at_most, number), 0, -1) if number % d == 0)


def build_mesh(layout: Layout, device_type: str) -> DeviceMesh:
    """The device mesh `[dp_replicate, dp_shard]`. Collective: every rank calls it."""
    from torch.distributed.device_mesh import init_device_mesh

    shape = (layout.dp_replicate, layout.dp_shard)
    return init_device_mesh(device_type, shape, mesh_dim_names=("dp_replicate", "dp_shard"))
