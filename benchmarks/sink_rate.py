"""Attention sinks in training: a softmax model beside one with sigmoid attention of equal size, on equal data.

    python benchmarks/sink_rate.py

The point of the attention sink study (Gu et al., arXiv 2410.10781), tried at a size that two cores train in minutes.
Bytes of Python's own library, one document a row; the arms differ in their mixer alone. The sink rate is the share of
(row, layer, head) in which the queries of the first 64 tokens give the first one more than 0.3 of their weight on the
mean, on rows that are never trained on; weights of sigmoid attention are divided by their sum for this metric only.
Draws sink rates and losses over steps; appends a JSON line to `--out`. Ends with 1 unless softmax ends above 10% and
sigmoid below 1%. At the default size it ends with 1: softmax has none, either.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from arms import Arm, last_loss, train_all
from recording import append
from rich.console import Console
from rich.table import Table

from trainer.config import OptimizerConfig

MIXERS = ("softmax", "sigmoid")
ABOVE, BELOW = 0.10, 0.01
Run = dict[str, Any]


def arm(mixer: str, options: argparse.Namespace) -> Arm:
    """One run. The arms differ in the mixer alone; that of sigmoid attention has its usual norm behind it."""
    settings = {"kind": mixer, "num_heads": options.heads} | ({"length": options.length} if mixer == "sigmoid" else {})
    tables = {
        "model": {"d_model": options.width, "num_layers": options.layers, "pattern": ["it"]},
        "mixers": {"it": settings},
        "feedforwards": {"swiglu": {"d_ff": options.width * 8 // 3}},
    }
    optimizer = OptimizerConfig(lr=options.lr, weight_decay=options.weight_decay)
    return Arm(
        mixer,
        options.seed,
        tables,
        optimizer,
        options.steps,
        options.rows,
        options.length,
        warmup=options.steps // 20,
        cosine=True,
        look_every=max(1, options.steps // 10),
        look_rows=options.look_rows,
    )


def by_layer(run: Run) -> list[float]:
    """The first key's mean weight at the end, of each layer: the mean over heads."""
    return [sum(heads) / len(heads) for heads in run["looks"][-1]["sink"]]


def draw(runs: list[Run], options: argparse.Namespace) -> None:
    """Sink rates above, losses below."""
    import matplotlib.pyplot as plt

    plt.rcParams["svg.fonttype"] = "none"
    figure, (above, below) = plt.subplots(2, 1, figsize=(8, 7), sharex=True, layout="constrained")
    for run, colour in zip(runs, ("C3", "C0"), strict=True):
        steps = [seen["step"] for seen in run["looks"]]
        above.plot(steps, [100 * seen["sink_rate"] for seen in run["looks"]], "o-", color=colour, label=run["name"])
        below.plot(steps, [seen["held_out"] for seen in run["looks"]], "o-", color=colour, label=run["name"])
    for bound in (ABOVE, BELOW):
        above.axhline(100 * bound, color="black", linestyle="--", linewidth=1)
    ends = ", ".join(f"{run['name']} {run['looks'][-1]['sink_rate']:.1%}" for run in runs)
    above.set(title=f"Sink rate (epsilon 0.3, 64 tokens) at the end: {ends}", ylabel="sink rate, %")
    below.set(ylabel="held-out loss, nats a byte", xlabel="step")
    above.legend()
    figure.savefig(options.picture)


def main() -> int:
    """Train both, compare, draw, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("layers", 4), ("width", 96), ("heads", 4), ("steps", 1500), ("rows", 16), ("length", 128)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--look-rows", type=int, default=50, help="rows on which sinks are measured")
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="few steps: see that it runs; leaves nothing")
    parser.add_argument("--mixers", nargs="+", default=list(MIXERS))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/sink_rate.jsonl"))
    parser.add_argument("--picture", type=Path, default=Path("docs/sink_rate.svg"))
    options = parser.parse_args()
    if options.quick:
        options.steps = 40
    began = time.monotonic()
    runs = train_all([arm(mixer, options) for mixer in options.mixers], options.workers)
    table = Table("mixer", "sink rate", "weight of the first key by layer", "last loss", "held out")
    for run in runs:
        end = run["looks"][-1]
        layers = ", ".join(f"{value:.3f}" for value in by_layer(run))
        numbers = f"{end['sink_rate']:.2%}", layers, f"{last_loss(run, 50):.3f}", f"{end['held_out']:.3f}"
        table.add_row(run["name"], *numbers)
    console = Console()
    console.print(table, f"{time.monotonic() - began:.0f} s", sep="\n")
    if not options.quick:
        draw(runs, options)
    append(
        options,
        "sink_rate",
        runs={
            run["name"]: {
                "sink_rate": [[seen["step"], seen["sink_rate"]] for seen in run["looks"]],
                "held_out": [[seen["step"], seen["held_out"]] for seen in run["looks"]],
                "first_key_by_layer": by_layer(run),
            }
            for run in runs
        },
        seconds=round(time.monotonic() - began),
    )
    rates = [run["looks"][-1]["sink_rate"] for run in runs]
    return 0 if options.quick or (rates[0] > ABOVE and rates[-1] < BELOW) else 1


if __name__ == "__main__":
    sys.exit(main())
