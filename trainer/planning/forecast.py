"""The plan itself: what each pipeline rank holds and sends, whether it fits, and how fast the whole will be."""

from __future__ import annotations

from dataclasses import dataclass

from parallel.mesh import STAGES_PER_RANK, Layout, resolve_layout
from trainer.config import Config
from trainer.planning.devices import Assumptions
from trainer.planning.program import RankTrace, Sent, trace_pipeline
from trainer.throughput import training_flops_per_token

DATA_PARALLEL = ("dp_replicate", "dp_shard", "dp_shard x cp", "dp_shard / ep", "dp_shard x cp / ep")


@dataclass(frozen=True)
class RankTime:
    """Seconds of a step on one rank.

    Attributes:
        computing: at the attained part of the peak, on the mean over the pieces of a sequence.
        uneven: what the last piece of a cut sequence takes longer, for which the others wait.
        waiting: for tensor-parallel and other messages that layers need before they go on.
        idle: the bubble of the pipeline, while it fills and empties.
        exposed: what data-parallel messages take beyond what hides behind computing.
    """

    computing: float
    uneven: float
    waiting: float
    idle: float
    exposed: float

    @property
    def step(self) -> float:
        return self.computing + self.uneven + self.waiting + self.idle + self.exposed


@dataclass(frozen=True)
class Forecast:
    """A plan.

    Attributes:
        ranks: one for each place in the pipeline.
        times: likewise; empty where the device's peak is not known.
        parameters: of the whole model. flops_per_token: for a trained token, without recomputation.
    """

    layout: Layout
    precision: str
    recompute: str
    ranks: list[RankTrace]
    times: list[RankTime]
    assumptions: Assumptions
    parameters: int
    flops_per_token: float
    tokens_per_step: int

    @property
    def costliest(self) -> RankTrace:
        """The rank that holds most."""
        return max(self.ranks, key=lambda rank: rank.peak)

    @property
    def fits(self) -> bool | None:
        """Whether the costliest rank has room; None where the device's memory is not known."""
        there = self.assumptions.memory
        return None if there is None else self.costliest.peak + self.assumptions.reserve <= there

    @property
    def step_time(self) -> float | None:
        """Seconds: those of the slowest rank."""
        return max(time.step for time in self.times) if self.times else None

    @property
    def tokens_per_second(self) -> float | None:
        return self.tokens_per_step / self.step_time if self.step_time else None

    @property
    def mfu(self) -> float | None:
        """The part of all devices' peak that trains the model."""
        if self.tokens_per_second is None or self.assumptions.peak is None:
            return None
        return self.tokens_per_second * self.flops_per_token / (self.assumptions.peak * self.layout.world_size)


def precision_of(config: Config, assumptions: Assumptions) -> str:
    """As training chooses it."""
    return config.run.precision or ("bf16" if assumptions.on_gpu else "fp32")


def forecast(config: Config, world_size: int, assumptions: Assumptions) -> Forecast:
    """Plan a run of so many processes; `config` is legal for them."""
    import torch

    from model.stack import Model

    layout = resolve_layout(config.parallel, world_size)
    precision = precision_of(config, assumptions)
    ranks = trace_pipeline(config, world_size, precision=precision, gloo=not assumptions.on_gpu)
    with torch.device("meta"):
        uncut = Model(config.architecture)
    times = [] if assumptions.peak is None else [rank_time(config, layout, rank, assumptions) for rank in ranks]
    return Forecast(
        layout=layout,
        precision=precision,
        recompute=config.parallel.recompute,
        ranks=ranks,
        times=times,
        assumptions=assumptions,
        parameters=sum(parameter.numel() for parameter in uncut.parameters()),
        flops_per_token=training_flops_per_token(uncut.flops(config.data.seq_len)),
        tokens_per_step=config.data.global_batch_size * config.data.seq_len,
    )


def rank_time(config: Config, layout: Layout, rank: RankTrace, assumptions: Assumptions) -> RankTime:
    """Seconds of a step on this rank."""
    assert assumptions.peak is not None
    tokens = config.data.global_batch_size * config.data.seq_len / layout.data_parallel
    flops = training_flops_per_token(rank.block_flops + rank.head_flops)
    if config.parallel.recompute == "full":
        flops += rank.block_flops
    uneven = training_flops_per_token(rank.uneven_flops)
    if config.parallel.recompute == "full":
        uneven += rank.uneven_flops
    seconds_per_flop = tokens / (layout.tp * layout.cp) / (assumptions.peak * assumptions.attained)
    computing, uneven = flops * seconds_per_flop, uneven * seconds_per_flop
    taken = {True: 0.0, False: 0.0}
    for sent in rank.sent:
        taken[sent.dimension in DATA_PARALLEL] += seconds_of(sent, assumptions)
    busy = computing + uneven + taken[False]
    # In a pipeline, parameters are gathered during the first micro-batch, and gradients summed after the last.
    behind = computing if layout.pp == 1 else computing / layout.microbatches
    exposed = taken[True] - min(assumptions.overlap * taken[True], behind)
    return RankTime(computing, uneven, taken[False], busy * bubble(layout), exposed)


def bubble(layout: Layout) -> float:
    """Idle time of a pipeline as a part of the busy time: (pp - 1) / (microbatches x stages a rank); none under zbv.

    Source: arXiv 2104.04473, section 2.2; for zbv, arXiv 2401.10241, whose backward in two halves fills the gaps.
    """
    if layout.pp == 1 or layout.pp_schedule == "zbv":
        return 0.0
    return (layout.pp - 1) / (layout.microbatches * STAGES_PER_RANK[layout.pp_schedule])


def seconds_of(sent: Sent, assumptions: Assumptions) -> float:
    """How long these messages take: their bytes over the link that they go through, without latencies.

    A ring over several nodes leaves each of them once, through the adapters of those of its ranks that are there.
    """
    if not leaves_node(sent, assumptions):
        return sent.bytes_sent / (assumptions.link * assumptions.links_attained)
    nodes = {rank // assumptions.node_size for rank in sent.ranks}
    together = 1 if sent.kind in ("send", "exchange") else len(sent.ranks) / len(nodes)
    return sent.bytes_sent / (assumptions.network * together * assumptions.links_attained)


def leaves_node(sent: Sent, assumptions: Assumptions) -> bool:
    """Whether the group is spread over several nodes."""
    return len({rank // assumptions.node_size for rank in sent.ranks}) > 1
