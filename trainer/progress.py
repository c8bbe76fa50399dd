"""What a person at the console sees of a run: a live line on a terminal, sparse plain lines in a log.

Everything goes to stderr, so that a command's output stays usable in a pipe.
"""

from __future__ import annotations

import math
import sys
import time
from typing import Any, TextIO

_TERMINAL_SECONDS = 0.2
_LOG_SECONDS = 10.0


class Progress:
    """Shows steps, loss, validation loss, tokens per second, MFU and the time left.

    `total_steps` is where the run ends, `first_step` the number of the first step that this process runs (1, or the
    resumed step plus 1). `peak` says what MFU is relative to ("989 TFLOP/s per device"), and is printed once; leave it
    out when the device's peak is not known. Only rank 0 passes `enabled=True`; elsewhere every call does nothing.
    """

    def __init__(
        self,
        total_steps: int,
        first_step: int,
        *,
        log_every_steps: int = 1,
        enabled: bool = True,
        peak: str | None = None,
        stream: TextIO | None = None,
    ) -> None:
        assert log_every_steps >= 1, f"log_every_steps must be at least 1, got {log_every_steps}"
        self._total, self._first, self._every = total_steps, first_step, log_every_steps
        self._enabled = enabled
        self._started = time.monotonic()
        self._next_show = -math.inf
        self._shown_step: int | None = None
        self._latest: dict[str, Any] | None = None
        self._val_loss: float | None = None
        if not enabled:
            return
        stream = sys.stderr if stream is None else stream
        self._view: _Terminal | _Lines = (
            _Terminal(total_steps, first_step - 1, stream) if stream.isatty() else _Lines(stream)
        )
        if peak:
            self.note(f"MFU is relative to {peak}.")

    def update(self, record: dict[str, Any]) -> None:
        """Takes the record of one step, as written to the metrics; shows it when it is time to."""
        if not self._enabled:
            return
        self._latest = record
        step, validated = record["step"], record.get("val_loss") is not None
        if validated:
            self._val_loss = record["val_loss"]
        # Validations, the first and the last step are always shown; of the others, as many as an eye can follow.
        important = validated or step == self._first or step >= self._total
        now = time.monotonic()
        if important or (step % self._every == 0 and now >= self._next_show):
            self._show(now)

    def note(self, text: str) -> None:
        """Prints a line of its own, above the live line if there is one."""
        if self._enabled:
            self._view.note(text)

    def close(self) -> None:
        """Shows the last step if it has not been shown, and leaves the terminal as it was; may be called twice."""
        if not self._enabled:
            return
        if self._latest is not None and self._latest["step"] != self._shown_step:
            self._show(time.monotonic())
        self._view.close()
        self._enabled = False

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _show(self, now: float) -> None:
        assert self._latest is not None
        step = self._latest["step"]
        self._next_show = now + self._view.seconds_between
        self._shown_step = step
        done = step - self._first + 1
        left = (now - self._started) / done * (self._total - step) if done > 0 else None
        self._view.show(step, self._total, _describe(self._latest, self._val_loss, left))


def _describe(record: dict[str, Any], val_loss: float | None, seconds_left: float | None) -> str:
    parts = []
    if record.get("skipped"):
        parts.append("skipped")
    loss = record.get("loss")
    parts.append("loss not finite" if loss is None or not math.isfinite(loss) else f"loss {loss:.4f}")
    if val_loss is not None:
        parts.append(f"val {val_loss:.4f}")
    if record.get("tokens_per_second") is not None:
        parts.append(f"{_compact(record['tokens_per_second'])} tokens/s")
    if record.get("mfu") is not None:
        parts.append(f"MFU {record['mfu']:.1%}")
    if seconds_left:
        parts.append(f"ETA {_clock(seconds_left)}")
    return "  ".join(parts)


def _compact(number: float) -> str:
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.3g}{letter}" if number < 999.5 * unit else f"{number / unit:.0f}{letter}"
    return f"{number:.3g}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class _Lines:
    """One plain line now and then, for files and continuous integration."""

    seconds_between = _LOG_SECONDS

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def show(self, step: int, total: int, text: str) -> None:
        self.note(f"step {step}/{total}  {text}")

    def note(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def close(self) -> None:
        self._stream.flush()


class _Terminal:
    """A live bar by rich."""

    seconds_between = _TERMINAL_SECONDS

    def __init__(self, total: int, done: int, stream: TextIO) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as RichProgress

        self._console = Console(file=stream)
        # No thread that refreshes: a data worker forked while it holds rich's lock would wait for ever.
        self._bar = RichProgress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[text]}", markup=False),
            console=self._console,
            auto_refresh=False,
        )
        self._task = self._bar.add_task("train", total=total, completed=done, text="")
        self._bar.start()

    def show(self, step: int, total: int, text: str) -> None:
        self._bar.update(self._task, completed=step, total=total, text=text, refresh=True)

    def note(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        self._bar.stop()
