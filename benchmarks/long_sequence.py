"""One sequence of 65,536 tokens, trained by one process and by four that have a quarter of it each.

    python benchmarks/long_sequence.py

A small model of Lightning layers learns bytes of Python's own library, one row a step, alone and at cp 4, in turns. For
both: resident memory above what a process has before the model is built, at its peak (the kernel's own count), and the
losses, which must be the same. What crosses the cuts is counted as it is sent, and stands beside what keys and values
of the same layers would be. Appends one JSON line to `--out`; ends with 1 when losses are further apart than 1e-5 nats.
"""

import argparse
import statistics
import sys
import sysconfig
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from plan import forget_peak, memory
from recording import append
from rich.console import Console
from rich.table import Table
from torch import Tensor

from model.batch import Batch
from model.objective import NextToken
from model.settings import build_architecture
from parallel.config import ParallelConfig
from parallel.mesh import build_mesh, resolve_layout
from parallel.spread import spread
from trainer.config import OptimizerConfig
from trainer.optimizer import build_optimizer
from trainer.signals import StopRequest
from trainer.step import Updater

MIB = 2**20
VOCAB = 256


def python_sources(count: int) -> Tensor:
    """The first so many bytes of Python's standard library, in the order of its file names; int64."""
    library = Path(sysconfig.get_paths()["stdlib"])
    text = bytearray()
    for path in sorted(library.glob("*.py")):
        text += path.read_bytes()
        if len(text) >= count:
            return torch.frombuffer(text[:count], dtype=torch.uint8).long()
    raise ValueError(f"{library} has {len(text)} bytes of modules, and {count} are asked for: take fewer steps.")


def row(sources: Tensor, step: int, length: int) -> Batch:
    """The sequence of a step, one document."""
    tokens = sources[step * length : (step + 1) * length + 1][None]
    counted = torch.ones(1, length, dtype=torch.bool)
    return Batch(tokens[:, :-1], tokens[:, 1:], counted, None, torch.arange(length)[None])


def train(rank: int, world_size: int, store: str, options: argparse.Namespace, answer: Connection) -> None:
    """What one process of a run sees of it."""
    torch.set_num_threads(1 if world_size > 1 else 2)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    sources = python_sources(options.steps * options.length + 1)
    tables = {
        "model": {"d_model": options.width, "num_layers": options.layers, "vocab_size": VOCAB, "pattern": ["it"]},
        "mixers": {"it": {"kind": "lightning", "num_heads": options.width // 64}},
        "feedforwards": {"sglu": {"d_ff": options.width * 11 // 4}},
    }
    _, architecture = build_architecture(tables, [])
    assert architecture is not None
    layout = resolve_layout(ParallelConfig(cp=world_size), world_size)
    mesh = build_mesh(layout, "cpu")
    before = memory("VmRSS")
    forget_peak()
    model = spread(architecture, mesh, torch.device("cpu"), precision="fp32", seq_len=options.length)
    model.initialise(seed=0)
    optimizer = build_optimizer(model, OptimizerConfig(lr=1e-3), [])
    objective = NextToken(model.cross_entropy)
    updater = Updater(model, optimizer, objective, grad_clip=1.0, seed=0, stop=StopRequest())
    sent: list[int] = []
    plain = dist.all_to_all_single

    def counting(received: Tensor, message: Tensor, *sizes: Any, group: Any) -> None:
        sent.append(message.numel() * message.element_size())
        plain(received, message, *sizes, group=group)

    losses, seconds = [], []
    with patch.object(dist, "all_to_all_single", counting):
        for step in range(options.steps):
            began = time.perf_counter()
            losses.append(updater.update(row(sources, step, options.length), step + 1, 1e-3).loss)
            seconds.append(time.perf_counter() - began)
    # Half of the messages of a step go forward, half backward.
    per_layer = sum(sent) / options.steps / options.layers / 2
    peak = memory("VmHWM") - before
    answer.send({"peak": peak, "losses": losses, "seconds": statistics.median(seconds), "sent": per_layer})
    dist.destroy_process_group()


def run(world_size: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Train with so many processes; what each of them says."""
    context = torch.multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        workers = []
        for rank in range(world_size):
            ours, theirs = context.Pipe(duplex=False)
            worker = context.Process(target=train, args=(rank, world_size, f"{folder}/store", options, theirs))
            worker.start()
            theirs.close()
            workers.append((worker, ours))
        said = [ours.recv() for _, ours in workers]
        for worker, _ in workers:
            worker.join()
    return said


def main() -> int:
    """Run both, in turns; print, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=65536)
    parser.add_argument("--cp", type=int, default=4)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/long_sequence.jsonl"))
    options = parser.parse_args()
    console = Console()
    runs: dict[int, list[list[dict[str, Any]]]] = {1: [], options.cp: []}
    for _ in range(options.rounds):
        for world_size, seen in runs.items():
            seen.append(run(world_size, options))
    table = Table("cp", "peak memory of a process, MiB", "of all, MiB", "step, s", "losses")
    found = {}
    for world_size, seen in runs.items():
        peaks = [statistics.median(processes[rank]["peak"] for processes in seen) for rank in range(world_size)]
        found[world_size] = {
            "peaks": peaks,
            "seconds": statistics.median(processes[0]["seconds"] for processes in seen),
            "losses": seen[0][0]["losses"],
        }
        shown = [f"{max(peaks) / MIB:.0f}", f"{sum(peaks) / MIB:.0f}", f"{found[world_size]['seconds']:.1f}"]
        table.add_row(str(world_size), *shown, ", ".join(f"{loss:.6f}" for loss in found[world_size]["losses"]))
    console.print(table)
    states = sum(process["sent"] for process in runs[options.cp][0])
    # Each rank's keys and values, fp32, to every other.
    keys_values = options.cp * (options.cp - 1) * (options.length // options.cp) * 2 * options.width * 4
    console.print(
        f"a layer, one direction, all ranks: {states / 1024:.0f} KiB of states; gathered keys and values would be "
        f"{keys_values / 1024:.0f} KiB, {keys_values / states:.0f} times as much"
    )
    apart = max(abs(a - b) for a, b in zip(*(result["losses"] for result in found.values()), strict=True))
    console.print(
        f"losses at most {apart:.1e} nats apart; peak {max(found[options.cp]['peaks']) / found[1]['peaks'][0]:.2f} x"
    )
    append(
        options,
        "long_sequence",
        runs=found,
        state_bytes=states,
        keys_values_bytes=keys_values,
        apart=apart,
    )
    return 0 if apart <= 1e-5 else 1


if __name__ == "__main__":
    sys.exit(main())
