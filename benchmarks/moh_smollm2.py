"""SmolLM2-135M with heads that are chosen for each token, tuned beside the same model as it is, on the same tokens.

    OMP_NUM_THREADS=2 python benchmarks/moh_smollm2.py

The model has 9 query heads in 3 groups. `headway upcycle moh` shares the first group and lets the norms of their
queries choose 4 of the other 6 heads (so 7 of 9 run for a token), or 2 (5 of 9); each of these models, and the one they
were made from, is then trained by `headway train` on equal batches with equal learning rates. Told are losses on text
that was held out: of the source, right after the switch, after tuning; and what part of the tokens each head gets.

What is trained on is of the kind that is held out (Shakespeare without Hamlet, and modules of Python's own library), so
every arm gains by tuning alone: the difference to the plain arm is the figure to look at. The embedding, which is also
the head, is frozen, as in smollm2.py: gradient, moments and update of its 28 million weights cost time and memory, and
no switch of heads touches them.

Run it from the root of the repository. `--weights` is a work folder of smollm2.py, where the weights are found or
fetched; everything made lands in `--work` (5 GB). A JSON line is appended to `--out`. No figure is promised: it ends
with 0 whatever comes out.
"""

import argparse
import json
import math
import shutil
import statistics
import subprocess
import sys
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recording import append
from smollm2 import (
    HAMLET,
    WHEEL,
    Text,
    fetch_weights,
    plays_but_hamlet,
    prepare,
    run,
    score,
    stay_in_this_environment,
    take_sample,
)

HEADS, SHARED = 9, 3
DIAGNOSED_ROWS = 16
PLAIN = "plain"
Found = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """What all arms have in common.

    Attributes:
        source: the Hugging Face folder.
        train: prefixes, of each of which as many rows are taken.
        held_out: name of a text -> its prefix.
    """

    work: Path
    source: Path
    train: list[str]
    held_out: dict[str, str]
    options: argparse.Namespace


def modules() -> tuple[list[Path], list[Path]]:
    """Python's own library: what is trained on, and every tenth module, which is held out."""
    found = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    held_out = found[5::10]
    return [path for path in found if path not in held_out], held_out


def read_held_out_modules(root: Path) -> str:
    return "\n".join(path.read_text() for path in modules()[1])


LIBRARY = Text("library", math.nan, None, None, (), read_held_out_modules)


def prepare_all(source: Path, options: argparse.Namespace) -> Setting:
    """Texts to train on, and others, as datasets in the work folder."""
    work, library = options.work, options.work / "library"
    library.mkdir(exist_ok=True)
    for path in modules()[0]:
        shutil.copyfile(path, library / f"{path.stem}.txt")
    train = [prepare(folder, work, source) for folder in (plays_but_hamlet(work), library)]
    held_out = {}
    for text in (HAMLET, LIBRARY):
        sample = take_sample(text, work, options.held_out, f"held-out-{text.name}-{options.held_out}", source)
        held_out[text.name] = prepare(sample, work, source)
    return Setting(work, source, train, held_out, options)


def losses(model: Path, setting: Setting) -> dict[str, float]:
    """Nats a token on each held-out text."""
    rows = score(model, list(setting.held_out.values()), setting.options.length, setting.work)
    return {name: rows[Path(prefix).name]["nats_per_token"] for name, prefix in setting.held_out.items()}


def loads(model: Path, setting: Setting) -> Found:
    """For which part of held-out tokens the heads run that are chosen: the least, and how many run for none."""
    found = setting.work / f"{model.name}-diagnosis.json"
    data = ("--data", *setting.held_out.values(), "--seq-len", str(setting.options.length))
    looked_at = ("--rows", str(DIAGNOSED_ROWS), "--queries", "16")  # loads are of all tokens whatever is looked at
    run("headway", "diagnose", str(model), *data, *looked_at, "--out", str(found))
    record = json.loads(found.read_text())
    routed = [load for row in record["diagnostics"]["load"] for load in row[SHARED:]]
    return {"head_load_min": record["head_load_min"], "idle": routed.count(0), "routed": len(routed)}


def switch(heads: int, setting: Setting) -> Path:
    """The source with so many of its heads running for a token."""
    made = setting.work / f"moh-{heads}"
    counts = ("--shared-heads", str(SHARED), "--active-heads", str(heads - SHARED))
    run("headway", "upcycle", "moh", str(setting.source), str(made), *counts, "--router", "norm", "--overwrite")
    return made


def tune(model: Path, name: str, setting: Setting) -> tuple[Path, list[Found]]:
    """Train a model; returns the run folder and what its metrics say of each step. Nothing earlier is gone on with."""
    options, trained = setting.options, setting.work / f"run-{name}"
    shutil.rmtree(trained, ignore_errors=True)
    config = setting.work / f"run-{name}.toml"
    config.write_text(
        f'[run]\ndir = "{trained}"\nprecision = "fp32"\nfreeze = ["embedding.*"]\n\n'
        f'[model]\ninit_from = "{model}"\n\n'
        f"[data]\ntrain = {json.dumps(setting.train)}\nseq_len = {options.length}\n"
        f"global_batch_size = {options.rows}\n\n"
        f"[optimizer]\nlr = {options.lr}\nweight_decay = 0.1\ngrad_clip = 1.0\n\n"
        f'[schedule]\nkind = "cosine"\nsteps = {options.steps}\nwarmup_steps = {max(1, options.steps // 10)}\n\n'
        '[metrics]\nsinks = ["jsonl"]\ndiagnose_every_steps = 0\n'
    )
    run("headway", "train", str(config))
    return trained, [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]


def measure(name: str, heads: int, setting: Setting, before: dict[str, float]) -> Found:
    """One arm, from the switch to the end of tuning."""
    print(f"\n{name}: {heads} of {HEADS} heads run for a token", flush=True)
    routed = heads < HEADS
    model = switch(heads, setting) if routed else setting.source
    switched = losses(model, setting) if routed else before
    found: Found = {"name": name, "heads": heads, "before": before, "switched": switched}
    if routed:
        found["load_switched"] = loads(model, setting)
    trained, steps = tune(model, name, setting)
    found["tuned"] = losses(trained, setting)
    found["training_loss"] = [round(step["loss"], 5) for step in steps]
    found["seconds_per_step"] = round(statistics.median(step["step_time"] for step in steps), 2)
    if routed:
        found["load_tuned"] = loads(trained, setting)
        found["head_balance_loss"] = [steps[at]["head_balance_loss"] for at in (0, -1)]
    return found


def report(arms: list[Found], options: argparse.Namespace) -> None:
    """A table, and in sentences what the switch cost and what of it is left."""
    from rich.console import Console
    from rich.table import Table

    plain, console = arms[0], Console(width=110)
    tokens = options.steps * options.rows * options.length
    table = Table(title=f"nats a token on {options.held_out:,} tokens each; tuned on {tokens:,} equal tokens")
    columns = ("text", "arm", "before", "after the switch", "after tuning", "to plain", "least head load")
    for column in columns:
        table.add_column(column, justify="left" if column in ("text", "arm") else "right")
    for text in plain["before"]:
        for arm in arms:
            values = [arm[when][text] for when in ("before", "switched", "tuned")]
            least = f"{arm['load_tuned']['head_load_min']:.4f}" if "load_tuned" in arm else ""
            away = f"{values[-1] - plain['tuned'][text]:+.4f}" if arm is not plain else ""
            table.add_row(text, arm["name"], *(f"{value:.4f}" for value in values), away, least)
        table.add_section()
    console.print(table)
    for arm in arms[1:]:
        for text in plain["before"]:
            cost, left = (arm[when][text] - plain[when][text] for when in ("switched", "tuned"))
            print(f"{arm['name']}, {text}: the switch cost {cost:+.4f} nats, after tuning {left:+.4f} to plain tuning")
        print(_head_loads(arm))
    print("All arms were tuned on text of the kind that is held out: what counts is the difference to the plain arm.")


def _head_loads(arm: Found) -> str:
    first, last = arm["head_balance_loss"]
    idle = " and ".join(str(arm[when]["idle"]) for when in ("load_switched", "load_tuned"))
    even = (arm["heads"] - SHARED) / (HEADS - SHARED)
    return (
        f"{arm['name']}: no token chose {idle} of {arm['load_tuned']['routed']} (layer, head) pairs after switch and "
        f"tuning; least load {arm['load_switched']['head_load_min']:.4f} and {arm['load_tuned']['head_load_min']:.4f} "
        f"(all alike: {even:.4f}); head_balance_loss {first:.4f} at the first step, {last:.4f} at the last"
    )


def draw(arms: list[Found], path: Path) -> None:
    """Losses of the same batches over steps, and how far the other arms are from the plain one."""
    import matplotlib.pyplot as plt

    plt.rcParams["svg.fonttype"] = "none"
    figure, (above, below) = plt.subplots(2, 1, figsize=(8, 7), layout="constrained")
    plain = arms[0]["training_loss"]
    for number, arm in enumerate(arms):
        steps, label = range(1, len(plain) + 1), f"{arm['heads']} of {HEADS} heads"
        above.plot(steps, arm["training_loss"], color=f"C{number}", label=label)
        if number:
            differences = [loss - other for loss, other in zip(arm["training_loss"], plain, strict=True)]
            below.plot(steps, differences, color=f"C{number}", label=label)
    above.set(title="SmolLM2-135M tuned with fewer heads, on equal batches", ylabel="loss, nats a token")
    below.set(xlabel="step", ylabel=f"beside all {HEADS} heads, nats a token")
    below.axhline(0, color="0.7", linewidth=1)
    for axes in (above, below):
        axes.legend()
    figure.savefig(path)


def main() -> int:
    """Prepare, measure the arms one after the other, report, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, default=Path("data/smollm2"), help="a work folder of smollm2.py")
    parser.add_argument("--work", type=Path, default=Path("data/moh-smollm2"), help="what is made")
    parser.add_argument("--heads", type=int, nargs="+", default=[7, 5], choices=range(SHARED + 1, HEADS))
    parser.add_argument("--lr", type=float, default=1e-4, help="the peak; a cosine to a tenth of it")
    for name, default in (("steps", 40), ("rows", 8), ("length", 256)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--held-out", type=int, default=8192, help="tokens of each text")
    parser.add_argument("--quick", action="store_true", help="2 small updates: see that it runs; leaves nothing")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "moh_smollm2.jsonl")
    parser.add_argument("--picture", type=Path, help="also draw the losses there, as an SVG")
    options = parser.parse_args()
    if options.quick:
        options.steps, options.rows, options.length, options.held_out = 2, 2, 128, 512
    stay_in_this_environment()
    options.work.mkdir(parents=True, exist_ok=True)
    options.weights.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    setting = prepare_all(fetch_weights(options.weights), options)
    before = losses(setting.source, setting)
    wanted = [(PLAIN, HEADS)] + [(f"moh-{heads}", heads) for heads in options.heads]
    arms = [measure(name, heads, setting, before) for name, heads in wanted]
    report(arms, options)
    if options.picture is not None:
        draw(arms, options.picture)
    append(options, "moh_smollm2", weights=WHEEL, arms=arms, seconds=round(time.monotonic() - began))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except subprocess.CalledProcessError as error:
        sys.exit(f"{error} Nothing after it was tried.")
