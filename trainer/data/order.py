"""The order of the samples on disk: computed once, by one process, whole or not at all.

Megatron names a cached order by the path of the data and writes it in place, so a replaced dataset would be read in the
order of the old one, and a killed writer would leave a torn file. Here an order lies in a folder named by the content
of the `.idx` and by all that shapes the order, written under a partial name and renamed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SECONDS_TO_APPEAR = 120.0


def order_folder(cache_dir: str | Path, kind: str, **shaped_by: Any) -> Path:
    """Where an order lies that is shaped by these values and by nothing else."""
    described = json.dumps(shaped_by, sort_keys=True)
    return Path(cache_dir) / f"{kind}-{hashlib.sha256(described.encode()).hexdigest()[:32]}"


def ensure(folder: Path, build: Callable[[Path], None]) -> None:
    """Have `build` fill the folder, unless it is there."""
    if folder.is_dir():
        return
    partial = folder.with_name(f"{folder.name}.partial-{socket.gethostname()}-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        build(partial)
        try:
            os.replace(partial, folder)
        except OSError:
            # Another process was faster with the same thing.
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def wait_for(folder: Path, seconds: float = SECONDS_TO_APPEAR) -> None:
    """Wait until a folder that another process has written is seen here; network file systems take their time.

    Raises ValueError when it does not appear.
    """
    deadline = time.monotonic() + seconds
    while not folder.is_dir():
        if time.monotonic() > deadline:
            raise ValueError(
                f"data.cache_dir: {folder} was written by the first process and is not seen on {socket.gethostname()} "
                f"after {seconds:g} s; put data.cache_dir, or the run folder, on a file system that every node sees."
            )
        # The listing makes a network file system look again.
        os.listdir(folder.parent) if folder.parent.is_dir() else None
        time.sleep(0.1)
