"""Validation: every token of every document once, in order."""

from __future__ import annotations

import os
from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

from trainer.data.batch import assemble, check_rows
from trainer.data.config import DataConfig
from trainer.data.indexed import Piece, open_pair
from trainer.data.modalities import TokenModalities, described_modalities
from trainer.data.split import split_ranges
from trainer.data.tokenizer import Tokenizer

if TYPE_CHECKING:
    from model.batch import Batch
    from model.untie import UntieConfig


class EvaluationData:
    """The documents of one dataset, joined in order and cut into rows of seq_len that share one token.

    Every token but the first of each document is the target of exactly one counted prediction, whether documents are
    isolated or not. The last row is filled up with predictions that do not count, and so is every row asked for beyond
    it: no process lacks a batch.

    `documents`: the range of documents that belong to it (default: all). `untie`: batches say which modality their
    tokens and targets are of; what fills them up is of modality 0. Raises ValueError when the dataset cannot be read,
    or does not say the modalities.
    """

    def __init__(
        self,
        prefix: str,
        *,
        seq_len: int,
        isolate_documents: bool = True,
        documents: range | None = None,
        vocab_size: int | None = None,
        untie: UntieConfig | None = None,
    ) -> None:
        self.prefix = prefix
        self.seq_len = seq_len
        self._data = open_pair(prefix)
        self._isolate = isolate_documents
        self._documents = documents if documents is not None else range(self._data.documents)
        self._vocab_size = vocab_size
        self._modalities = None if untie is None else TokenModalities(self._data, untie)
        lengths = self._data.lengths[self._documents.start : self._documents.stop].astype(np.int64)
        self._ends = np.cumsum(lengths)
        self.tokens = int(self._ends[-1]) if len(lengths) else 0
        self.counted_tokens = int(np.maximum(lengths - 1, 0).sum())
        self.num_rows = max(0, -(-(self.tokens - 1) // seq_len))

    def num_batches(self, batch_size: int) -> int:
        """How many global batches of `batch_size` rows hold everything."""
        return -(-self.num_rows // batch_size)

    def batch(self, index: int, rows: range, batch_size: int) -> Batch:
        """Rows of global batch number `index`: B = len(rows), N = seq_len. Rows beyond the data count nothing.

        Raises ValueError at a token outside the vocabulary.
        """
        check_rows(rows, batch_size)
        shape = (len(rows), self.seq_len)
        tokens, targets = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        pieces, counted = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=bool)
        modalities = np.zeros((2, *shape), dtype=np.int64)
        for place, row in enumerate(rows):
            start = (index * batch_size + row) * self.seq_len
            read, found = self._read(start, min(start + self.seq_len + 1, self.tokens))
            documents, _, lengths = np.array(found, dtype=np.int64).reshape(-1, 3).T
            owners = np.repeat(documents, lengths)
            real = max(len(read) - 1, 0)
            tokens[place, :real], targets[place, :real] = read[:-1], read[1:]
            counted[place, :real] = owners[1:] == owners[:-1]
            # What fills a row up is a document of its own, after all others.
            pieces[place, :real], pieces[place, real:] = owners[:-1], self._documents.stop
            if self._modalities is not None:
                of_read = self._modalities.of(read, found)
                modalities[:, place, :real] = of_read[:-1], of_read[1:]
        told_apart = None if self._modalities is None else (modalities[0], modalities[1])
        return assemble(tokens, targets, counted, pieces, self._isolate, told_apart)

    def counted_bytes(
        self, tokenizer: Tokenizer, *, batches: int | None = None, batch_size: int = 1, end_token: int | None = None
    ) -> int | None:
        """UTF-8 bytes of text behind the counted targets of the first `batches` global batches (default: of all); None
        when some tokens stand for no text, as those of images do.

        An end token stands for no bytes; `end_token` names one that is not the tokenizer's. Exact for SentencePiece;
        with a Hugging Face tokenizer, a character that is cut in two is off by at most its bytes.
        Raises ValueError when the data holds ids that the tokenizer does not know.
        """
        if described_modalities(self.prefix) is not None:
            return None
        limit = self.tokens if batches is None else min(self.tokens, batches * batch_size * self.seq_len + 1)
        total = 0
        for document, end in zip(self._documents, self._ends.tolist(), strict=True):
            ids = self._data.document(document)
            ids = ids[: len(ids) - max(0, end - limit)]
            if self._modalities is not None and len(ids) and int(ids.max()) >= tokenizer.vocab_size:
                return None
            if len(ids) > 1:
                self._check_ids(ids, document, 0, tokenizer.vocab_size, "the tokenizer")
                first, ids = ids[:1], ids[:-1] if ids[-1] == end_token else ids
                total += tokenizer.count_bytes(ids.tolist()) - tokenizer.count_bytes(first.tolist())
            if end >= limit:
                break
        return total

    def _read(self, start: int, stop: int) -> tuple[np.ndarray, list[Piece]]:
        """(tokens int64 [stop - start], the pieces of documents they are) of a stretch of the joined documents."""
        found, pieces = [np.zeros(0, dtype=np.int64)], []
        place = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            document = self._documents[place]
            ids = self._data.document(document)
            begin = int(self._ends[place]) - len(ids)
            part = ids[start - begin : stop - begin].astype(np.int64)
            if self._vocab_size is not None:
                self._check_ids(part, document, start - begin, self._vocab_size, "the model's vocabulary")
            found.append(part)
            pieces.append(Piece(document, start - begin, len(part)))
            start, place = start + len(part), place + 1
        return np.concatenate(found), pieces

    def _check_ids(self, ids: np.ndarray, document: int, offset: int, vocab_size: int, whose: str) -> None:
        wrong = (ids < 0) | (ids >= vocab_size)
        if wrong.any():
            at = int(wrong.argmax())
            raise ValueError(
                f"{self.prefix}: token {offset + at} of document {document} is id {int(ids[at])}, and {whose} has "
                f"{vocab_size}; the data was made with another tokenizer, or is damaged."
            )


def validation_sets(
    config: DataConfig, *, vocab_size: int | None = None, untie: UntieConfig | None = None
) -> dict[str, EvaluationData]:
    """What a run validates on, by name: `data.validation`, or the part of the training sources that `data.split` holds
    back. A name is the last part of the prefix, numbered from the second of the same name on.

    With `untie`, their batches know modalities. Raises ValueError when a dataset cannot be read.
    """
    sources = config.validation_sources() or (config.training_sources() if config.split else [])
    sets = {}
    for name, source in zip(unique_names([source.path for source in sources]), sources, strict=True):
        held_back = None
        if not config.validation and config.split:
            held_back = split_ranges(open_pair(source.path).documents, config.split)[1]
        sets[name] = EvaluationData(
            source.path,
            seq_len=config.seq_len,
            isolate_documents=config.isolate_documents,
            documents=held_back,
            vocab_size=vocab_size,
            untie=untie,
        )
    return sets


def unique_names(prefixes: list[str]) -> list[str]:
    """The last part of each prefix; the second of the same name gets "-2" behind it, and so on."""
    seen: Counter[str] = Counter()
    taken: set[str] = set()
    names = []
    for prefix in prefixes:
        base = os.path.basename(os.path.normpath(prefix))
        seen[base] += 1
        name = base if seen[base] == 1 else f"{base}-{seen[base]}"
        while name in taken:
            name += "-2"
        taken.add(name)
        names.append(name)
    return names
