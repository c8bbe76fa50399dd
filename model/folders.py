"""Checkpoint folders: their names, their manifest, and which one is the newest complete one.

`step-00000100/` holds the shards and `.metadata` of torch.distributed.checkpoint, `config.toml`, the tokenizer, and
`manifest.json` with every file's size and hash, written last. A folder is a checkpoint when its manifest checks out;
there is no pointer that could move too early.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from model.files import file_sha256

MANIFEST = "manifest.json"
_STEP = re.compile(r"step-(\d{8,})")


def step_folder(run_dir: Path, step: int) -> Path:
    """Where the checkpoint after update number `step` lies."""
    return run_dir / "checkpoints" / f"step-{step:08d}"


def step_of(folder: Path) -> int | None:
    """The step a folder's name speaks of; None when it is no step folder."""
    match = _STEP.fullmatch(folder.name)
    return int(match[1]) if match else None


def describe_files(folder: Path, files: list[Path]) -> dict[str, dict[str, Any]]:
    """Size and hash of each file, by its path in the folder: what a manifest holds."""
    return {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": file_sha256(path)} for path in files
    }


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a step folder. Raises ValueError when there is none that can be read."""
    path = folder / MANIFEST
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{folder} is no complete checkpoint: it has no {MANIFEST}.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}); take an older step folder.") from None


def check_files(folder: Path, *, hashes: bool) -> list[str]:
    """Compare a step folder with its manifest; sentences naming each file that differs. Empty: it checks out."""
    try:
        files = read_manifest(folder)["files"]
    except (ValueError, KeyError) as error:
        return [str(error)]
    faults = []
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            faults.append(f"{path} is missing.")
        elif (size := path.stat().st_size) != expected["bytes"]:
            faults.append(f"{path} has {size} bytes, its manifest says {expected['bytes']}.")
        elif hashes and file_sha256(path) != expected["sha256"]:
            faults.append(f"{path} is not what was written: its SHA-256 differs from the manifest's.")
    return faults


def step_folders(run_dir: Path) -> Iterator[Path]:
    """The step folders of a run, newest first, complete or not (never `.partial` ones)."""
    found = [path for path in (run_dir / "checkpoints").glob("step-*") if step_of(path) is not None and path.is_dir()]
    yield from sorted(found, key=lambda path: step_of(path) or 0, reverse=True)


def newest_complete(run_dir: Path) -> tuple[Path | None, list[str]]:
    """The newest step folder that checks out, hashes included, and why newer ones were passed over."""
    passed_over: list[str] = []
    for folder in step_folders(run_dir):
        faults = check_files(folder, hashes=True)
        if not faults:
            return folder, passed_over
        passed_over += faults
    return None, passed_over


def find_checkpoint(path: Path) -> Path:
    """The step folder that MODEL means: a step folder itself (whatever its name), or the newest complete one of a run.

    Raises:
        ValueError: nothing there, or nothing complete.
    """
    if not path.exists():
        raise ValueError(f"{path} does not exist: expected a run folder, a step folder or a Hugging Face folder.")
    if step_of(path) is not None or (path / MANIFEST).is_file():
        if faults := check_files(path, hashes=True):
            raise ValueError(" ".join(faults))
        return path
    if (path / "checkpoints").is_dir():
        folder, passed_over = newest_complete(path)
        if folder is None:
            raise ValueError(" ".join([f"{path} is a run folder without a complete checkpoint.", *passed_over]))
        return folder
    raise ValueError(
        f"{path} is neither a run folder (with checkpoints/) nor a step folder (with {MANIFEST}) nor a Hugging Face "
        "folder (with config.json)."
    )
