"""`headway report RUN`: one HTML page about one run."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Arguments:
    """Writes RUN/report.html, a page that needs nothing but itself, and prints its path."""

    run: Path
    """The run folder, finished or still going."""


def report(argv: Sequence[str]) -> int:
    """Runs the command; returns 0, or 2 when RUN is not a run folder."""
    import tyro

    arguments = tyro.cli(Arguments, args=list(argv), prog="headway report", config=(tyro.conf.PositionalRequiredArgs,))
    from trainer.report import write_report

    try:
        path = write_report(arguments.run)
    except ValueError as refusal:
        print(refusal, file=sys.stderr)
        return 2
    print(path)
    return 0
