"""What `headway plan` says of one GPU, beside what training there held and how fast it was.

    python benchmarks/plan_gpu.py

Presets train some steps in bf16 with random tokens, each with different recomputation. Memory: what torch's allocator
had given out at its peak, above what it had before the model. Speed: the median step after the first three; beside it
stands what a plan would say had its layers attained the part of the peak that was measured without recomputation.
Appends one JSON line to `--out`. Needs a GPU that the plan knows.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from plan import random_rows, trainer_of

from parallel.mesh import build_mesh, resolve_layout
from parallel.processes import Process, process_group
from trainer.config import Config, load_config
from trainer.planning.devices import this_machine
from trainer.throughput import training_flops_per_token

PRESETS = {
    "llama-125m": {"data.seq_len": 2048, "data.global_batch_size": 16, "parallel.microbatches": 2},
    "transnormer-385m": {"data.seq_len": 2048, "data.global_batch_size": 16, "parallel.microbatches": 2},
    "hybrid-7to1-1b": {"data.seq_len": 2048, "data.global_batch_size": 8, "parallel.microbatches": 2},
}
RECOMPUTE = ("none", "selective", "full")
STEPS, WARM = 12, 3
MIB = 2**20


def overrides(preset: str, recompute: str) -> list[str]:
    settings = PRESETS[preset] | {
        "parallel.recompute": recompute,
        "data.isolate_documents": "false",
        "run.dir": "none",
        "run.precision": "bf16",
    }
    return [word for key, value in settings.items() for word in (f"--{key}", str(value))]


def train(config: Config) -> dict[str, float]:
    """Some steps; peak memory in bytes, seconds of a step, operations of a token."""
    device = torch.device("cuda", 0)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    updater = trainer_of(config, build_mesh(resolve_layout(config.parallel, 1), "cuda"), device, "bf16")
    batch = random_rows(config)
    seconds = []
    for step in range(STEPS):
        torch.cuda.synchronize()
        began = time.perf_counter()
        updater.update(batch, step + 1, lr=1e-5)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return {
        "held": torch.cuda.max_memory_allocated() - before,
        "reserved": torch.cuda.max_memory_reserved(),
        "seconds": statistics.median(seconds[WARM:]),
        "flops_per_token": training_flops_per_token(updater.model.uncut.flops(config.data.seq_len)),
        "tokens": batch.tokens.numel(),
    }


def plan(preset: str, recompute: str, device: str, attained: float) -> dict[str, Any]:
    """What `headway plan` says, in a process that sees no GPU."""
    command = [sys.executable, "-m", "trainer", "plan", f"configs/{preset}.toml", "--world", "1", "--json"]
    command += ["--device", device, "--attained", f"{attained:.4f}", *overrides(preset, recompute)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join([".", *sys.path])}
    answer = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert answer.returncode == 0, answer.stderr[-2000:]
    return json.loads(answer.stdout)


def main() -> int:
    """All presets, with each kind of recomputation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=list(PRESETS))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/plan_gpu.jsonl"))
    options = parser.parse_args()
    device = this_machine()
    rows = []
    print("preset, recompute: planned and held, MiB, and their ratio; tokens/s, MFU, tokens/s planned")
    with process_group(Process(0, 0, 1, "cuda")):
        for preset in options.only or PRESETS:
            attained = 0.4
            for recompute in RECOMPUTE:
                config = load_config(Path(f"configs/{preset}.toml"), overrides(preset, recompute), world_size=1)
                found = train(config)
                per_second = found["tokens"] / found["seconds"]
                if recompute == "none":
                    peak = plan(preset, recompute, device, attained)["assumptions"]["peak"]
                    attained = min(1.0, per_second * found["flops_per_token"] / peak)
                said = plan(preset, recompute, device, attained)
                row = {
                    "preset": preset,
                    "recompute": recompute,
                    "planned_mib": round(said["ranks"][0]["peak"] / MIB, 1),
                    "held_mib": round(found["held"] / MIB, 1),
                    "reserved_mib": round(found["reserved"] / MIB, 1),
                    "tokens_per_second": round(per_second),
                    "planned_tokens_per_second": round(said["tokens_per_second"]),
                    "mfu": round(per_second * found["flops_per_token"] / peak, 4),
                    "parts_mib": {part: round(size / MIB, 1) for part, size in said["ranks"][0]["memory"].items()},
                }
                rows.append(row)
                ratio = row["planned_mib"] / row["held_mib"]
                print(
                    f"{preset:<17} {recompute:<10}{row['planned_mib']:>9}{row['held_mib']:>9}{ratio:>7.3f}"
                    f"{row['tokens_per_second']:>9}{row['mfu']:>7.3f}{row['planned_tokens_per_second']:>9}",
                    flush=True,
                )
    record = {
        "benchmark": "plan_gpu",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "hardware": torch.cuda.get_device_name(0),
        "torch": torch.__version__,
        "presets": PRESETS,
        "rows": rows,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("a") as file:
        file.write(json.dumps(record) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
