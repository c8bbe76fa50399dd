"""A deep softmax model without warm-up, plain and with sigmaReparam: losses, and the lowest entropy of a layer.

    python benchmarks/entropy_collapse.py

The point of the sigmaReparam paper (arXiv 2303.06296) at a size that two cores train in minutes: bytes of Python's own
library, the same rows for both arms, a learning rate that is there from the first step on. Both are trained at several
learning rates with one seed, and with three seeds at `--lr`. Collapsed is a run whose loss is no number, or whose last
losses (mean of 20) are at least 0.5 nats above those of the other arm with the same seed. The figure says what came
out; a JSON line is appended to `--out`. Ends with 1 where the plain model does not collapse with every seed, or the
other one does.
"""

import argparse
import math
import sys
import time
from pathlib import Path
from typing import Any

from arms import Arm, last_loss, train_all
from recording import append
from rich.console import Console
from rich.table import Table

from model.reparam import ReparamConfig
from trainer.config import OptimizerConfig

PLAIN, SIGMA = "plain", "sigmaReparam"
ABOVE = 0.5
Run = dict[str, Any]


def arm(name: str, lr: float, seed: int, options: argparse.Namespace) -> Arm:
    """One run. The arms differ in `[reparam]` alone."""
    tables = {
        "model": {
            "d_model": options.width,
            "num_layers": options.layers,
            "pattern": ["softmax"],
            "init_std": options.init_std,
        },
        "mixers": {"softmax": {"num_heads": options.heads}},
        "feedforwards": {"gelu": {"d_ff": 4 * options.width}},
    }
    optimizer = OptimizerConfig(lr=lr, weight_decay=0.0, grad_clip=options.grad_clip)
    reparam = ReparamConfig(kind="sigma" if name == SIGMA else "none")
    return Arm(name, seed, tables, optimizer, options.steps, options.rows, options.length, reparam=reparam)


def collapsed(plain: Run, other: Run) -> bool:
    """Whether the plain run failed where the other one did not."""
    return math.isfinite(last_loss(other)) and not last_loss(plain) < last_loss(other) + ABOVE


def lowest_entropies(run: Run) -> tuple[list[int], list[float]]:
    """Steps, and the lowest mean entropy of a layer, nats."""
    found = [(seen["step"], [x for x in seen["layer_entropy"] if x is not None]) for seen in run["looks"]]
    return [step for step, values in found if values], [min(values) for _, values in found if values]


def draw(
    pairs: list[tuple[Run, Run]], sweep: dict[float, tuple[Run, Run]], lr: float, verdict: str, path: Path
) -> None:
    """Losses above, lowest layer entropies in the middle, and the last losses at each learning rate below."""
    import matplotlib.pyplot as plt

    plt.rcParams["svg.fonttype"] = "none"
    figure, (above, middle, below) = plt.subplots(3, 1, figsize=(8, 10), layout="constrained")
    for number, pair in enumerate(pairs):
        for run, colour in zip(pair, ("C3", "C0"), strict=True):
            label = {"label": run["name"]} if number == 0 else {}
            losses = [min(loss, 12.0) if math.isfinite(loss) else 12.0 for loss in run["losses"]]
            above.plot(range(1, len(losses) + 1), losses, color=colour, alpha=0.8, linewidth=1, **label)
            middle.semilogy(*lowest_entropies(run), ".-", color=colour, alpha=0.8, **label)
    above.set(title=f"{verdict}\nlearning rate {lr:g} from the first step on, {len(pairs)} seeds", xlabel="step")
    above.set(ylabel="loss, nats a byte", ylim=(None, 8))
    middle.set(ylabel="lowest entropy of a layer, nats", xlabel="step")
    for place, (name, colour) in enumerate(((PLAIN, "C3"), (SIGMA, "C0"))):
        values = [min(last_loss(found[place]), 8.0) for found in sweep.values()]
        below.semilogx(list(sweep), values, "o-", color=colour, label=name)
    below.set(ylabel="last loss (no number: 8), nats", xlabel="learning rate (one seed)")
    for axes in (above, middle, below):
        axes.legend()
    figure.savefig(path)


def main() -> int:
    """Train all, compare, draw, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lr", type=float, default=5e-2, help="of the runs with several seeds")
    parser.add_argument("--sweep", type=float, nargs="*", default=[3e-3, 1e-2, 5e-2, 1e-1])
    for name, default in (("layers", 16), ("width", 64), ("heads", 4), ("steps", 200), ("rows", 8), ("length", 128)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--init-std", type=float, default=0.02)
    parser.add_argument("--grad-clip", type=float, default=1.0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--quick", action="store_true", help="few steps, one seed, no sweep: see that it runs; leaves nothing"
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/entropy_collapse.jsonl"))
    parser.add_argument("--picture", type=Path, default=Path("docs/entropy_collapse.svg"))
    options = parser.parse_args()
    if options.quick:
        options.steps, options.seeds, options.sweep = 30, 1, []
    began = time.monotonic()
    wanted = [(lr, 0) for lr in options.sweep if lr != options.lr]
    wanted += [(options.lr, seed) for seed in range(options.seeds)]
    runs = train_all([arm(name, *what, options) for what in wanted for name in (PLAIN, SIGMA)], options.workers)
    found = dict(zip(wanted, zip(runs[::2], runs[1::2], strict=True), strict=True))
    pairs = [found[options.lr, seed] for seed in range(options.seeds)]
    sweep = {lr: found[lr, 0] for lr in sorted({lr for lr, seed in wanted if seed == 0})}
    table = Table("learning rate", "seed", *(f"{name}: last loss" for name in (PLAIN, SIGMA)), "lowest entropies", "")
    for (lr, seed), pair in found.items():
        entropies = ", ".join(f"{lowest_entropies(run)[1][-1]:.3f}" for run in pair)
        told = "collapsed" if collapsed(*pair) else ""
        table.add_row(f"{lr:g}", str(seed), *(f"{last_loss(run):.3f}" for run in pair), entropies, told)
    count = sum(collapsed(*pair) for pair in pairs)
    verdict = f"The plain model collapsed with {count} of {len(pairs)} seeds, where sigmaReparam trained"
    console = Console()
    console.print(table, f"{verdict}; {time.monotonic() - began:.0f} s", sep="\n")
    if not options.quick:
        draw(pairs, sweep, options.lr, verdict, options.picture)
    append(
        options,
        "entropy_collapse",
        collapsed=count,
        last_losses=[[lr, seed, *(_number(last_loss(run)) for run in pair)] for (lr, seed), pair in found.items()],
        lowest_entropies=[
            [lr, seed, *(lowest_entropies(r)[1][-1] for r in pair)] for (lr, seed), pair in found.items()
        ],
        seconds=round(time.monotonic() - began),
    )
    return 0 if options.quick or count == len(pairs) else 1


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


if __name__ == "__main__":
    sys.exit(main())
