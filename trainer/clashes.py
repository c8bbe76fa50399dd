"""The floors are import packages of their own; other distributions use some of their names."""

from __future__ import annotations

import importlib.util
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

FLOORS = ("kernels", "model", "parallel", "trainer", "launch")


def clashing_distributions() -> list[str]:
    """A sentence for each floor whose name is taken by something else on this machine."""
    faults = []
    home = Path(__file__).resolve().parent.parent
    for name in FLOORS:
        found = _installed(name)
        if found is not None:
            faults.append(
                f"the distribution {name} {found.version} is installed and takes the name of Headway's package "
                f"{name}/: `pip uninstall {name}`, or give Headway an environment of its own."
            )
            continue
        spec = importlib.util.find_spec(name)
        place = Path(spec.origin).resolve().parent.parent if spec is not None and spec.origin else None
        if place != home:
            faults.append(
                f"`import {name}` finds {place} and not {home}: start from another folder, or mend PYTHONPATH."
            )
    return faults


def _installed(name: str) -> Distribution | None:
    """The distribution of this name, if it has a package of this name; one that does not say what it has may have."""
    try:
        found = distribution(name)
    except PackageNotFoundError:
        return None
    files = found.files
    return found if files is None or any(file.parts[0] in (name, f"{name}.py") for file in files) else None
