"""Text to Megatron's `.bin` and `.idx`, with a sidecar that says what they hold."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.files import file_sha256, replace_folder, write_json
from trainer.data.documents import Problems, ReadingOptions, find_inputs, read_documents, texts
from trainer.data.lazy import megatron
from trainer.data.modalities import COLUMN
from trainer.data.parts import NAMES, Part, TokenIds
from trainer.data.sidecar import read_sidecar
from trainer.data.tokenizer import Tokenizer, default_workers, load_tokenizer

if TYPE_CHECKING:
    import numpy as np

# A chunk is tokenised at once: long enough to keep every thread busy, short enough to hold in memory.
CHUNK_CHARACTERS = 1 << 22
CHUNK_DOCUMENTS = 4096
# In the order in which they get their names.
FILES = (COLUMN, ".json", ".bin", ".idx")


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

    One sequence per document, each with the end token behind it; uint16 where the vocabulary fits, else int32. With
    `reading.image_codes`, documents are text and images, numbered as `trainer.data.parts` says, and there is an
    `out`.modalities too. Everything is written under partial names. The `.idx` gets its final name last, and with
    `overwrite` loses it first, and no reader takes a prefix without it: so a set that is complete by its names is
    complete.

    Raises ValueError with every fault found: broken input by file and line, a prefix that exists, a bad tokenizer.
    """
    reading = reading or ReadingOptions()
    if faults := reading.faults():
        raise ValueError("\n".join(faults))
    _check_free(out, overwrite)
    files = find_inputs(inputs)
    loaded = load_tokenizer(tokenizer)
    ids = None if reading.image_codes is None else TokenIds(loaded.vocab_size, reading.image_codes)
    problems = Problems(skip=skip_broken)
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    partial = Path(out + ".partial")
    try:
        _remove_partial(partial)
        with _progress(files) as advance:
            documents = read_documents(files, reading, problems)
            written = _Writer(partial, loaded, ids)
            written.write(documents, problems, workers or default_workers(), advance)
        problems.refuse_if_any()
        if written.counts["documents"] == 0:
            raise ValueError(f"{', '.join(inputs)}: not one document is left to write ({_counted(problems)}).")
        sidecar = {**_describe(partial, loaded, ids), **written.counts, "skipped": dict(problems.skipped)}
        if ids is not None:
            sidecar["modalities"] = _describe_column(partial, ids, written.of_modality)
        write_json(f"{partial}.json", sidecar)
        Path(f"{partial}.tokenizer").mkdir()
        loaded.copy_to(f"{partial}.tokenizer")
        _publish(partial, out)
    finally:
        _remove_partial(partial)
    return sidecar


def _check_free(out: str, overwrite: bool) -> None:
    existing = [out + suffix for suffix in (*FILES, ".tokenizer") if os.path.exists(out + suffix)]
    if os.path.exists(out + ".json") and read_sidecar(out) is None:
        raise ValueError(f"--out {out}: {out}.json exists and is not ours to replace; give another prefix.")
    if existing and not overwrite:
        raise ValueError(
            f"--out {out}: {', '.join(existing)} already there; give another prefix, or --overwrite to replace them."
        )


class _Writer:
    """Writes documents into the partial `.bin` and `.idx`, and with `ids` into the column, and counts them.

    `counts`: documents, tokens, bytes of text and max_token. `of_modality`: tokens of each modality.
    """

    def __init__(self, partial: Path, tokenizer: Tokenizer, ids: TokenIds | None) -> None:
        self._partial = partial
        self._tokenizer = tokenizer
        self._ids = ids
        self.counts = {"documents": 0, "tokens": 0, "bytes": 0, "max_token": -1}
        self.of_modality = [0] * len(NAMES)

    def write(self, documents: Iterator[list[Part]], problems: Problems, workers: int, advance: Any) -> None:
        """Write them all; `advance` is told how many characters and codes went by."""
        indexed = megatron("indexed_dataset")
        vocab_size = self._tokenizer.vocab_size if self._ids is None else self._ids.vocab_size
        builder = indexed.IndexedDatasetBuilder(f"{self._partial}.bin", dtype=indexed.DType.optimal_dtype(vocab_size))
        try:
            with contextlib.nullcontext() if self._ids is None else open(f"{self._partial}{COLUMN}", "wb") as column:
                for chunk in _chunks(documents):
                    advance(sum(map(_size, chunk)))
                    if problems.listed:
                        # It will be refused: only the list of what is broken is still wanted.
                        continue
                    for document, tokens in zip(chunk, self._tokens(chunk, workers), strict=True):
                        builder.add_document(tokens, [len(tokens)])
                        self._count(document, tokens, column)
        finally:
            # Closes the .bin as well.
            builder.finalize(f"{self._partial}.idx")

    def _tokens(self, chunk: list[list[Part]], workers: int) -> Iterator[np.ndarray]:
        """The tokens int64 [n] of each document; each text is tokenised by itself."""
        import numpy as np

        encoded = iter(self._tokenizer.encode_batch([text for document in chunk for text in texts(document)], workers))
        for document in chunk:
            tokens: list[int] = []
            for part in document:
                if isinstance(part, str):
                    tokens += next(encoded)
                else:
                    assert self._ids is not None, "images are read only where their codes are counted"
                    tokens += self._ids.image(part)
            yield np.array([*tokens, self._tokenizer.end_token], dtype=np.int64)

    def _count(self, document: list[Part], tokens: np.ndarray, column: Any) -> None:
        self.counts["documents"] += 1
        self.counts["tokens"] += len(tokens)
        self.counts["bytes"] += sum(len(text.encode()) for text in texts(document))
        self.counts["max_token"] = max(self.counts["max_token"], int(tokens.max()))
        if self._ids is not None:
            modalities = self._ids.modalities(tokens)
            column.write(modalities.tobytes())
            for number in range(len(NAMES)):
                self.of_modality[number] += int((modalities == number).sum())


def _size(document: list[Part]) -> int:
    return sum(map(len, document))


def _chunks(documents: Iterator[list[Part]]) -> Iterator[list[list[Part]]]:
    chunk: list[list[Part]] = []
    characters = 0
    for document in documents:
        chunk.append(document)
        characters += _size(document)
        if characters >= CHUNK_CHARACTERS or len(chunk) >= CHUNK_DOCUMENTS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _describe(partial: Path, tokenizer: Tokenizer, ids: TokenIds | None) -> dict[str, Any]:
    """What the sidecar says besides the counts."""
    with open(f"{partial}.idx", "rb") as stream:
        stream.seek(17)
        code = stream.read(1)[0]
    return {
        "format": 1,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size if ids is None else ids.vocab_size,
        "end_token": tokenizer.end_token,
        "dtype": megatron("indexed_dataset").DType(code).name,
        "bin_bytes": os.path.getsize(f"{partial}.bin"),
        "idx_bytes": os.path.getsize(f"{partial}.idx"),
        "bin_sha256": file_sha256(f"{partial}.bin"),
        "idx_sha256": file_sha256(f"{partial}.idx"),
    }


def _describe_column(partial: Path, ids: TokenIds, tokens: list[int]) -> dict[str, Any]:
    """What the sidecar says of the column."""
    return {
        "names": NAMES,
        "ranges": ids.ranges,
        "tokens": tokens,
        "bytes": os.path.getsize(f"{partial}{COLUMN}"),
        "sha256": file_sha256(f"{partial}{COLUMN}"),
    }


def _publish(partial: Path, out: str) -> None:
    """Give the finished files their names, the `.idx` last."""
    with contextlib.suppress(FileNotFoundError):
        os.remove(out + ".idx")
    replace_folder(Path(f"{partial}.tokenizer"), Path(out + ".tokenizer"))
    with contextlib.suppress(FileNotFoundError):
        os.remove(out + COLUMN)
    for suffix in FILES:
        if suffix != COLUMN or os.path.exists(f"{partial}{COLUMN}"):
            os.replace(f"{partial}{suffix}", out + suffix)


def _remove_partial(partial: Path) -> None:
    shutil.rmtree(f"{partial}.tokenizer", ignore_errors=True)
    for suffix in (*FILES, ".json.partial"):
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
