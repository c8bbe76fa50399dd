"""`status.json`, which says what kind of end a run came to, and `logs/events.jsonl`, which says how it got there."""

from __future__ import annotations

import json
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from model.files import write_json

State = Literal["running", "finished", "stopped", "preempted", "failed"]


class Status:
    """Kept by the first rank; on the others every method does nothing."""

    def __init__(self, run_dir: Path, *, is_first: bool):
        self.run_dir, self.is_first = run_dir, is_first
        self.step = 0
        self.checkpoint: str | None = None
        self.state: State = "running"
        self.reason = ""
        # Checkpoints become durable in a thread of their own.
        self._lock = threading.Lock()

    def set(self, state: State, reason: str = "") -> None:
        """Write `status.json`."""
        self.state, self.reason = state, reason
        self._write()

    def _write(self) -> None:
        if not self.is_first:
            return
        with self._lock:
            facts = {"state": self.state, "step": self.step, "checkpoint": self.checkpoint, "reason": self.reason}
            write_json(self.run_dir / "status.json", facts)

    def event(self, name: str, **details: Any) -> None:
        """Append one line to `logs/events.jsonl`."""
        if not self.is_first:
            return
        if name == "checkpoint_durable":
            self.checkpoint = f"step-{details['step']:08d}"
            self._write()
        record = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": name, **details}
        with (self.run_dir / "logs" / "events.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")
