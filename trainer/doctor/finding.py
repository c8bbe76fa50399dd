"""What a look finds."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Finding:
    """A line of the report.

    Attributes:
        what: was looked at.
        found: in a few words.
        meaning: for training, where that is not plain.
        hint: a sentence about something slower or more fragile than it has to be, and what to do.
        fault: a sentence about what stands in the way of training, and what to do. One of them is enough to fail.
    """

    what: str
    found: str
    meaning: str = ""
    hint: str = ""
    fault: str = ""


def run(*command: str, seconds: float = 10.0) -> str | None:
    """What a program says; None where there is none, it fails, or it takes too long."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def ask_python(code: str, seconds: float = 120.0) -> tuple[Any, str]:
    """What a piece of Python prints as JSON, in a process of its own; or None, and the last line of why not.

    What is slow, noisy, or may end the process is asked like this.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return None, f"no answer in {seconds:g} s"
    if done.returncode:
        return None, (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1]
    return json.loads(done.stdout.strip().splitlines()[-1]), ""
