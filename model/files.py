"""Small file habits that all floors share."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def file_sha256(path: str | Path) -> str:
    """The SHA-256 of a file's bytes, as hexadecimal."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_json(path: str | Path, content: Any) -> None:
    """Write JSON so that `path` either is complete or does not exist."""
    partial = f"{path}.partial"
    with open(partial, "w", encoding="utf-8") as stream:
        json.dump(content, stream, indent=1, ensure_ascii=False)
        stream.write("\n")
    os.replace(partial, path)


def replace_folder(partial: Path, final: Path) -> None:
    """Give a finished folder its final name, in place of what may be there."""
    old = final.with_name(final.name + ".partial-old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        os.replace(final, old)
    os.replace(partial, final)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """An empty folder to fill, which gets its final name at the end, in place of what was there; if anything goes wrong
    it is removed, and what was there stays."""
    partial = final.with_name(final.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        replace_folder(partial, final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
