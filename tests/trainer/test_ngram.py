"""The n-gram baselines: proper probabilities, and an example worked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from trainer.ngram import NgramBaselines


def test_hand_computed_example():
    # a = 0, b = 1, c = 2, d = 3 (never seen); documents "a b a b" and "a c".
    model = NgramBaselines.count([np.array([0, 1, 0, 1]), np.array([0, 2], dtype=np.uint16)], 4)
    # Tokens: a 3, b 2, c 1 of 6, three kinds: 0.75 * 3 / 6 is spread over four.
    spread = 0.75 * 3 / 6 / 4
    unigram, _ = model.nats(np.array([0, 0, 0, 0]), np.array([0, 1, 2, 3]))
    expected = [2.25 / 6 + spread, 1.25 / 6 + spread, 0.25 / 6 + spread, spread]
    np.testing.assert_allclose(np.exp(-unigram), expected, rtol=1e-12)
    # Pairs: ab 2, ba 1, ac 1; b, a and c each follow one kind of token, of three kinds of pairs.
    follow = 0.25 / 3 + 0.75 * 3 / 3 / 4
    nothing = 0.75 * 3 / 3 / 4
    after_a = 0.75 * 2 / 3
    _, bigram = model.nats(np.array([0, 0, 0, 0, 1, 3]), np.array([0, 1, 2, 3, 0, 2]))
    expected = [
        after_a * follow,
        1.25 / 3 + after_a * follow,
        0.25 / 3 + after_a * follow,
        after_a * nothing,
        0.25 / 1 + 0.75 * follow,
        follow,
    ]
    np.testing.assert_allclose(np.exp(-bigram), expected, rtol=1e-12)


def test_probabilities_sum_to_one_for_seen_and_unseen_contexts():
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 40, size=rng.integers(0, 60)) for _ in range(80)]
    model = NgramBaselines.count(documents, 50)
    every = np.arange(50)
    for context in range(50):
        unigram, bigram = model.nats(np.full(50, context), every)
        assert math.isclose(np.exp(-unigram).sum(), 1, rel_tol=1e-12)
        assert math.isclose(np.exp(-bigram).sum(), 1, rel_tol=1e-12)
        assert np.isfinite(bigram).all()


def test_counting_in_pieces_changes_nothing(monkeypatch: pytest.MonkeyPatch):
    rng = np.random.default_rng(1)
    documents = [rng.integers(0, 20, size=30) for _ in range(50)]
    whole = NgramBaselines.count(documents, 20)
    monkeypatch.setattr("trainer.ngram.PAIRS_AT_ONCE", 7)
    pieces = NgramBaselines.count(iter(documents), 20)
    np.testing.assert_array_equal(whole.pairs, pieces.pairs)
    np.testing.assert_array_equal(whole.pair_counts, pieces.pair_counts)
    assert whole.pair_counts.sum() == 50 * 29


def test_bigram_beats_unigram_where_order_matters():
    text = np.tile(np.arange(10), 50)
    unigram, bigram = NgramBaselines.count([text], 10).nats(text[:-1], text[1:])
    assert bigram.mean() < 0.2 < 2 < unigram.mean()


def test_nothing_seen_is_uniform_and_shapes_are_kept():
    unigram, bigram = NgramBaselines.count([], 8).nats(np.zeros((2, 3), dtype=int), np.ones((2, 3), dtype=int))
    np.testing.assert_allclose(unigram, np.full((2, 3), math.log(8)))
    np.testing.assert_allclose(bigram, np.full((2, 3), math.log(8)))


def test_ids_outside_the_vocabulary_are_refused():
    with pytest.raises(ValueError, match=r"document 1 holds id 9, outside the vocabulary of 8"):
        NgramBaselines.count([np.array([1]), np.array([2, 9])], 8)
    model = NgramBaselines.count([np.array([1, 2])], 8)
    with pytest.raises(ValueError, match="target holds id -1"):
        model.nats(np.array([0]), np.array([-1]))
