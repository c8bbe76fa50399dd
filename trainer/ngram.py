"""Unigram and bigram language models over token ids: what a trained model has to beat.

With d = 0.75, c(.) the counts, V the vocabulary's size and N1+(.) the number of different tokens or pairs seen:

    unigram      p(w)     = max(c(w) - d, 0) / sum c          + d N1+(w: c(w) > 0) / sum c          x 1/V
    continuation q(w)     = max(N1+(. w) - d, 0) / N1+(. .)   + d N1+(w: N1+(. w) > 0) / N1+(. .)   x 1/V
    bigram       p(w | v) = max(c(v w) - d, 0) / sum_u c(v u) + d N1+(v .) / sum_u c(v u)           x q(w)

and p(w | v) = q(w) after a v that nothing was seen to follow: interpolated Kneser-Ney (Chen and Goodman, 1999, section
2.7) of order two. Pairs across documents do not count.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

DISCOUNT = 0.75
PAIRS_AT_ONCE = 1 << 22


@dataclass
class NgramBaselines:
    """Both models, counted. Arrays over the vocabulary are float64 [V]; `pairs` int64, sorted, is v V + w of each pair
    that was seen and `pair_counts` int64 its count."""

    vocab_size: int
    unigram: np.ndarray
    continuation: np.ndarray
    pairs: np.ndarray
    pair_counts: np.ndarray
    context_totals: np.ndarray
    context_types: np.ndarray

    @classmethod
    def count(cls, documents: Iterable[np.ndarray], vocab_size: int) -> NgramBaselines:
        """Count documents, each an array of ids [length].

        Raises ValueError at an id outside [0, vocab_size).
        """
        tokens = np.zeros(vocab_size, dtype=np.int64)
        pairs, counts = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
        waiting: list[np.ndarray] = []
        for index, document in enumerate(documents):
            ids = np.asarray(document).astype(np.int64)
            _check_ids(ids, vocab_size, f"document {index}")
            tokens += np.bincount(ids, minlength=vocab_size)
            waiting.append(ids[:-1] * vocab_size + ids[1:])
            if sum(map(len, waiting)) >= PAIRS_AT_ONCE or len(waiting) >= 4096:
                pairs, counts = _add(pairs, counts, waiting)
                waiting = []
        pairs, counts = _add(pairs, counts, waiting)
        before, after = np.divmod(pairs, vocab_size)
        return cls(
            vocab_size=vocab_size,
            unigram=_discounted(tokens),
            continuation=_discounted(np.bincount(after, minlength=vocab_size)),
            pairs=pairs,
            pair_counts=counts,
            context_totals=np.bincount(before, weights=counts, minlength=vocab_size),
            context_types=np.bincount(before, minlength=vocab_size).astype(np.float64),
        )

    def nats(self, previous: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(-log p(target), -log p(target | previous)), float64, for two arrays of ids of one shape.

        Raises ValueError at an id outside the vocabulary.
        """
        v, w = np.asarray(previous).astype(np.int64), np.asarray(target).astype(np.int64)
        _check_ids(v, self.vocab_size, "previous")
        _check_ids(w, self.vocab_size, "target")
        seen = np.maximum(self._pair_count(v * self.vocab_size + w) - DISCOUNT, 0)
        totals = self.context_totals[v]
        known = totals > 0
        safe = np.where(known, totals, 1)
        share = np.where(known, DISCOUNT * self.context_types[v] / safe, 1.0)
        bigram = np.where(known, seen / safe, 0.0) + share * self.continuation[w]
        return -np.log(self.unigram[w]), -np.log(bigram)

    def _pair_count(self, keys: np.ndarray) -> np.ndarray:
        """How often each pair was seen, 0 for one that was not."""
        if len(self.pairs) == 0:
            return np.zeros(keys.shape, dtype=np.int64)
        place = np.minimum(np.searchsorted(self.pairs, keys), len(self.pairs) - 1)
        return np.where(self.pairs[place] == keys, self.pair_counts[place], 0)


def _discounted(counts: np.ndarray) -> np.ndarray:
    """Absolute discounting of counts [V], what it takes off spread evenly: float64 [V] that sums to 1."""
    total = counts.sum()
    if total == 0:
        return np.full(len(counts), 1 / len(counts))
    return np.maximum(counts - DISCOUNT, 0) / total + DISCOUNT * (counts > 0).sum() / total / len(counts)


def _add(pairs: np.ndarray, counts: np.ndarray, waiting: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Merge new pairs into sorted unique ones and their counts."""
    new, new_counts = np.unique(np.concatenate([np.zeros(0, dtype=np.int64), *waiting]), return_counts=True)
    merged, inverse = np.unique(np.concatenate([pairs, new]), return_inverse=True)
    total = np.zeros(len(merged), dtype=np.int64)
    np.add.at(total, inverse, np.concatenate([counts, new_counts]))
    return merged, total


def _check_ids(ids: np.ndarray, vocab_size: int, where: str) -> None:
    wrong = (ids < 0) | (ids >= vocab_size)
    if wrong.any():
        found = int(ids[wrong].flat[0])
        raise ValueError(f"{where} holds id {found}, outside the vocabulary of {vocab_size}.")
