"""What a diagnosis of attention costs while training, as a part of a step.

    OMP_NUM_THREADS=1 python benchmarks/diagnostics_cost.py

One model is trained on real steps (batch, forward, backward, clipping, update); in every round some steps are followed
by a diagnosis and some are not, by turns. A diagnosis is what `metrics.diagnose_every_steps` makes of the first row of
the batch: a forward pass, 256 queries of each head and layer, the windows of 64 tokens, and the collectives (of one
process). Printed are medians over the rounds, and what it comes to when every so many steps are diagnosed. Appends one
JSON line to `--out`; ends with 1 when that is more than 1%.
"""

import argparse
import datetime
import json
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from train_step import describe_hardware

from model.batch import Batch
from model.objective import NextToken
from model.settings import build_architecture
from parallel.config import ParallelConfig
from parallel.mesh import build_mesh, resolve_layout
from parallel.spread import spread
from trainer.config import OptimizerConfig
from trainer.diagnostics import Diagnostics
from trainer.metrics import MetricsConfig
from trainer.optimizer import build_optimizer
from trainer.signals import StopRequest
from trainer.step import Updater

BOUND = 0.01
EVERY = MetricsConfig().diagnose_every_steps


def build(options: argparse.Namespace, device: torch.device) -> Updater:
    """A Llama of that size and what trains it."""
    tables: dict[str, Any] = {
        "model": {"d_model": options.width, "num_layers": options.layers, "vocab_size": options.vocab},
        "mixers": {"softmax": {"num_heads": options.heads}},
        "feedforwards": {"swiglu": {"d_ff": options.width * 8 // 3 // 8 * 8}},
    }
    tables["model"]["pattern"] = ["softmax"]
    faults: list[str] = []
    _, architecture = build_architecture(tables, faults)
    assert architecture is not None, faults
    mesh = build_mesh(resolve_layout(ParallelConfig(), 1), device.type)
    precision = "bf16" if device.type == "cuda" else "fp32"
    model = spread(architecture, mesh, device, precision=precision, seq_len=options.seq_len)
    model.initialise(seed=0)
    optimizer = build_optimizer(model, OptimizerConfig(), [])
    return Updater(model, optimizer, NextToken(model.cross_entropy), grad_clip=1.0, seed=0, stop=StopRequest())


def random_batch(options: argparse.Namespace, seed: int) -> Batch:
    """Rows of random tokens; where they are packed, a document begins at every hundredth token or so."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(options.vocab, (options.rows, options.seq_len + 1), generator=generator)
    places = torch.arange(options.seq_len).expand(options.rows, -1)
    counted, documents = torch.ones_like(places, dtype=torch.bool), None
    if options.packed:
        begins = torch.rand(places.shape, generator=generator) < 0.01
        documents = begins.cumsum(1)
        places = places - torch.where(begins, places, 0).cummax(1).values
    return Batch(tokens[:, :-1], tokens[:, 1:], counted, documents, places)


def measure(options: argparse.Namespace) -> list[dict[str, float]]:
    """Seconds of a step and of a diagnosis, by the clock and of the processor; medians of each round."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    updater, diagnostics = build(options, device), Diagnostics(1)
    rounds = []
    for number in range(options.rounds + 1):  # the first one warms up
        steps, alone = [], []
        for step in range(options.steps):
            seed = number * options.steps + step
            batch = random_batch(options, seed)
            steps.append(timed(device, lambda batch=batch, seed=seed: updater.update(batch, seed + 1, 1e-4)))
            if step % 2:
                alone.append(timed(device, lambda batch=batch: diagnostics.record(updater.model, batch, 1)))
        medians = {}
        for name, times in (("step", steps), ("diagnosis", alone)):
            medians[name], medians[f"{name}_cpu"] = (statistics.median(one) for one in zip(*times, strict=True))
        rounds.append(medians)
    return rounds[1:]


def timed(device: torch.device, work: Any) -> tuple[float, float]:
    """Seconds by the clock, and of this process's threads: what others do on the machine is in the first alone."""
    began, began_cpu = time.perf_counter(), time.process_time()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began, time.process_time() - began_cpu


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"layers": 4, "width": 256, "heads": 4, "vocab": 8192, "seq_len": 512, "rows": 8}
    for name, default in (sizes | {"rounds": 7, "steps": 4}).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--packed", action="store_true", help="rows of many short documents, instead of one")
    parser.add_argument("--note", default="", help="about the machine, kept in the record")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "diagnostics_cost.jsonl")
    options = parser.parse_args()
    if options.steps < 2:
        parser.error(f"--steps {options.steps} leaves no step for a diagnosis: take at least 2.")
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            rounds = measure(options)
        finally:
            dist.destroy_process_group()
    step, diagnosis = (statistics.median(found[key] for found in rounds) for key in ("step", "diagnosis"))
    share = statistics.median(found["diagnosis"] / found["step"] for found in rounds)
    share_cpu = statistics.median(found["diagnosis_cpu"] / found["step_cpu"] for found in rounds)
    print(f"a step {1000 * step:.1f} ms, a diagnosis {1000 * diagnosis:.1f} ms: {share:.1%} of a step")
    print(f"of processor time {share_cpu:.1%}")
    print(f"every {EVERY} steps: {share / EVERY:.2%} of training (bound {BOUND:.0%})")
    record = {
        "benchmark": "diagnostics_cost",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "hardware": describe_hardware(
            torch.get_num_threads(), torch.cuda.get_device_name() if torch.cuda.is_available() else None
        ),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "size": {name: getattr(options, name) for name in sizes} | {"packed": options.packed},
        "rounds": rounds,
        "diagnosis_over_step": share,
        "diagnosis_over_step_cpu": share_cpu,
        "share_of_training": share / EVERY,
        "every_steps": EVERY,
        "note": options.note,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("a") as out:
        out.write(json.dumps(record) + "\n")
    return 0 if share / EVERY <= BOUND else 1


if __name__ == "__main__":
    sys.exit(main())
