"""A Mixture-of-Transformers beside the dense model that computes as much for a token, on real pictures with captions.

    OMP_NUM_THREADS=1 python benchmarks/mot_captions.py

Fashion-MNIST as codes of learned patches, with captions made from the names of its classes (`image_captions.py`), next
tokens everywhere (arXiv 2411.04996, Chameleon setting). Arms of one shape, whose tokens run through as many weights,
and which get the same batches with the same learning rate:

    dense          all weights shared
    feed-forward   feed-forwards for each modality, the rest shared
    mot            all parts for each modality

`headway train` trains each with every seed, two at a time (`--workers`), and tells the loss of each modality on
held-out documents as it goes. Told are these losses at the end, and after which part of the steps an arm is where dense
ends, for each modality and seed. Draws `--picture` and appends a JSON line to `--out`. No learning rate is tuned, for
none of the arms. Everything made lands in `--work`, where a second run with the same settings finds what the first one
made. No figure is promised: it ends with 0 whatever comes out. The picture wants matplotlib (the extra `benchmarks`).
"""

import argparse
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import tomli_w
from image_captions import Captioned, build
from recording import append
from rich.console import Console
from rich.table import Table

from model.hf.source import open_model
from model.stack import Model
from trainer.metrics import read_metrics

ARMS: dict[str, list[str]] = {
    "dense": [],
    "feed-forward": ["feedforward"],
    "mot": ["qkv", "o", "feedforward", "norms"],
}
COLOURS = {"dense": "C2", "feed-forward": "C0", "mot": "C3"}
MODALITIES = ("text", "image")
Curve = list[tuple[int, float]]


def configuration(options: argparse.Namespace, data: Captioned, arm: str, seed: int) -> dict[str, Any]:
    """All that an arm is and does."""
    told = data.sidecar["modalities"]
    return {
        "run": {"dir": str(options.work / "runs" / f"{arm}-{seed}"), "seed": seed, "precision": "fp32"},
        "model": {
            "d_model": options.width,
            "num_layers": options.layers,
            "vocab_size": data.sidecar["vocab_size"],
            "norm_position": "sandwich_out",
        },
        "mixers": {"softmax": {"num_heads": options.heads, "qk_norm": True}},
        "feedforwards": {"swiglu": {"d_ff": 3 * options.width}},
        "untie": {"modalities": 2, "names": told["names"], "ranges": told["ranges"], "parts": ARMS[arm]},
        "data": {
            "train": [data.train],
            "validation": [data.validation],
            "seq_len": options.length,
            "global_batch_size": options.rows,
            "validate_every_steps": options.look_every,
            "validation_batches": options.look_batches,
        },
        "optimizer": {"lr": options.lr},
        "schedule": {"steps": options.steps, "warmup_steps": options.steps // 12, "final_lr_fraction": 0.1},
        "metrics": {"sinks": ["jsonl"]},
    }


def train(options: argparse.Namespace, data: Captioned, arm: str, seed: int) -> Path:
    """Train an arm, or find that it is trained; its run folder."""
    tables = configuration(options, data, arm, seed)
    folder = Path(tables["run"]["dir"])
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.parent / f"{folder.name}.toml"
    path.write_text(tomli_w.dumps(tables))
    done = subprocess.run(
        [sys.executable, "-m", "trainer", "train", str(path)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{arm}, seed {seed} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    print(f"{arm}, seed {seed}: trained", flush=True)
    return folder


def curves(folder: Path) -> dict[str, Curve]:
    """Held-out loss of each modality over the steps."""
    found: dict[str, Curve] = {name: [] for name in MODALITIES}
    for record in read_metrics(folder):
        for name in MODALITIES:
            if (loss := record.get(f"modality/{name}/val_loss")) is not None:
                found[name].append((record["step"], loss))
    return found


def first_below(curve: Curve, loss: float) -> float | None:
    """The step, between two looks, at which a curve comes down to this loss; None where it does not."""
    for (before, high), (step, low) in pairwise(curve):
        if low <= loss < high:
            return before + (step - before) * (high - loss) / (high - low)
    return None


def sizes(folder: Path) -> dict[str, float]:
    """Parameters, and operations of a token forward."""
    architecture = open_model(folder).architecture()
    model = Model(architecture)
    return {"parameters": sum(p.numel() for p in model.parameters()), "operations": model.flops(256)}


def report(found: dict[str, list[dict[str, Any]]], steps: int) -> list[dict[str, Any]]:
    """A table of all arms."""
    table = Table("", "parameters", "operations a token", "text", "image", "part of dense's steps, text", "image")
    rows = []
    for arm, runs in found.items():
        row: dict[str, Any] = {"arm": arm, "parameters": runs[0]["parameters"], "operations": runs[0]["operations"]}
        for name in MODALITIES:
            row[name] = [round(run["curves"][name][-1][1], 4) for run in runs]
        for name in MODALITIES:
            reached = [
                first_below(run["curves"][name], dense["curves"][name][-1][1])
                for run, dense in zip(runs, found["dense"], strict=True)
            ]
            row[f"{name}, part"] = [None if step is None else round(step / steps, 3) for step in reached]
        rows.append(row)
        words = [f"{statistics.mean(row[name]):.4f} {row[name]}" for name in MODALITIES]
        parts = [str(row[f"{name}, part"]) for name in MODALITIES]
        table.add_row(arm, f"{row['parameters']:,}", f"{row['operations']:,.0f}", *words, *parts)
    Console(width=160).print(table)
    return rows


def draw(found: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Held-out loss of each modality over the steps, a line for each seed; below, what it is less than dense."""
    import matplotlib.pyplot as plt

    plt.rcParams["svg.fonttype"] = "none"
    figure, panels = plt.subplots(2, len(MODALITIES), figsize=(10, 6.5), layout="constrained", sharex=True)
    for above, below, name in zip(*panels, MODALITIES, strict=True):
        for arm, runs in found.items():
            for number, (run, dense) in enumerate(zip(runs, found["dense"], strict=True)):
                steps, losses = zip(*run["curves"][name], strict=True)
                style = {"color": COLOURS[arm], "alpha": 0.7, "linewidth": 1.2}
                above.plot(steps, losses, label=arm if number == 0 else None, **style)
                if arm != "dense":
                    away = [loss - other for loss, (_, other) in zip(losses, dense["curves"][name], strict=True)]
                    below.plot(steps, away, **style)
        # The first looks would hide all others.
        last = [loss for runs in found.values() for run in runs for _, loss in run["curves"][name][1:]]
        above.set(title=name, ylim=(min(last) - 0.02, max(last) + 0.02))
        apart = [y for line in below.lines for y in line.get_ydata()[2:]]
        below.set(xlabel="step", ylim=(min(apart) - 0.005, max(apart) + 0.005))
        below.axhline(0, color="C2", linewidth=1)
        for axes in (above, below):
            axes.grid(color="0.92")
    panels[0][0].set_ylabel("held-out loss, nats a token")
    panels[1][0].set_ylabel("less that of dense")
    panels[0][0].legend()
    figure.savefig(path)


def main() -> int:
    """Prepare, train, report, draw, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = {"width": 128, "layers": 4, "heads": 4, "rows": 16, "length": 256, "steps": 400, "seeds": 3, "workers": 2}
    for name, default in (numbers | {"look_every": 25, "look_batches": 12}).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--quick", action="store_true", help="one seed, 40 steps; leaves no line and no picture")
    parser.add_argument("--work", type=Path, default=Path("data/mot-captions"))
    parser.add_argument("--picture", type=Path, default=Path("docs/mot_captions.svg"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/mot_captions.jsonl"))
    options = parser.parse_args()
    if options.quick:
        options.seeds, options.steps, options.look_every, options.work = 1, 40, 10, options.work / "quick"
    data = build("fashion", options.work)
    jobs = [(arm, seed) for seed in range(options.seeds) for arm in ARMS]
    with ThreadPoolExecutor(options.workers) as workers:
        folders = list(workers.map(lambda job: train(options, data, *job), jobs))
    found: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
    for (arm, _), folder in zip(jobs, folders, strict=True):
        found[arm].append({"curves": curves(folder)} | sizes(folder))
    rows = report(found, options.steps)
    draw(found, options.work / "picture.svg" if options.quick else options.picture)
    told = {arm: [run["curves"] for run in runs] for arm, runs in found.items()}
    append(options, "mot_captions", rows=rows, curves=told)
    return 0


if __name__ == "__main__":
    sys.exit(main())
