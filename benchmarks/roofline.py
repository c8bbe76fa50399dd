"""What part of a GPU's two ceilings the kernels reach: arithmetic in matrix products, and bytes to and from memory.

    PYTHONPATH=. python benchmarks/roofline.py --picture docs/roofline.svg

Measures both ceilings here (a large bf16 product, a large copy), takes the times of our kernels on such a GPU from
`results/kernels.jsonl`, and says of each what it has to do at least, which ceiling that meets first, and how near it
comes. Appends one JSON line to `--out`; draws the picture where matplotlib is installed.

What a kernel has to do at least (`WORK`), for T tokens, H heads of width d, N tokens a sequence, 2 bytes a number:

| | operations, forward | and backward | numbers, forward | and backward |
|---|---|---|---|---|
| lightning | 4 T H d^2: k^T v into the state, q out of it | 8 T H d^2 | 4 T H d | 7 T H d |
| softmax, gated | 2 T N H d a: two products with the N/2 keys seen | 5/2 of that | 4 T H d | 8 T H d |
| sigmoid | as softmax | 5/2 of that | 4 T H d | 7 T H d |
| norm gate, glu | none to speak of | | 3 T W | 5 T W |
| cross entropy | 2 T D V | 4 T D V | T D + V D | T D + V D |

A chunked form of lightning attention does more operations than the recurrence (products inside chunks), and reads and
writes states; both are left out, as is all that is read twice. `a` is the part of the heads that run. Backward of
attention makes the weights again, since they are nowhere kept: five products, where forward has two.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import torch
from kernel_cells import OURS, SHARES
from kernel_speed import Clock, append, stamp

RESULTS = Path(__file__).parent / "results"
BYTES = {"bfloat16": 2, "float32": 4}


class Work(NamedTuple):
    """Operations and bytes."""

    operations: float
    bytes: float


def work_of(row: dict[str, Any]) -> dict[str, Work]:
    """Of a row of `kernels.jsonl`, the least that forward, and forward with backward, have to do."""
    size = BYTES[row["dtype"]]
    tokens = row["length"] * row["batch"]
    across = tokens * row.get("heads", 1) * row["width"]
    operation = row["operation"]
    if operation == "lightning":
        once = 4.0 * across * row["width"]
        return _both(once, 2 * once, 4 * across * size, 7 * across * size)
    if operation in ("gated attention", "sigmoid attention"):
        once = 2.0 * across * row["length"] * SHARES.get(row["arm"], 1.0)
        backward = 8 if operation == "gated attention" else 7
        return _both(once, 2.5 * once, 4 * across * size, backward * across * size)
    if operation in ("norm gate", "glu"):
        return _both(0.0, 0.0, 3 * across * size, 5 * across * size)
    assert operation == "cross entropy", operation
    moved = (tokens + row["vocabulary"]) * row["width"] * size
    once = 2.0 * across * row["vocabulary"]
    return _both(once, 2 * once, moved, moved)


def _both(forward: float, backward: float, moved_forward: float, moved_backward: float) -> dict[str, Work]:
    return {
        "forward": Work(forward, moved_forward),
        "both": Work(forward + backward, moved_forward + moved_backward),
    }


class Ceilings(NamedTuple):
    """Operations and bytes in a second."""

    operations: float
    bytes: float

    def shortest(self, work: Work) -> tuple[float, str]:
        """Seconds that work takes at least, and which ceiling says so."""
        products, memory = work.operations / self.operations, work.bytes / self.bytes
        return max((products, "operations"), (memory, "memory"))


def measure_ceilings(device: torch.device, rounds: int = 10) -> Ceilings:
    """Medians of a product of two 8192 x 8192 matrices, and of a copy of 2 GiB, read and written."""
    gpu, clock = device.type == "cuda", Clock(device)
    side, numbers = (8192, 2**30) if gpu else (256, 2**20)
    dtype = torch.bfloat16 if gpu else torch.float32
    # Random: a GPU multiplies zeros faster.
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    source = torch.empty(numbers, dtype=dtype, device=device).fill_(1)
    target = torch.empty_like(source)
    product, copy = (lambda: a @ b), (lambda: target.copy_(source))
    seconds = {}
    for name, work in (("product", product), ("copy", copy)):
        for _ in range(3):
            work()
        seconds[name] = statistics.median(clock.seconds(work) for _ in range(rounds))
    return Ceilings(2.0 * side**3 / seconds["product"], 2.0 * source.nbytes / seconds["copy"])


def latest(path: Path, gpu: str | None) -> list[dict[str, Any]]:
    """The newest row of each of our kernels at each shape, on such a GPU."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        ours = row.get("arm") == OURS or row.get("arm") in SHARES
        if ours and "reason" not in row and row["hardware"]["gpu"] == gpu:
            key = tuple(row.get(name) for name in ("operation", "arm", "length", "width", "batch", "vocabulary"))
            found.pop(key, None)
            found[key] = row
    return list(found.values())


def placed(rows: list[dict[str, Any]], ceilings: Ceilings) -> list[dict[str, Any]]:
    """Each kernel's place under the roof, forward and with backward."""
    found = []
    for row in rows:
        for name, work in work_of(row).items():
            seconds = row[f"{name}_ms"] / 1e3
            least, bound = ceilings.shortest(work)
            keys = ("operation", "arm", "length", "width", "batch", "heads", "vocabulary")
            found.append(
                {key: row[key] for key in keys if key in row}
                | {
                    "pass": name,
                    "ms": row[f"{name}_ms"],
                    "tflops": round(work.operations / seconds / 1e12, 2),
                    "gbytes": round(work.bytes / seconds / 1e9, 1),
                    "operations_per_byte": round(work.operations / work.bytes, 2),
                    "bound": bound,
                    "fraction": round(least / seconds, 3),
                    "measured": row["date"],
                }
            )
    return found


def show(rows: list[dict[str, Any]], ceilings: Ceilings) -> None:
    print(f"ceilings: {ceilings.operations / 1e12:.1f} TFLOP/s, {ceilings.bytes / 1e9:.1f} GB/s")
    for row in rows:
        what = f"{row['operation']}, {row['arm']}"
        print(
            f"{what:<30} N {row['length']:<7} width {row['width']:<5}{row['pass']:<8}{row['ms']:>9.3f} ms"
            f"{row['tflops']:>9.1f} TFLOP/s{row['gbytes']:>9.1f} GB/s   {row['fraction']:>6.1%} of {row['bound']}"
        )


def draw(rows: list[dict[str, Any]], ceilings: Ceilings, gpu: str | None, path: Path) -> None:
    """Operations a second over operations a byte, under the roof of both ceilings."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.fonttype"], plt.rcParams["svg.hashsalt"] = "none", "roofline"
    figure, axes = plt.subplots(figsize=(8, 5))
    edge = [2.0**power for power in range(-2, 15)]
    axes.plot(edge, [min(ceilings.operations, x * ceilings.bytes) / 1e12 for x in edge], color="black")
    shown = [row for row in rows if row["tflops"] > 0]
    for name in dict.fromkeys(row["operation"] for row in shown):
        for kind, marker in (("forward", "o"), ("both", "s")):
            mine = [row for row in shown if row["operation"] == name and row["pass"] == kind]
            axes.scatter(
                [row["operations_per_byte"] for row in mine],
                [row["tflops"] for row in mine],
                marker=marker,
                label=f"{name}, {'forward' if kind == 'forward' else 'with backward'}",
            )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("operations a byte, at least")
    axes.set_ylabel("TFLOP/s")
    axes.set_title(f"{gpu}: {ceilings.operations / 1e12:.0f} TFLOP/s, {ceilings.bytes / 1e12:.2f} TB/s, both measured")
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Measure, place, print, record, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--kernels", type=Path, default=RESULTS / "kernels.jsonl")
    parser.add_argument("--out", type=Path, default=RESULTS / "roofline.jsonl")
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    gpu = stamp()["hardware"]["gpu"]
    ceilings = measure_ceilings(torch.device(options.device))
    rows = placed(latest(options.kernels, gpu), ceilings)
    show(rows, ceilings)
    record = {
        "benchmark": "roofline",
        "ceilings": {"tflops": round(ceilings.operations / 1e12, 1), "gbytes": round(ceilings.bytes / 1e9, 1)},
        "rows": rows,
    }
    append(options.out, [record])
    if options.picture:
        try:
            draw(rows, ceilings, gpu, options.picture)
        except ImportError as error:
            print(f"no picture: {error}")


if __name__ == "__main__":
    main()
