"""What a token costs at different lengths: Lightning attention beside softmax attention, forward and backward.

    python benchmarks/lightning_length.py

Every length gets the same number of tokens per batch, so equal times mean an equal cost per token. The settings take
turns in every round, so a busy machine slows all of them alike; medians are shown, and the ratio to the first length.
Peak memory is that of one sequence, each setting in a process of its own. Appends one JSON line to `--out`.
"""

import argparse
import datetime
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from kernels.lightning import decay_slopes, lightning_attention

MIB = 2**20


def lightning(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    slopes = torch.tensor(decay_slopes("alibi_layer", q.shape[2], 0, 24))
    return lightning_attention(q, k, v, slopes)[0]


def softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(*heads_first, is_causal=True).transpose(1, 2)


ATTENTION: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"lightning": lightning, "softmax": softmax}


def make_inputs(batch: int, length: int, heads: int, width: int) -> list[Tensor]:
    """Return leaves q, k, v [B, N, H, d] and a cotangent for the output [B, N, H d], float32."""
    torch.manual_seed(0)
    leaves = [torch.randn(batch, length, heads, width, requires_grad=True) for _ in range(3)]
    return [*leaves, torch.randn(batch, length, heads * width)]


def step(name: str, inputs: list[Tensor]) -> None:
    """Run forward and backward once; the heads are joined, as every layer does next."""
    q, k, v, cotangent = inputs
    torch.autograd.grad(ATTENTION[name](q, k, v).reshape(cotangent.shape), (q, k, v), cotangent)


def measure_times(options: argparse.Namespace) -> dict[tuple[str, int], list[float]]:
    """Return the seconds of every round for every setting, after one round that is thrown away."""
    settings = [(name, length) for length in options.lengths for name in ATTENTION]
    inputs = {n: make_inputs(options.tokens // n, n, options.heads, options.width) for n in options.lengths}
    seconds: dict[tuple[str, int], list[float]] = {setting: [] for setting in settings}
    for _ in range(options.rounds + 1):
        for name, length in settings:
            start = time.perf_counter()
            step(name, inputs[length])
            seconds[name, length].append(time.perf_counter() - start)
    return {setting: rounds[1:] for setting, rounds in seconds.items()}


def peak_bytes() -> int:
    """Return the most memory this process has held so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def measure_peak_here(name: str, length: int, heads: int, width: int) -> int:
    """Return how far one step on one sequence, inputs and gradients included, lifts the peak of this process, bytes."""
    step(name, make_inputs(1, 64, heads, width))  # threads and library buffers are there before the count begins
    before = peak_bytes()
    step(name, make_inputs(1, length, heads, width))
    return peak_bytes() - before


def measure_peaks(options: argparse.Namespace) -> dict[tuple[str, int], int]:
    """Return the peak of every setting in bytes, from a fresh process each.

    A child begins with the peak of its parent, so this comes before the parent holds anything big.
    """
    peaks = {}
    for name in ATTENTION:
        for length in options.lengths:
            command = [sys.executable, __file__, "--peak", name, str(length), "--threads", str(torch.get_num_threads())]
            command += ["--heads", str(options.heads), "--width", str(options.width)]
            peaks[name, length] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return peaks


def summarise(
    options: argparse.Namespace, seconds: dict[tuple[str, int], list[float]], peaks: dict[tuple[str, int], int]
) -> list[dict[str, Any]]:
    """Return one row per setting: median cost of a token, its ratio to the first length, peak memory of a sequence."""
    first = options.lengths[0]
    medians = {setting: statistics.median(rounds) for setting, rounds in seconds.items()}
    return [
        {
            "attention": name,
            "length": length,
            "batch": options.tokens // length,
            "microseconds_per_token": round(medians[name, length] / options.tokens * 1e6, 3),
            "ratio_to_first_length": round(medians[name, length] / medians[name, first], 3),
            "softmax_over_this": round(medians["softmax", length] / medians[name, length], 2),
            "peak_mib": round(peaks[name, length] / MIB, 1),
            "peak_kib_per_token": round(peaks[name, length] / length / 1024, 2),
        }
        for name in ATTENTION
        for length in options.lengths
    ]


def describe_hardware() -> dict[str, Any]:
    """Return the processor's model, its cores and the threads in use: nothing that names the machine."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return {"cpu": model, "cores": os.cpu_count(), "threads": torch.get_num_threads()}


def show(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    table = Table(
        title=f"forward + backward, float32, {options.tokens} tokens per batch, "
        f"{options.heads} heads of {options.width}, median of {options.rounds} rounds"
    )
    for column in ("attention", "N", "batch", "us / token", "to first N", "softmax / this", "peak MiB", "KiB / token"):
        table.add_column(column, justify="left" if column == "attention" else "right")
    for row in rows:
        table.add_row(*(str(value) for value in row.values()), end_section=row["length"] == options.lengths[-1])
    Console(width=110).print(table)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--tokens", type=int, default=8192, help="tokens per batch, at every length")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--width", type=int, default=64, help="width of a head")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "lightning_length.jsonl")
    parser.add_argument("--peak", nargs=2, metavar=("ATTENTION", "LENGTH"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if uneven := [n for n in options.lengths if n < 1 or options.tokens % n]:
        parser.error(f"every length must divide --tokens {options.tokens}, received {uneven}")
    return options


def main() -> None:
    options = parse_options()
    torch.set_num_threads(options.threads)
    if options.peak:
        print(measure_peak_here(options.peak[0], int(options.peak[1]), options.heads, options.width))
        return
    peaks = measure_peaks(options)
    rows = summarise(options, measure_times(options), peaks)
    show(rows, options)
    record = {
        "benchmark": "lightning_length",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "hardware": describe_hardware(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "settings": {key: getattr(options, key) for key in ("lengths", "tokens", "heads", "width", "rounds")},
        "rows": rows,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("a") as out:
        out.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
