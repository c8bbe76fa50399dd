"""Entropies of attention weights and the penalty on them, against maps written out in full."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels.attention import Visible
from model.attention import AttentionMap
from model.entropy import EntropyPenalty, keys_seen, query_entropies
from model.mixers import MIXERS
from model.observer import EnterBackward, Observer
from tests.conformance.models import CASES, mixer_class, random_batch, random_documents, small_model

B, N, H, G, D = 3, 13, 4, 2, 6
DOCUMENTS = random_documents(B, N)
ALL = Visible(N, N)
VISIBLE = {
    "causal": ALL,
    "window": Visible(N, N, window=4),
    "documents": Visible(N, N, documents=DOCUMENTS, key_documents=DOCUMENTS),
    "both ways, window, documents": Visible(N, N, causal=False, window=4, documents=DOCUMENTS, key_documents=DOCUMENTS),
    "the second half": Visible(N - 6, N, first_index=6, documents=DOCUMENTS[:, 6:], key_documents=DOCUMENTS),
}


def some_map(visible: Visible = ALL, dtype: torch.dtype = torch.float64, **others: Any) -> AttentionMap:
    """Heads of which the first attends widely and the last to hardly more than one key."""
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(B, visible.num_queries, H, D, generator=generator, dtype=torch.float64)
    q = q * torch.tensor([0.1, 1.0, 2.0, 8.0])[:, None]
    k = torch.randn(B, visible.num_keys, G, D, generator=generator, dtype=torch.float64)
    return AttentionMap(q.to(dtype).requires_grad_(), k.to(dtype).requires_grad_(), visible, D**-0.5, **others)


def full_weights(attention: AttentionMap, b: int, h: int, i: int) -> Tensor:
    """What query i gives to each key that it sees, normalised, from q and k alone."""
    seen, place = attention.visible, attention.visible.first_index + i
    keys = []
    for j in range(seen.num_keys):
        near = seen.window is None or abs(place - j) < seen.window
        together = seen.documents is None or seen.key_documents is None
        together = together or bool(seen.documents[b, i] == seen.key_documents[b, j])  # type: ignore[index]
        if near and together and (j <= place or not seen.causal):
            keys.append(attention.k_BMGd[b, j, h // (H // G)])
    scores = torch.stack(keys) @ attention.q_BNHd[b, i, h] * attention.scale
    weights = scores.exp() if attention.normalised else scores.sigmoid()
    return weights / weights.sum()


def eager_entropies(attention: AttentionMap) -> tuple[Tensor, Tensor]:
    """`[B, H, N]` entropies and numbers of keys, one query at a time."""
    rows = [
        [[full_weights(attention, b, h, i) for i in range(attention.visible.num_queries)] for h in range(H)]
        for b in range(B)
    ]
    entropies = [[torch.stack([-(a * a.log()).sum() for a in queries]) for queries in heads] for heads in rows]
    counts = [[[len(a) for a in queries] for queries in heads] for heads in rows]
    return torch.stack([torch.stack(heads) for heads in entropies]), torch.tensor(counts)


@pytest.mark.parametrize("at_once", [1, 5, 64])
@pytest.mark.parametrize("name", VISIBLE)
def test_entropies_are_those_of_the_full_map(name: str, at_once: int) -> None:
    attention = some_map(VISIBLE[name])
    found = query_entropies(attention, at_once)
    wanted, counts = eager_entropies(attention)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-13)
    assert torch.equal(keys_seen(attention, at_once).expand_as(counts), counts)
    leaves = (attention.q_BNHd, attention.k_BMGd)
    factor = torch.randn_like(found)
    for a, b in zip(
        torch.autograd.grad((found * factor).sum(), leaves),
        torch.autograd.grad((wanted * factor).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_weights_that_are_not_normalised_are_first() -> None:
    attention = some_map(form=lambda scores, _: F.logsigmoid(scores), normalised=False)
    torch.testing.assert_close(query_entropies(attention, 5), eager_entropies(attention)[0], rtol=1e-12, atol=1e-13)


def test_what_is_no_token_is_left_out() -> None:
    """A key bias takes weight; the entropy is that of the rest, normalised again."""
    plain = some_map()
    biased = replace(plain, extra_BNH=torch.full((B, N, H), 3.0, dtype=torch.float64))
    assert torch.equal(query_entropies(biased), query_entropies(plain))


def test_a_query_without_any_weight_has_no_entropy_and_no_gradient() -> None:
    def nothing_for_the_third(scores: Tensor, queries: Tensor) -> Tensor:
        return scores.masked_fill((queries == 2)[:, None], -torch.inf)

    attention = some_map(form=nothing_for_the_third)
    found = query_entropies(attention)
    found.sum().backward()
    assert torch.equal(found[:, :, 2], torch.zeros(B, H, dtype=torch.float64))
    assert attention.q_BNHd.grad is not None and attention.k_BMGd.grad is not None
    assert torch.equal(attention.q_BNHd.grad[:, 2], torch.zeros(B, H, D, dtype=torch.float64))
    assert attention.k_BMGd.grad.isfinite().all()


def test_entropies_of_bf16_are_fp32() -> None:
    found = query_entropies(some_map(dtype=torch.bfloat16))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), query_entropies(some_map()), rtol=0.05, atol=0.02)


class Largest(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.elements = max(self.elements, *made, 0)
        return result


def test_the_map_is_never_there_at_once() -> None:
    n, at_once = 256, 16
    q, k = (torch.randn(1, n, heads, D).requires_grad_() for heads in (H, G))
    with Largest() as largest:
        query_entropies(AttentionMap(q, k, Visible(n, n), 1.0), at_once).sum().backward()
    assert largest.elements == H * at_once * n
    held: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: held.append(x) or x, lambda x: x):  # type: ignore[func-returns-value]
        query_entropies(AttentionMap(q, k, Visible(n, n), 1.0), at_once)
    assert max((x.numel() for x in held), default=0) <= q.numel(), "what lies between is computed again"


# The penalty.


def eager_penalty(
    attention: AttentionMap, theta_H: Tensor, *, margin: float, reduction: str, normaliser: str, length: int
) -> Tensor:
    """`[H]`: the mean over heads and all else are the caller's. Written as the paper's algorithm, in loops."""
    entropies, counts = eager_entropies(attention)
    most = math.log(length) if normaliser == "length" else 1.0
    heads = []
    for h in range(H):
        penalty = torch.zeros((), dtype=torch.float64)
        for b in range(B):
            levels = []
            for i in range(attention.visible.num_queries):
                count = int(counts[b, h, i])
                if normaliser == "length":
                    levels.append(entropies[b, h, i])
                elif count > 1:
                    levels.append(entropies[b, h, i] / math.log(count))
            for level in [sum(levels) / len(levels)] if reduction == "mean" else levels:
                apart = level - theta_H[h] * most
                if apart.abs() > margin * most:
                    penalty = penalty + apart**2
        heads.append(penalty)
    return torch.stack(heads)


@pytest.mark.parametrize("normaliser", ["length", "seen"])
@pytest.mark.parametrize("reduction", ["mean", "per_query_sum"])
@pytest.mark.parametrize("name", ["causal", "window", "documents"])
def test_the_penalty_is_the_algorithm(name: str, reduction: Any, normaliser: Any) -> None:
    """Value, and the derivatives by queries, keys and thresholds; some heads lie inside of the margin and some not."""
    attention = some_map(VISIBLE[name])
    theta = torch.tensor([0.5, 0.4, 0.6, 0.3], dtype=torch.float64, requires_grad=True)
    penalty = EntropyPenalty(1.0, 0.25, reduction=reduction, normaliser=normaliser, queries_at_once=5)
    wanted = eager_penalty(attention, theta, margin=0.25, reduction=reduction, normaliser=normaliser, length=N)
    entropies = query_entropies(attention, 5)
    found = penalty.penalties(entropies, keys_seen(attention), theta, N)
    torch.testing.assert_close(found.sum_H, wanted.detach(), rtol=1e-11, atol=1e-12)
    inside = found.by_entropy_BHN == 0
    assert inside.any() and not inside.all()
    leaves = (attention.q_BNHd, attention.k_BMGd)
    *by_map, by_theta = torch.autograd.grad(wanted.sum(), (*leaves, theta))
    torch.testing.assert_close(found.by_threshold_H, by_theta, rtol=1e-10, atol=1e-12)
    for a, b in zip(torch.autograd.grad(entropies, leaves, found.by_entropy_BHN), by_map, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_inside_the_margin_there_is_no_penalty() -> None:
    entropies = torch.full((1, 1, N), 0.5 * math.log(N), dtype=torch.float64)
    seen = keys_seen(some_map())
    for theta, inside in ((0.5, True), (0.69, True), (0.31, True), (0.71, False), (0.29, False)):
        found = EntropyPenalty(1.0, 0.2).penalties(entropies, seen, torch.tensor([theta]).double(), N)
        assert (found.sum_H.item() == 0) is inside
        assert (found.by_threshold_H.item() == 0) is inside
        assert bool((found.by_entropy_BHN == 0).all()) is inside


def test_the_gradient_leads_back_to_the_threshold() -> None:
    """Of a head above it, less entropy and a higher threshold are better; of one below, the other way round."""
    entropies = torch.tensor([2.5, 0.1], dtype=torch.float64)[None, :, None].expand(1, 2, N)
    found = EntropyPenalty(1.0, 0.1).penalties(entropies, keys_seen(some_map()), torch.full((2,), 0.5).double(), N)
    assert (found.by_entropy_BHN[0, 0] > 0).all() and (found.by_entropy_BHN[0, 1] < 0).all()
    assert found.by_threshold_H[0] < 0 < found.by_threshold_H[1]


def test_a_sum_over_queries_is_that_of_the_released_code() -> None:
    """entropy_regularization.py, with its 1e-9 inside of the logarithm, and a threshold for each layer's heads."""
    attention = some_map()
    theta, margin = torch.tensor([0.5, 0.4, 0.6, 0.3], dtype=torch.float64), 0.2
    scores = torch.einsum("bnhd,bmhd->bhnm", attention.q_BNHd, attention.k_BMGd.repeat_interleave(2, 2)) * D**-0.5
    weights = scores.masked_fill(~torch.ones(N, N, dtype=torch.bool).tril(), -torch.inf).softmax(-1)
    entropy_BHN = -(weights * (weights + 1e-9).log()).sum(-1)
    apart = entropy_BHN - theta[:, None] * math.log(N)
    penalty_BHN = torch.where(apart.abs() > margin * math.log(N), apart**2, torch.zeros_like(apart))
    wanted = penalty_BHN.sum((0, 2)).mean()
    penalty = EntropyPenalty(1.0, margin, reduction="per_query_sum")
    found = penalty.penalties(query_entropies(attention), keys_seen(attention), theta, N).sum_H.mean()
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)
    averaged = EntropyPenalty(1.0, margin).penalties(query_entropies(attention), keys_seen(attention), theta, N)
    assert averaged.sum_H.mean() / B < 0.05 * found, "the weights of the two are not of one size"


def test_a_sequence_of_single_tokens_has_no_penalty_where_keys_seen_count() -> None:
    alone = torch.arange(N).expand(B, N)
    attention = some_map(Visible(N, N, documents=alone, key_documents=alone))
    for reduction in ("mean", "per_query_sum"):
        penalty = EntropyPenalty(1.0, 0.1, reduction=reduction, normaliser="seen")  # type: ignore[arg-type]
        found = penalty.penalties(query_entropies(attention), keys_seen(attention), torch.full((H,), 0.5).double(), N)
        assert not found.sum_H.any() and not found.by_entropy_BHN.any() and not found.by_threshold_H.any()


def test_backward_begins_where_the_entropies_arise() -> None:
    attention = some_map()
    entropies = query_entropies(attention)
    derivative, other = torch.randn_like(entropies), torch.randn_like(attention.q_BNHd)
    passed = EnterBackward.apply(attention.q_BNHd, entropies, derivative)
    assert torch.equal(passed, attention.q_BNHd)
    leaves = (attention.q_BNHd, attention.k_BMGd)
    found = torch.autograd.grad((passed * other).sum(), leaves)
    by_q, by_k = torch.autograd.grad(query_entropies(attention), leaves, derivative)
    torch.testing.assert_close(found, (by_q + other, by_k))


# What mixers say of themselves.


class _Asked(Observer):
    def __init__(self) -> None:
        self.layers: list[int] = []

    def attention(self, layer: int, weights: AttentionMap) -> Tensor:
        self.layers.append(layer)
        return weights.q_BNHd


@pytest.mark.parametrize(("kind", "example"), CASES)
def test_mixers_say_whether_they_have_attention_weights(kind: str, example: int) -> None:
    model, asked = small_model(kind, example), _Asked()
    model.observer = asked
    model(random_batch(2, 16).tokens)
    assert asked.layers == ([0, 1] if mixer_class(kind).has_attention_map else [])


def test_some_mixer_has_them() -> None:
    assert any(mixer_class(kind).has_attention_map for kind in MIXERS)
