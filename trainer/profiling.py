"""A trace of some steps, by torch's profiler: what ran when, on the CPU and on the GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


class Profiler:
    """Traces the steps `first .. last` of a run into one file of its `logs/`; of no steps, it does nothing at all.

    The file is named by rank and by the steps that it holds: fewer than asked for, where the run ends between them.
    """

    def __init__(self, steps: Sequence[int], logs: Path, rank: int):
        self.asked, self.logs, self.rank = (range(steps[0], steps[1] + 1) if steps else range(0)), logs, rank
        self._trace: Any = None
        self._held: list[int] = []

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around what a step does; what follows it, up to the next one, is in the trace, too."""
        if number not in self.asked:
            yield
            return
        if self._trace is None:
            self._trace = torch.profiler.profile(activities=_activities())
            self._trace.start()
        self._held.append(number)
        with torch.profiler.record_function(f"step {number}"):
            yield
        if number == self.asked[-1]:
            self.close()

    def close(self) -> None:
        """Write what was traced, if anything was."""
        if self._trace is None:
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._trace.stop()
        final = self.logs / f"trace-rank{self.rank:05d}-steps-{self._held[0]}-{self._held[-1]}.json.gz"
        # torch compresses what ends in .gz.
        partial = final.with_name(f"{final.name}.partial.gz")
        self._trace.export_chrome_trace(str(partial))
        os.replace(partial, final)
        self._trace = None


def _activities() -> list[Any]:
    activity = torch.profiler.ProfilerActivity
    return [activity.CPU, activity.CUDA] if torch.cuda.is_available() else [activity.CPU]


def profile_faults(steps: Sequence[int]) -> list[str]:
    """Why these cannot be `run.profile_steps`, in sentences."""
    if not steps or (len(steps) == 2 and 1 <= steps[0] <= steps[1]):
        return []
    return [
        f"run.profile_steps = {list(steps)} must be two numbers, the first step to trace and the last, from 1 on, for "
        "example [10, 12]."
    ]
