"""What sigmaReparam costs: a whole step with reparametrised matrices beside one with plain ones.

    python benchmarks/reparam_cost.py

Two models of one architecture and the same batches, in one process, step by step in turns, the first of each pair
alternating. By the clock, and in seconds of processors, which other work on a shared machine disturbs less: whole
steps, and the part from gradients to updated parameters, the only one in which the two differ. What it costs goes by
the parameters, and a step by parameters times tokens: so the more tokens a step has, the smaller its part. Beside them
a forward and backward of the plain autograd form, which scales every matrix in every pass. Prints medians of rounds and
ratios; appends one JSON line to `--out`.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from recording import append
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


def now() -> tuple[float, float]:
    """By the clock, and what the processors have worked."""
    return time.perf_counter(), time.process_time()


def since(began: tuple[float, float]) -> tuple[float, float]:
    return tuple(b - a for a, b in zip(began, now(), strict=True))  # type: ignore[return-value]


class Clocked:
    """Notes when the gradients of a step are there."""

    def __init__(self, updater: Updater):
        self.began, train = now(), updater.model.train

        def clocked(*args: Any) -> float:
            nats = train(*args)
            self.began = now()
            return nats

        updater.model.train = clocked  # type: ignore[method-assign]


def plain_autograd(model: Spread, part: Batch) -> tuple[float, float]:
    """Seconds of a forward and backward in which every matrix is scaled by autograd."""
    reparam: Any = model.reparam
    raw = {name: p.detach().clone().requires_grad_() for name, p in model.parameters.items()}
    gains = {m.name: model.beside[f"{m.name}.spectral_gain"] for m in reparam.matrices}
    vectors = {
        m.name: (model.kept[f"{m.name}.spectral_v"], model.kept[f"{m.name}.spectral_u"][:, 0]) for m in reparam.matrices
    }
    began = now()
    weights = raw | effective_weights(raw, gains, vectors, reparam.matrices)
    logits = torch.func.functional_call(model.stages[0], weights, (part.tokens,), {"positions": part.positions})
    NextToken().nats(logits, part.targets, part.counted).sum().backward()
    return since(began)


def plain_linears(model: Spread, part: Batch) -> tuple[float, float]:
    """Seconds of a forward and backward as it is trained."""
    began = now()
    logits = model.stages[0](part.tokens, positions=part.positions)
    NextToken().nats(logits, part.targets, part.counted).sum().backward()
    seconds = since(began)
    for parameter in model.parameters.values():
        parameter.grad = None
    return seconds


def measure(options: argparse.Namespace) -> dict[str, list[list[float]]]:
    """What is measured -> for each round the medians [by the clock, of processors], in seconds."""
    updaters = {name: build(options, reparam) for name, reparam in FORMS.items()}
    clocks = {name: Clocked(updater) for name, updater in updaters.items()}
    keys = [f"{name} {what}" for name in FORMS for what in ("step", "update")]
    keys += ["forward and backward", "forward and backward, by autograd"]
    found: dict[str, list[list[float]]] = {key: [] for key in keys}
    count = 0
    for turn in range(options.rounds + 1):
        seconds: dict[str, list[tuple[float, float]]] = {key: [] for key in keys}
        for _ in range(options.steps):
            count += 1
            data = batch(options)
            for name in list(FORMS)[:: 1 if count % 2 else -1]:
                began = now()
                updaters[name].update(data, count, 1e-4)
                seconds[f"{name} step"].append(since(began))
                seconds[f"{name} update"].append(since(clocks[name].began))
        part = next(data.micro_batches(options.microbatches))
        seconds["forward and backward"].append(plain_linears(updaters["sigma"].model, part))
        seconds["forward and backward, by autograd"].append(plain_autograd(updaters["sigma"].model, part))
        if turn:  # The first one warms up.
            for key, values in seconds.items():
                found[key].append([statistics.median(kind) for kind in zip(*values, strict=True)])
    return found


def main() -> None:
    """Measure, print, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("width", 384), ("layers", 4), ("rows", 16), ("length", 512), ("microbatches", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--steps", type=int, default=2, help="in each round, of each form")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/reparam_cost.jsonl"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    seconds = measure(options)
    table = Table("", "seconds", "lowest", "highest", "of processors", "lowest", "highest")
    medians: dict[str, list[float]] = {}
    for key, rounds in seconds.items():
        cells = []
        for values in zip(*rounds, strict=True):
            medians.setdefault(key, []).append(statistics.median(values))
            cells += [f"{x:.3f}" for x in (statistics.median(values), min(values), max(values))]
        table.add_row(key, *cells)
    console = Console()
    console.print(table)
    told = {}
    for place, kind in enumerate(("by the clock", "of processors")):
        pairs = zip(seconds["plain step"], seconds["sigma step"], strict=True)
        ratio = statistics.median(b[place] / a[place] for a, b in pairs)
        more = medians["sigma update"][place] - medians["plain update"][place]
        told[kind] = {"step_ratio": ratio, "update_more": more, "part": more / medians["plain step"][place]}
        console.print(
            f"{kind}: a step {ratio:.4f} x that of plain linear maps; the update takes {more * 1000:.0f} ms more, "
            f"{told[kind]['part']:.2%} of a step"
        )
    append(
        options,
        "reparam_cost",
        seconds=seconds,
        told=told,
    )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
