"""Small models trained beside each other, equal but for one thing, and what attention does meanwhile.

For benchmarks of this folder: rows of bytes of Python's own library, one document each, the same for all arms and
seeds; runs in processes of their own, several at a time, each on one core.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from long_sequence import VOCAB, python_sources

from model.batch import Batch
from model.objective import NextToken
from model.reparam import ReparamConfig
from model.settings import build_architecture
from parallel.config import ParallelConfig
from parallel.diagnose import diagnose
from parallel.mesh import build_mesh, resolve_layout
from parallel.spread import Spread, spread
from trainer.config import OptimizerConfig
from trainer.diagnostics import record_of
from trainer.optimizer import build_optimizer
from trainer.signals import StopRequest
from trainer.step import Updater

BYTES = 4_600_000
HELD_OUT = 300_000
"""At the end of the bytes; the loss there is the mean over a part of them."""


@dataclass(frozen=True)
class Arm:
    """One run: a model, what trains it, and on how much.

    Attributes:
        tables: `model`, `mixers` and `feedforwards` of a configuration; the vocabulary is that of bytes.
        warmup: updates in which the learning rate rises; then it is constant, or, with `cosine`, falls to a tenth.
        look_every: updates between two looks at attention.
    """

    name: str
    seed: int
    tables: dict[str, Any]
    optimizer: OptimizerConfig
    steps: int
    rows: int = 16
    length: int = 128
    warmup: int = 0
    cosine: bool = False
    reparam: ReparamConfig = field(default_factory=ReparamConfig)
    look_every: int = 25
    look_rows: int = 16

    def learning_rate(self, step: int) -> float:
        lr = self.optimizer.lr
        if step <= self.warmup:
            return lr * step / self.warmup
        if not self.cosine:
            return lr
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return lr * (0.55 + 0.45 * math.cos(math.pi * done))


def batch_of(sources: torch.Tensor, places: torch.Tensor, length: int) -> Batch:
    """The rows that begin at these places."""
    rows = sources[places[:, None] + torch.arange(length + 1)]
    positions = torch.arange(length).expand(len(places), length)
    return Batch(rows[:, :-1], rows[:, 1:], torch.ones_like(positions, dtype=torch.bool), None, positions)


def batches(sources: torch.Tensor, arm: Arm) -> Iterator[Batch]:
    """Rows at random places, by the seed: the same in all arms."""
    generator = torch.Generator().manual_seed(arm.seed)
    for _ in range(arm.steps):
        places = torch.randint(BYTES - HELD_OUT - arm.length - 1, (arm.rows,), generator=generator)
        yield batch_of(sources, places, arm.length)


def build(arm: Arm) -> tuple[Spread, Updater]:
    """The model on this process, and what trains it."""
    tables = arm.tables | {"model": arm.tables["model"] | {"vocab_size": VOCAB}}
    faults: list[str] = []
    _, architecture = build_architecture(tables, faults)
    assert architecture is not None, faults
    mesh = build_mesh(resolve_layout(ParallelConfig(), 1), "cpu")
    cpu = torch.device("cpu")
    model = spread(architecture, mesh, cpu, precision="fp32", seq_len=arm.length, reparam=arm.reparam)
    model.initialise(arm.seed)
    model.reparam.begin()
    optimizer = build_optimizer(model, arm.optimizer, [])
    stop, clip = StopRequest(), arm.optimizer.grad_clip
    return model, Updater(model, optimizer, NextToken(), grad_clip=clip, seed=arm.seed, stop=stop)


def look(model: Spread, held_out: Batch, step: int) -> dict[str, Any]:
    """Loss and attention on rows that are never trained on."""
    model.evaluating(True)
    nats = model.evaluate(held_out, NextToken())
    model.evaluating(False)
    found = record_of(diagnose(model, held_out, rows=len(held_out.tokens), num_queries=None))
    found["layer_entropy"] = [_mean(row) for row in found["diagnostics"]["entropy"]]
    found["sink"] = found["diagnostics"]["sink"]
    del found["diagnostics"]
    return {"step": step, "held_out": nats / held_out.tokens.numel()} | found


def _mean(row: list[float | None] | None) -> float | None:
    numbers = [value for value in row or [] if value is not None]
    return sum(numbers) / len(numbers) if numbers else None


def train(arm: Arm) -> dict[str, Any]:
    """Train one arm in this process; losses of every step, and looks. A run whose loss is no number ends there."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    sources = python_sources(BYTES)
    places = torch.linspace(BYTES - HELD_OUT, BYTES - arm.length - 1, arm.look_rows).long()
    held_out = batch_of(sources, places, arm.length)
    model, updater = build(arm)
    losses: list[float] = []
    looks = [look(model, held_out, 0)]
    for step, batch in enumerate(batches(sources, arm), start=1):
        outcome = updater.update(batch, step, arm.learning_rate(step))
        losses.append(outcome.loss)
        if outcome.skipped:
            break
        if step % arm.look_every == 0 or step == arm.steps:
            looks.append(look(model, held_out, step))
    dist.destroy_process_group()
    return {"name": arm.name, "seed": arm.seed, "lr": arm.optimizer.lr, "losses": losses, "looks": looks}


def train_all(arms: list[Arm], workers: int) -> list[dict[str, Any]]:
    """What came of each arm, in their order."""
    context = torch.multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, max_tasks_per_child=1) as pool:
        return list(pool.map(train, arms))


def last_loss(found: dict[str, Any], count: int = 20) -> float:
    """The mean of the last losses; of a run that ended before its time, infinity."""
    last = found["losses"][-count:]
    return sum(last) / len(last) if all(map(math.isfinite, last)) else math.inf
