"""Small file habits that all floors share."""

from __future__ import annotations

import hashlib
import json
import os
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
