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

    def fail(self, reason: str, *, is_cause: bool = False) -> None:
        """Write that the run has failed, and why.

        Args:
            is_cause: this rank knows the cause: it is heard though it be not the first, and the first, which fails when
                the other is gone, does not write over it.
        """
        path = self.run_dir / "status.json"
        written = json.loads(path.read_text()) if path.is_file() else {}
        if is_cause and not self.is_first:
            write_json(path, written | {"state": "failed", "step": self.step, "reason": reason})
        elif is_cause or written.get("state") != "failed":
            self.set("failed", reason)

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
