"""`python -m launch.run_folder CONFIG.toml [--section.key VALUE ...]` prints the run folder of that start.

For scripts, which need it before and after a run: in `status.json` there stands what kind of end it came to.
"""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path

REFUSED = 2


def run_folder(config: Path, overrides: Sequence[str]) -> str:
    """`run.dir`, as `headway train` would find it; the last override counts.

    Raises:
        ValueError: the file cannot be read, or says no run folder.
    """
    for word, value in reversed(list(zip_longest(overrides, overrides[1:], fillvalue=""))):
        if word.startswith("--run.dir="):
            return word.removeprefix("--run.dir=")
        if word == "--run.dir" and value:
            return value
    try:
        tables = tomllib.loads(config.read_text())
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"{config} cannot be read: {error}.") from None
    run = tables.get("run")
    folder = run.get("dir") if isinstance(run, dict) else None
    if not isinstance(folder, str) or not folder:
        raise ValueError(f'{config} names no run folder: write dir = "runs/first" under [run], or give --run.dir.')
    return folder


def main(argv: Sequence[str]) -> int:
    """Returns the exit code."""
    if not argv:
        print("usage: python -m launch.run_folder CONFIG.toml [--section.key VALUE ...]", file=sys.stderr)
        return REFUSED
    try:
        print(run_folder(Path(argv[0]), argv[1:]))
    except ValueError as fault:
        print(fault, file=sys.stderr)
        return REFUSED
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
