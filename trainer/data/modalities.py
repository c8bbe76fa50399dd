"""Which modality the tokens of a dataset are of: by their ids, or by its column, `PREFIX.modalities`.

The column has one uint8 for each token of `PREFIX.bin`, in the same order. `headway data prepare` writes it beside
documents of parts, and the sidecar tells its names and counts.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer.data.config import DataConfig
from trainer.data.indexed import CHUNK_TOKENS, Piece, TokenFile, open_pair
from trainer.data.sidecar import read_sidecar
from trainer.data.split import training_range

if TYPE_CHECKING:
    from model.untie import UntieConfig

COLUMN = ".modalities"
# Whether a modality is seen at all is looked for in no more tokens than these, spread over the training data.
MOST_LOOKED_AT = 64 << 20
BLOCK_TOKENS = 1 << 16


class TokenModalities:
    """The modality of each token of one dataset.

    Raises ValueError when the column is wanted and is missing, or has another length than the `.bin`.
    """

    def __init__(self, data: TokenFile, untie: UntieConfig) -> None:
        self._data = data
        self._untie = untie
        self._column: np.ndarray | None = None
        if not untie.by_ids:
            if faults := column_faults(data, untie):
                raise ValueError("\n".join(faults))
            self._column = open_column(data.prefix)

    def of(self, tokens: np.ndarray, pieces: Iterable[Piece]) -> np.ndarray:
        """The modalities of `tokens` int64 [n], which are these pieces of documents one after the other: int64 [n]."""
        if self._column is None:
            return by_ids(self._untie, tokens)
        found = [np.zeros(0, dtype=np.int64)]
        for piece in pieces:
            start = int(self._data.offsets[piece.document]) + piece.offset
            found.append(self._column[start : start + piece.length].astype(np.int64))
        return np.concatenate(found)

    def within(self, start: int, stop: int) -> np.ndarray:
        """The modalities of a stretch of the `.bin`, counted in tokens: int64 [stop - start]."""
        if self._column is None:
            return by_ids(self._untie, self._data.tokens[start:stop].astype(np.int64))
        return self._column[start:stop].astype(np.int64)


def by_ids(untie: UntieConfig, tokens: np.ndarray) -> np.ndarray:
    """The modality of each of `tokens` int64 [...], as `untie.ranges` says: int64 [...]."""
    import torch

    return untie.of_tokens(torch.from_numpy(tokens)).numpy()


def open_column(prefix: str) -> np.ndarray:
    """PREFIX.modalities as a flat memory map of uint8."""
    return np.memmap(prefix + COLUMN, dtype=np.uint8, mode="r")


def column_faults(data: TokenFile, untie: UntieConfig) -> list[str]:
    """Why the column of a dataset cannot say the modalities, one sentence each: it is missing, has another length than
    the `.bin`, numbers its modalities otherwise, or has more of them. Empty when ids say the modalities, or it can."""
    if untie.by_ids:
        return []
    path = data.prefix + COLUMN
    if not os.path.isfile(path):
        return [
            f"{path} cannot be found: without untie.ranges it says which modality a token is of; "
            "`headway data prepare --parts` writes it, or give untie.ranges."
        ]
    if (size := os.path.getsize(path)) != len(data.tokens):
        return [
            f"{path}: {size} bytes, but {data.prefix}.bin has {len(data.tokens)} tokens, each of which has one: they "
            "do not belong together; copy or prepare the whole set again."
        ]
    described = described_modalities(data.prefix)
    faults = [] if described is None else _description_faults(path, described, untie)
    return faults or _number_faults(data, described, untie)


def described_modalities(prefix: str) -> dict[str, Any] | None:
    """What the sidecar says of a column: its names, ranges of ids, tokens of each, bytes and sha256. None without."""
    return (read_sidecar(prefix) or {}).get("modalities")


def _description_faults(path: str, described: dict[str, Any], untie: UntieConfig) -> list[str]:
    names = described["names"]
    if described["bytes"] != os.path.getsize(path):
        return [
            f"{path} has {os.path.getsize(path)} bytes, and the sidecar describes one of {described['bytes']}: they do "
            "not belong together; copy the whole set again."
        ]
    if untie.names and untie.names[: len(names)] != names[: len(untie.names)]:
        return [
            f"untie.names = {_quoted(untie.names)}, but {path} numbers {_quoted(names)} in that order: name them so."
        ]
    return []


def _number_faults(data: TokenFile, described: dict[str, Any] | None, untie: UntieConfig) -> list[str]:
    """Does the column hold a number that is no modality? The sidecar's counts answer it; else it is scanned."""
    if described is not None and not any(described["tokens"][untie.modalities :]):
        return []
    column = open_column(data.prefix)
    for start in range(0, len(column), CHUNK_TOKENS):
        wrong = column[start : start + CHUNK_TOKENS] >= untie.modalities
        if wrong.any():
            at = start + int(wrong.argmax())
            document, place = data.locate(at)
            return [
                f"{data.prefix}{COLUMN}: token {place} of document {document} is of modality {int(column[at])}, and "
                f"untie.modalities = {untie.modalities}: they are numbered from 0; {int(column.max()) + 1} would do."
            ]
    return []


def _quoted(names: list[str]) -> str:
    return "[" + ", ".join(f'"{name}"' for name in names) + "]"


def unseen_modalities(config: DataConfig, untie: UntieConfig) -> list[str]:
    """A sentence for each modality of which the training data has no token, as far as was looked.

    Sidecars answer where they count these modalities and all documents are trained on. Otherwise tokens are looked at:
    all of them up to 64M, else as many in evenly spaced blocks, until every modality was seen.
    Raises ValueError when a source cannot be read.
    """
    sources = [open_pair(source.path) for source in config.training_sources()]
    stretches = [_trained_stretch(data, config.split) for data in sources]
    total = sum(map(len, stretches))
    share = min(1.0, MOST_LOOKED_AT / max(total, 1))
    seen, looked_at = np.zeros(untie.modalities, dtype=bool), 0
    for data, stretch in zip(sources, stretches, strict=True):
        counts = _counted_by_sidecar(data, untie) if len(stretch) == len(data.tokens) else None
        if counts is not None:
            seen[: len(counts)] |= np.array(counts[: untie.modalities]) > 0
            looked_at += len(stretch)
            continue
        modalities = TokenModalities(data, untie)
        for start, stop in _blocks(stretch, share):
            if seen.all():
                return []
            counts_of_block = np.bincount(modalities.within(start, stop), minlength=untie.modalities)
            seen |= counts_of_block[: untie.modalities] > 0
            looked_at += stop - start
    return [_unseen(untie, number, looked_at, total) for number in np.flatnonzero(~seen).tolist()]


def differing_ranges(config: DataConfig, untie: UntieConfig) -> list[str]:
    """A sentence for each source that was prepared with ids of one modality which `untie.ranges` gives to another."""
    if not untie.by_ids:
        return []
    return [
        sentence
        for source in config.training_sources()
        if (described := described_modalities(source.path)) is not None
        for sentence in _differing(source.path, described, untie)
    ]


def _differing(prefix: str, described: dict[str, Any], untie: UntieConfig) -> Iterator[str]:
    for number, bounds in enumerate(described["ranges"]):
        for first, end in zip(bounds[::2], bounds[1::2], strict=True):
            ours = by_ids(untie, np.arange(first, end))
            if (wrong := ours != number).any():
                at = first + int(wrong.argmax())
                yield (
                    f"untie.ranges: {prefix} was prepared with ids {first} to {end - 1} for "
                    f'"{described["names"][number]}", and id {at} is of "{untie.called[int(ours[at - first])]}" here: '
                    f"it belongs to ranges = {described['ranges']}."
                )
                break


def _trained_stretch(data: TokenFile, split: list[float] | None) -> range:
    """From the first token of the `.bin` that is trained on to the last."""
    documents = training_range(data.documents, split)
    if not documents:
        return range(0)
    starts = data.offsets[documents.start : documents.stop]
    ends = starts + data.lengths[documents.start : documents.stop]
    return range(int(starts.min()), int(ends.max()))


def _counted_by_sidecar(data: TokenFile, untie: UntieConfig) -> list[int] | None:
    described = described_modalities(data.prefix)
    if described is None or (untie.by_ids and untie.ranges != described["ranges"]):
        return None
    return described["tokens"]


def _blocks(stretch: range, share: float) -> Iterator[tuple[int, int]]:
    """(first token, one beyond the last) of evenly spaced blocks that make up a share of the stretch."""
    size = min(BLOCK_TOKENS, len(stretch))
    if size == 0:
        return
    count = -(-len(stretch) // size) if share == 1 else max(1, int(len(stretch) * share) // size)
    for number in range(count):
        start = stretch.start + number * size
        if share < 1:
            start = stretch.start + (len(stretch) - size) * number // max(count - 1, 1)
        yield start, min(start + size, stretch.stop)


def _unseen(untie: UntieConfig, modality: int, looked_at: int, total: int) -> str:
    ids = ""
    if untie.by_ids:
        bounds = untie.ranges[modality]
        ids = " (ids " + ", ".join(f"{a} to {b - 1}" for a, b in zip(bounds[::2], bounds[1::2], strict=True)) + ")"
    among = f"the {total:,} tokens of the training data"
    if looked_at < total:
        among = f"the {looked_at:,} tokens looked at, in evenly spaced blocks, of {among}"
    return (
        f'untie: no token of "{untie.called[modality]}"{ids} among {among}: its weights get no gradient but zeros and '
        "decay."
    )
