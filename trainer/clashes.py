"""The floors are import packages of their own; other distributions use two of their names."""

from __future__ import annotations

import importlib.util
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

FLOORS = ("kernels", "model", "parallel", "trainer", "launch")


def clashing_distributions() -> list[str]:
    """A sentence for each floor whose name is taken by something else on this machine."""
    faults = []
    home = Path(__file__).resolve().parent.parent
    for name in FLOORS:
        try:
            version = distribution(name).version
            faults.append(
                f"the distribution {name} {version} is installed and takes the name of Headway's package {name}/: "
                f"`pip uninstall {name}`, or give Headway an environment of its own."
            )
            continue
        except PackageNotFoundError:
            pass
        spec = importlib.util.find_spec(name)
        found = Path(spec.origin).resolve().parent.parent if spec is not None and spec.origin else None
        if found != home:
            faults.append(
                f"`import {name}` finds {found} and not {home}: start from another folder, or mend PYTHONPATH."
            )
    return faults
