"""What choosing experts and taking tokens to them costs: a mixture of experts and a dense layer that computes as much.

    python benchmarks/experts.py

Forward and backward of one feed-forward, gradients of its input and of all weights. The dense one is as wide as the
experts of a token together, so both do the same products for each token (the router's are what the mixture has more).
In every round all arms take their turn, in an order that turns round each time; prints medians of the rounds and of
their ratios, by the clock and in seconds of processors, which other work disturbs less. Beside them the mixture of
Hugging Face's Mixtral with the same weights, in its loop over experts. Says whether what is promised holds (at most
1.15 of the time of the dense one) and appends one JSON line to `--out`.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from recording import append
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from model.context import Context
from model.feedforward.gated import GatedConfig, SwiGLU
from model.feedforward.moe import MoE, MoEConfig
from model.layer import Site

MOST = 1.15
DENSE, OURS, PEER = "dense", "experts", "transformers' Mixtral"
Seconds = dict[str, list[tuple[float, float]]]


def mixture(options: argparse.Namespace) -> MoE:
    """Experts whose router draws as at the beginning of training."""
    site = Site(0, 1, options.d_model, feedforwards={"swiglu": (SwiGLU, GatedConfig(options.d_ff))})
    layer = MoE(MoEConfig(options.experts, options.top_k, "swiglu"), site)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, 0.0, 0.02)
    return layer


def mixtral(options: argparse.Namespace, ours: MoE) -> nn.Module:
    """The peer, with our weights."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=options.d_model,
        intermediate_size=options.d_ff,
        num_local_experts=options.experts,
        num_experts_per_tok=options.top_k,
    )
    config._experts_implementation = "eager"
    peer = MixtralSparseMoeBlock(config)
    with torch.no_grad():
        peer.gate.weight.copy_(ours.router.weight)
        for number, expert in ours.experts.items():
            peer.experts.gate_up_proj[int(number)] = torch.cat((expert.gate.weight, expert.up.weight))
            peer.experts.down_proj[int(number)] = expert.down.weight
    return peer


def arms(options: argparse.Namespace) -> dict[str, Callable[[], Tensor]]:
    """Name -> one forward and backward of it; gives the output."""
    torch.manual_seed(0)
    x = torch.randn(options.rows, options.length, options.d_model, requires_grad=True)
    cotangent, ctx = torch.randn(x.shape), Context(torch.arange(options.length).expand(options.rows, -1))
    ours = mixture(options)
    dense = SwiGLU(GatedConfig(options.top_k * options.d_ff), Site(0, 1, options.d_model))
    peer = mixtral(options, ours)

    def step(layer: nn.Module, *others: Any) -> Callable[[], Tensor]:
        weights = [parameter for parameter in layer.parameters() if parameter.requires_grad]

        def run() -> Tensor:
            out = layer(x, *others)
            out = out[0] if isinstance(out, tuple) else out
            torch.autograd.grad(out, [x, *weights], cotangent)
            return out.detach()

        return run

    return {DENSE: step(dense, ctx), OURS: step(ours, ctx), PEER: step(peer)}


def measure(options: argparse.Namespace) -> Seconds:
    """For each arm the seconds of each round, by the clock and of processors; the first round warms up."""
    turns = list(arms(options).items())
    ours, theirs = (step() for name, step in turns if name in (OURS, PEER))
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5), "the peer computes something else"
    seconds: Seconds = {name: [] for name, _ in turns}
    for turn in range(options.rounds + 1):
        for name, step in turns[:: 1 if turn % 2 else -1]:
            clock, work = time.perf_counter(), time.process_time()
            for _ in range(options.repeats):
                step()
            took = time.perf_counter() - clock, time.process_time() - work
            seconds[name].append((took[0] / options.repeats, took[1] / options.repeats))
    return {name: rounds[1:] for name, rounds in seconds.items()}


def ratio(seconds: Seconds, name: str, other: str, kind: int) -> float:
    """Median over the rounds of the one's time to the other's; `kind` 0 is the clock, 1 processors."""
    return statistics.median(a[kind] / b[kind] for a, b in zip(seconds[name], seconds[other], strict=True))


def main() -> None:
    """Measure, print, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"d_model": 512, "d_ff": 704, "experts": 8, "top_k": 2, "rows": 4, "length": 1024}
    for name, default in (sizes | {"rounds": 7, "repeats": 3, "threads": 2}).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--quick", action="store_true", help="three rounds; leaves no line")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/experts.jsonl"))
    options = parser.parse_args()
    options.rounds = 3 if options.quick else options.rounds
    torch.set_num_threads(options.threads)
    console, seconds = Console(width=120), measure(options)
    tokens = options.rows * options.length
    title = f"forward + backward, {tokens} tokens, {options.experts} experts of {options.d_ff}, {options.top_k} each"
    table = Table("", "ms", "to dense", "processors, ms", "to dense", title=f"{title}, fp32, {options.rounds} rounds")
    rows = []
    for name in seconds:
        row: dict[str, Any] = {"arm": name}
        for kind, what in enumerate(("clock", "processors")):
            row[f"{what}_ms"] = round(statistics.median(x[kind] for x in seconds[name]) * 1e3, 1)
            row[f"{what}_to_dense"] = round(ratio(seconds, name, DENSE, kind), 3)
        rows.append(row)
        table.add_row(*(str(x) for x in row.values()))
    console.print(table)
    held = {what: ratio(seconds, OURS, DENSE, kind) <= MOST for kind, what in enumerate(("clock", "processors"))}
    for what, holds in held.items():
        console.print(f"{'holds' if holds else 'DOES NOT HOLD':<14} at most {MOST} of the dense one, by {what}")
    append(options, "experts", rows=rows, held=held)


if __name__ == "__main__":
    main()
