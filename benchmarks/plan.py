"""What `headway plan` says of memory, beside what processes held: one model in several layouts, on this CPU.

    python benchmarks/plan.py

The model is configs/llama-125m.toml with 8 heads of 72 (of its 9, two ranks cannot have half), 2 sequences of 1024 a
step, fp32. In every layout all processes run two training steps, over gloo. What a process held is the peak of its
resident memory (VmHWM, reset by /proc/self/clear_refs) above what was resident before the model was built, when a small
model had taken a step in the same layout, so that code and connections are there.

glibc keeps blocks that were freed, and the longer it runs the larger those it keeps (up to 32 MiB, by its dynamic
threshold). MALLOC_MMAP_THRESHOLD_=65536 ends that: every block from 64 KiB goes back to the system when it is freed. A
run without it may hold more than the plan says.

Ends with 1 when a process was further than 10% from its plan. Appends one JSON line to `--out`.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning_length import describe_hardware

from model.batch import Batch
from model.objective import NextToken
from parallel.mesh import Mesh, build_mesh, resolve_layout
from parallel.spread import spread
from trainer.config import Config, load_config
from trainer.optimizer import build_optimizer
from trainer.signals import StopRequest
from trainer.step import Updater

CONFIG = "configs/llama-125m.toml"
MODEL = ["--mixers.softmax.num_heads", "8", "--mixers.softmax.num_kv_heads", "4"]
BATCH = ["--data.seq_len", "1024", "--data.global_batch_size", "2"]
SMALL = ["--model.d_model", "64", "--model.num_layers", "4", "--feedforwards.swiglu.d_ff", "128"]
BOUND = 0.10
SECONDS = 1200
MIB = 2**20


def parallel(**settings: Any) -> list[str]:
    return [word for key, value in settings.items() for word in (f"--parallel.{key}", str(value))]


LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "alone": (1, []),
    "alone, 2 micro-batches": (1, parallel(microbatches=2)),
    "alone, selective": (1, parallel(recompute="selective")),
    "alone, full": (1, parallel(recompute="full")),
    "fsdp2": (2, []),
    "fsdp2, full": (2, parallel(recompute="full")),
    "tp2": (2, parallel(tp=2)),
    "pp2": (2, parallel(pp=2, microbatches=2)),
    "pp2, full": (2, parallel(pp=2, microbatches=2, recompute="full")),
    "tp2 x pp2": (4, parallel(tp=2, pp=2, microbatches=2)),
    "tp2 x fsdp2": (4, parallel(tp=2)),
    "cp2": (2, parallel(cp=2)),
    "cp2 x fsdp2": (4, parallel(cp=2)),
}


def overrides(settings: list[str]) -> list[str]:
    return ["--run.dir", "none", "--parallel.microbatches", "1", *MODEL, *BATCH, *settings]


# What a process does.


def memory(key: str) -> int:
    """Bytes of this process's memory: `VmRSS` now, or `VmHWM`, the most since the last `forget_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def trainer_of(config: Config, mesh: Mesh, device: torch.device, precision: str) -> Updater:
    """What trains a model by this configuration, built as a run builds it."""
    model = spread(
        config.architecture,
        mesh,
        device,
        precision=precision,
        seq_len=config.data.seq_len,
        recompute=config.parallel.recompute,
    )
    model.initialise(0)
    optimizer = build_optimizer(model, config.optimizer, [])
    return Updater(model, optimizer, NextToken(model.cross_entropy), grad_clip=1.0, seed=0, stop=StopRequest())


def random_rows(config: Config) -> Batch:
    """A global batch, each row one document."""
    rows, n = config.data.global_batch_size, config.data.seq_len
    tokens = torch.randint(config.model.vocab_size, (rows, n + 1))
    counted, positions = torch.ones(rows, n, dtype=torch.bool), torch.arange(n).repeat(rows, 1)
    return Batch(tokens[:, :-1].clone(), tokens[:, 1:].clone(), counted, None, positions)


def train(settings: list[str]) -> int:
    """Two steps of a model; the peak of resident memory above what there was before, in bytes."""
    config = load_config(Path(CONFIG), settings, world_size=dist.get_world_size())
    layout = resolve_layout(config.parallel, dist.get_world_size())
    mesh = build_mesh(layout, "cpu")
    gc.collect()
    before = memory("VmRSS")
    forget_peak()
    updater = trainer_of(config, mesh, torch.device("cpu"), "fp32")
    share = config.data.global_batch_size // layout.data_parallel
    for step in (1, 2):
        mine = slice(mesh.data_rank * share, (mesh.data_rank + 1) * share)
        updater.update(random_rows(config).rows(mine), step, lr=1e-4)
    return memory("VmHWM") - before


def work(store: str, settings: list[str]) -> None:
    """A process of its own: a small model first, then the one that counts; its peak, and its place in the pipeline."""
    torch.set_num_threads(1)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    timeout = datetime.timedelta(seconds=SECONDS)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=timeout)
    train([*settings, *SMALL])
    print(json.dumps({"rank": rank, "held": train(settings)}), flush=True)
    dist.barrier()
    dist.destroy_process_group()


# What the parent does.


def measure(world_size: int, settings: list[str]) -> list[int]:
    """Bytes that each rank held at its peak."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--store", f"{folder}/store", *settings]
        limits = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
        started = [
            subprocess.Popen(
                command,
                env=os.environ | limits | {"PYTHONPATH": ".", "RANK": str(rank), "WORLD_SIZE": str(world_size)},
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(world_size)
        ]
        try:
            outputs = [process.communicate(timeout=SECONDS)[0] for process in started]
        finally:
            for process in started:
                process.kill()
    found = [json.loads(output.splitlines()[-1]) for output in outputs]
    return [each["held"] for each in sorted(found, key=lambda each: each["rank"])]


def plan(world_size: int, settings: list[str]) -> list[dict[str, Any]]:
    """What `headway plan` says of each pipeline rank."""
    command = [sys.executable, "-m", "trainer", "plan", CONFIG, "--world", str(world_size), "--device", "cpu", "--json"]
    answer = subprocess.run([*command, *settings], capture_output=True, text=True, check=True, timeout=SECONDS)
    return json.loads(answer.stdout)["ranks"]


def compare(name: str) -> list[dict[str, Any]]:
    """Planned and held, rank by rank, in MiB."""
    world_size, settings = LAYOUTS[name]
    planned = plan(world_size, overrides(settings))
    rows = []
    for rank, held in enumerate(measure(world_size, overrides(settings))):
        one = planned[rank * len(planned) // world_size]
        rows.append(
            {
                "layout": name,
                "rank": rank,
                "planned_mib": round(one["peak"] / MIB, 1),
                "held_mib": round(held / MIB, 1),
                "ratio": round(one["peak"] / held, 3),
                "parts_mib": {part: round(size / MIB, 1) for part, size in one["memory"].items()},
            }
        )
    return rows


def main() -> int:
    """Run all layouts, or those that are named; print a table, and write a line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=list(LAYOUTS), help="layouts")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/plan.jsonl"))
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    print(f"{'layout':<24}{'rank':>5}{'planned':>10}{'held':>10}{'planned / held':>16}   MiB")
    for name in options.only or LAYOUTS:
        for row in compare(name):
            print(
                f"{name:<24}{row['rank']:>5}{row['planned_mib']:>10}{row['held_mib']:>10}{row['ratio']:>16.3f}",
                flush=True,
            )
            rows.append(row)
    record = {
        "benchmark": "plan",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "hardware": describe_hardware(),
        "versions": {"python": platform.python_version(), "torch": version("torch")},
        "model": f"{CONFIG} {' '.join([*MODEL, *BATCH])}",
        "rows": rows,
    }
    with options.out.open("a") as file:
        file.write(json.dumps(record) + "\n")
    wrong = [row for row in rows if abs(row["ratio"] - 1) > BOUND]
    print(f"all within {BOUND:.0%}" if not wrong else f"{len(wrong)} NOT within {BOUND:.0%}")
    return 1 if wrong else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--store"]:
        work(sys.argv[2], sys.argv[3:])
    else:
        sys.exit(main())
