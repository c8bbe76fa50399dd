"""A plan as tables for a person, and as plain data for `--json`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from parallel.trace import CATEGORIES
from trainer.planning.devices import GIB, Assumptions
from trainer.planning.forecast import Forecast, bubble, leaves_node, seconds_of
from trainer.planning.program import RankTrace
from trainer.planning.remedies import Remedy


def as_data(plan: Forecast, remedies: list[Remedy]) -> dict[str, Any]:
    """Everything in a plan; bytes, seconds, FLOP/s."""
    ranks = []
    for index, rank in enumerate(plan.ranks):
        sent = [
            {"dimension": s.dimension, "kind": s.kind, "count": s.count, "bytes_sent": s.bytes_sent} for s in rank.sent
        ]
        facts = {"pp_rank": rank.pp_rank, "layers": rank.layers, "memory": rank.memory, "peak": rank.peak, "sent": sent}
        ranks.append(facts | ({"seconds": asdict(plan.times[index])} if plan.times else {}))
    return {
        "legal": True,
        "fits": plan.fits,
        "layout": asdict(plan.layout),
        "world_size": plan.layout.world_size,
        "precision": plan.precision,
        "recompute": plan.recompute,
        "parameters": plan.parameters,
        "ranks": ranks,
        "step_time": plan.step_time,
        "tokens_per_second": plan.tokens_per_second,
        "mfu": plan.mfu,
        "assumptions": asdict(plan.assumptions),
        "remedies": [asdict(remedy) for remedy in remedies],
    }


def show(plan: Forecast, remedies: list[Remedy]) -> None:
    """Print it."""
    console = Console(highlight=False)
    layout = plan.layout
    names = ("dp_replicate", "dp_shard", "pp", "cp", "tp")
    factors = " x ".join(f"{name} {size}" for name in names if (size := getattr(layout, name)) > 1)
    console.print(
        f"{plan.parameters:,} parameters on {layout.world_size} x {plan.assumptions.device}"
        f"{', ' + factors if factors else ''}{f', experts over ep {layout.ep}' if layout.ep > 1 else ''}; "
        f"{plan.precision}, microbatches {layout.microbatches}, "
        f"recompute {plan.recompute}: the layout is legal."
    )
    console.print(_memory_table(plan))
    console.print(_verdict(plan))
    for remedy in remedies:
        console.print(f"  {remedy.sentence()}", markup=False)
    busiest = max(plan.ranks, key=lambda rank: sum(sent.bytes_sent for sent in rank.sent))
    if busiest.sent:
        console.print(_traffic_table(plan, busiest))
    if plan.layout.cp > 1:
        console.print(_balance(plan), markup=False)
    for line in _speed(plan):
        console.print(line, markup=False)


def gib(size: float) -> str:
    return f"{size / GIB:.2f}"


def _memory_table(plan: Forecast) -> Table:
    table = Table(title="memory of a rank at its peak, GiB", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("pp rank", "blocks", *CATEGORIES, "peak"):
        table.add_column(name, justify="right", no_wrap=True)
    for rank in plan.ranks:
        parts = [gib(rank.memory[name]) for name in CATEGORIES]
        table.add_row(str(rank.pp_rank), str(len(rank.layers)), *parts, gib(rank.peak))
    return table


def _verdict(plan: Forecast) -> str:
    assumed, peak = plan.assumptions, plan.costliest.peak
    if assumed.memory is None:
        return f"It needs {gib(peak)} GiB; what there is is not known."
    words = "It fits" if plan.fits else "It does NOT fit"
    return (
        f"{words}: {gib(peak)} GiB and {gib(assumed.reserve)} GiB that are no tensors, "
        f"of the {gib(assumed.memory)} GiB that a process has."
    )


def _balance(plan: Forecast) -> str:
    """How evenly the pieces of a sequence are laden."""
    costs = [rank.block_flops + rank.head_flops for rank in plan.ranks]
    most = max((cost + rank.uneven_flops) / cost for cost, rank in zip(costs, plan.ranks, strict=True))
    if most == 1:
        return "The pieces of a sequence cost alike."
    return f"The last piece of a sequence sees most keys: it computes {most:.2f} times the mean of all pieces."


def _traffic_table(plan: Forecast, rank: RankTrace) -> Table:
    title = f"messages of a rank in a step (pp rank {rank.pp_rank}, which sends most)"
    table = Table("along", "kind", "through", title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("count", "GiB sent", *(["seconds"] if plan.times else [])):
        table.add_column(name, justify="right")
    for sent in rank.sent:
        through = "network" if leaves_node(sent, plan.assumptions) else "node"
        figures = [f"{sent.count:,}", f"{sent.bytes_sent / GIB:.3g}"]
        if plan.times:
            figures.append(f"{seconds_of(sent, plan.assumptions):.3g}")
        table.add_row(sent.dimension, sent.kind, through, *figures)
    return table


def _speed(plan: Forecast) -> list[str]:
    assumed = plan.assumptions
    if not plan.times or plan.step_time is None or assumed.peak is None:
        return ["Speed: not said, since the peak of this device is not known. Give it as --peak (TFLOP/s)."]
    slowest = max(plan.times, key=lambda time: time.step)
    return [
        f"Expected: {plan.step_time:.3g} s a step, {plan.tokens_per_second:,.0f} tokens/s, MFU {plan.mfu:.1%}.",
        f"  of a step: computing {slowest.computing:.3g} s, the last piece of a sequence longer by "
        f"{slowest.uneven:.3g} s, waiting for messages {slowest.waiting:.3g} s, "
        f"bubble {slowest.idle:.3g} s, data-parallel messages that do not hide {slowest.exposed:.3g} s.",
        "Assumed:",
        *(f"  {line}" for line in _assumed(plan, assumed)),
    ]


def _assumed(plan: Forecast, assumed: Assumptions) -> list[str]:
    assert assumed.peak is not None
    lines = [
        f"peak {assumed.peak / 1e12:.0f} TFLOP/s a device (--peak), of which layers attain {assumed.attained:.0%} "
        "(--attained); norms, the loss and the update are in that;",
        f"nodes of {assumed.node_size} (--node-size); a device sends {assumed.link / 1e9:.4g} GB/s inside (--link) and "
        f"{assumed.network / 1e9:.4g} GB/s out of them (--network), of which {assumed.links_attained:.0%} are attained "
        "(--links-attained); no latencies;",
        f"{assumed.overlap:.0%} of data-parallel messages hide behind computing, where there is enough of it "
        "(--overlap); of the others, nothing does;",
    ]
    if plan.layout.pp > 1:
        lines.append(f"a pipeline is idle for {bubble(plan.layout):.1%} of its busy time, its stages being equal;")
    return lines
