"""`PREFIX.json`, which says what a dataset holds, and the small file habits that the data part shares."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

MARK = b'"tokenizer_fingerprint"'
LARGEST_SIDECAR = 1 << 20


def file_sha256(path: str | Path) -> str:
    """The SHA-256 of a file's bytes, as hexadecimal."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_json(path: str | Path, content: dict[str, Any]) -> None:
    """Write JSON so that `path` either is complete or does not exist."""
    partial = f"{path}.partial"
    with open(partial, "w", encoding="utf-8") as stream:
        json.dump(content, stream, indent=1, sort_keys=True, ensure_ascii=False)
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


def read_sidecar(prefix: str) -> dict[str, Any] | None:
    """The content of PREFIX.json; None when there is none, as beside data that Megatron's own tools wrote.

    Raises ValueError when the file is there but is no description of a dataset.
    """
    path = prefix + ".json"
    if not os.path.isfile(path):
        return None
    with open(path, "rb") as stream:
        head = stream.read(LARGEST_SIDECAR)
    if MARK not in head:
        # Megatron users keep the raw text, as PREFIX.json, beside PREFIX.bin: that is another file, and no fault.
        return None
    try:
        return json.loads(head)
    except ValueError as fault:
        raise ValueError(f"{path}: damaged; it is not the JSON that `headway data prepare` wrote ({fault}).") from fault


def recorded_tokenizer(prefix: str) -> str | None:
    """The tokenizer folder kept beside the data, PREFIX.tokenizer, or None."""
    folder = prefix + ".tokenizer"
    return folder if os.path.isdir(folder) else None
