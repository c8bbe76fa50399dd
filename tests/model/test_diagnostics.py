"""Statistics of attention against a map of all queries by all keys, which the diagnostics themselves never make."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import model.diagnostics as diagnostics
from kernels.attention import Visible
from model.attention import AttentionMap
from model.diagnostics import SINK, AttentionProbe, Diagnosis, Numbers, Sample, Tally, probed
from tests.conformance.models import built, positions_of, random_batch, small_model

ROWS, LENGTH, HEADS, KV_HEADS, WIDTH = 2, 150, 4, 2, 8


@dataclass(frozen=True)
class Kind:
    """Attention of some kind, small enough for a map of all by all."""

    isolated: bool = True
    window: int | None = None
    extra: bool = False
    normalised: bool = True
    sharpness: float = 1.0


KINDS = {
    "plain": Kind(isolated=False),
    "documents": Kind(),
    "window": Kind(window=9),
    "extra logit": Kind(extra=True),
    "not normalised": Kind(normalised=False),
    "sharp": Kind(isolated=False, sharpness=6.0),
}


def documents() -> Tensor:
    begins = torch.zeros(ROWS, LENGTH, dtype=torch.int64)
    begins[0, 80] = begins[1, [1, 5, 75, 140]] = 1
    return begins.cumsum(1)


def sigmoid_form(scores_BHRM: Tensor, queries_R: Tensor) -> Tensor:
    return F.logsigmoid(scores_BHRM - 2.0)


def map_of(kind: Kind, dtype: torch.dtype) -> AttentionMap:
    generator = torch.Generator().manual_seed(3)
    q, k = (torch.randn(ROWS, LENGTH, h, WIDTH, generator=generator, dtype=torch.float64) for h in (HEADS, KV_HEADS))
    # A first token that most look at, so that there are sinks: in some heads only.
    begins = positions_of(documents()) == 0 if kind.isolated else torch.arange(LENGTH).expand(ROWS, LENGTH) == 0
    k[..., 0, :] += 4.0 * begins[..., None]
    q[..., :2, :] = (q[..., :2, :].abs() + 0.2) * kind.sharpness
    ids = documents() if kind.isolated else None
    visible = Visible(LENGTH, LENGTH, 0, True, kind.window, ids, ids)
    extra = torch.randn(ROWS, LENGTH, HEADS, generator=generator, dtype=torch.float64).to(dtype)
    form = None if kind.normalised else sigmoid_form
    return AttentionMap(
        q.to(dtype), k.to(dtype), visible, WIDTH**-0.5, form, extra if kind.extra else None, kind.normalised
    )


def numbers(num_layers: int) -> Numbers:
    return Numbers([list(range(HEADS))] * num_layers, [0] * num_layers)


def found_in(weights: AttentionMap, num_queries: int | None = None) -> Diagnosis:
    sample = Sample.of((ROWS, LENGTH), weights.visible.documents, torch.device("cpu"), num_queries)
    probe = AttentionProbe(sample)
    probe.residual(0, torch.ones(ROWS, LENGTH, 3))
    assert probe.attention(0, weights) is weights.q_BNHd
    return Tally.of(probe, numbers(1)).diagnosis()


def oracle(kind: Kind) -> tuple[dict[str, list[float]], float]:
    """Row by row, key by key, from one big map: the definitions, and nothing of how they are computed."""
    weights = map_of(kind, torch.float64)
    k = weights.k_BMGd.repeat_interleave(HEADS // KV_HEADS, dim=2)
    S = torch.einsum("bihd,bjhd->bhij", weights.q_BNHd, k) / math.sqrt(WIDTH)
    i, j = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)
    seen = (j <= i) & (i - j < (kind.window or LENGTH))
    ids = documents() if kind.isolated else torch.zeros(ROWS, LENGTH)
    seen = seen & (ids[:, :, None] == ids[:, None, :])
    if kind.normalised:
        logits = S
        Z = torch.where(seen[:, None], S, -math.inf)
        if kind.extra:
            assert weights.extra_BNH is not None
            Z = torch.cat([Z, weights.extra_BNH.transpose(1, 2)[..., None]], dim=-1)
        A = Z.softmax(-1)[..., :LENGTH]
    else:
        logits = torch.log(torch.sigmoid(S - 2.0))
        A = torch.where(seen[:, None], torch.sigmoid(S - 2.0), 0.0)
    told: dict[str, list[float]] = {}
    sinks = []
    for h in range(HEADS):
        rows: dict[str, list[float]] = {
            name: [] for name in ("entropy", "entropy_norm", "effective_keys", "first_weight")
        }
        rows |= {"mass": [], "logit_max": []}
        alphas = []
        for b in range(ROWS):
            for t in range(LENGTH):
                keys = seen[b, t].nonzero()[:, 0].tolist()
                a = A[b, h, t, keys]
                p = a / a.sum()
                first = int((ids[b] == ids[b, t]).nonzero()[0])
                entropy = -sum(x * math.log(x) for x in p.tolist() if x > 0)
                rows["entropy"].append(entropy)
                if len(keys) > 1:
                    rows["entropy_norm"].append(entropy / math.log(len(keys)))
                rows["effective_keys"].append(1 / (p**2).sum().item())
                shown = a if kind.normalised else p
                rows["first_weight"].append(shown[keys.index(first)].item() if first in keys else 0.0)
                rows["mass"].append(a.sum().item())
                rows["logit_max"].append(logits[b, h, t, keys].max().item())
            starts = [t for t in range(LENGTH - 63) if t == 0 or ids[b, t] != ids[b, t - 1]]
            for start in (t for t in starts if ids[b, t] == ids[b, t + 63]):
                W = A[b, h, start : start + 64, start : start + 64]
                W = W if kind.normalised else W / W.sum(-1, keepdim=True)
                alphas.append([W[k:, k].mean().item() for k in range(64)])
        mean = torch.tensor(alphas).double().mean(0)
        sinks += [alpha[0] > 0.3 for alpha in alphas]
        values = {name: sum(v) / len(v) for name, v in rows.items()} | {"logit_max": max(rows["logit_max"])}
        values |= {"sink": sum(a[0] for a in alphas) / len(alphas), "sink_argmax": mean.argmax().item() + 1}
        for name, value in values.items():
            told.setdefault(name, []).append(value)
    return told, sum(sinks) / len(sinks)


@pytest.mark.parametrize("name", KINDS)
def test_every_statistic_is_that_of_a_whole_map(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnostics, "BLOCK", 8000)  # many blocks, of several queries each
    wanted, rate = oracle(KINDS[name])
    for dtype, bound in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        found = found_in(map_of(KINDS[name], dtype))
        assert found.sink_rate == rate
        assert set(found.by_head) == {*wanted, "load"}
        for what, values in wanted.items():
            assert found.by_head[what][0].tolist() == pytest.approx(values, rel=bound, abs=bound), what
    if name == "plain":
        assert 0 < rate < 1


def test_a_collapsed_head_reads_nought() -> None:
    """One key gets all, at logits of thousands: nothing is left of the difference of large numbers."""
    weights = map_of(Kind(isolated=False), torch.float32)
    k_BMGd = torch.zeros_like(weights.k_BMGd)
    k_BMGd[:, 0] = 40.0
    q_BNHd = torch.full_like(weights.q_BNHd, 37.7)
    found = found_in(replace(weights, q_BNHd=q_BNHd, k_BMGd=k_BMGd))
    assert found.by_head["logit_max"].min() > 4000
    assert found.by_head["entropy"].abs().max() < 1e-5 and (found.by_head["entropy"] >= 0).all()
    assert found.by_head["effective_keys"].tolist()[0] == pytest.approx([1.0] * HEADS, abs=1e-5)
    assert found.by_head["first_weight"].tolist()[0] == pytest.approx([1.0] * HEADS, abs=1e-5)
    assert found.sink_rate == 1.0 and set(found.by_head["sink_argmax"][0].tolist()) == {1.0}


def test_even_attention_reads_its_largest_values() -> None:
    weights = map_of(Kind(isolated=False), torch.float32)
    found = found_in(replace(weights, q_BNHd=torch.zeros_like(weights.q_BNHd)))
    counts = range(1, LENGTH + 1)
    assert found.by_head["entropy"][0].tolist() == pytest.approx(
        [sum(map(math.log, counts)) / LENGTH] * HEADS, abs=1e-5
    )
    assert found.by_head["entropy_norm"][0].tolist() == pytest.approx([1.0] * HEADS, abs=1e-5)
    assert found.by_head["effective_keys"][0].tolist() == pytest.approx([sum(counts) / LENGTH] * HEADS, rel=1e-5)


@pytest.mark.parametrize(("n", "count"), [(10, None), (10, 256), (256, 256), (257, 256), (1000, 7)])
def test_sampled_queries_are_spread_and_end_with_the_last(n: int, count: int | None) -> None:
    queries = Sample.of((1, n), None, torch.device("cpu"), count).queries_R.tolist()
    assert len(queries) == min(n, count or n) == len(set(queries))
    assert queries[-1] == n - 1 and queries == sorted(queries) and queries[0] >= 0
    gaps = {b - a for a, b in pairwise(queries)}
    assert max(gaps, default=1) - min(gaps, default=1) <= 1


def test_windows_are_the_first_long_documents_of_each_row() -> None:
    begins = torch.zeros(2, 64 * 7, dtype=torch.int64)
    begins[0, [3, 66, 130, 194, 300, 370]] = 1
    windows = Sample.of(begins.shape, begins.cumsum(1), torch.device("cpu")).windows
    # Of row 0: 3..65 has 63 tokens, 66..129 has 64 and counts; four at most.
    assert windows == [(0, 66), (0, 130), (0, 194), (0, 300), (1, 0)]


class Largest(TorchDispatchMode):
    """Notes how many elements the largest tensor has that comes out of any operation."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for part in out if isinstance(out, tuple | list) else [out]:
            if isinstance(part, Tensor):
                self.elements = max(self.elements, part.numel())
        return out


@pytest.mark.parametrize("isolated", [True, False])
def test_nothing_as_large_as_all_queries_by_all_keys_is_made(isolated: bool) -> None:
    n = 2048
    ids = torch.arange(n).div(700, rounding_mode="floor")[None] if isolated else None
    x_BNHd = torch.randn(1, n, 2, 8)
    weights = AttentionMap(x_BNHd, x_BNHd, Visible(n, n, documents=ids, key_documents=ids), 0.3)
    with Largest() as largest:
        AttentionProbe(Sample.of((1, n), ids, torch.device("cpu"), None)).attention(0, weights)
    assert largest.elements <= diagnostics.BLOCK < n * n
    # A whole model's pass, with its own attention, its logits, and all.
    model = small_model("softmax", dtype=torch.float32)
    with Largest() as largest:
        probed(model, random_batch(1, n, isolated=False))
    assert largest.elements < n * n


def test_a_probe_changes_nothing_and_is_gone_afterwards() -> None:
    model, batch = small_model("softmax", example=1), random_batch(2, 80)
    plain = model(batch.tokens, documents=batch.documents, positions=batch.positions)
    probe = probed(model, batch)
    assert model.observer is None
    assert sorted(probe.row_sums) == sorted(probe.norms) == [0, 1]
    again = model(batch.tokens, documents=batch.documents, positions=batch.positions)
    assert torch.equal(plain, again)


def test_the_residual_stream_is_measured_where_it_enters_a_layer() -> None:
    model, batch = small_model("softmax"), random_batch(2, 40)
    found = Tally.of(probed(model, batch, None), numbers(2)).diagnosis()
    x = model.embedding(batch.tokens)
    norms = x.norm(dim=-1)
    ratios = []
    for row, ids in zip(norms, batch.documents, strict=True):
        firsts = torch.ones_like(ids, dtype=torch.bool)
        firsts[1:] = ids[1:] != ids[:-1]
        ratios.append(row[firsts].mean() / row.sort().values[(len(row) - 1) // 2])
    assert found.residual_max[0].item() == pytest.approx(x.abs().max().item(), rel=1e-12)
    assert found.first_norm_ratio[0].item() == pytest.approx(sum(ratios).item() / 2, rel=1e-12)
    assert found.residual_max[1] != found.residual_max[0]


def test_rows_looked_at_one_after_the_other_are_rows_looked_at_together() -> None:
    model, batch = small_model("softmax"), random_batch(3, 70)
    together = Tally.of(probed(model, batch, None), numbers(2))
    apart = Tally.empty(numbers(2))
    for row in range(3):
        apart.add(Tally.of(probed(model, batch.rows(slice(row, row + 1)), None), numbers(2)))
    for name in ("head_sums", "layer_sums", "maxima"):
        torch.testing.assert_close(getattr(apart, name), getattr(together, name), rtol=1e-9, atol=1e-12)


def test_experts_of_each_modality_are_looked_at_one_after_the_other() -> None:
    """Which part of all tokens chose each; of which modality they are, the data says."""
    experts = {"moe": {"num_experts": 4, "top_k": 2, "expert": "swiglu"}, "swiglu": {"d_ff": 24}}
    model = built(
        {
            "model": {"d_model": 32, "num_layers": 2, "vocab_size": 61, "pattern": ["it"]},
            "mixers": {"it": {"kind": "softmax", "num_heads": 2}},
            "feedforwards": experts | {"wide": {"kind": "swiglu", "d_ff": 48}},
            "untie": {"modalities": 3, "feedforwards": {"1": "wide"}},
        }
    )
    plain = random_batch(2, 80)
    modalities = torch.randint(3, plain.tokens.shape)
    batch = replace(plain, modalities=modalities)
    of_model = Numbers.of(model)
    assert of_model.experts == [8, 8]
    tally = Tally.of(probed(model, batch), of_model)
    tally.add(Tally.of(probed(model, batch), of_model))
    for loads in tally.diagnosis().expert_loads:
        for m, first in ((0, 0), (2, 4)):
            assert sum(loads[first : first + 4]) == pytest.approx(2 * (modalities == m).double().mean().item())
            assert len(set(loads[first : first + 4])) > 1


def test_layers_without_weights_have_none() -> None:
    found = Tally.of(probed(small_model("lightning"), random_batch(2, 70)), numbers(2)).diagnosis()
    assert found.heads == [0, 0] and found.rows("entropy") == [None, None] and found.sink_rate is None
    assert found.residual_max.isfinite().all()
    assert SINK == 0.3
