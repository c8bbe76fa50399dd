"""Reads a run folder into one object, and never fails on what is optional: what cannot be read becomes a remark."""

from __future__ import annotations

import difflib
import json
import math
import tomllib
from array import array
from collections import defaultdict
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from trainer.metrics import FILE_NAME, iter_metrics

MARKERS = ("config.toml", "status.json", FILE_NAME)
"""A folder with one of these, and without a checkpoint's manifest, is a run folder."""


@dataclass
class Series:
    """One metric over the steps that have it; values that were recorded as null are NaN."""

    steps: np.ndarray
    values: np.ndarray

    def finite(self) -> Series:
        """The part of it that holds numbers."""
        keep = np.isfinite(self.values)
        return Series(self.steps[keep], self.values[keep])

    def __len__(self) -> int:
        return len(self.steps)


@dataclass
class Event:
    """One line of `logs/events.jsonl`."""

    time: datetime | None
    name: str
    step: int | None
    details: dict[str, Any]


@dataclass
class Checkpoint:
    """One folder under `checkpoints/`."""

    name: str
    size: int
    files: int
    complete: bool
    written: datetime


@dataclass
class Run:
    """All that the page shows."""

    name: str
    status: dict[str, Any] = field(default_factory=dict)
    config_text: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    series: dict[str, Series] = field(default_factory=dict)
    skipped: list[int] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    checkpoints: list[Checkpoint] = field(default_factory=list)
    evaluation: list[dict[str, Any]] = field(default_factory=list)
    sample: str = ""
    summary: dict[str, Any] = field(default_factory=dict)
    diagnostics: dict[str, Any] = field(default_factory=dict)
    diagnosed_step: int = 0
    remarks: list[str] = field(default_factory=list)

    def metric(self, name: str) -> Series:
        """The series of one metric, only where it is a number; empty when the run has none."""
        series = self.series.get(name)
        return series.finite() if series else Series(np.zeros(0, dtype=np.int64), np.zeros(0))


def read_run(run_dir: Path) -> Run:
    """Reads a run folder. Raises `ValueError` when it is not one, naming what was found and what is nearest."""
    _require_run_folder(run_dir)
    run = Run(name=run_dir.resolve().name)
    run.status = _json(run, run_dir / "status.json", dict) or {}
    run.summary = _json(run, run_dir / "summary.json", dict) or {}
    evaluation = _json(run, run_dir / "evaluation.json", list) or []
    run.evaluation = [row for row in evaluation if isinstance(row, dict)]
    run.sample = _text(run, run_dir / "sample.txt").strip("\n")
    run.config_text = _text(run, run_dir / "config.toml")
    try:
        run.config = tomllib.loads(run.config_text)
    except tomllib.TOMLDecodeError as error:
        run.remarks.append(f"config.toml is shown as text, but it is not valid TOML: {error}.")
    _read_metrics(run, run_dir)
    run.events = _read_events(run, run_dir / "logs" / "events.jsonl")
    run.checkpoints = _read_checkpoints(run_dir / "checkpoints")
    return run


def _is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in MARKERS) and not (folder / "manifest.json").exists()


def _require_run_folder(folder: Path) -> None:
    expected = f"a run folder holds {', '.join(MARKERS[:-1])} or {MARKERS[-1]}, as `headway train` leaves them"
    if _is_run(folder):
        return
    if not folder.is_dir():
        found = f"{folder} is {'a file' if folder.exists() else 'not there'}"
    elif (folder / "manifest.json").exists():
        found = f"{folder} is a checkpoint of a run"
    else:
        names = sorted(child.name for child in folder.iterdir())
        found = f"{folder} holds {', '.join(names[:5]) + (', ...' if len(names) > 5 else '') if names else 'nothing'}"
    nearest = _nearest_run(folder)
    hint = f" The nearest run folder is {nearest}." if nearest else ""
    raise ValueError(f"{found}; {expected}.{hint}")


def _nearest_run(folder: Path) -> Path | None:
    """A run around the folder (it may be a step folder), inside it, or beside it under a similar name."""
    for parent in list(folder.absolute().parents)[:2]:
        if _is_run(parent):
            return parent
    if folder.is_dir():
        inside = [child for child in folder.iterdir() if _is_run(child)]
        return max(inside, key=lambda child: child.stat().st_mtime, default=None)
    beside = (
        {child.name: child for child in folder.parent.iterdir() if _is_run(child)} if folder.parent.is_dir() else {}
    )
    close = difflib.get_close_matches(folder.name, beside, n=1)
    return beside[close[0]] if close else None


def _text(run: Run, path: Path) -> str:
    if not path.is_file():
        return ""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        run.remarks.append(f"{path.name} could not be read: {error.strerror}.")
        return ""


def _json(run: Run, path: Path, kind: type) -> Any:
    text = _text(run, path)
    if not text:
        return None
    try:
        value = json.loads(text)
    except ValueError as error:
        run.remarks.append(f"{path.name} is left out, because it is not valid JSON: {error}.")
        return None
    if not isinstance(value, kind):
        run.remarks.append(
            f"{path.name} is left out: it holds a {type(value).__name__}, a {kind.__name__} is expected."
        )
        return None
    return value


def _read_metrics(run: Run, run_dir: Path) -> None:
    # Compact arrays, not records: a run of a million steps has to fit in memory here.
    columns: defaultdict[str, tuple[array[int], array[float]]] = defaultdict(lambda: (array("q"), array("d")))
    try:
        for record in iter_metrics(run_dir):
            step = record.pop("step")
            if record.pop("skipped", False):
                run.skipped.append(step)
            if isinstance(record.get("diagnostics"), dict):
                run.diagnostics, run.diagnosed_step = record["diagnostics"], step
            for name, value in record.items():
                if type(value) in (str, list, dict):
                    continue
                steps, values = columns[name]
                steps.append(step)
                values.append(math.nan if value is None else value)
    except ValueError as refusal:
        run.remarks.append(str(refusal))
    for name, (steps, values) in columns.items():
        run.series[name] = Series(np.array(steps, dtype=np.int64), np.array(values))


def _read_events(run: Run, path: Path) -> list[Event]:
    events, unreadable = [], 0
    for line in _text(run, path).splitlines():
        try:
            details = json.loads(line)
            name, step = str(details.pop("event")), details.pop("step", None)
        except (ValueError, KeyError, TypeError, AttributeError):
            unreadable += 1
            continue
        step = step if isinstance(step, int) else None
        events.append(Event(_moment(details.pop("time", None)), name, step, details))
    if unreadable > 1:  # one may be the line that is being written
        run.remarks.append(f"{unreadable} lines of logs/events.jsonl are not events, and are left out.")
    return events


def _moment(value: Any) -> datetime | None:
    """A time as seconds since 1970 or in ISO form, in UTC; None where it is neither."""
    try:
        if isinstance(value, str):
            moment = datetime.fromisoformat(value)
            return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).astimezone(UTC)
        return datetime.fromtimestamp(value, UTC)
    except (TypeError, ValueError, OverflowError, OSError):
        return None


def _read_checkpoints(folder: Path) -> list[Checkpoint]:
    found = []
    for child in sorted(folder.glob("step-*")):
        try:
            sizes = [file.stat().st_size for file in child.rglob("*") if file.is_file()]
            complete = (child / "manifest.json").is_file() and child.suffix != ".partial"
            written = datetime.fromtimestamp(child.stat().st_mtime, UTC)
        except OSError:  # a run that is going renames and deletes folders while we look
            continue
        found.append(Checkpoint(child.name, sum(sizes), len(sizes), complete, written))
    return found
