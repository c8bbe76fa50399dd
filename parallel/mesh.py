"""The one file that does mesh arithmetic: which layouts are legal, and the device mesh of a legal one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any, get_args

from parallel.config import ParallelConfig
from parallel.zero_config import engine_faults

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    from model.config import Architecture


STAGES_PER_RANK = {"1f1b": 1, "interleaved1f1b": 2, "zbv": 2}


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
    sequence_parallel: bool = True
    pp_schedule: str = "1f1b"

    @property
    def num_stages(self) -> int:
        """Stages of the pipeline: one a rank, or two where the schedule wants it."""
        return self.pp * STAGES_PER_RANK[self.pp_schedule] if self.pp > 1 else 1

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
    return Layout(
        config.dp_replicate,
        dp_shard,
        config.pp,
        config.cp,
        config.tp,
        config.ep,
        microbatches,
        config.sequence_parallel,
        config.pp_schedule,
    )


def stages_of_rank(layout: Layout, rank: int) -> list[int]:
    """Which stages the rank holds in a pipeline: with two, one after a whole round, or (zbv) back again in a V."""
    if layout.num_stages == layout.pp:
        return [rank]
    second = layout.num_stages - 1 - rank if layout.pp_schedule == "zbv" else layout.pp + rank
    return [rank, second]


def costliest_ranks(layout: Layout) -> list[int]:
    """For each place in the pipeline one of its ranks than which no other there holds more.

    Shares of parameters are rounded up, so it is a first one, but of the pieces of a sequence it has the last, which
    sees most keys.
    """
    return list(range((layout.cp - 1) * layout.tp, layout.world_size, layout.world_size // layout.pp))


def layout_faults(
    config: ParallelConfig,
    world_size: int,
    architecture: Architecture,
    *,
    seq_len: int,
    global_batch_size: int,
    isolate_documents: bool = True,
    compiled: bool = False,
) -> list[str]:
    """Why this layout cannot carry this model and batch: all reasons, each with its numbers and a legal choice.

    Args:
        isolate_documents: whether documents begin anywhere in a row; otherwise a row is one document.
        compiled: whether `run.compile` is set.
    """
    sizes = {name: getattr(config, name) for name in ("dp_replicate", "dp_shard", "pp", "cp", "tp", "ep")}
    wrong = [name for name, size in sizes.items() if size < 1 and not (name == "dp_shard" and size == -1)]
    if wrong:
        return [f"parallel.{name} = {sizes[name]} must be at least 1." for name in wrong]
    layout = resolve_layout(config, world_size)
    faults = _world_faults(layout, world_size) + engine_faults(config, compiled=compiled)
    faults += _batch_faults(layout, global_batch_size)
    faults += _model_faults(layout, architecture)
    faults += _schedule_faults(config, layout, architecture, compiled)
    faults += _sequence_faults(config, layout, architecture, seq_len, isolate_documents)
    return faults + _expert_faults(layout, architecture)


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
    rounds = max(1, layout.microbatches // layout.pp)
    if layout.pp > 1 and layout.pp_schedule == "interleaved1f1b" and layout.microbatches % rounds:
        faults.append(
            f'parallel.pp_schedule = "interleaved1f1b" runs microbatches = {layout.microbatches} in {rounds} rounds of '
            f"pp = {layout.pp} or more, which they do not fill evenly: "
            f"take {rounds * layout.pp} or {(rounds + 1) * layout.pp}."
        )
    return faults


def _schedule_faults(config: ParallelConfig, layout: Layout, architecture: Architecture, compiled: bool) -> list[str]:
    """Why this order of forward and backward cannot be."""
    if layout.pp == 1:
        return []
    faults = []
    num_layers = architecture.model.num_layers
    if layout.num_stages > num_layers:
        each = layout.num_stages // layout.pp
        made = f'with pp_schedule = "{layout.pp_schedule}" makes {layout.num_stages} stages, ' if each > 1 else "is "
        other = ', or "1f1b"' if each > 1 and layout.pp <= num_layers else ""
        faults.append(
            f"parallel.pp = {layout.pp} {made}more than model.num_layers = {num_layers}: "
            f"take pp of at most {num_layers // each}{other}."
        )
    if layout.pp_schedule == "zbv" and config.recompute != "none":
        faults.append(
            f'parallel.recompute = "{config.recompute}" with pp_schedule = "zbv": it takes backward apart in two, and '
            'each half would compute the activations again; take recompute = "none", or pp_schedule = "1f1b".'
        )
    if layout.pp_schedule == "zbv" and compiled:
        faults.append(
            'run.compile with parallel.pp_schedule = "zbv": backward cannot be taken apart inside of compiled blocks; '
            'take compile = false, or pp_schedule = "1f1b".'
        )
    return faults


def _model_faults(layout: Layout, architecture: Architecture) -> list[str]:
    units: dict[str, int] = {}
    for section, parts in (("mixers", architecture.mixers), ("feedforwards", architecture.feedforwards)):
        for name, (_, settings) in parts.items():
            counts: dict[str, int] = getattr(settings, "tensor_parallel_units", dict)()
            units |= {f"{section}.{name}.{key}": count for key, count in counts.items()}
    vocab_size = architecture.model.vocab_size
    legal = next(
        tp
        for tp in range(layout.tp, 0, -1)
        if _all_have_rows(vocab_size, tp) and all(count % tp == 0 for count in units.values())
    )
    faults = [
        f"parallel.tp = {layout.tp} does not divide {key} = {count}: the largest tp that fits this model is {legal}."
        for key, count in units.items()
        if count % layout.tp
    ]
    if not _all_have_rows(vocab_size, layout.tp):
        faults.append(
            f"parallel.tp = {layout.tp} leaves a rank without any of model.vocab_size = {vocab_size} rows: "
            f"the largest tp that fits this model is {legal}."
        )
    if layout.tp > 1:
        faults += _undeclared(architecture)
    return faults


def _expert_faults(layout: Layout, architecture: Architecture) -> list[str]:
    """Why experts cannot be spread so."""
    shards, ep = layout.dp_shard * layout.cp, layout.ep
    counts = {
        f"feedforwards.{name}.num_experts": settings.num_experts
        for name, (_, settings) in architecture.feedforwards.items()
        if hasattr(settings, "num_experts")
    }
    if ep > 1 and not counts:
        return [f"parallel.ep = {ep}, but no feed-forward of this model has experts: set ep = 1."]
    legal = next(size for size in range(ep, 0, -1) if all(n % size == 0 for n in (shards, *counts.values())))
    faults = []
    if shards % ep:
        faults.append(
            f"parallel.ep = {ep} does not divide dp_shard x cp = {layout.dp_shard} x {layout.cp}: the largest ep that "
            f"fits this model is {legal}."
        )
    faults += [
        f"parallel.ep = {ep} does not divide {key} = {count}: the largest ep that fits this model is {legal}."
        for key, count in counts.items()
        if count % ep
    ]
    return faults


def _sequence_faults(
    config: ParallelConfig, layout: Layout, architecture: Architecture, seq_len: int, isolate_documents: bool
) -> list[str]:
    """Why rows of so many tokens cannot be cut into these pieces."""
    if seq_len % layout.cp:
        near = largest_divisor(seq_len, layout.cp)
        return [
            f"parallel.cp = {layout.cp} does not divide data.seq_len = {seq_len}: the largest cp that does is {near}."
        ]
    piece = seq_len // layout.cp
    faults = []
    if config.sequence_parallel and layout.tp > 1 and piece % layout.tp:
        faults.append(
            f"parallel.sequence_parallel cuts data.seq_len / cp = {piece} tokens into tp = {layout.tp} "
            f"pieces: the largest tp that divides it is {largest_divisor(piece, layout.tp)}, "
            "or set sequence_parallel = false."
        )
    if layout.cp > 1:
        said = [
            f"parallel.cp = {layout.cp}, mixers.{name}: {fault}"
            for name, (mixer, settings) in architecture.mixers.items()
            for fault in _crossing_faults(mixer, settings, layout, piece, isolate_documents)
        ]
        # A mixer that cannot be cut so need not be tried.
        faults += said or [f"parallel.cp = {layout.cp}: {fault}" for fault in _uncrossed(architecture)]
    return faults


def _crossing_faults(mixer: type, settings: Any, layout: Layout, piece: int, isolate_documents: bool) -> list[str]:
    """Why a mixer, a user's own perhaps, cannot work on pieces of so many tokens."""
    from model.layer import Crossing

    crossing = getattr(mixer, "context", None)
    if crossing not in get_args(Crossing):
        said = "does not say what" if crossing is None else f"says {crossing!r}, which is nothing that"
        words = ", ".join(f'"{word}"' for word in get_args(Crossing))
        return [f"{mixer.__name__} {said} crosses a cut of the sequence: its context has to be one of {words}."]
    if crossing == "heads" and settings.num_heads % (layout.tp * layout.cp):
        near = largest_divisor(settings.num_heads // layout.tp or 1, layout.cp)
        return [
            f"heads are traded for pieces of the sequence, and tp x cp = {layout.tp} x {layout.cp} does not divide "
            f"num_heads = {settings.num_heads}: the largest cp that fits is {near}."
        ]
    faults: Callable[..., list[str]] = getattr(settings, "sequence_cut_faults", lambda *_: [])
    return faults(piece, isolate_documents)


def _all_have_rows(vocab_size: int, tp: int) -> bool:
    """Whether parts of equal size, rounded up, leave something for the last rank."""
    return -(-vocab_size // tp) * (tp - 1) < vocab_size


def _undeclared(architecture: Architecture) -> list[str]:
    """Layers, a user's own perhaps, that do not say how they are cut."""
    import torch

    from model.stack import Model
    from parallel.tensor import sharding_faults

    with torch.device("meta"):
        return sharding_faults(Model(architecture))


def _uncrossed(architecture: Architecture) -> list[str]:
    """Mixers, a user's own perhaps, that do not do what they say about cuts of the sequence."""
    import torch

    from model.stack import Model
    from parallel.context import crossing_faults

    # What each modality has for itself is no matter of the sequence.
    with torch.device("meta"):
        return crossing_faults(Model(replace(architecture, untie=None)))


def largest_divisor(number: int, at_most: int) -> int:
    """The largest divisor of `number` that is not above `at_most`."""
    return next(d for d in range(min(at_most, number), 0, -1) if number % d == 0)


@dataclass(frozen=True)
class Mesh:
    """The processes of a layout as torch's meshes, and this one's place among them.

    Attributes:
        whole: `[pp, dp_replicate, dp_shard, cp, tp]`; ranks of one tp group are neighbours, and those of one cp group
            come next.
        data: `[dp_replicate, shards]`, the ranks that have other tokens, and other shards of this one's parameters:
            `shards` is dp_shard x cp, since ranks with other pieces of a sequence differ in their tokens as well.
        tensors: `[dp_replicate, tp, shards]`, the order in which a parameter is cut: its tp share first, and that among
            the ranks with other tokens.
        experts: ep ranks that are neighbours among the shards, each of which has other experts. One alone: None.
        expert_data, expert_tensors: as `data` and `tensors`, of the ranks that have the same experts, which are all of
            them without expert parallelism.
    """

    layout: Layout
    whole: DeviceMesh
    data: DeviceMesh
    tensors: DeviceMesh
    experts: ProcessGroup | None
    expert_data: DeviceMesh
    expert_tensors: DeviceMesh

    def rank(self, name: str) -> int:
        """This process's place along one dimension."""
        return self.whole.get_local_rank(name)

    def group(self, name: str) -> ProcessGroup:
        """The processes along one dimension through this one."""
        return self.whole.get_group(name)

    @property
    def expert_rank(self) -> int:
        """Which share of the experts this process has."""
        shard = self.rank("dp_shard") * self.layout.cp + self.rank("cp")
        return shard % self.layout.ep

    @property
    def data_rank(self) -> int:
        """Which share of the global batch this process has."""
        return self.rank("dp_replicate") * self.layout.dp_shard + self.rank("dp_shard")

    @property
    def is_first_of_share(self) -> bool:
        """Whether, of the processes with the same share of the batch, this is the one that speaks for it."""
        return self.rank("pp") == self.rank("cp") == self.rank("tp") == 0


def build_mesh(layout: Layout, device_type: str) -> Mesh:
    """The meshes of a layout. Collective: every rank calls it."""
    from torch.distributed import new_group
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

    names = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
    shape = tuple(getattr(layout, name) for name in names)
    whole = init_device_mesh(device_type, shape, mesh_dim_names=names)
    groups = {name: whole.get_group(name) for name in ("dp_replicate", "tp")}
    shards = whole["dp_shard"] if layout.cp == 1 else whole["dp_shard", "cp"]._flatten("shards")
    groups["shards"] = shards.get_group()
    if layout.cp > 1 and groups["shards"].group_name == whole.get_group("cp").group_name:
        # All ranks, in both cases. FSDP gathers ahead while layers exchange, and must not wait in the same line.
        groups["shards"] = new_group()
    # [dp_replicate, shards, tp]: those that have this one's stage.
    ranks = whole["dp_replicate", "dp_shard", "cp", "tp"].mesh.flatten(1, 2)

    def mesh_of(ranks: Tensor, *order: str) -> DeviceMesh:
        return DeviceMesh.from_group([groups[name] for name in order], device_type, mesh=ranks, mesh_dim_names=order)

    tp_rank, ep = whole.get_local_rank("tp"), layout.ep
    data = mesh_of(ranks[:, :, tp_rank], "dp_replicate", "shards")
    tensors = mesh_of(ranks.transpose(1, 2), "dp_replicate", "tp", "shards")
    if ep == 1:
        return Mesh(layout, whole, data, tensors, None, data, tensors)
    among = init_device_mesh(
        device_type,
        (layout.pp, layout.dp_replicate, layout.dp_shard * layout.cp // ep, ep, layout.tp),
        mesh_dim_names=("pp", "dp_replicate", "expert_shards", "ep", "tp"),
    )
    experts = among.get_group("ep")
    if experts.group_name == groups["shards"].group_name:
        experts = new_group()  # All ranks; as above.
    groups["expert_shards"] = among.get_group("expert_shards")
    # [dp_replicate, expert_shards, tp]: those of them that have this one's experts.
    ranks = ranks.unflatten(1, (-1, ep))[:, :, among.get_local_rank("ep")]
    expert_data = mesh_of(ranks[:, :, tp_rank], "dp_replicate", "expert_shards")
    expert_tensors = mesh_of(ranks.transpose(1, 2), "dp_replicate", "tp", "expert_shards")
    return Mesh(layout, whole, data, tensors, experts, expert_data, expert_tensors)
