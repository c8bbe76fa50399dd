"""Which documents train and which validate."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from trainer.data.config import DataConfig
from trainer.data.indexed import open_pair


def split_ranges(documents: int, split: list[float]) -> tuple[range, range]:
    """The documents that train and those that validate: contiguous, the training ones first, cut where Megatron cuts.

    `split`: [train, validation] fractions. Either range may come out empty.
    """
    cut = round(split[0] / sum(split) * float(documents))
    return range(cut), range(cut, documents)


def training_range(documents: int, split: list[float] | None) -> range:
    """The documents of a training source that are trained on."""
    return split_ranges(documents, split)[0] if split else range(documents)


def training_documents(config: DataConfig) -> Iterator[np.ndarray]:
    """Every document that is trained on, once, in the order of the files: tokens [length], in the dtype on disk.

    For what is counted on the training data, as the n-gram baselines. Raises ValueError when a source cannot be read.
    """
    for source in config.training_sources():
        data = open_pair(source.path)
        for document in training_range(data.documents, config.split):
            yield data.document(document)
