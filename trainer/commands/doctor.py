"""`headway doctor [RUN_DIR]`: what is installed and fast, what is missing, and what stands in the way."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from trainer.cli import REFUSED


@dataclass
class Arguments:
    """What is installed and fast, what is missing, and what stands in the way of training on this machine.

    Ends with 0, or with 2 where something stands in the way.
    """

    run_dir: Annotated[tyro.conf.Positional[Path | None], tyro.conf.arg(metavar="RUN_DIR")] = None
    """Where a run is to be: is there room, can it be written. Default: the folder you are in."""


def doctor(argv: list[str]) -> int:
    """Look at everything, print it, and return the exit code."""
    arguments = tyro.cli(Arguments, args=argv, prog="headway doctor")
    from rich.console import Console

    from trainer.doctor import devices, limits, network, place, software
    from trainer.doctor.show import show

    report = {
        "Software": software.look(),
        "Devices": devices.look(),
        "Network": network.look(),
        "Folders and clocks": place.look(arguments.run_dir),
        "Limits": limits.look(),
    }
    show(report, Console())
    return REFUSED if any(one.fault for findings in report.values() for one in findings) else 0
