"""Text to Megatron's `.bin` and `.idx`, with a sidecar that says what they hold."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from model.files import file_sha256, replace_folder, write_json
from trainer.data.documents import Problems, ReadingOptions, find_inputs, read_documents
from trainer.data.lazy import megatron
from trainer.data.sidecar import read_sidecar
from trainer.data.tokenizer import Tokenizer, default_workers, load_tokenizer

# A chunk is tokenised at once: long enough to keep every thread busy, short enough to hold in memory.
CHUNK_CHARACTERS = 1 << 22
CHUNK_DOCUMENTS = 4096


def prepare_dataset(
    inputs: list[str],
    tokenizer: str,
    out: str,
    *,
    reading: ReadingOptions | None = None,
    workers: int | None = None,
    skip_broken: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Tokenise documents and write `out`.bin, .idx, .json and .tokenizer/. Returns the content of the `.json`.

    One sequence per document, each with the end token behind it; uint16 where the vocabulary fits, else int32.
    Everything is written under partial names. The `.idx` gets its final name last, and with `overwrite` loses it
    first, and no reader takes a prefix without it: so a set that is complete by its names is complete.

    Raises ValueError with every fault found: broken input by file and line, a prefix that exists, a bad tokenizer.
    """
    _check_free(out, overwrite)
    files = find_inputs(inputs)
    loaded = load_tokenizer(tokenizer)
    problems = Problems(skip=skip_broken)
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    partial = Path(out + ".partial")
    try:
        _remove_partial(partial)
        with _progress(files) as advance:
            texts = read_documents(files, reading or ReadingOptions(), problems)
            counts = _write_pair(texts, loaded, partial, problems, workers or default_workers(), advance)
        problems.refuse_if_any()
        if counts["documents"] == 0:
            raise ValueError(f"{', '.join(inputs)}: not one document is left to write ({_counted(problems)}).")
        sidecar = {**_describe(partial, loaded), **counts, "skipped": dict(problems.skipped)}
        write_json(f"{partial}.json", sidecar)
        Path(f"{partial}.tokenizer").mkdir()
        loaded.copy_to(f"{partial}.tokenizer")
        _publish(partial, out)
    finally:
        _remove_partial(partial)
    return sidecar


def _check_free(out: str, overwrite: bool) -> None:
    existing = [out + suffix for suffix in (".bin", ".idx", ".json", ".tokenizer") if os.path.exists(out + suffix)]
    if os.path.exists(out + ".json") and read_sidecar(out) is None:
        raise ValueError(f"--out {out}: {out}.json exists and is not ours to replace; give another prefix.")
    if existing and not overwrite:
        raise ValueError(
            f"--out {out}: {', '.join(existing)} already there; give another prefix, or --overwrite to replace them."
        )


def _write_pair(
    texts: Iterator[str], tokenizer: Tokenizer, partial: Path, problems: Problems, workers: int, advance: Any
) -> dict[str, int]:
    """Write the partial `.bin` and `.idx`; returns documents, tokens, bytes and max_token."""
    import numpy as np

    indexed = megatron("indexed_dataset")
    dtype = indexed.DType.optimal_dtype(tokenizer.vocab_size)
    builder = indexed.IndexedDatasetBuilder(f"{partial}.bin", dtype=dtype)
    counts = {"documents": 0, "tokens": 0, "bytes": 0, "max_token": -1}
    try:
        for chunk in _chunks(texts):
            advance(sum(map(len, chunk)))
            if problems.listed:
                # It will be refused: only the list of what is broken is still wanted.
                continue
            for text, ids in zip(chunk, tokenizer.encode_batch(chunk, workers), strict=True):
                tokens = np.array([*ids, tokenizer.end_token], dtype=np.int64)
                builder.add_document(tokens, [len(tokens)])
                counts["documents"] += 1
                counts["tokens"] += len(tokens)
                counts["bytes"] += len(text.encode())
                counts["max_token"] = max(counts["max_token"], int(tokens.max()))
    finally:
        # Closes the .bin as well.
        builder.finalize(f"{partial}.idx")
    return counts


def _chunks(texts: Iterator[str]) -> Iterator[list[str]]:
    chunk: list[str] = []
    characters = 0
    for text in texts:
        chunk.append(text)
        characters += len(text)
        if characters >= CHUNK_CHARACTERS or len(chunk) >= CHUNK_DOCUMENTS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _describe(partial: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    """What the sidecar says besides the counts."""
    with open(f"{partial}.idx", "rb") as stream:
        stream.seek(17)
        code = stream.read(1)[0]
    return {
        "format": 1,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "end_token": tokenizer.end_token,
        "dtype": megatron("indexed_dataset").DType(code).name,
        "bin_bytes": os.path.getsize(f"{partial}.bin"),
        "idx_bytes": os.path.getsize(f"{partial}.idx"),
        "bin_sha256": file_sha256(f"{partial}.bin"),
        "idx_sha256": file_sha256(f"{partial}.idx"),
    }


def _publish(partial: Path, out: str) -> None:
    """Give the finished files their names, the `.idx` last."""
    with contextlib.suppress(FileNotFoundError):
        os.remove(out + ".idx")
    replace_folder(Path(f"{partial}.tokenizer"), Path(out + ".tokenizer"))
    for suffix in (".json", ".bin", ".idx"):
        os.replace(f"{partial}{suffix}", out + suffix)


def _remove_partial(partial: Path) -> None:
    shutil.rmtree(f"{partial}.tokenizer", ignore_errors=True)
    for suffix in (".bin", ".idx", ".json", ".json.partial"):
        with contextlib.suppress(FileNotFoundError):
            os.remove(f"{partial}{suffix}")


def _counted(problems: Problems) -> str:
    return ", ".join(f"{kind}: {count}" for kind, count in sorted(problems.skipped.items())) or "nothing was skipped"


@contextlib.contextmanager
def _progress(files: list[str]) -> Iterator[Any]:
    """A bar on a terminal's standard error, and nothing elsewhere. Yields a function that takes characters done."""
    if not sys.stderr.isatty():
        yield lambda characters: None
        return
    from rich.console import Console
    from rich.progress import Progress

    size = sum(os.path.getsize(file) for file in files)
    # Compressed files hold more than their size: their bar cannot have an end.
    packed = any(file.endswith((".gz", ".parquet")) for file in files)
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("tokenising", total=None if packed else size)
        yield lambda characters: bar.advance(task, characters)
