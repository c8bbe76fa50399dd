"""What a planted fault is."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Fault:
    """What goes wrong, the replacements in one file that make it so, and the tests that must notice."""

    name: str
    file: str
    replacements: list[tuple[str, str]]
    tests: list[str] = field(default_factory=list)
