"""What a training step costs: Headway beside transformers, and Headway's loop beside the bare step it is made of.

    python benchmarks/train_step.py
    PYTHONPATH=. python benchmarks/train_step.py --size 1b --skip-loop --variants headway-compiled transformers-compiled
    PYTHONPATH=. python benchmarks/train_step.py --size 1b --skip-loop --variants lightning-compiled

Both train the same Llama: equal parameters (whose logits are compared first), batch, AdamW and clipping, driven by the
same few lines; only the model differs. Eager, and compiled as each is meant to be: Headway block by block, transformers
as a whole. fp32 on a CPU; on a GPU, weights and all in bf16; of size 1b, bf16 weights beside fp32 ones that AdamW
updates, and for Headway's models the loss without logits, where there is one. `lightning` is TransNormerLLM of the same
widths. MFU counts the model's own operations, over the maker's figure for the GPU. Two variants of 1b fit into 80 GB at
a time.

The loop is `trainer.loop.train` with a real run on a small dataset: batches, counters, metrics, TensorBoard, status and
console. After each of its steps the same model takes a bare step on the same batch (forward, backward, clip, update),
and the difference is what the loop costs.

Every variant has a process of its own that lives from the first round to the last; in every round they take turns, in a
fresh order, so that a busy machine slows all of them alike. Ratios are medians over rounds. Peak memory is how far a
process rises above what it held after a small model had taken a step. Appends one JSON line to `--out`.
"""

import argparse
import contextlib
import datetime
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from train_step_models import (
    BETAS,
    CLIP,
    DECAY,
    FAMILIES,
    HOWS,
    LR,
    MASTERED,
    SIZES,
    build_ours,
    build_theirs,
    device,
    flops_of_step,
    make_step,
    model_tables,
    random_tokens,
)

# The processes that measure import torch; this one stays small, since a child's peak begins with its parent's.

WARMUP = 2
LOOP = "loop"
MIB = 2**20


class Turns:
    """A worker's end of the conversation: a line in says go, a line of JSON out says what came of it."""

    def __init__(self, lines_in: TextIO, lines_out: TextIO):
        self.lines_in, self.lines_out = lines_in, lines_out

    def reply(self, **facts: Any) -> None:
        print(json.dumps(facts), file=self.lines_out, flush=True)

    def wait(self) -> bool:
        """Until the next turn; false when there is none."""
        return self.lines_in.readline().strip() == "go"


class Worker:
    """The other end: a process that measures one variant."""

    def __init__(self, variant: str, options: argparse.Namespace):
        self.variant = variant
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (lives as long as the worker)
        command = [sys.executable, __file__, "--worker", variant, "--size", options.size]
        for flag in ("rounds", "steps", "threads"):
            command += [f"--{flag}", str(getattr(options, flag))]
        command += ["--batch-size", str(SIZES[options.size]["batch_size"])]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True
        )
        self.facts: dict[str, Any] = {}

    def warm(self) -> None:
        """Wait until it is."""
        self.facts = self.listen()

    def listen(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.log.seek(0)
            raise RuntimeError(f"{self.variant} ended early:\n{self.log.read()[-3000:]}")
        return json.loads(line)

    def round(self) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return self.listen()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
        self.log.close()


# What the workers do.


def work_check(size: dict[str, int], turns: Turns) -> None:
    """Say how far the two models' logits are apart when they hold the same weights."""
    import torch

    from model.hf.names import from_hf

    ours, theirs = build_ours(size), build_theirs(size)
    ours.load_state_dict(from_hf(theirs.state_dict(), ours.architecture, "llama"))
    tokens = random_tokens(size)[:1, :-1]
    with torch.no_grad():
        wanted = theirs(input_ids=tokens).logits
        apart = (ours(tokens) - wanted).abs().max() / wanted.abs().max()
    counts = [sum(parameter.numel() for parameter in model.parameters()) for model in (ours, theirs)]
    gpu = torch.cuda.get_device_name() if device().type == "cuda" else None
    turns.reply(apart=apart.item(), parameters=counts, gpu=gpu)


def work_model(variant: str, size: dict[str, int], steps: int, turns: Turns) -> None:
    """Train one of the models, so many steps a turn."""
    family, _, how = variant.partition("-")
    compiled, mastered = how == "compiled", size in [SIZES[name] for name in MASTERED]
    # A small model first: what imports and libraries hold from then on is not what training this one takes.
    make_step(family, SIZES["tiny"], compiled=False)[0]()
    before = resident_bytes()
    step, facts = make_step(family, size, compiled=compiled, mastered=mastered)
    losses = [step().item() for _ in range(WARMUP)]
    release_cache()
    turns.reply(**facts, flops=flops_of_step(family, size), peak_flops=peak_of_device(), losses=losses)
    while turns.wait():
        seconds = [timed(step) for _ in range(steps)]
        turns.reply(seconds=statistics.median(seconds), peak_bytes=peak_bytes() - before)
        release_cache()


def peak_of_device() -> float | None:
    """bf16 operations a second, as the maker says; None where that is not known."""
    from trainer.throughput import peak_flops

    return peak_flops(device(), "bf16")


def release_cache() -> None:
    """Leave the GPU's memory to the variant whose turn is next."""
    import torch

    torch.cuda.empty_cache()


def timed(work: Callable[[], Any]) -> float:
    """Seconds that some work takes, the GPU's part of it included."""
    import torch

    began = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def resident_bytes() -> int:
    """What this process holds now: on a GPU, of the GPU's memory."""
    import torch

    if device().type == "cuda":
        return torch.cuda.memory_allocated()
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * resource.getpagesize() if statm.exists() else peak_bytes()


def peak_bytes() -> int:
    """The most it has held so far."""
    import torch

    if device().type == "cuda":
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def write_corpus(prefix: Path, size: dict[str, int], tokens: int) -> None:
    """Random documents of 10 to 1000 tokens, as Megatron's own tools write them."""
    import numpy as np

    from trainer.data.lazy import megatron

    generator = np.random.default_rng(0)
    builder = megatron("indexed_dataset").IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    while tokens > 0:
        document = generator.integers(size["vocab_size"], size=generator.integers(10, 1000))
        builder.add_document(document, [len(document)])
        tokens -= len(document)
    builder.finalize(f"{prefix}.idx")


class BareStep:
    """Takes the place of `run.log`: logs, notes how long the loop's step took, and takes a bare step beside it."""

    def __init__(self, run: Any, steps: int, turns: Turns):
        self.run, self.steps, self.turns, self.log = run, steps, turns, run.log
        self.parameters = [p for group in run.optimizer.param_groups for p in group["params"]]
        self.seconds: dict[str, list[float]] = {"loop": [], "bare": [], "batch": [], "log": []}
        self.since = time.perf_counter()

    def __call__(self, record: dict[str, Any]) -> None:
        timed(lambda: None)  # what the GPU still does of the update is not the log's
        self.seconds["log"].append(timed(lambda: self.log(record)))
        self.seconds["loop"].append(time.perf_counter() - self.since)
        self.take_bare_step(record["step"])
        done = record["step"] - WARMUP
        if done >= 0 and done % self.steps == 0:
            self.turns.reply(**(self.summary() if done else {}))
            release_cache()
            self.turns.wait()
        self.since = time.perf_counter()

    def take_bare_step(self, step: int) -> None:
        import torch

        from model.objective import batch_nats

        began = time.perf_counter()
        batch = self.run.data.batch(step - 1, self.run.rows)
        self.seconds["batch"].append(time.perf_counter() - began)
        model, objective = self.run.model, self.run.updater.objective
        batch, counted = batch.to(model.device), batch.counted.sum().item()

        def bare() -> None:
            (batch_nats(model.runs, objective, batch)[0] / counted).backward()
            torch.nn.utils.clip_grad_norm_(self.parameters, CLIP)
            self.run.optimizer.step()
            self.run.optimizer.zero_grad(set_to_none=True)

        self.seconds["bare"].append(timed(bare))

    def summary(self) -> dict[str, float]:
        turn = {name: seconds[-self.steps :] for name, seconds in self.seconds.items()}
        # Neighbours are compared: what slows one of a pair slows the other.
        over_bare = statistics.median(a / b for a, b in zip(turn["loop"], turn["bare"], strict=True))
        return {name: statistics.median(seconds) for name, seconds in turn.items()} | {"over_bare": over_bare}


def work_loop(size: dict[str, int], rounds: int, steps: int, turns: Turns) -> None:
    """A whole run through `trainer.loop.train`."""
    from parallel.processes import process_group, this_process
    from trainer.config import config_from_tables
    from trainer.loop import train
    from trainer.resume import make_plan, prepare_run_folder
    from trainer.run import open_run
    from trainer.signals import StopRequest
    from trainer.status import Status

    updates = WARMUP + rounds * steps
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_corpus(folder / "corpus", size, (updates + 1) * size["batch_size"] * (size["seq_len"] + 1))
        tables = model_tables(size) | {
            "run": {"dir": str(folder / "run")},
            "data": {"train": [str(folder / "corpus")]}
            | {"seq_len": size["seq_len"], "global_batch_size": size["batch_size"]},
            "optimizer": {"lr": LR, "betas": list(BETAS), "weight_decay": DECAY, "grad_clip": CLIP},
            "schedule": {"steps": updates, "warmup_steps": WARMUP},
        }
        config, process = config_from_tables(tables), this_process()
        plan = make_plan(config)
        prepare_run_folder(config, plan)
        status = Status(folder / "run", is_first=True)
        with StopRequest() as stop, process_group(process), open_run(config, plan, process, stop, status) as run:
            run.log = BareStep(run, steps, turns)  # type: ignore[method-assign]
            train(run)


def work(options: argparse.Namespace) -> None:
    """Be the worker that `--worker` names."""
    # Whatever a library prints must not come between the lines of the conversation.
    turns = Turns(sys.stdin, os.fdopen(os.dup(1), "w"))
    os.dup2(2, 1)
    import torch

    torch.set_num_threads(options.threads)
    size = SIZES[options.size]
    if options.worker == "check":
        work_check(size, turns)
    elif options.worker == LOOP:
        work_loop(size, options.rounds, options.steps, turns)
    else:
        work_model(options.worker, size, options.steps, turns)


# What is made of it.


def measure(options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """The facts of the check, and every variant's replies, round by round."""
    variants = options.variants
    facts: dict[str, Any] = {"gpu": None, "apart": None}
    if {"headway", "transformers"} <= {variant.partition("-")[0] for variant in variants}:
        check = Worker("check", options)
        check.warm()
        check.close()
        facts = check.facts
        ours, theirs = facts["parameters"]
        if ours != theirs or not facts["apart"] < 1e-3:
            raise RuntimeError(f"these are not the same model: {facts}")
    workers = {}
    for variant in variants:
        print(f"starting {variant}", file=sys.stderr)
        workers[variant] = Worker(variant, options)
    for worker in workers.values():
        worker.warm()
    replies: dict[str, list[dict[str, Any]]] = {variant: [] for variant in variants}
    for number in range(options.rounds):
        for variant in random.Random(number).sample(variants, len(variants)):
            replies[variant].append(workers[variant].round())
        print(f"round {number + 1} of {options.rounds}", file=sys.stderr)
    for worker in workers.values():
        worker.close()
    facts["variants"] = {variant: worker.facts for variant, worker in workers.items()}
    return facts, replies


def summarise(size: dict[str, int], facts: dict[str, Any], replies: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians of the variants, ratios Headway / transformers, and the loop's cost."""
    tokens = size["batch_size"] * size["seq_len"]
    variants, ratios = {}, {}
    for variant, rounds in replies.items():
        if variant == LOOP:
            continue
        variants[variant] = {
            "step_ms": round(1e3 * median_of(rounds, "seconds"), 2),
            "tokens_per_second": round(tokens / median_of(rounds, "seconds"), 1),
            "peak_mib": round(max(reply["peak_bytes"] for reply in rounds) / MIB, 1),
        }
        known = facts["variants"][variant]
        variants[variant] |= {key: known[key] for key in ("parameters", "weights", "head")}
        if known["peak_flops"]:
            mfu = known["flops"] / median_of(rounds, "seconds") / known["peak_flops"]
            variants[variant]["mfu"] = round(mfu, 4)
        family, _, how = variant.partition("-")
        if family == "headway" and (theirs := replies.get(f"transformers-{how}")):
            pairs = list(zip(rounds, theirs, strict=True))
            ratios[how] = {
                "tokens_per_second": round(statistics.median(b["seconds"] / a["seconds"] for a, b in pairs), 3),
                "peak_memory": round(pairs[-1][0]["peak_bytes"] / pairs[-1][1]["peak_bytes"], 3),
            }
    found: dict[str, Any] = {"variants": variants, "headway_over_transformers": ratios}
    if loop := replies.get(LOOP):
        times = {f"{name}_ms": round(1e3 * median_of(loop, name), 3) for name in ("loop", "bare", "batch", "log")}
        found["loop"] = times | {"cost_percent": round(100 * (median_of(loop, "over_bare") - 1), 2)}
    return found


def median_of(replies: list[dict[str, Any]], key: str) -> float:
    return statistics.median(reply[key] for reply in replies)


def describe_hardware(threads: int, gpu: str | None) -> dict[str, Any]:
    """The processor's model, cores and threads in use, and the GPU if there is one: nothing that names the machine."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return {"cpu": model, "cores": os.cpu_count(), "threads": threads, "gpu": gpu}


def gpu_name() -> str | None:
    """Of the one in use."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def versions(*packages: str) -> dict[str, str]:
    """Of those that are installed."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for package in packages:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def show(record: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console, size = Console(width=110), record["size"]
    shape = f"{size['num_layers']} layers of {size['d_model']}, {size['batch_size']} x {size['seq_len']} tokens"
    table = Table(title=f"one training step, {shape}, median of {record['rounds']} rounds of {record['steps']} steps")
    columns = {"step_ms": "ms / step", "tokens_per_second": "tokens / s", "peak_mib": "peak MiB", "mfu": "MFU"}
    for column in ("variant", *columns.values()):
        table.add_column(column, justify="left" if column == "variant" else "right")
    for variant, numbers in record["variants"].items():
        table.add_row(variant, *(str(numbers.get(key, "")) for key in columns))
    console.print(table)
    for how, ratio in record["headway_over_transformers"].items():
        speed, memory = ratio.values()
        console.print(f"Headway / transformers, {how}: {speed} x tokens per second, {memory} x peak memory")
    if (loop := record.get("loop")) is None:
        return
    console.print(
        f"the loop's own cost: {loop['cost_percent']}% of a bare step of {loop['bare_ms']} ms "
        f"(the batch {loop['batch_ms']} ms, the log {loop['log_ms']} ms)"
    )


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="cpu", help="shape of model and batch")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=5, help="steps of a variant's turn in a round")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--skip-compiled", action="store_true")
    parser.add_argument("--skip-loop", action="store_true", help="leave out the loop, which needs megatron-core")
    known = [f"{family}-{how}" for how in HOWS for family in FAMILIES]
    parser.add_argument("--variants", nargs="+", choices=known, help="default: Headway's Llama and transformers'")
    parser.add_argument("--batch-size", type=int, help="sequences of a step; default: the size's")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "train_step.jsonl")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rounds < 1 or options.steps < 1:
        parser.error(f"--rounds {options.rounds} and --steps {options.steps} must be at least 1")
    if options.batch_size:
        SIZES[options.size]["batch_size"] = options.batch_size
    if options.variants is None:
        hows = ["eager"] if options.skip_compiled else HOWS
        options.variants = [f"{family}-{how}" for how in hows for family in ("headway", "transformers")]
    if not options.skip_loop:
        options.variants.append(LOOP)
    return options


def main() -> None:
    options = parse_options()
    if options.worker:
        work(options)
        return
    facts, replies = measure(options)
    record = {
        "benchmark": "train_step",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "hardware": describe_hardware(options.threads, gpu_name()),
        "versions": {"python": platform.python_version()} | versions("torch", "triton", "transformers"),
        "size": {"name": options.size} | SIZES[options.size],
        "rounds": options.rounds,
        "steps": options.steps,
        "logits_apart": facts["apart"],
    } | summarise(SIZES[options.size], facts, replies)
    show(record)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("a") as out:
        out.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
