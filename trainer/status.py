"""`status.json`, which says what kind of end a run came to, and `logs/events.jsonl`, which says how it got there."""

from __future__ import annotations

import json
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from model.files import write_json
from parallel.processes import Process
from parallel.watch import LostNode

State = Literal["running", "finished", "stopped", "preempted", "failed"]

SECONDS_FOR_THE_FIRST = 3.0
"""For the first rank to speak before another stands in for it: two nodes miss each other at nearly the same time."""
LOOKS_FOR_THE_FIRST = 30


class Status:
    """Kept by the first rank; on the others every method does nothing, unless one stands in for it."""

    def __init__(self, run_dir: Path, *, is_first: bool):
        self.run_dir, self.is_first = run_dir, is_first
        self._path = run_dir / "status.json"
        # Of an earlier start, perhaps.
        self._found = self._written()
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
            write_json(self._path, facts)

    def fail(self, process: Process, error: BaseException, *, is_cause: bool = False) -> None:
        """Say that this process ends by `error`.

        Where the first rank's node is the one that is lost, the first rank of the next node stands in for it.

        Args:
            is_cause: this rank knows the cause: it is heard though it be not the first, and the first, which fails when
                the other is gone, does not write over it.
        """
        if isinstance(error, LostNode) and error.index == 0 and process.node == 1 and process.local_rank == 0:
            self._stand_in()
        self.event("failed", step=self.step, reason=f"{type(error).__name__}: {error}")
        reason = f"rank {process.rank}, step {self.step}: {type(error).__name__}: {error}"
        written = self._written()
        if is_cause and not self.is_first:
            write_json(self._path, written | {"state": "failed", "step": self.step, "reason": reason})
        elif is_cause or isinstance(error, LostNode) or written.get("state") != "failed" or written == self._found:
            self.set("failed", reason)

    def _written(self) -> dict[str, Any]:
        try:
            return json.loads(self._path.read_text())
        except (OSError, ValueError):
            return {}

    def _stand_in(self) -> None:
        # A node that is cut off by itself believes that the first is lost; that one's own word counts.
        for _ in range(LOOKS_FOR_THE_FIRST):
            if self._written().get("state") != "running":
                return
            time.sleep(SECONDS_FOR_THE_FIRST / LOOKS_FOR_THE_FIRST)
        if (found := self._written()).get("state") == "running":
            self.checkpoint, self.is_first = found["checkpoint"], True

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
