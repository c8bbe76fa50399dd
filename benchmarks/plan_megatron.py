"""What `headway plan` expects of GPT-2 8.3B on 512 V100s, beside what Megatron-LM measured (arXiv 1909.08053, 5.1).

    python benchmarks/plan_megatron.py

The paper's baseline is 1.2B parameters on one GPU, which sustains 39 TFLOP/s, "30% of peak": so the peak is taken to be
130 TFLOP/s, and the attained part 0.30, and what a plan adds are the messages. An efficiency is computing over step
time: the baseline has no messages, so it is what is left of linear scaling. A DGX-2H has 16 GPUs, 300 GB/s between two
of them (150 in each direction), and 100 GB/s to other servers, 6.25 for a GPU.

Nothing is measured here but the plan's own time. Appends one JSON line to `--out`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lightning_length import describe_hardware
from rich.console import Console
from rich.table import Table

from trainer.config import load_config
from trainer.planning.devices import GIB, assume
from trainer.planning.forecast import Forecast, forecast

CONFIG = Path("configs/gpt-8.3b.toml")
BASELINE = [
    "--model.d_model", "1536", "--model.num_layers", "40",
    "--mixers.softmax.num_heads", "16", "--feedforwards.gelu.d_ff", "6144",
]  # fmt: skip
AS_PAPER = ["--parallel.sequence_parallel", "false", "--parallel.recompute", "full"]

# name: (processes, what to change, sequences, data-parallel messages that hide, the paper's efficiency)
CASES: dict[str, tuple[int, list[str], int, float, float | None]] = {
    "1.2B, 1 GPU": (1, [*BASELINE, *AS_PAPER], 8, 0.0, 1.0),
    "8.3B, tp 8": (8, [*AS_PAPER, "--parallel.tp", "8"], 8, 0.0, 0.77),
    "8.3B, tp 8 x 64 replicas": (
        512,
        [*AS_PAPER, "--parallel.tp", "8", "--parallel.dp_replicate", "64"],
        512,
        0.0,
        0.76,
    ),
    "the same, 90% of sums hidden": (
        512,
        [*AS_PAPER, "--parallel.tp", "8", "--parallel.dp_replicate", "64"],
        512,
        0.9,
        None,
    ),
    "tp 8 x fsdp 64, as Headway would": (512, ["--parallel.tp", "8"], 512, 0.9, None),
}
PAPER_FLOPS = 15.1e15


def plan(case: tuple[int, list[str], int, float, float | None]) -> Forecast:
    world_size, settings, sequences, overlap, _ = case
    overrides = ["--data.global_batch_size", str(sequences), "--parallel.microbatches", "1", *settings]
    assumptions = assume("v100", world_size, node_size=16, peak=130e12, attained=0.30, overlap=overlap)
    return forecast(load_config(CONFIG, overrides, world_size=world_size), world_size, assumptions)


def row_of(name: str) -> dict[str, Any]:
    """A case's figures."""
    began = time.monotonic()
    found = plan(CASES[name])
    (spent,) = found.times
    assert found.tokens_per_second is not None
    return {
        "case": name,
        "peak_gib": round(found.costliest.peak / GIB, 2),
        "step_seconds": round(spent.step, 3),
        "computing": round(spent.computing, 3),
        "waiting": round(spent.waiting, 3),
        "exposed": round(spent.exposed, 3),
        "efficiency": round(spent.computing / spent.step, 3),
        "paper": CASES[name][4],
        "petaflops": round(found.tokens_per_second * found.flops_per_token / 1e15, 2),
        "planned_in_seconds": round(time.monotonic() - began, 1),
    }


def main() -> None:
    """Plan all cases, print them, write a line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/plan.jsonl"))
    options = parser.parse_args()
    table = Table("", "GiB", "s a step", "computing", "tp", "dp", "efficiency", "paper", "PFLOP/s", "planned in, s")
    rows = [row_of(name) for name in CASES]
    for row in rows:
        table.add_row(*("-" if value is None else str(value) for value in row.values()))
    Console(width=140).print(table)
    record = {
        "benchmark": "plan_megatron",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "hardware": describe_hardware(),
        "versions": {"python": platform.python_version(), "torch": version("torch")},
        "paper_petaflops": PAPER_FLOPS / 1e15,
        "rows": rows,
    }
    with options.out.open("a") as file:
        file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
