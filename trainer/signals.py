"""SIGTERM and SIGUSR1 ask for a clean stop. Any rank may be asked, at any time; all stop after the same step."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any


class StopRequest:
    """Remembers that a signal came. The loop shares it with the other ranks once a step."""

    def __init__(self) -> None:
        self.signal_name = ""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGTERM, signal.SIGUSR1):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        # A second signal changes nothing: the stop is under way, and the checkpoint must not be cut short.
        self.signal_name = self.signal_name or signal.Signals(number).name

    @property
    def requested(self) -> bool:
        return bool(self.signal_name)
