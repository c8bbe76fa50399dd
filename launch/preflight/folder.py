"""Is the run folder the same on every node?"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

SECONDS_TO_APPEAR = 3.0
"""A network file system may show a new file late."""


@contextmanager
def marked(run_dir: Path) -> Iterator[tuple[str, list[str]]]:
    """The name of a file in the run folder that no other folder has, and what prevents it; gone again at the end, and
    so are folders that were made for it."""
    name = f".preflight-{os.urandom(8).hex()}"
    missing = [folder for folder in (run_dir, *run_dir.parents) if not folder.exists()]
    try:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            (run_dir / name).write_text(name)
        except OSError as error:
            yield name, [_not_writable(run_dir, error)]
        else:
            yield name, []
    finally:
        with suppress(OSError):
            (run_dir / name).unlink()
        for folder in missing:
            with suppress(OSError):  # somebody has begun to use it
                folder.rmdir()


def folder_faults(run_dir: Path, name: str) -> list[str]:
    """What is wrong with this node's run folder, in which node 0 has made the file `name`."""
    where = f"{run_dir} (here {run_dir.absolute()})"
    deadline = time.monotonic() + SECONDS_TO_APPEAR
    while not (run_dir / name).is_file():
        if time.monotonic() > deadline:
            return [
                f"the run folder {where} is not that of node 0: a file that node 0 made in its own has not appeared in "
                f"{SECONDS_TO_APPEAR:g} s. It must lie on a file system that all nodes share: mount one on all, and "
                "give a path in it as run.dir."
            ]
        time.sleep(0.2)
    own = run_dir / f"{name}-{os.urandom(4).hex()}"
    try:
        own.write_text(name)
    except OSError as error:
        return [_not_writable(run_dir, error)]
    own.unlink(missing_ok=True)
    return []


def _not_writable(run_dir: Path, error: OSError) -> str:
    return (
        f"the run folder {run_dir} (here {run_dir.absolute()}) cannot be written: {error.strerror}. Mend its "
        "permissions or mount, or name another run.dir."
    )
