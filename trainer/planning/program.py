"""One training step of one rank, traced: the real program, on tensors without values and in a world of one process."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from model.batch import Batch
from model.layer import Mixer
from model.objective import Objective
from parallel.mesh import Layout, Mesh, build_mesh, costliest_ranks, resolve_layout
from parallel.spread import Spread, spread
from parallel.trace import Trace, Traffic
from trainer.config import Config
from trainer.objective import add_auxiliary_losses, make_objective
from trainer.optimizer import build_optimizer
from trainer.signals import StopRequest
from trainer.step import Updater

Sums = dict[tuple[str, str], Traffic]


@dataclass(frozen=True)
class Sent:
    """Collectives of one kind along one dimension of the mesh in one step, as one rank sees them.

    Attributes:
        dimension: of the mesh, or "all" for those of all ranks.
        count: how many there are; bytes_sent: by this rank, in all of them.
        ranks: of the group.
    """

    dimension: str
    kind: str
    count: int
    bytes_sent: int
    ranks: list[int] = field(repr=False)


@dataclass(frozen=True)
class RankTrace:
    """What one rank holds at its peak, and what it computes and sends in a step.

    Attributes:
        pp_rank: its place in the pipeline; layers: the blocks it holds.
        memory: bytes by category; their sum is the peak.
        block_flops, head_flops: forward operations for each token of a sequence, in the blocks held and in the head, of
            all tensor-parallel ranks together.
        uneven_flops: by how much a token of the last piece of a cut sequence costs more than one of the mean: it sees
            more keys.
    """

    pp_rank: int
    layers: list[int]
    memory: dict[str, int]
    sent: list[Sent]
    block_flops: float
    head_flops: float
    uneven_flops: float

    @property
    def peak(self) -> int:
        return sum(self.memory.values())


def trace_pipeline(config: Config, world_size: int, *, precision: str, gloo: bool) -> list[RankTrace]:
    """Trace a step for each place in the pipeline, on one rank that has it; of the others there none holds more.

    Args:
        config: legal for so many processes.
        gloo: count what torch's gloo backend copies beside the tensors.
    """
    layout = resolve_layout(config.parallel, world_size)
    traces = []
    for rank in costliest_ranks(layout):
        with _fake_world(rank, world_size):
            traces.append(trace_step(config, layout, precision=precision, fake=True, gloo=gloo))
        gc.collect()
    return traces


def trace_step(config: Config, layout: Layout, *, precision: str, fake: bool, gloo: bool) -> RankTrace:
    """Trace a step of this process, in the process group that there is. Collective where that is a real one.

    Args:
        fake: on tensors without values, and with as few micro-batches as show what all of them do.
    """
    traced = _few_microbatches(layout) if fake else layout
    mesh = build_mesh(traced, "cpu")
    model = spread(
        config.architecture,
        mesh,
        torch.device("cpu"),
        precision=precision,
        seq_len=config.data.seq_len,
        recompute=config.parallel.recompute,
        reparam=config.reparam,
    )
    rows = config.data.global_batch_size // (layout.data_parallel * layout.microbatches)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) if fake else nullcontext():
        if fake:
            model.allocate()
        else:
            model.initialise(config.run.seed)
            model.reparam.begin()
        lr_factors = add_auxiliary_losses(model, config)
        optimizer = build_optimizer(model, config.optimizer, config.run.freeze, lr_factors)
        if fake:
            _find_shapes(optimizer)
        batch = _batch(config, rows * traced.microbatches)
        trace = Trace(fake=fake, gloo=gloo)
        with trace:
            marks = _update(config, model, optimizer, batch, trace)
    more = layout.microbatches - traced.microbatches
    memory = trace.memory()
    memory["rest"] += more * (_size(batch) // traced.microbatches + _buffers(model, rows, config.data.seq_len))
    traffic = marks.with_more(trace.traffic, more, mesh)
    return RankTrace(mesh.rank("pp"), _layers(model), memory, _by_dimension(traffic, mesh), *_flops(config, model))


def _few_microbatches(layout: Layout) -> Layout:
    """No more micro-batches than there have to be: each further one holds and sends what the one before did.

    Without a pipeline the second finds gradients of the first, and so do all that follow. A pipeline is full with one
    for each stage; as many again, and all its stages have gradients while it is. (Under zbv every further one leaves
    something behind, by what has been seen: there all are traced.)
    """
    if layout.pp > 1 and layout.pp_schedule == "zbv":
        return layout
    return replace(layout, microbatches=min(layout.microbatches, 2 * layout.num_stages))


@contextmanager
def _fake_world(rank: int, world_size: int) -> Iterator[None]:
    """A process group in which this process is one of many, and nobody answers."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    assert not dist.is_initialized(), "a plan is made in a process that has no process group"
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _batch(config: Config, rows: int) -> Batch:
    """As many rows as a rank has; what is in them does not matter, but modalities are taken to be equally many."""
    shape = (rows, config.data.seq_len)
    tokens, targets, documents, positions = (torch.zeros(shape, dtype=torch.int64) for _ in range(4))
    counted = torch.ones(shape, dtype=torch.bool)
    untie = config.architecture.untie
    modalities = None if untie is None else torch.arange(shape[1]).expand(shape) % untie.modalities
    isolated = documents if config.data.isolate_documents else None
    return Batch(tokens, targets, counted, isolated, positions, modalities, modalities)


def _size(batch: Batch) -> int:
    """Bytes."""
    return sum(x.numel() * x.itemsize for x in vars(batch).values() if x is not None)


def _buffers(model: Spread, rows: int, n: int) -> int:
    """Bytes that torch's pipelines keep for each micro-batch: for what every stage receives, forward and backward."""
    if model.pipeline is None:
        return 0
    received = sum((not stage.is_first) + (not stage.is_last) for stage in model.pipeline.stages)
    stream = model.pipeline.residual(rows, n // model.layout.cp)
    return received * stream.numel() * stream.itemsize


def _find_shapes(optimizer: torch.optim.Optimizer) -> None:
    """An update that is not looked at.

    At first DTensor finds out what comes of an operation by trying it on fake tensors of its own, of whole parameters.
    Among ours they would be counted as if they were real; it remembers the result.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    optimizer.zero_grad()


def _update(config: Config, model: Spread, optimizer: torch.optim.Optimizer, batch: Batch, trace: Trace) -> _Marks:
    """The step itself, as the training loop takes it. The trace is told what the tensors are."""
    trace.own("rest", vars(batch).values())
    trace.own("parameters", (p for stage in model.stages for p in stage.parameters()))
    trace.own("parameters", model.beside.values())
    trace.own("optimizer", (x for state in optimizer.state.values() for x in state.values()))
    optimizer.register_step_pre_hook(lambda *_: _own_trained(model, trace))
    marks = _Marks(make_objective(model, config), trace)
    if model.pipeline is not None:
        marks.watch(model.pipeline)
    updater = Updater(
        model, optimizer, marks, grad_clip=config.optimizer.grad_clip, seed=config.run.seed, stop=StopRequest()
    )
    updater.update(batch, step=1, lr=config.optimizer.lr)
    return marks


def _own_trained(model: Spread, trace: Trace) -> None:
    """Gradients; and parameters again, since at its first step FSDP makes longer ones of shards that it has to fill."""
    trace.own("gradients", (p.grad for p in model.learned.values()))
    trace.own("parameters", model.learned.values())


class _Marks:
    """An objective that notes what had been sent whenever a micro-batch came to it, and around a pipeline's work."""

    def __init__(self, objective: Objective, trace: Trace):
        self.objective, self.trace = objective, trace
        self.takes_head = objective.takes_head
        self.at_losses: list[Sums] = []
        self.around_pipeline: list[Sums] = []

    def nats(self, logits_BNV: Tensor, targets_BN: Tensor, counted_BN: Tensor) -> Tensor:
        self.at_losses.append(self.trace.traffic_so_far())
        return self.objective.nats(logits_BNV, targets_BN, counted_BN)

    def head_nats(self, *given: Tensor) -> tuple[Tensor, Tensor]:
        self.at_losses.append(self.trace.traffic_so_far())
        return self.objective.head_nats(*given)

    def watch(self, pipeline: Any) -> None:
        """Note what has been sent before and after the pipeline's micro-batches."""
        train = pipeline.train

        def watched(*args: Any) -> Tensor:
            self.around_pipeline.append(self.trace.traffic_so_far())
            nats = train(*args)
            self.around_pipeline.append(self.trace.traffic_so_far())
            return nats

        pipeline.train = watched

    def with_more(self, sums: Sums, more: int, mesh: Mesh) -> Sums:
        """What is sent with so many more micro-batches."""
        if more == 0:
            return sums
        if self.around_pipeline:
            # Parameters are gathered, and gradients summed, once, however many micro-batches pass.
            fixed = {group.group_name for data in (mesh.data, mesh.expert_data) for group in data.get_all_groups()}
            before, after = self.around_pipeline
            times = more / mesh.layout.microbatches
            return _add(sums, before, {key: x for key, x in after.items() if key[1] not in fixed}, times)
        # From the loss of the first to that of the second lie one backward and one forward.
        first, second = self.at_losses[:2]
        return _add(sums, first, second, more)


def _add(sums: Sums, before: Sums, after: Sums, times: float) -> Sums:
    """`sums` and `times` what came between."""
    found = dict(sums)
    for key, traffic in after.items():
        found[key] = found[key].plus(traffic, times).plus(before.get(key, Traffic()), -times)
    return found


def _by_dimension(sums: Sums, mesh: Mesh) -> list[Sent]:
    names = {dist.group.WORLD.group_name: ("all", dist.group.WORLD)}
    names |= {mesh.group(name).group_name: (name, mesh.group(name)) for name in mesh.whole.mesh_dim_names}
    shards = mesh.data.get_group("shards")
    sharding = "dp_shard" if mesh.layout.cp == 1 else "dp_shard x cp"
    names[shards.group_name] = (sharding, shards)
    if mesh.experts is not None:
        same_experts = mesh.expert_data.get_group("expert_shards")
        names[same_experts.group_name] = (f"{sharding} / ep", same_experts)
        names[mesh.experts.group_name] = ("ep", mesh.experts)
    found = []
    for (kind, group_name), traffic in sums.items():
        dimension, group = names[group_name]
        ranks = dist.get_process_group_ranks(group)
        found.append(Sent(dimension, kind, round(traffic.count), round(traffic.sent), ranks))
    return sorted(found, key=lambda sent: -sent.bytes_sent)


def _layers(model: Spread) -> list[int]:
    return [block.layer for stage in model.stages for block in stage.layers.values()]


def _flops(config: Config, model: Spread) -> tuple[float, float, float]:
    """Forward operations per token: of the blocks held, of the head where it is held, and what the last piece of a cut
    sequence has to do beyond the mean."""
    uncut, n = model.uncut.layers, config.data.seq_len
    blocks = [uncut[str(layer)] for layer in _layers(model)]
    has_head = any(getattr(stage, "is_last", True) for stage in model.stages)
    head = 2.0 * config.model.d_model * config.model.vocab_size if has_head else 0.0
    uneven = sum(_uneven(block.mixer, n, model.layout.cp) for block in blocks)
    return sum(block.mixer.flops(n) + block.feedforward.flops(n) for block in blocks), head, uneven


def _uneven(mixer: Mixer, n: int, cp: int) -> float:
    """Forward operations per token of attention in the last of `cp` pieces, less the mean of all."""
    if mixer.context != "kv" or cp == 1:
        return 0.0
    seen = [place + 0.5 - mixer.first_seen(place) for place in range(n)]
    last = seen[n - n // cp :]
    factor = sum(last) / len(last) / (sum(seen) / n)
    return (factor - 1) * (mixer.flops(n) - mixer.linear_flops())
