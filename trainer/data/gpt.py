"""Megatron's GPT data, and which document each token came from. Importing this imports megatron-core: do it late."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split

from trainer.data.indexed import Piece


class PackedDocuments(GPTDataset):
    """Samples of seq_len + 1 tokens, packed and shuffled by Megatron, with the documents they are made of.

    Megatron's own `__getitem__` rewrites tokens that equal its padding id and tells documents apart by their end token;
    neither happens here. A sample is never padded: Megatron drops the last one that is not full.
    """

    def __getitem__(self, idx: int | None) -> dict[str, Any]:
        """tokens int64 [seq_len + 1], and its pieces in order, whose lengths sum to seq_len + 1."""
        assert idx is not None
        tokens, _ = self._query_document_sample_shuffle_indices(idx)
        pieces = list(self._pieces(int(self.shuffle_index[idx])))
        assert len(tokens) == self.config.sequence_length + 1 == sum(piece.length for piece in pieces)
        return {"tokens": tokens, "pieces": pieces}

    def _pieces(self, sample: int) -> Iterator[Piece]:
        """The pieces of a sample, before shuffling. The sample's last token is the next one's first."""
        first, first_offset = (int(value) for value in self.sample_index[sample])
        last, last_offset = (int(value) for value in self.sample_index[sample + 1])
        for place in range(first, last + 1):
            document = int(self.document_index[place])
            offset = first_offset if place == first else 0
            end = last_offset + 1 if place == last else int(self.dataset.sequence_lengths[document])
            yield Piece(document, offset, end - offset)


class _NoTokenizer:
    """Stands where Megatron asks for a tokenizer: nothing here depends on one."""

    vocab_size = None
    unique_identifiers: dict[str, str] = {}


def open_packed(prefix: str, documents: range, *, samples: int, seq_len: int, seed: int, cache: str) -> PackedDocuments:
    """Megatron's packed samples of some documents of a dataset, their order read from `cache` or written there."""
    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=seq_len,
        blend=([prefix], None),
        split="1",
        path_to_cache=cache,
        tokenizer=_NoTokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    # Without the path in it, the name of the cached order is the same wherever the data lies.
    with quiet():
        indices = np.arange(documents.start, documents.stop, dtype=np.int32)
        return PackedDocuments(IndexedDataset(prefix), None, indices, samples, Split.train, config)


def blend(weights: list[float], samples: int) -> tuple[np.ndarray, np.ndarray]:
    """(source int16 [samples], sample of it int64 [samples]): Megatron's interleaving by weight.

    `BlendedDataset` computes the same, but cannot cache it without a process group.
    """
    from megatron.core.datasets import helpers

    total = sum(weights)
    sources, places = np.zeros(samples, dtype=np.int16), np.zeros(samples, dtype=np.int64)
    helpers.build_blending_indices(sources, places, [w / total for w in weights], len(weights), samples, False)
    return sources, places


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Megatron's notes on its own caching are of no use here."""
    logger = logging.getLogger("megatron.core.datasets")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
