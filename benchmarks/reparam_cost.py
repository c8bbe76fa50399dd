"""What sigmaReparam costs: a whole step with reparametrised matrices beside one with plain ones.

    python benchmarks/reparam_cost.py

Two models of one architecture and the same batches, in one process, step by step in turns, the first of each pair
alternating; after that the optimizer's part alone (from gradients to updated parameters), and what the plain autograd
form of the same thing takes, which scales every matrix in every forward pass. Prints medians and ratios; appends one
JSON line to `--out`.
"""

import argparse
import datetime
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning_length import describe_hardware
from rich.console import Console
from rich.table import Table

from model.batch import Batch
from model.objective import NextToken
from model.reparam import ReparamConfig, effective_weights
from model.settings import build_architecture
from parallel.config import ParallelConfig
from parallel.mesh import build_mesh, resolve_layout
from parallel.spread import Spread, spread
from trainer.config import OptimizerConfig
from trainer.optimizer import build_optimizer
from trainer.signals import StopRequest
from trainer.step import Updater

VOCAB = 4096
FORMS = {"plain": ReparamConfig(), "sigma": ReparamConfig(kind="sigma")}


def batch(options: argparse.Namespace) -> Batch:
    """Random tokens: what they are does not change the time."""
    tokens = torch.randint(VOCAB, (options.rows, options.length + 1))
    counted = torch.ones(options.rows, options.length, dtype=torch.bool)
    places = torch.arange(options.length).expand(options.rows, options.length)
    return Batch(tokens[:, :-1], tokens[:, 1:], counted, None, places)


def build(options: argparse.Namespace, reparam: ReparamConfig) -> Updater:
    """A model and what trains it."""
    tables = {
        "model": {"d_model": options.width, "num_layers": options.layers, "vocab_size": VOCAB, "pattern": ["softmax"]},
        "mixers": {"softmax": {"num_heads": options.width // 64}},
        "feedforwards": {"swiglu": {"d_ff": options.width * 8 // 3 // 64 * 64}},
    }
    _, architecture = build_architecture(tables, [])
    assert architecture is not None
    mesh = build_mesh(resolve_layout(ParallelConfig(microbatches=options.microbatches), 1), "cpu")
    cpu = torch.device("cpu")
    model = spread(architecture, mesh, cpu, precision="fp32", seq_len=options.length, reparam=reparam)
    model.initialise(seed=0)
    model.reparam.begin()
    optimizer = build_optimizer(model, OptimizerConfig(lr=1e-4), [])
    return Updater(model, optimizer, NextToken(), grad_clip=1.0, seed=0, stop=StopRequest())


class Clocked:
    """Times what comes after the gradients of a step."""

    def __init__(self, updater: Updater):
        self.began, train = 0.0, updater.model.train

        def clocked(*args: Any) -> float:
            nats = train(*args)
            self.began = time.perf_counter()
            return nats

        updater.model.train = clocked  # type: ignore[method-assign]


def plain_autograd(model: Spread, part: Batch) -> float:
    """Seconds of a forward and backward in which every matrix is scaled by autograd."""
    reparam: Any = model.reparam
    raw = {name: p.detach().clone().requires_grad_() for name, p in model.parameters.items()}
    gains = {m.name: model.beside[f"{m.name}.spectral_gain"] for m in reparam.matrices}
    vectors = {
        m.name: (model.kept[f"{m.name}.spectral_v"], model.kept[f"{m.name}.spectral_u"][:, 0]) for m in reparam.matrices
    }
    began = time.perf_counter()
    weights = raw | effective_weights(raw, gains, vectors, reparam.matrices)
    logits = torch.func.functional_call(model.stages[0], weights, (part.tokens,), {"positions": part.positions})
    NextToken().loss_sum(logits, part.targets, part.counted).backward()
    return time.perf_counter() - began


def plain_linears(model: Spread, part: Batch) -> float:
    """Seconds of a forward and backward as it is trained."""
    began = time.perf_counter()
    logits = model.stages[0](part.tokens, positions=part.positions)
    NextToken().loss_sum(logits, part.targets, part.counted).backward()
    seconds = time.perf_counter() - began
    for parameter in model.parameters.values():
        parameter.grad = None
    return seconds


def measure(options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of each round."""
    updaters = {name: build(options, reparam) for name, reparam in FORMS.items()}
    clocks = {name: Clocked(updater) for name, updater in updaters.items()}
    found: dict[str, list[float]] = {f"{name} {what}": [] for name in FORMS for what in ("step", "update")}
    found |= {"forward and backward": [], "forward and backward, by autograd": []}
    count = 0
    for turn in range(options.rounds + 1):
        seconds: dict[str, list[float]] = {key: [] for key in found}
        for _ in range(options.steps):
            count += 1
            data = batch(options)
            for name in list(FORMS)[:: 1 if count % 2 else -1]:
                began = time.perf_counter()
                updaters[name].update(data, count, 1e-4)
                ended = time.perf_counter()
                seconds[f"{name} step"].append(ended - began)
                seconds[f"{name} update"].append(ended - clocks[name].began)
        part = next(data.micro_batches(options.microbatches))
        seconds["forward and backward"].append(plain_linears(updaters["sigma"].model, part))
        seconds["forward and backward, by autograd"].append(plain_autograd(updaters["sigma"].model, part))
        if turn:  # The first one warms up.
            for key, values in seconds.items():
                found[key].append(statistics.median(values))
    return found


def main() -> None:
    """Measure, print, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("width", 512), ("layers", 4), ("rows", 8), ("length", 512), ("microbatches", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--steps", type=int, default=3, help="in each round, of each form")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/reparam_cost.jsonl"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    seconds = measure(options)
    medians = {key: statistics.median(values) for key, values in seconds.items()}
    table = Table("", "seconds (median)", "lowest", "highest")
    for key, values in seconds.items():
        table.add_row(key, f"{medians[key]:.3f}", f"{min(values):.3f}", f"{max(values):.3f}")
    console = Console()
    console.print(table)
    ratios = [b / a for a, b in zip(seconds["plain step"], seconds["sigma step"], strict=True)]
    ratio = statistics.median(ratios)
    updates = medians["sigma update"] - medians["plain update"]
    console.print(
        f"a step: {ratio:.4f} x that of plain linear maps (rounds: {', '.join(f'{r:.3f}' for r in sorted(ratios))}); "
        f"the update takes {updates * 1000:.0f} ms more, {updates / medians['plain step']:.2%} of a step"
    )
    record = {
        "benchmark": "reparam_cost",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "hardware": describe_hardware(),
        "torch": torch.__version__,
        "options": {key: value for key, value in vars(options).items() if key != "out"},
        "seconds": seconds,
        "step_ratio": ratio,
    }
    with options.out.open("a") as file:
        file.write(json.dumps(record) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
