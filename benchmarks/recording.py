"""The line of JSON that a benchmark leaves in `results/`."""

import argparse
import datetime
import json
from pathlib import Path
from typing import Any

import torch
from lightning_length import describe_hardware


def append(options: argparse.Namespace, name: str, **found: Any) -> None:
    """Append what was found to `options.out`, with date, hardware, version and options; a quick look leaves nothing."""
    if getattr(options, "quick", False):
        return
    record = {
        "benchmark": name,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "hardware": describe_hardware(),
        "torch": torch.__version__,
        # Where things lie on this machine says nothing.
        "options": {
            key: value for key, value in vars(options).items() if key != "picture" and not isinstance(value, Path)
        },
    }
    with options.out.open("a") as file:
        file.write(json.dumps(record | found) + "\n")
