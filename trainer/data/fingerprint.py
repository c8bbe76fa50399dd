"""What the order and content of the training data depend on, in a form to store with a checkpoint and to compare."""

from __future__ import annotations

import hashlib
import os
from typing import TYPE_CHECKING, Any

from model.files import file_sha256
from trainer.data.config import DataConfig, DataSource
from trainer.data.indexed import open_pair
from trainer.data.modalities import COLUMN, column_faults

if TYPE_CHECKING:
    from model.untie import UntieConfig

BLOCKS = 64
BLOCK_BYTES = 1 << 16


def fingerprint(config: DataConfig, *, seed: int, samples: int, untie: UntieConfig | None = None) -> dict[str, Any]:
    """A JSON-able description of the data of a run; equal for data that was moved but is the same.

    Of every source: the last part of its prefix, its weight, the SHA-256 of its `.idx`, the size of its `.bin` and the
    SHA-256 of 64 evenly spaced blocks of it; the same of its column of modalities, where `untie` takes them from there.
    Beside them: seq_len, seed, samples, split.
    Raises ValueError when a source cannot be read.
    """
    return {
        "train": [_source(source, untie) for source in config.training_sources()],
        "validation": [_source(source, untie) for source in config.validation_sources()],
        "seq_len": config.seq_len,
        "seed": seed,
        "samples": samples,
        "split": list(config.split) if config.split else None,
    }


def fingerprint_differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What differs between two fingerprints, one sentence each; empty when the data and its order are the same."""
    differences = [
        f"data: {key} was {old.get(key)} and is {new.get(key)}; the samples come in another order."
        for key in ("seq_len", "seed", "samples", "split")
        if old.get(key) != new.get(key)
    ]
    for key in ("train", "validation"):
        before, after = old.get(key, []), new.get(key, [])
        if len(before) != len(after):
            names = [", ".join(source["name"] for source in side) or "none" for side in (before, after)]
            differences.append(f"data.{key} had {len(before)} sources ({names[0]}) and has {len(after)} ({names[1]}).")
        else:
            for place, (one, other) in enumerate(zip(before, after, strict=True)):
                differences += _source_differences(f"data.{key}[{place}]", one, other)
    return differences


def _source(source: DataSource, untie: UntieConfig | None) -> dict[str, Any]:
    data = open_pair(source.path)
    column = {}
    if untie is not None and not untie.by_ids and not column_faults(data, untie):
        column = {"modalities_blocks_sha256": _blocks_sha256(source.path + COLUMN)}
    return {
        "name": os.path.basename(source.path),
        "weight": float(source.weight),
        "idx_sha256": file_sha256(source.path + ".idx"),
        "bin_bytes": os.path.getsize(source.path + ".bin"),
        "bin_blocks_sha256": _blocks_sha256(source.path + ".bin"),
        **column,
    }


def _blocks_sha256(path: str) -> str:
    """SHA-256 over evenly spaced blocks, the first and the last among them: the whole of a file up to 4 MiB."""
    digest = hashlib.sha256()
    last = max(0, os.path.getsize(path) - BLOCK_BYTES)
    with open(path, "rb") as stream:
        for start in sorted({last * block // (BLOCKS - 1) for block in range(BLOCKS)}):
            stream.seek(start)
            digest.update(stream.read(BLOCK_BYTES))
    return digest.hexdigest()


def _source_differences(key: str, old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    if old["name"] != new["name"]:
        same = all(old[part] == new[part] for part in ("idx_sha256", "bin_bytes", "bin_blocks_sha256"))
        if not same:
            return [f"{key} was {old['name']} and is {new['name']}, with other content."]
    differences = []
    if old["weight"] != new["weight"]:
        differences.append(f"{key} {new['name']}: its weight was {old['weight']:g} and is {new['weight']:g}.")
    if old["bin_bytes"] != new["bin_bytes"]:
        differences.append(f"{key} {new['name']}: its .bin had {old['bin_bytes']} bytes and has {new['bin_bytes']}.")
    elif old["bin_blocks_sha256"] != new["bin_blocks_sha256"]:
        differences.append(f"{key} {new['name']}: its .bin has the same size but other tokens.")
    if old["idx_sha256"] != new["idx_sha256"]:
        differences.append(f"{key} {new['name']}: its .idx differs, so its documents are cut elsewhere.")
    columns = [side.get("modalities_blocks_sha256") for side in (old, new)]
    if None not in columns and columns[0] != columns[1]:
        differences.append(f"{key} {new['name']}: its column of modalities differs.")
    return differences
