"""Megatron's `.bin` and `.idx`, looked at before anything is trusted.

megatron-core's own reader asserts or maps past the end on a broken pair, and takes seconds to import, so what checks,
scans and walks through documents in order reads the two files here, with nothing but NumPy. Training reads, and
preparing writes, through megatron-core.

The `.idx`: 9 bytes of magic, then version (u64), type code (u8), sequence count (u64), boundary count (u64); then per
sequence its length (i32) and its byte offset into the `.bin` (i64); then the document boundaries (i64); then, in
multimodal data, a mode per sequence (i8). A sequence is a document here, as it is for Megatron's GPT data.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<QBQQ")
HEADER_BYTES = len(MAGIC) + HEADER.size
TOKEN_TYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
CHUNK_TOKENS = 1 << 24


class Piece(NamedTuple):
    """A run of tokens of a sample: from `offset` of a document."""

    document: int
    offset: int
    length: int


@dataclass
class TokenFile:
    """An opened `.bin/.idx` pair.

    `lengths` int32 [documents]; `offsets` int64 [documents], in tokens; `tokens` the whole `.bin` as a flat memory map
    of the dtype on disk.
    """

    prefix: str
    lengths: np.ndarray
    offsets: np.ndarray
    tokens: np.ndarray
    groups: int

    @property
    def documents(self) -> int:
        """How many sequences there are, each of which is read as a document."""
        return len(self.lengths)

    @property
    def total(self) -> int:
        """How many tokens there are."""
        return int(self.lengths.sum(dtype=np.int64))

    def document(self, index: int) -> np.ndarray:
        """The tokens of one document [length], in the dtype on disk, not copied."""
        start = int(self.offsets[index])
        return self.tokens[start : start + int(self.lengths[index])]

    def chunks(self) -> Iterator[tuple[int, np.ndarray]]:
        """The `.bin` from its start, as (position of the first token, tokens), a few megabytes at a time."""
        for start in range(0, len(self.tokens), CHUNK_TOKENS):
            yield start, self.tokens[start : start + CHUNK_TOKENS]

    def largest(self) -> int:
        """The largest token id, from a scan of the whole `.bin`; -1 when there is none."""
        return max((int(chunk.max()) for _, chunk in self.chunks()), default=-1)

    def locate(self, position: int) -> tuple[int, int]:
        """(document, place in it) of the token at a position of the `.bin`."""
        order = np.argsort(self.offsets, kind="stable")
        found = int(order[np.searchsorted(self.offsets[order], position, side="right") - 1])
        return found, position - int(self.offsets[found])

    def first_outside(self, vocab_size: int) -> tuple[int, int, int] | None:
        """(id, document, place) of the first id in the `.bin` outside [0, vocab_size); None if there is none."""
        for start, chunk in self.chunks():
            wrong = (chunk < 0) | (chunk >= vocab_size)
            if wrong.any():
                at = int(wrong.argmax())
                return int(chunk[at]), *self.locate(start + at)
        return None


def pair_faults(prefix: str) -> list[str]:
    """What keeps `prefix.bin` and `prefix.idx` from being read, one sentence each; empty when they can be."""
    for suffix in (".bin", ".idx"):
        if prefix.endswith(suffix) and os.path.exists(prefix):
            return [f"{prefix}: expected a prefix and got a file; write {prefix.removesuffix(suffix)} instead."]
    missing = [prefix + suffix for suffix in (".bin", ".idx") if not os.path.isfile(prefix + suffix)]
    if missing:
        return [_missing_fault(prefix, missing)]
    return _index_faults(prefix)


def open_pair(prefix: str) -> TokenFile:
    """Open `prefix.bin` and `prefix.idx`.

    Raises ValueError, with every fault in a sentence, when they are missing, broken or empty.
    """
    faults = pair_faults(prefix)
    if faults:
        raise ValueError("\n".join(faults))
    code, sequences, boundaries = _header(prefix + ".idx")
    index = np.memmap(prefix + ".idx", dtype=np.uint8, mode="r")
    lengths_end = HEADER_BYTES + 4 * sequences
    dtype = np.dtype(TOKEN_TYPES[code])
    return TokenFile(
        prefix=prefix,
        lengths=np.frombuffer(index, np.int32, sequences, HEADER_BYTES),
        offsets=np.frombuffer(index, np.int64, sequences, lengths_end) // dtype.itemsize,
        tokens=np.memmap(prefix + ".bin", dtype=dtype, mode="r"),
        groups=boundaries - 1,
    )


def _missing_fault(prefix: str, missing: list[str]) -> str:
    folder, name = os.path.split(prefix)
    neighbours = []
    if os.path.isdir(folder or "."):
        neighbours = sorted(entry[:-4] for entry in os.listdir(folder or ".") if entry.endswith(".idx"))
    nearby = [os.path.join(folder, neighbour) for neighbour in neighbours if neighbour != name][:5]
    advice = f"the prefixes in that folder are {', '.join(nearby)}" if nearby else "`headway data prepare` writes both"
    return f"{prefix}: {' and '.join(missing)} cannot be found; {advice}."


def _header(path: str) -> tuple[int, int, int]:
    """(type code, sequences, document boundaries) of an `.idx`; ValueError with the reason when it is not one."""
    with open(path, "rb") as stream:
        head = stream.read(HEADER_BYTES)
    if len(head) < HEADER_BYTES or not head.startswith(MAGIC):
        raise ValueError(f"{path}: not a Megatron index (its first bytes are {head[:9]!r}, expected {MAGIC!r}).")
    version, code, sequences, boundaries = HEADER.unpack(head[len(MAGIC) :])
    if version != 1:
        raise ValueError(f"{path}: index version {version}; version 1 is the one that can be read.")
    if code not in TOKEN_TYPES:
        raise ValueError(f"{path}: type code {code} is not that of whole numbers ({sorted(TOKEN_TYPES)}).")
    return code, sequences, boundaries


def _index_faults(prefix: str) -> list[str]:
    path = prefix + ".idx"
    try:
        code, sequences, boundaries = _header(path)
    except ValueError as fault:
        return [str(fault)]
    least = HEADER_BYTES + 12 * sequences + 8 * boundaries
    size = os.path.getsize(path)
    if size not in (least, least + sequences):
        return [
            f"{path}: {size} bytes, but its header announces {sequences} sequences and {boundaries} document "
            f"boundaries, which take {least}: it is cut short or damaged; prepare or copy it again."
        ]
    if sequences == 0:
        return [f"{prefix}: the dataset is empty (0 documents); at least one document is needed."]
    index = np.memmap(path, dtype=np.uint8, mode="r")
    lengths = np.frombuffer(index, np.int32, sequences, HEADER_BYTES)
    offsets = np.frombuffer(index, np.int64, sequences, HEADER_BYTES + 4 * sequences)
    return _content_faults(prefix, lengths, offsets, np.dtype(TOKEN_TYPES[code]))


def _content_faults(prefix: str, lengths: np.ndarray, offsets: np.ndarray, dtype: np.dtype) -> list[str]:
    if (lengths < 0).any():
        at = int((lengths < 0).argmax())
        return [f"{prefix}.idx: document {at} has length {int(lengths[at])}; the index is damaged, prepare it again."]
    total = int(lengths.sum(dtype=np.int64))
    if total == 0:
        return [f"{prefix}: the dataset is empty ({len(lengths)} documents without a token); tokens are needed."]
    expected, size = total * dtype.itemsize, os.path.getsize(prefix + ".bin")
    if size != expected:
        state = "cut short" if size < expected else "longer than its index says"
        return [
            f"{prefix}.bin: {size} bytes, but {prefix}.idx counts {total} tokens of {dtype.name}, which take "
            f"{expected}: it is {state}; copy or prepare the pair again."
        ]
    ends = offsets + lengths.astype(np.int64) * dtype.itemsize
    stray = (offsets < 0) | (ends > size) | (offsets % dtype.itemsize != 0)
    if stray.any():
        at = int(stray.argmax())
        return [f"{prefix}.idx: document {at} starts at byte {int(offsets[at])}, outside the .bin of {size} bytes."]
    return []
