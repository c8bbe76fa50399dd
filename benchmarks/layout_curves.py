"""One loss curve whatever the layout: quickstart-size steps on real text, under torchrun, in one picture.

    python benchmarks/layout_curves.py

Trains `configs/quickstart.toml` for 60 steps in fp32 in one process, in tp2 x pp2, in fsdp2 x tp2 and in a zero-bubble
pipeline with FSDP; and once more through three layouts: saved in tp2 x pp2 after 20 steps, resumed in fsdp2 for 20,
then in one process. Prints how far the losses are apart, appends a JSON line to `--out` and draws `--picture`. It ends
with 1 when they are further apart than 1e-5 nats at the first step or 1e-3 at any. Needs `data/shakespeare-tokens`,
which `make quickstart` leaves behind, and matplotlib (the extra `benchmarks`).
"""

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from lightning_length import describe_hardware
from rich.console import Console
from rich.table import Table

from trainer.metrics import read_metrics

FIRST, ANY = 1e-5, 1e-3
PARTS: dict[str, list[tuple[int, list[str]]]] = {
    "one process": [(1, [])],
    "tp2 x pp2": [(4, ["--parallel.tp", "2", "--parallel.pp", "2"])],
    "fsdp2 x tp2": [(4, ["--parallel.tp", "2", "--parallel.dp_shard", "2"])],
    "pp2 zbv x fsdp2": [(4, ["--parallel.pp", "2", "--parallel.pp_schedule", "zbv", "--parallel.dp_shard", "2"])],
    "tp2 x pp2, then fsdp2, then one": [
        (4, ["--parallel.tp", "2", "--parallel.pp", "2"]),
        (2, ["--parallel.dp_shard", "2"]),
        (1, []),
    ],
}
"""Name -> processes and settings of each part of the run."""


def train(run_dir: Path, parts: list[tuple[int, list[str]]], steps: int) -> list[dict[str, Any]]:
    """Train in one layout after another, each for its share of the steps; the records."""
    shutil.rmtree(run_dir, ignore_errors=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for number, (processes, layout) in enumerate(parts, start=1):
        stop = steps * number // len(parts)
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)),
            *("-m", "trainer", "train", "configs/quickstart.toml", "--run.dir", str(run_dir)),
            *("--run.precision", "fp32", "--schedule.steps", str(steps), "--run.stop_at_step", str(stop)),
            *("--data.validate_every_steps", str(steps // 3), *layout),
        ]
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    return read_metrics(run_dir)


def differences(found: list[dict[str, Any]], twin: list[dict[str, Any]], key: str = "loss") -> list[float]:
    """|loss - that of the twin| at each step that has one, nats a token."""
    return [abs(a[key] - b[key]) for a, b in zip(found, twin, strict=True) if key in b]


def draw(runs: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """The curves above, their distance from one process below."""
    import matplotlib.pyplot as plt

    plt.rcParams["svg.fonttype"] = "none"
    figure, (above, below) = plt.subplots(2, 1, figsize=(8, 7), sharex=True, layout="constrained")
    for number, (name, records) in enumerate(runs.items()):
        steps = [record["step"] for record in records]
        style = {"linewidth": 5 - number, "color": f"C{number}", "label": name}
        above.plot(steps, [record["loss"] for record in records], **style)
        if number:
            apart = [max(value, 1e-9) for value in differences(records, runs["one process"])]
            below.semilogy(steps, apart, ".-", color=f"C{number}", label=name)
    below.axhline(ANY, color="black", linestyle="--", linewidth=1)
    below.annotate("bound: 1e-3 nats", (1, ANY), va="bottom")
    above.set(title="Loss of one model in five layouts (lines lie upon each other)", ylabel="nats a token")
    below.set(ylabel="distance from one process, nats", xlabel="step (equal losses are drawn at 1e-9)")
    above.legend()
    figure.savefig(path)


def main() -> int:
    """Train all, compare, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--work", type=Path, default=Path("runs/layout-curves"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/layout_curves.jsonl"))
    parser.add_argument("--picture", type=Path, default=Path("docs/layout_curves.svg"))
    options = parser.parse_args()
    console = Console()
    runs: dict[str, list[dict[str, Any]]] = {}
    seconds = {}
    for name, parts in PARTS.items():
        began = time.monotonic()
        runs[name] = train(options.work / name.replace(" ", "-").replace(",", ""), parts, options.steps)
        seconds[name] = round(time.monotonic() - began, 1)
        console.print(f"{name}: {options.steps} steps in {seconds[name]} s, last loss {runs[name][-1]['loss']:.6f}")
    twin = runs["one process"]
    table = Table("layout", "first step", "largest", "validation", "last loss")
    apart = {}
    for name, records in runs.items():
        losses, held_out = differences(records, twin), differences(records, twin, "val_loss")
        apart[name] = {"first": losses[0], "largest": max(losses), "validation": max(held_out)}
        shown = (f"{losses[0]:.1e}", f"{max(losses):.1e}", f"{max(held_out):.1e}")
        table.add_row(name, *shown, f"{records[-1]['loss']:.6f}")
    console.print(table)
    record = {
        "benchmark": "layout_curves",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "hardware": describe_hardware(),
        "steps": options.steps,
        "apart": apart,
        "seconds": seconds,
        "losses": {name: [record["loss"] for record in records] for name, records in runs.items()},
    }
    with options.out.open("a") as file:
        file.write(json.dumps(record) + "\n")
    draw(runs, options.picture)
    holds = all(found["first"] <= FIRST and found["largest"] <= ANY for found in apart.values())
    console.print("holds" if holds else "DOES NOT HOLD")
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
