"""Writes docs/performance.md from the lines in `results/`: measured figures alone, each with where and when.

    python benchmarks/performance.py

What has not been measured is not in the page.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS, PAGE, PICTURE = ROOT / "benchmarks" / "results", ROOT / "docs" / "performance.md", "roofline.svg"
HEAD = """# Speed, as measured

<!-- Written by benchmarks/performance.py from benchmarks/results; do not edit. -->

Every figure here was measured by a script in [benchmarks/](../benchmarks/README.md), which ran what
it measures and its peers in turns. Above each table stand the machine, the versions and the day.
Ratios say more than times. Which form of a kernel runs on your machine, `headway doctor` says.
"""


def read(results: Path, name: str) -> list[dict[str, Any]]:
    """The lines of a benchmark, oldest first; none where there is no file."""
    path = results / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def where(record: dict[str, Any], before: str = "", after: str = "") -> str:
    """Machine, versions and day of a line, in a sentence; a paragraph."""
    hardware = record["hardware"]
    machine = hardware.get("gpu") or f"{hardware['cores']} cores of {hardware['cpu']}"
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    said = f"{before} {machine}; {versions}; {record['date'][:10]}. {after}".strip()
    return textwrap.fill(said, 100, break_on_hyphens=False) + "\n"


def table(head: list[str], rows: Iterable[list[Any]]) -> Iterator[str]:
    """Text in the first columns, numbers to the right."""
    rows = list(rows)
    yield "| " + " | ".join(head) + " |"
    yield (
        "|"
        + "|".join("---" if any(_is_text(row[place]) for row in rows) else "--:" for place in range(len(head)))
        + "|"
    )
    for row in rows:
        yield "| " + " | ".join("" if cell is None else str(cell) for cell in row) + " |"
    yield ""


def _is_text(cell: Any) -> bool:
    return isinstance(cell, str) and not cell.removesuffix("%").replace(".", "", 1).isdigit()


def newest(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The last row of each arm of a kernel at a shape on a kind of GPU, in the order of first appearance."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        keys = ("operation", "arm", "length", "width", "batch", "heads", "vocabulary")
        found[row["hardware"]["gpu"], *(row.get(key) for key in keys)] = row
    return list(found.values())


def kernels(results: Path) -> Iterator[str]:
    """A table for each operation on each kind of GPU."""
    rows = [row for row in read(results, "kernels") if not row.get("check") and row["hardware"]["gpu"]]
    rows = [row for row in newest(rows) if "reason" not in row]
    if not rows:
        return
    yield "## Kernels\n"
    yield "bfloat16, medians of up to 7 rounds by events of the GPU; ratios are the times of others over ours"
    yield "(`headway`; of gated attention that is all heads, which torch's own attention computes), so above 1"
    yield "ours is the faster. Memory is what forward and backward add.\n"
    for operation, gpu in dict.fromkeys((row["operation"], row["hardware"]["gpu"]) for row in rows):
        mine = [row for row in rows if (row["operation"], row["hardware"]["gpu"]) == (operation, gpu)]
        mine.sort(key=lambda row: (row["width"], row["length"], row.get("vocabulary", 0)))
        yield f"### {operation.capitalize()}, on {gpu}\n"
        yield from dict.fromkeys(where(row) for row in mine)
        head = ["tokens", "rows", "width", "", "forward, ms", "with backward, ms", "/ ours", "/ ours, both", "MiB"]
        yield from table(head, ([row["length"], row["batch"], row["width"], *_numbers(row)] for row in mine))


def _numbers(row: dict[str, Any]) -> list[Any]:
    keys = ("forward_over_ours", "both_over_ours", "peak_mib")
    return [row["arm"], f"{row['forward_ms']:.3f}", f"{row['both_ms']:.3f}", *(row.get(key) for key in keys)]


def roofline(results: Path) -> Iterator[str]:
    """Of each kind of GPU, the newest line."""
    records = {record["hardware"]["gpu"]: record for record in read(results, "roofline") if record["hardware"]["gpu"]}
    if not records:
        return
    yield "## Beside what the GPU can do\n"
    yield "What a kernel has to do at least (`benchmarks/roofline.py` has formulas) takes so long at the measured"
    yield "ceilings of matrix products or of memory; the part is that time over the kernel's.\n"
    if (PAGE.parent / PICTURE).exists():
        yield f"![operations a second over operations a byte]({PICTURE})\n"
    for record in records.values():
        tops = record["ceilings"]
        yield where(record, after=f"Ceilings: {tops['tflops']} TFLOP/s, {tops['gbytes']} GB/s.")
        head = ["kernel", "tokens", "width", "", "ms", "TFLOP/s", "GB/s", "part", "of"]
        passes = {"forward": "forward", "both": "with backward"}
        yield from table(
            head,
            (
                [
                    f"{row['operation']}, {row['arm']}",
                    row["length"],
                    row["width"],
                    passes[row["pass"]],
                    f"{row['ms']:.3f}",
                    row["tflops"],
                    row["gbytes"],
                    f"{row['fraction']:.0%}",
                    row["bound"],
                ]
                for row in record["rows"]
            ),
        )


def train_step(results: Path) -> Iterator[str]:
    """Every line: whole training steps."""
    records = read(results, "train_step")
    if not records:
        return
    yield "## A training step\n"
    yield "Forward, backward, clipping and AdamW of a Llama in Headway, the same in transformers, and of"
    yield "TransNormerLLM (`lightning`) of the same widths. MFU counts the model's own operations.\n"
    for record in records:
        size = record["size"]
        shape = f"{size['num_layers']} layers of {size['d_model']}, {size['batch_size']} x {size['seq_len']} tokens."
        yield where(record, shape)
        keys = ("step_ms", "tokens_per_second", "peak_mib", "mfu", "weights", "head")
        used = [key for key in keys if any(key in numbers for numbers in record["variants"].values())]
        names = dict(zip(keys, ("ms", "tokens / s", "peak MiB", "MFU", "weights", "loss from"), strict=True))
        yield from table(
            ["", *(names[key] for key in used)],
            ([variant, *(numbers.get(key) for key in used)] for variant, numbers in record["variants"].items()),
        )


def lengths(results: Path) -> Iterator[str]:
    """Every line: the portable form on a CPU."""
    records = read(results, "lightning_length")
    if not records:
        return
    yield "## Length, on a CPU\n"
    yield "Forward and backward of the attention alone, fp32, as many tokens a batch at every length.\n"
    for record in records:
        yield where(record)
        head = ["", "tokens", "µs a token", "to the first length", "peak KiB a token"]
        keys = ("attention", "length", "microseconds_per_token", "ratio_to_first_length", "peak_kib_per_token")
        yield from table(head, ([row[key] for key in keys] for row in record["rows"]))


def page(results: Path = RESULTS) -> str:
    """The whole page."""
    lines = [HEAD]
    for part in (kernels, roofline, train_step, lengths):
        lines += part(results)
    return "\n".join(lines).rstrip("\n") + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
