"""`PREFIX.json`, which says what a dataset holds."""

from __future__ import annotations

import json
import os
from typing import Any

MARK = b'"tokenizer_fingerprint"'
LARGEST_SIDECAR = 1 << 20


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
