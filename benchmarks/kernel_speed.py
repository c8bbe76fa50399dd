"""How fast the kernels are beside their peers on a GPU; first whether they are right.

    PYTHONPATH=. python benchmarks/kernel_speed.py --minutes 4

First every operation is checked against its fp64 reference, outputs and gradients (`kernel_checks.py`), by several
processes at once, which also compile; what is wrong is not timed. Then cells (`kernel_cells.py`), what is promised
first, until the time is over: all arms of a cell take turns in each of 7 rounds, by CUDA events, forward and forward
with backward. An arm that is slow takes fewer rounds. Each cell appends its rows to `--out` as soon as it is done, one
line of JSON an arm, with hardware, versions and date. Imports torch, triton and `kernels/`; peers where they are.

`--device cpu` runs all of it at tiny sizes with the portable forms, which says nothing but that it runs.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from kernel_cells import OPERATIONS, OURS, Arm, Cell, cells, make_arm
from kernel_checks import Check, checks, run_check

from kernels.dispatch import forced

SECONDS_OF_AN_ARM = 5.0
"""At most about so long; a slow one takes fewer rounds."""
SHORTEST = 1e-3
"""Seconds that are timed at a time: what is quicker is repeated."""
CYCLES = 2e9
"""Of a GPU in a second, about."""
MIB = 2**20


class Clock:
    """Seconds of some work: by events of the GPU, or by the clock."""

    def __init__(self, device: torch.device):
        self.gpu = device.type == "cuda"

    def seconds(self, work: Callable[[], Any], repeats: int = 1, lead: float = 0.0) -> float:
        """Of one of so many repeats. A GPU is kept busy for `lead` seconds first, in which its queue fills: what is
        timed is its work, and not how quickly Python hands it on."""
        if not self.gpu:
            began = time.perf_counter()
            for _ in range(repeats):
                work()
            return (time.perf_counter() - began) / repeats
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if lead:
            torch.cuda._sleep(int(lead * CYCLES))
        first.record()
        for _ in range(repeats):
            work()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1e3 / repeats


class Runner:
    """An arm that is ready: compiled, its memory measured, and how often it may run known."""

    def __init__(self, arm: Arm, clock: Clock, rounds: int):
        self.arm, self.clock = arm, clock
        out = self.forward()
        self.out = out.detach()
        # Alike for all arms of a cell, and laid out as the output of most is.
        generator = torch.Generator(device=out.device).manual_seed(1)
        self.cotangent = torch.randn(out.shape, generator=generator, device=out.device, dtype=torch.float32).to(
            out.dtype
        )
        del out
        self.both()
        self.peak = self._peak()
        once = {name: max(clock.seconds(work), 1e-7) for name, work in self.works.items()}
        self.repeats = {name: max(1, min(20, round(SHORTEST / seconds))) for name, seconds in once.items()}
        self.leads = {
            name: min(0.02, 1.5 * self.repeats[name] * self._issue(work)) for name, work in self.works.items()
        }
        self.rounds = max(2, min(rounds, int(SECONDS_OF_AN_ARM / sum(once.values()))))
        self.found: dict[str, list[float]] = {name: [] for name in self.works}

    @property
    def works(self) -> dict[str, Callable[[], Any]]:
        return {"forward": self.forward, "both": self.both}

    def forward(self) -> torch.Tensor:
        with forced(**self.arm.forms):
            return self.arm.run()

    def both(self) -> None:
        """Forward and backward."""
        with forced(**self.arm.forms):
            torch.autograd.grad(self.arm.run(), self.arm.leaves, self.cotangent)

    def _issue(self, work: Callable[[], Any]) -> float:
        """Seconds that Python takes to hand the work on."""
        if self.clock.gpu:
            torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    def _peak(self) -> int | None:
        """Bytes by which forward and backward lift the memory in use; not known on a CPU."""
        if not self.clock.gpu:
            return None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self.both()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def round(self) -> None:
        for name, work in self.works.items():
            self.found[name].append(self.clock.seconds(work, self.repeats[name], self.leads[name]))


def time_cell(cell: Cell, device: torch.device, rounds: int) -> list[dict[str, Any]]:
    """A row for each arm."""
    clock, runners, reasons = Clock(device), {}, {}
    for name in cell.arms:
        try:
            runners[name] = Runner(make_arm(cell, name, device), clock, rounds)
        except Exception as error:
            reasons[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    first = runners.get(cell.arms[0])
    apart = {}
    for name, runner in runners.items():
        if runner.arm.same and first is not None:
            apart[name] = ((runner.out.float() - first.out.float()).norm() / first.out.float().norm()).item()
    for number in range(max((runner.rounds for runner in runners.values()), default=0)):
        order = list(runners.values())
        for runner in order[:: 1 if number % 2 else -1]:
            if number < runner.rounds:
                runner.round()
    return [_row(cell, name, runners, apart, reasons) for name in cell.arms]


def _row(
    cell: Cell, name: str, runners: dict[str, Runner], apart: dict[str, float], reasons: dict[str, str]
) -> dict[str, Any]:
    row: dict[str, Any] = {"operation": cell.operation, "arm": name} | cell.shape
    if name in reasons:
        return row | {"reason": reasons[name]}
    runner = runners[name]
    forward, both = (statistics.median(runner.found[work]) for work in ("forward", "both"))
    row |= {"dtype": str(runner.out.dtype).removeprefix("torch."), "rounds": runner.rounds}
    row |= {"forward_ms": round(forward * 1e3, 4), "both_ms": round(both * 1e3, 4)}
    if (ours := runners.get(OURS)) is not None:
        for work in ("forward", "both"):
            pairs = zip(runner.found[work], ours.found[work], strict=False)
            row[f"{work}_over_ours"] = round(statistics.median(a / b for a, b in pairs), 3)
    if runner.peak is not None:
        row["peak_mib"] = round(runner.peak / MIB, 1)
    if runner.arm.form:
        row["form"] = runner.arm.form
    if name in apart:
        row["apart_from_ours"] = float(f"{apart[name]:.2g}")
    return row


# -------------------------------------------------------------------------------------------- checks


def warm(cell: Cell) -> None:
    """Compile a cell's arms, in a process of its own: what Triton makes is kept in files."""
    arm = make_arm(cell, cell.arms[0], torch.device("cuda"))
    out = arm.run()
    torch.autograd.grad(out, arm.leaves, torch.ones_like(out))


def check_all(options: argparse.Namespace, wanted: list[Cell]) -> tuple[list[dict[str, Any]], set[str]]:
    """Rows of all checks, and the operations that are wrong in the dtype that is timed."""
    asked = checks(options.device, options.only)
    rows = []
    if options.device == "cpu":
        rows = [run_check(check) for check in asked]
    else:
        # What is timed of ours compiles meanwhile.
        compiled = {
            replace(cell, arms=(name,), length=min(cell.length, 2048), batch=min(cell.batch, 2)): None
            for cell in wanted
            for name in cell.arms
            if name in (OURS, "1/2")
        }
        workers = max(2, min(14, (os.cpu_count() or 2) - 1))
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            futures = {pool.submit(run_check, check): check for check in asked}
            others = [pool.submit(warm, cell) for cell in compiled]
            for future in as_completed([*futures, *others]):
                if future in futures:
                    rows.append(_result_of(futures[future], future))
    timed = "bfloat16" if options.device == "cuda" else "float32"
    wrong = {row["operation"] for row in rows if row["dtype"] == timed and not row["right"]}
    return rows, wrong


def _result_of(check: Check, future: Any) -> dict[str, Any]:
    try:
        return future.result()
    except Exception as error:
        return check._asdict() | {"error": None, "right": False, "reason": f"{type(error).__name__}: {error}"}


def show_checks(rows: list[dict[str, Any]]) -> None:
    for row in sorted(rows, key=lambda row: (row["operation"], row["dtype"], row["width"], row["length"])):
        name = f"{row['operation']:<18}{row['dtype']:<10}width {row['width']:<5}length {row['length']:<5}"
        if row["error"] is None:
            print(f"{'FAILED':<7}{name}{row['reason']}")
            continue
        each = " ".join(f"{part} {error:.1e}" for part, error in row["errors"].items())
        print(f"{'right' if row['right'] else 'WRONG':<7}{name}{row['form']:<8}{each}")
    sys.stdout.flush()


# -------------------------------------------------------------------------------------------- record


def stamp() -> dict[str, Any]:
    """What every line says of where and when it was measured: nothing that names the machine."""
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for name, package in (("triton", "triton"), ("fla", "fla-core")):
        try:
            versions[name] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "benchmark": "kernels",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "hardware": {"gpu": gpu, "cpu": platform.machine(), "cores": os.cpu_count()},
        "versions": versions,
    }


def append(path: Path, rows: list[dict[str, Any]]) -> None:
    """One line each, at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(stamp() | row) + "\n" for row in rows)


def show(cell: Cell, rows: list[dict[str, Any]]) -> None:
    print(f"\n{cell}")
    for row in rows:
        if "reason" in row:
            print(f"  {row['arm']:<18}left out: {row['reason']}")
            continue
        print(
            f"  {row['arm']:<18}{row['forward_ms']:>10.3f} ms forward{row['both_ms']:>10.3f} ms both   "
            f"x ours: {row.get('forward_over_ours', '-'):>7} {row.get('both_over_ours', '-'):>7}   "
            f"{row.get('peak_mib', '-'):>9} MiB   {row.get('apart_from_ours', '')} {row.get('form', '')}"
        )
    sys.stdout.flush()


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=4.0, help="no new cell begins after so long, checks included")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", nargs="+", choices=OPERATIONS, default=list(OPERATIONS), help="these operations")
    parser.add_argument("--arms", nargs="+", help="these arms; ours is always among them")
    parser.add_argument("--lengths", type=int, nargs="+", help="these lengths")
    parser.add_argument("--widths", type=int, nargs="+", help="these widths")
    parser.add_argument("--skip-checks", action="store_true")
    parser.add_argument("--checks-only", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "kernels.jsonl")
    return parser.parse_args()


def chosen_cells(options: argparse.Namespace) -> list[Cell]:
    """Those that were asked for, in the order of their importance."""
    found = []
    for cell in cells(options.device == "cpu"):
        asked = cell.operation in options.only
        asked &= options.lengths is None or cell.length in options.lengths
        asked &= options.widths is None or cell.width in options.widths
        arms = tuple(a for a in cell.arms if options.arms is None or a == OURS or a in options.arms)
        if asked:
            found.append(replace(cell, arms=arms))
    return found


def main() -> int:
    """Check, time, print, record. Ends with 1 where something is wrong."""
    options = parse_options()
    began = time.perf_counter()
    wanted, wrong = chosen_cells(options), set()
    if not options.skip_checks:
        rows, wrong = check_all(options, wanted)
        show_checks(rows)
        append(options.out, [{"check": True} | row for row in rows])
        print(f"checked in {time.perf_counter() - began:.0f} s; wrong, and not timed: {', '.join(wrong) or 'nothing'}")
    if options.checks_only:
        return int(bool(wrong))
    device, left_out = torch.device(options.device), []
    for cell in wanted:
        if cell.operation in wrong:
            continue
        if time.perf_counter() - began > options.minutes * 60:
            left_out.append(str(cell))
            continue
        rows = time_cell(cell, device, options.rounds)
        append(options.out, rows)
        show(cell, rows)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    print(f"\n{time.perf_counter() - began:.0f} s; left out for want of time: {'; '.join(left_out) or 'nothing'}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
