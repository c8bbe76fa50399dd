"""What weights per modality cost: a training step of a Mixture-of-Transformers beside one of the dense model that
computes as much for each token.

    python benchmarks/modalities_cost.py

Softmax attention, all parts untied, two modalities in runs as captions and images make them. Arms, which all do the
same products for each token:

    dense           one set of weights
    towers          two, as trained
    one modality    the same model, all tokens of the first: nothing to sort, so what is left of the difference to dense
                    are products without rows and a second set of weights to update
    masks           the same model as released (facebookresearch/Mixture-of-Transformers): every layer takes the tokens
                    of each modality by a mask, and writes what comes of them back by it

Sorting and putting back is timed beside that, alone: as many of both as a step has. In every round all arms take their
turn, in an order that turns round each time; prints medians of the rounds and of their ratios, by the clock and in
seconds of processors. Whole steps, and the part up to the gradients, since an optimizer's work goes by the parameters,
of which towers have as often as many, and not by the tokens. Says whether what is promised holds (a step at most 1.15
of the dense one's) and appends one JSON line to `--out`.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from recording import append
from rich.console import Console
from rich.table import Table
from torch import Tensor

from kernels.grouped import Groups
from model.batch import Batch
from model.feedforward.towers import FeedForwardTowers
from model.objective import NextToken
from model.settings import build_architecture
from model.towers import Towers
from parallel.config import ParallelConfig
from parallel.mesh import build_mesh, resolve_layout
from parallel.spread import spread
from trainer.config import OptimizerConfig
from trainer.optimizer import build_optimizer
from trainer.signals import StopRequest
from trainer.step import Updater

MOST, VOCAB, IMAGE = 1.15, 4096, 49
DENSE, OURS, ONE, MASKS = "dense", "towers", "one modality", "masks"
WHAT = ("step", "gradients")
KINDS = ("clock", "processors")
Seconds = dict[str, list[list[float]]]


def batch(options: argparse.Namespace, modalities: Tensor) -> Batch:
    """Random tokens: what they are does not change the time."""
    tokens = torch.randint(VOCAB, (options.rows, options.length + 1))
    counted = torch.ones(options.rows, options.length, dtype=torch.bool)
    places = torch.arange(options.length).expand(options.rows, options.length)
    return Batch(tokens[:, :-1], tokens[:, 1:], counted, None, places, modalities[:, :-1], modalities[:, 1:])


def in_runs(options: argparse.Namespace) -> Tensor:
    """Captions of 8 to 90 tokens, each with an image behind it: about half of all tokens each."""
    rows = []
    for _ in range(options.rows):
        row: list[int] = []
        while len(row) <= options.length:
            row += [0] * int(torch.randint(8, 91, ())) + [1] * IMAGE
        rows.append(row[: options.length + 1])
    return torch.tensor(rows)


def build(options: argparse.Namespace, untied: bool) -> Updater:
    """A model and what trains it."""
    tables = {
        "model": {"d_model": options.width, "num_layers": options.layers, "vocab_size": VOCAB, "pattern": ["softmax"]},
        "mixers": {"softmax": {"num_heads": options.width // 64}},
        "feedforwards": {"swiglu": {"d_ff": options.width * 3}},
    }
    _, architecture = build_architecture(tables | ({"untie": {"modalities": 2}} if untied else {}), [])
    assert architecture is not None
    mesh = build_mesh(resolve_layout(ParallelConfig(), 1), "cpu")
    model = spread(architecture, mesh, torch.device("cpu"), precision="fp32", seq_len=options.length)
    model.initialise(seed=0)
    optimizer = build_optimizer(model, OptimizerConfig(lr=1e-4), [])
    return Updater(model, optimizer, NextToken(), grad_clip=1.0, seed=0, stop=StopRequest())


@contextmanager
def by_masks() -> Iterator[None]:
    """Towers as they were released."""

    def towers(self: Towers, x: Tensor) -> Tensor:
        assert self.current.groups is not None
        return merged(x, self.current.groups, [*self.towers])

    def feedforwards(self: FeedForwardTowers, x: Tensor, ctx: Any) -> Tensor:
        return merged(x, ctx.groups, [lambda rows, tower=tower: tower(rows, ctx) for tower in self.towers.values()])

    def merged(x: Tensor, groups: Groups, each: list[Callable[[Tensor], Tensor]]) -> Tensor:
        flat, found = x.flatten(0, 1), None
        for modality, tower in enumerate(each):
            mask = MASK.flatten() == modality
            made = tower(flat[mask])
            found = made.new_empty(len(flat), *made.shape[1:]) if found is None else found
            found[mask] = made
        assert found is not None
        return found.unflatten(0, x.shape[:2])

    with ExitStack() as stack:
        stack.enter_context(patch.object(Towers, "forward", towers))
        stack.enter_context(patch.object(FeedForwardTowers, "forward", feedforwards))
        yield


MASK = torch.empty(0)


def now() -> list[float]:
    """By the clock, and what the processors have worked."""
    return [time.perf_counter(), time.process_time()]


def one_step(updater: Updater, given: Batch) -> list[float]:
    """Seconds of a step by the clock and of processors, then those up to the gradients."""
    marks: list[list[float]] = []
    train = type(updater.model).train

    def noting(*args: Any) -> float:
        nats = train(updater.model, *args)
        marks.append(now())
        return nats

    began = now()
    with patch.object(updater.model, "train", noting):
        updater.update(given, step=1, lr=1e-4)
    return [end - begin for mark in (now(), marks[0]) for begin, end in zip(began, mark, strict=True)]


def sorting(options: argparse.Namespace, modalities: Tensor) -> list[float]:
    """Seconds of all sorting and putting back in a step: of rows as wide as they are, forward and backward."""
    d = options.width
    stream = torch.randn(options.rows, options.length, d, requires_grad=True)
    wide = torch.randn(options.rows, options.length, d, requires_grad=True)
    began = now()
    groups = Groups(modalities[:, :-1].contiguous(), 2)
    for _ in range(options.layers):
        # Norm, queries, keys, values and the map out; norm and feed-forward.
        for x, back in ((stream, 4), (wide, 1), (stream, 1), (stream, 1)):
            rows = groups.sort(x)
            made = [groups.restore(rows) for _ in range(back)]
            groups.forget()
            torch.autograd.grad(made, x, [x.detach()] * back)
    return [end - begin for begin, end in zip(began, now(), strict=True)] * 2


def measure(options: argparse.Namespace) -> Seconds:
    """For each arm the seconds of each round; the first round warms up."""
    global MASK
    torch.manual_seed(0)
    modalities = in_runs(options)
    MASK = modalities[:, :-1]
    dense, ours = build(options, False), build(options, True)
    mixed, alone = batch(options, modalities), batch(options, torch.zeros_like(modalities))

    def masked() -> list[float]:
        with by_masks():
            return one_step(ours, mixed)

    check(ours, mixed)
    turns: dict[str, Callable[[], list[float]]] = {
        DENSE: lambda: one_step(dense, mixed),
        OURS: lambda: one_step(ours, mixed),
        ONE: lambda: one_step(ours, alone),
        MASKS: masked,
        "sorting alone": lambda: sorting(options, modalities),
    }
    seconds: Seconds = {name: [] for name in turns}
    for turn in range(options.rounds + 1):
        for name, step in list(turns.items())[:: 1 if turn % 2 else -1]:
            seconds[name].append(step())
    return {name: rounds[1:] for name, rounds in seconds.items()}


@torch.no_grad()
def check(ours: Updater, mixed: Batch) -> None:
    """Both ways compute the same."""
    model = ours.model.stages[0]
    found = model(mixed.tokens, modalities=mixed.modalities)
    with by_masks():
        torch.testing.assert_close(model(mixed.tokens, modalities=mixed.modalities), found, rtol=1e-4, atol=1e-4)


def main() -> None:
    """Measure, print, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"width": 512, "layers": 4, "rows": 8, "length": 512, "rounds": 7, "threads": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--quick", action="store_true", help="three rounds; leaves no line")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/modalities_cost.jsonl"))
    options = parser.parse_args()
    options.rounds = 3 if options.quick else options.rounds
    torch.set_num_threads(options.threads)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    seconds = measure(options)
    columns = [f"{what}, {kind}" for what in WHAT for kind in KINDS]
    title = (
        f"{options.rows * options.length} tokens of {options.width}, {options.layers} layers, {options.rounds} rounds"
    )
    table = Table("", *(cell for name in columns for cell in (f"{name}, ms", "to dense")), title=title)
    rows = []
    for name, rounds in seconds.items():
        row: dict[str, Any] = {"arm": name}
        for place, what in enumerate(columns):
            pairs = zip(rounds, seconds[DENSE], strict=True)
            row[f"{what}, ms"] = round(statistics.median(x[place] for x in rounds) * 1e3, 1)
            row[f"{what}, to dense"] = round(statistics.median(a[place] / b[place] for a, b in pairs), 3)
        rows.append(row)
        table.add_row(*(str(x) for x in row.values()))
    console = Console(width=140)
    console.print(table)
    ours = next(row for row in rows if row["arm"] == OURS)
    held = {name: ours[f"{name}, to dense"] <= MOST for name in columns}
    for name, holds in held.items():
        console.print(f"{'holds' if holds else 'DOES NOT HOLD':<14} at most {MOST} of the dense one: {name}")
    append(options, "modalities_cost", rows=rows, held=held)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
