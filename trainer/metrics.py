"""What a run writes about itself: one record per optimizer step, to every sink that was asked for.

`metrics.jsonl` is the record that counts. Resume cuts it back, `headway report` draws it, and a process that dies at
any moment, by whatever means, leaves every line it had written; the other sinks are views of the same records.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import math
import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, cast, get_args

from trainer.diagnostics import layer_means

Sink = Literal["jsonl", "tensorboard", "wandb"]
Record = dict[str, Any]

FILE_NAME = "metrics.jsonl"
LONGEST_END = 1 << 18


@dataclass
class MetricsConfig:
    """Section `[metrics]`: where records go, and how often the console is told."""

    sinks: list[Sink] = field(default_factory=lambda: cast("list[Sink]", ["jsonl", "tensorboard"]))
    """Where each step's record is written. `jsonl` must be among them; `wandb` is offline, if it is installed."""
    log_every_steps: int = 1
    """How often the console line is refreshed. `metrics.jsonl` has one object per step whatever this says."""
    diagnose_every_steps: int = 50
    """Every so many steps attention is looked at: entropy, sinks, largest logits, by layer and head. 0: never."""

    def faults(self) -> list[str]:
        """Everything that is wrong with this section, each as a sentence; empty when it is right."""
        faults = _sink_faults(self.sinks)
        if self.log_every_steps < 1:
            faults.append(f"metrics.log_every_steps is {self.log_every_steps}; it must be 1 (every step) or more.")
        if self.diagnose_every_steps < 0:
            faults.append(
                f"metrics.diagnose_every_steps is {self.diagnose_every_steps}; it must be 0 (never) or more, "
                "for example 50."
            )
        return faults


def _sink_faults(sinks: Sequence[str]) -> list[str]:
    known = get_args(Sink)
    faults = []
    for sink in sinks:
        if sink in known:
            continue
        nearest = difflib.get_close_matches(sink, known, n=1)
        hint = f'; the nearest is "{nearest[0]}"' if nearest else ""
        faults.append(f'metrics.sinks lists "{sink}", but the sinks are {", ".join(known)}{hint}.')
    if len(set(sinks)) < len(sinks):
        faults.append(f"metrics.sinks is {list(sinks)}, which names a sink twice; name each once.")
    if "jsonl" not in sinks:
        nearest_legal = ["jsonl", *sinks]
        faults.append(
            f'metrics.sinks is {list(sinks)}, without "jsonl", which resume and `headway report` read; '
            f"{nearest_legal} works."
        )
    for sink in ("tensorboard", "wandb"):
        if sink in sinks and not _installed(sink):
            rest = [other for other in sinks if other != sink] or ["jsonl"]
            faults.append(
                f'metrics.sinks lists "{sink}", which is not installed; install it, or use metrics.sinks = {rest}.'
            )
    return faults


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ValueError:  # a module put into sys.modules by hand has no spec; it is there all the same
        return True


class _Sink(Protocol):
    def write(self, record: Record) -> None: ...

    def close(self) -> None: ...


class MetricsLog:
    """Writes one record per optimizer step to every sink, and nothing of it is lost when the process is killed.

    `resumed_step` is the number of updates already in the parameters: 0 for a new run. What earlier processes wrote
    about later steps is cut away when the log is opened, so that every step stands there once. Write a step's record
    before its checkpoint is made: a checkpoint must never know of a step that the log does not.

    Raises `ValueError` when a sink is unknown or not installed, or when `jsonl` is not among them.
    """

    def __init__(self, run_dir: Path, sinks: Sequence[str], *, resumed_step: int) -> None:
        assert resumed_step >= 0, f"resumed_step counts updates, got {resumed_step}"
        faults = _sink_faults(sinks)
        if faults:
            raise ValueError(" ".join(faults))
        run_dir.mkdir(parents=True, exist_ok=True)
        self._last_step = resumed_step
        makers: dict[str, Callable[[Path, int], _Sink]] = {
            "jsonl": _JsonLines,
            "tensorboard": _TensorBoard,
            "wandb": _WeightsAndBiases,
        }
        self._sinks: list[_Sink] = [makers[sink](run_dir, resumed_step) for sink in sinks]

    def write(self, record: Record) -> None:
        """Writes one step's record. Numbers that are not finite are recorded as null."""
        step = record["step"]
        assert step > self._last_step, f"step {step} after step {self._last_step}: one record per step, in order"
        self._last_step = step
        plain = _plain(record)
        for sink in self._sinks:
            sink.write(plain)

    def close(self) -> None:
        """Flushes and closes every sink; calling it again does nothing."""
        while self._sinks:
            self._sinks.pop().close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _plain(value: Any) -> Any:
    """The value as strict JSON knows it: scalars of torch and numpy become Python's, NaN and infinity become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    assert hasattr(value, "item"), f"a record holds numbers, text, lists and dicts, not {type(value).__name__}"
    return _plain(value.item())


def _numbers(record: Record) -> Iterator[tuple[str, float]]:
    """What a sink of curves draws: the record's own numbers, and of its diagnostics those of layers."""
    for name, value in record.items():
        if name == "diagnostics":
            yield from layer_means(value)
        elif name != "step" and isinstance(value, (bool, int, float)):
            yield name, float(value)


class _JsonLines:
    def __init__(self, run_dir: Path, resumed_step: int) -> None:
        path = run_dir / FILE_NAME
        _cut_back(path, resumed_step)
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: Record) -> None:
        # One write and one flush per line: the kernel holds it from then on, whatever becomes of this process.
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class _TensorBoard:
    def __init__(self, run_dir: Path, resumed_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Event files are only ever appended to. `purge_step` leaves a note in the new one that makes every reader drop
        # what the older files say from that step on; for a new run in an old folder, that is all of it.
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=resumed_step + 1)

    def write(self, record: Record) -> None:
        step = record["step"]
        for name, value in _numbers(record):
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _WeightsAndBiases:
    """Offline runs under `RUN/wandb`. wandb cannot cut a run back, so each resume is a run of its own in one group."""

    def __init__(self, run_dir: Path, resumed_step: int) -> None:
        import wandb

        name = run_dir.resolve().name
        self._run = wandb.init(
            mode="offline", dir=str(run_dir), project="headway", group=name, name=f"{name}-from-{resumed_step}"
        )

    def write(self, record: Record) -> None:
        self._run.log(dict(_numbers(record)), step=record["step"])

    def close(self) -> None:
        self._run.finish()


def _cut_back(path: Path, step: int) -> None:
    """Leaves only the whole records up to `step`. The file is exchanged at once: there is no moment with half of it."""
    if not path.exists():
        return
    with path.open("rb") as lines:
        # Only the end of the file is parsed, from its last line backwards: a long run resumes as fast as a short one.
        starts = array("q", [0])
        for line in lines:
            starts.append(starts[-1] + len(line))
        size = end = starts.pop()
        while end > 0:
            lines.seek(starts[-1])
            record = _parse(lines.readline())
            if record is not None and record["step"] <= step:
                break
            end = starts.pop()
        if end == size:
            return
        partial = path.with_name(path.name + ".partial")
        lines.seek(0)
        with partial.open("wb") as kept:
            while (left := end - kept.tell()) > 0:
                kept.write(lines.read(min(left, 1 << 20)))
            kept.flush()
            os.fsync(kept.fileno())
    os.replace(partial, path)


def iter_metrics(run_dir: Path) -> Iterator[Record]:
    """Yields the records of a run in order, without holding them all; none when nothing has been written yet.

    The last line may be torn, when the process was killed in the middle of it: it is left out. A line that is broken
    anywhere else was not made by Headway, and is refused with its number in a `ValueError`.
    """
    path = run_dir / FILE_NAME
    if not path.exists():
        return
    with path.open("rb") as lines:
        broken: int | None = None
        for number, line in enumerate(lines, start=1):
            if broken is not None:
                raise ValueError(
                    f"Line {broken} of {FILE_NAME} is not a JSON object with an integer `step`, and it is not the last "
                    f"line, so no interrupted write explains it; remove that line to go on."
                )
            record = _parse(line)
            if record is None:
                broken = number
            else:
                yield record


def last_record(run_dir: Path) -> Record | None:
    """The newest whole record of a run; None when there is none. Reads only the end of the file."""
    path = run_dir / FILE_NAME
    if not path.exists():
        return None
    size, end = path.stat().st_size, LONGEST_END
    with path.open("rb") as lines:
        while True:
            lines.seek(max(0, size - end))
            whole = [record for line in lines.readlines() if (record := _parse(line)) is not None]
            if whole or end >= size:
                return whole[-1] if whole else None
            end *= 4  # a record with the diagnostics of many heads is long


def _parse(line: bytes) -> Record | None:
    # A line without its end is torn even when what is there happens to parse: `1}` may have been going to be `12}`.
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def read_metrics(run_dir: Path) -> list[Record]:
    """All records of a run, in order of steps; an empty list when none has been written yet. See `iter_metrics`."""
    return list(iter_metrics(run_dir))
