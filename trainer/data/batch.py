"""From arrays of tokens to the batch that a step is fed with."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from model.batch import Batch


def assemble(
    tokens: np.ndarray,
    targets: np.ndarray,
    counted: np.ndarray,
    pieces: np.ndarray,
    isolate: bool,
    modalities: tuple[np.ndarray, np.ndarray] | None = None,
) -> Batch:
    """A Batch from int64 arrays [B, N] and bool `counted` [B, N].

    `pieces`: a number per token that changes exactly where another document begins, non-decreasing along N.
    `modalities`: of the tokens and of the targets, where they are told apart.
    """
    import torch

    from model.batch import Batch

    places = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    begins = np.zeros(tokens.shape, dtype=bool)
    begins[:, 1:] = pieces[:, 1:] != pieces[:, :-1]
    documents = begins.cumsum(axis=1)
    starts = np.maximum.accumulate(np.where(begins, places, 0), axis=1)
    positions = places - starts if isolate else places
    return Batch(
        tokens=torch.from_numpy(np.ascontiguousarray(tokens)),
        targets=torch.from_numpy(np.ascontiguousarray(targets)),
        counted=torch.from_numpy(np.ascontiguousarray(counted)),
        documents=torch.from_numpy(documents) if isolate else None,
        positions=torch.from_numpy(np.array(positions)),
        modalities=None if modalities is None else torch.from_numpy(np.ascontiguousarray(modalities[0])),
        target_modalities=None if modalities is None else torch.from_numpy(np.ascontiguousarray(modalities[1])),
    )


def check_rows(rows: range, batch_size: int) -> None:
    """Our own callers ask for rows of the global batch only."""
    assert rows.step == 1 and 0 <= rows.start <= rows.stop <= batch_size, (rows, batch_size)
