"""What heads that a token does not select save: gated attention with some of its heads, with all, and torch's own.

    python benchmarks/gated_attention.py

Forward and backward of the attention alone. In every round all arms take their turn, in an order that turns round each
time, so a busy machine slows all of them alike; prints medians of the rounds and of their ratios, by the clock and in
seconds of processors, which other work disturbs less. Which heads a token selects is by chance, so a head's queries lie
as irregularly as a router would have them, but all heads are asked for about equally often. Says whether what is
promised holds (half of the heads in at most 0.65 of the time of all; all in at most 1.3 of that of torch's fused causal
attention) and appends one JSON line to `--out`.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from recording import append
from rich.console import Console
from rich.table import Table
from torch import Tensor

from kernels.attention import Visible
from kernels.attention.gated import gated_attention

HALF, ALL = 0.65, 1.3
TORCH, EVERY = "torch, causal", "all heads"
Seconds = dict[tuple[int, str], list[tuple[float, float]]]


def choose(length: int, heads: int, shared: int, routed: int) -> Tensor:
    """[1, N, A]: the shared heads, and `routed` of the others."""
    drawn = torch.rand(1, length, heads - shared).argsort(-1)[..., :routed] + shared
    return torch.cat((torch.arange(shared).expand(1, length, -1), drawn), -1)


def arms(options: argparse.Namespace, length: int) -> dict[str, Callable[[], None]]:
    """Name -> one forward and backward of it."""
    heads, width = options.heads, options.width
    leaves = [torch.randn(1, length, heads, width, requires_grad=True) for _ in range(3)]
    cotangent, visible, scale = torch.randn(1, length, heads, width), Visible(length, length), width**-0.5

    def peer() -> None:
        out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in leaves), is_causal=True, scale=scale)
        torch.autograd.grad(out.transpose(1, 2), leaves, cotangent)

    def ours(index: Tensor | None) -> Callable[[], None]:
        gate = torch.rand(1, length, heads if index is None else index.shape[2], requires_grad=True)

        def step() -> None:
            out = gated_attention(*leaves, gate, index, visible=visible, scale=scale)
            torch.autograd.grad(out, [*leaves, gate], cotangent)

        return step

    found = {TORCH: peer, EVERY: ours(None), "1/2": ours(choose(length, heads, 0, heads // 2))}
    if length == options.length:
        found["1/2, half of them shared"] = ours(choose(length, heads, heads // 4, heads // 4))
        for eighths in (1, 2, 6):
            name = {1: "1/8", 2: "1/4", 6: "3/4"}[eighths]
            found[name] = ours(choose(length, heads, 0, heads * eighths // 8))
    return found


def measure(options: argparse.Namespace) -> Seconds:
    """For each arm the seconds of each round, by the clock and of processors; the first round warms up."""
    torch.manual_seed(0)
    turns = [((n, name), step) for n in options.lengths for name, step in arms(options, n).items()]
    seconds: Seconds = {key: [] for key, _ in turns}
    for turn in range(options.rounds + 1):
        for key, step in turns[:: 1 if turn % 2 else -1]:
            clock, work = time.perf_counter(), time.process_time()
            step()
            seconds[key].append((time.perf_counter() - clock, time.process_time() - work))
    return {key: rounds[1:] for key, rounds in seconds.items()}


def ratio(seconds: Seconds, length: int, name: str, other: str, kind: int) -> float:
    """Median over the rounds of the one's time to the other's; `kind` 0 is the clock, 1 processors."""
    pairs = zip(seconds[length, name], seconds[length, other], strict=True)
    return statistics.median(a[kind] / b[kind] for a, b in pairs)


def show(seconds: Seconds, options: argparse.Namespace, console: Console) -> list[dict[str, object]]:
    """Print the table; its rows."""
    table = Table(
        "N",
        "heads of a token",
        *("ms", "to all", "to torch", "processors, ms", "to all", "to torch"),
        title=f"forward + backward, {options.heads} heads of {options.width}, fp32, median of {options.rounds} rounds",
    )
    rows: list[dict[str, object]] = []
    for length, name in seconds:
        row: dict[str, object] = {"length": length, "heads": name}
        for kind, what in enumerate(("clock", "processors")):
            row[f"{what}_ms"] = round(statistics.median(x[kind] for x in seconds[length, name]) * 1e3, 1)
            row[f"{what}_to_all"] = round(ratio(seconds, length, name, EVERY, kind), 3)
            row[f"{what}_to_torch"] = round(ratio(seconds, length, name, TORCH, kind), 3)
        rows.append(row)
        table.add_row(*(str(x) for x in row.values()))
    console.print(table)
    return rows


def judge(seconds: Seconds, options: argparse.Namespace, console: Console) -> dict[str, bool]:
    """Whether each promise held, by the clock and of processors."""
    n = options.length
    promises = [("1/2", EVERY, HALF), ("1/2, half of them shared", EVERY, HALF), (EVERY, TORCH, ALL)]
    held = {}
    for name, other, most in promises:
        for kind, what in enumerate(("by the clock", "of processors")):
            found = ratio(seconds, n, name, other, kind)
            text = f"{name} / {other}, N = {n}, {what}"
            held[text] = found <= most
            console.print(f"{'holds' if held[text] else 'DOES NOT HOLD':<14} {text}: {found:.3f}, promised {most}")
    return held


def main() -> None:
    """Measure, print, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("heads", 8), ("width", 64), ("length", 4096), ("rounds", 7), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--quick", action="store_true", help="one length and three rounds; leaves no line")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gated_attention.jsonl"))
    options = parser.parse_args()
    if options.quick:
        options.lengths, options.rounds = [options.length], 3
    if options.length not in options.lengths:
        parser.error(f"--length {options.length} must be one of --lengths {options.lengths}")
    torch.set_num_threads(options.threads)
    console = Console(width=120)
    seconds = measure(options)
    rows = show(seconds, options, console)
    append(options, "gated_attention", rows=rows, held=judge(seconds, options, console))


if __name__ == "__main__":
    main()
