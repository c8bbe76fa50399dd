"""What attention does in every layer and head of a model: an observer of one forward pass, and what its findings mean.

Nothing here holds a map of all queries by all keys. A sample of queries is looked at, a block at a time, and so are the
first tokens of some documents, in which sinks are measured. What is found are sums, counts and maxima, so that those of
several batches, or of the processes that have pieces of one, can be added. docs/diagnostics.md has the definitions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.attention import row_statistics, sink_scores, sink_weights
from model.attention import AttentionMap
from model.batch import Batch
from model.observer import Observer
from model.routing import Routing
from model.stack import Model

QUERIES = 256
"""Of a longer row, so many queries are looked at."""
WINDOW, WINDOWS_PER_ROW = 64, 4
"""Sinks are measured in so many tokens at the beginning of a document, in so many documents of a row."""
SINK = 0.3
"""A head has a sink where the first token gets more than this of the weights, in the mean over queries."""
BLOCK = 2**20
"""So many log weights are held at a time."""

ROW_SUMS = ("rows", "rows_norm", "entropy", "entropy_norm", "effective_keys", "first_weight", "mass")
SUMS = (*ROW_SUMS, "windows", "sinks", "routed", "active")
"""What is summed for each head, before the WINDOW sums of alpha."""


@dataclass(frozen=True)
class Sample:
    """Which tokens of some rows are looked at, by their places in whole rows.

    Attributes:
        queries_R: in every row.
        begins_BN: place of the first token of each token's document.
        windows: (row, place of the first token) of each window; all WINDOW tokens are of one document.
    """

    queries_R: Tensor
    begins_BN: Tensor
    windows: list[tuple[int, int]]

    @classmethod
    def of(
        cls,
        shape: tuple[int, ...],
        documents_BN: Tensor | None,
        device: torch.device,
        num_queries: int | None = QUERIES,
    ) -> Sample:
        """Of B rows of N tokens.

        Args:
            documents_BN: ids; None where a row is one document.
            num_queries: of each row, at most, evenly spread, the last token's among them; None: all.
        """
        n = shape[1]
        places_N = torch.arange(n, device=device)
        count = n if num_queries is None else min(n, num_queries)
        queries_R = torch.arange(1, count + 1, device=device) * n // count - 1
        begins_BN = torch.zeros(shape, dtype=torch.int64, device=device)
        if documents_BN is not None:
            opens_BN = torch.ones_like(documents_BN, dtype=torch.bool)
            opens_BN[:, 1:] = documents_BN[:, 1:] != documents_BN[:, :-1]
            begins_BN = torch.where(opens_BN, places_N, 0).cummax(1).values
        return cls(queries_R, begins_BN, list(_windows(begins_BN)))

    @property
    def firsts_BN(self) -> Tensor:
        """Bool: whether a token is the first of its document."""
        return self.begins_BN == torch.arange(self.begins_BN.shape[1], device=self.begins_BN.device)


def _windows(begins_BN: Tensor) -> Iterator[tuple[int, int]]:
    """The first windows of each row: documents of at least WINDOW tokens."""
    last_BN = begins_BN[:, WINDOW - 1 :]
    places_N = torch.arange(last_BN.shape[1], device=last_BN.device)
    for row, whole_N in enumerate(last_BN == places_N):
        yield from ((row, begin) for begin in whole_N.nonzero()[:WINDOWS_PER_ROW, 0].tolist())


class AttentionProbe(Observer):
    """An observer of one forward pass without gradients. It changes nothing.

    Args:
        stream_begin: place in whole rows of the first token of the residual stream here.

    Attributes:
        row_sums, logit_max: layer -> `[H, len(ROW_SUMS)]` and `[H]`, of the queries and heads here.
        columns: layer -> `[W, H, WINDOW]`, the weights of each key of a window summed over the queries here.
        active: layer -> `[H, 2]`, of the heads here where heads are chosen: tokens, and those for which a head runs.
        experts: (layer, tower) -> `[E, 2]`, where experts are chosen: tokens, and those that chose an expert.
        residual_max: layer -> the largest magnitude in the residual stream here.
        norms: layer -> `[B, R]`, of the residual stream at the sampled places; 0 where they are not here.
        first_norms: layer -> `[B]`, of first tokens of documents, summed over those here.
    """

    def __init__(self, sample: Sample, stream_begin: int = 0):
        self.sample, self.stream_begin = sample, stream_begin
        self.row_sums: dict[int, Tensor] = {}
        self.logit_max: dict[int, Tensor] = {}
        self.columns: dict[int, Tensor] = {}
        self.active: dict[int, Tensor] = {}
        self.experts: dict[tuple[int, int], Tensor] = {}
        self.residual_max: dict[int, Tensor] = {}
        self.norms: dict[int, Tensor] = {}
        self.first_norms: dict[int, Tensor] = {}

    def attention(self, layer: int, weights: AttentionMap) -> Tensor:
        self._look_at_rows(layer, weights)
        if weights.visible.causal:
            self._look_at_windows(layer, weights)
        return weights.q_BNHd

    def routing(self, layer: int, found: Routing) -> Tensor:
        chosen_TU = (found.chosen_BNU if found.active_BNH is None else found.active_BNH).flatten(0, 1).double()
        counts_U2 = torch.stack((torch.full_like(chosen_TU[0], len(chosen_TU)), chosen_TU.sum(0)), dim=-1)
        if found.active_BNH is None:
            self.experts[layer, found.tower] = counts_U2
        else:
            self.active[layer] = counts_U2
        return found.scores_BNU

    def residual(self, layer: int, x: Tensor) -> None:
        here = range(self.stream_begin, self.stream_begin + x.shape[1])
        norms_BN = torch.linalg.vector_norm(x, dim=-1, dtype=torch.promote_types(x.dtype, torch.float32)).double()
        queries_R = self.sample.queries_R
        inside_R = (queries_R >= here.start) & (queries_R < here.stop)
        norms_BR = norms_BN[:, (queries_R - here.start).clamp(0, len(here) - 1)]
        self.norms[layer] = torch.where(inside_R, norms_BR, 0.0)
        firsts_BN = self.sample.firsts_BN[:, here.start : here.stop]
        self.first_norms[layer] = torch.where(firsts_BN, norms_BN, 0.0).sum(1)
        self.residual_max[layer] = x.abs().amax().double()

    def _look_at_rows(self, layer: int, weights: AttentionMap) -> None:
        heads = weights.q_BNHd.shape[2]
        sums_HK = weights.q_BNHd.new_zeros(heads, len(ROW_SUMS), dtype=torch.float64)
        largest_H = torch.full_like(sums_HK[:, 0], -torch.inf)
        for queries_R in _blocks(weights, self.sample.queries_R):
            first_BR = self.sample.begins_BN[:, queries_R + weights.visible.first_index]
            logs_BHRM, extra_BHR = weights.log_weights(queries_R), _extra(weights, queries_R)
            found = row_statistics(logs_BHRM, first_BR, extra_BHR, normalised=weights.normalised)
            several = found.keys > 1
            parts = {"rows": torch.ones_like(found.mass), "rows_norm": several} | found._asdict()
            sums_HK += torch.stack([parts[name].double().sum((0, 2)) for name in ROW_SUMS], dim=1)
            largest_H = torch.maximum(largest_H, found.logit_max.amax((0, 2)).double())
        self.row_sums[layer], self.logit_max[layer] = sums_HK, largest_H

    def _look_at_windows(self, layer: int, weights: AttentionMap) -> None:
        heads = weights.q_BNHd.shape[2]
        shape = (len(self.sample.windows), heads, WINDOW)
        columns_WHT = weights.q_BNHd.new_zeros(shape, dtype=torch.float64)
        for window, (row, begin) in enumerate(self.sample.windows):
            places_T = torch.arange(begin, begin + WINDOW, device=columns_WHT.device)
            for queries_R in _blocks(weights, places_T):
                logs_BHRM, extra_BHR = weights.log_weights(queries_R), _extra(weights, queries_R)
                given_BHRM = sink_weights(logs_BHRM, extra_BHR, normalised=weights.normalised)
                # Where the sequence is cut, the keys here may end inside of the window.
                given_HT = given_BHRM[row, :, :, begin : begin + WINDOW].double().sum(1)
                columns_WHT[window, :, : given_HT.shape[-1]] += given_HT
        self.columns[layer] = columns_WHT


@torch.no_grad()
def probed(model: Model, batch: Batch, num_queries: int | None = QUERIES) -> AttentionProbe:
    """What a probe sees of a batch in a model that is not spread, as it is (in evaluation mode, say)."""
    found = AttentionProbe(Sample.of(batch.tokens.shape, batch.documents, batch.tokens.device, num_queries))
    model.observer = found
    try:
        model.hidden(batch.tokens, batch.documents, batch.positions, modalities=batch.modalities)
    finally:
        model.observer = None
    return found


@dataclass(frozen=True)
class Numbers:
    """What there is in the layers of a whole model.

    Attributes:
        heads: of each layer the numbers of its heads, in the order in which it keeps them.
        experts: of each layer how many there are to be chosen from, those of one modality after those of the other; 0
            where none are.
    """

    heads: list[list[int]]
    experts: list[int]

    @classmethod
    def of(cls, model: Model) -> Numbers:
        blocks = list(model.layers.values())
        towers = [[tower.balance for tower in block.feedforward.by_tower.values()] for block in blocks]
        experts = [sum(balance.num_units for balance in found if balance is not None) for found in towers]
        return cls([block.mixer.head_numbers for block in blocks], experts)


def _blocks(weights: AttentionMap, places_R: Tensor) -> Iterator[Tensor]:
    """Of these places in whole rows, those of queries that are here, as indices among them, in blocks."""
    seen = weights.visible
    queries_R = places_R - seen.first_index
    queries_R = queries_R[(queries_R >= 0) & (queries_R < seen.num_queries)]
    rows, _, heads, _ = weights.q_BNHd.shape
    if len(queries_R):
        yield from queries_R.split(max(1, BLOCK // (rows * heads * seen.num_keys)))


def _extra(weights: AttentionMap, queries_R: Tensor) -> Tensor | None:
    """`[B, H, R]`, as wide as log weights."""
    if weights.extra_BNH is None:
        return None
    extra_BHR = weights.extra_BNH[:, queries_R].transpose(1, 2)
    return extra_BHR.to(torch.promote_types(weights.q_BNHd.dtype, torch.float32))


@dataclass
class Tally:
    """Sums, counts and maxima of a whole model by layer and head; those of different tokens, or heads, can be added.

    Attributes:
        head_sums: `[L, H, len(SUMS) + WINDOW]` fp64; H of the layer that has most, 0 for heads that are not there.
        layer_sums: `[L, 2]` fp64: norms of first tokens over the median norm, and the number of rows.
        expert_sums: `[L, E, 2]` fp64, E of the layer that has most: tokens, and those that chose an expert.
        maxima: `[L, H + 1]` fp64: logits of heads, and the residual stream's magnitude; -inf where nothing was seen.
    """

    head_sums: Tensor
    layer_sums: Tensor
    expert_sums: Tensor
    maxima: Tensor

    @classmethod
    def empty(cls, numbers: Numbers) -> Tally:
        """Of nothing; on the CPU."""
        num_layers, num_heads = len(numbers.heads), max(map(len, numbers.heads))
        return cls(
            torch.zeros(num_layers, num_heads, len(SUMS) + WINDOW, dtype=torch.float64),
            torch.zeros(num_layers, 2, dtype=torch.float64),
            torch.zeros(num_layers, max(numbers.experts), 2, dtype=torch.float64),
            torch.full((num_layers, num_heads + 1), -torch.inf, dtype=torch.float64),
        )

    @classmethod
    def of(cls, probe: AttentionProbe, of_model: Numbers, share: int = 0) -> Tally:
        """What a probe has seen; on the CPU.

        Args:
            share: which of equal shares of each layer's heads it has seen. What is the same whoever has which heads is
                that of the first.
        """
        tally, head_numbers = cls.empty(of_model), of_model.heads

        def numbers(layer: int, count: int) -> list[int]:
            return head_numbers[layer][share * count : (share + 1) * count]

        for layer, sums_HK in probe.row_sums.items():
            heads = numbers(layer, len(sums_HK))
            tally.head_sums[layer, heads, : len(ROW_SUMS)] = sums_HK
            tally.maxima[layer, heads] = probe.logit_max[layer]
        for layer, active_H2 in probe.active.items():
            tally.head_sums[layer, numbers(layer, len(active_H2)), len(SUMS) - 2 : len(SUMS)] = active_H2
        first: Counter[int] = Counter()
        for (layer, _), chosen_E2 in sorted(probe.experts.items(), key=lambda entry: entry[0]):
            tally.expert_sums[layer, first[layer] : first[layer] + len(chosen_E2)] = chosen_E2 * (share == 0)
            first[layer] += len(chosen_E2)
        for layer, columns_WHT in probe.columns.items():
            heads = numbers(layer, columns_WHT.shape[1])
            alpha_WHT = sink_scores(columns_WHT)
            tally.head_sums[layer, heads, len(ROW_SUMS)] = len(alpha_WHT)
            tally.head_sums[layer, heads, len(ROW_SUMS) + 1] = (alpha_WHT[..., 0] > SINK).double().sum(0)
            tally.head_sums[layer, heads, len(SUMS) :] = alpha_WHT.sum(0)
        firsts_B = probe.sample.firsts_BN.sum(1)
        for layer, norms_BR in probe.norms.items():
            ratio_B = probe.first_norms[layer] / firsts_B / norms_BR.median(1).values
            tally.layer_sums[layer] = torch.stack((ratio_B.sum(), ratio_B.new_tensor(float(len(ratio_B)))))
        for layer, largest in probe.residual_max.items():
            tally.maxima[layer, -1] = largest
        return tally

    def add(self, other: Tally) -> None:
        """Take in what was found in other rows."""
        self.head_sums += other.head_sums
        self.layer_sums += other.layer_sums
        self.expert_sums += other.expert_sums
        self.maxima = torch.maximum(self.maxima, other.maxima)

    def diagnosis(self) -> Diagnosis:
        """What it all means."""
        rows, rows_norm, *summed, windows, sinks, routed, active = self.head_sums[..., : len(SUMS)].unbind(-1)
        entropy, entropy_norm, effective_keys, first_weight, mass = summed
        alpha_LHT, there_LH = self.head_sums[..., len(SUMS) :] / windows[..., None], rows > 0
        argmax = alpha_LHT.nan_to_num(-1.0).argmax(-1).double() + 1.0
        maxima, (ratio, ratios) = self.maxima, self.layer_sums.unbind(-1)
        by_head = {
            "entropy": entropy / rows,
            "entropy_norm": entropy_norm / rows_norm,
            "logit_max": maxima[:, :-1],
            "effective_keys": effective_keys / rows,
            "sink": alpha_LHT[..., 0],
            "sink_argmax": torch.where(windows > 0, argmax, torch.nan),
            "first_weight": first_weight / rows,
            "mass": mass / rows,
            "load": active / routed,
        }
        heads = there_LH.sum(1).tolist()
        rate = None if windows.sum() == 0 else (sinks.sum() / windows.sum()).item()
        looked_LE, chose_LE = self.expert_sums.unbind(-1)
        loads = [
            (chose_E[looked_E > 0] / looked_E[looked_E > 0]).tolist()
            for looked_E, chose_E in zip(looked_LE, chose_LE, strict=True)
        ]
        return Diagnosis(heads, by_head, loads, rate, (sinks.sum(1) / windows.sum(1)), maxima[:, -1], ratio / ratios)


@dataclass(frozen=True)
class Diagnosis:
    """Statistics of attention by layer and head, fp64, on the CPU; nan where nothing was there to be measured.

    Attributes:
        heads: of each layer; 0 where its mixer has no attention weights.
        by_head: name -> `[L, H]`, of the names in docs/diagnostics.md; heads by their numbers.
        expert_loads: for each layer, which part of the tokens chose each expert; empty where none are chosen.
        sink_rate: of (window, layer, head), the share with a sink at the first token; None without a window.
        sink_rates: `[L]`, the same of each layer.
        residual_max: `[L]`, the largest magnitude in the residual stream that enters the layer.
        first_norm_ratio: `[L]`, norm of documents' first tokens in that stream over the median norm.
    """

    heads: list[int]
    by_head: dict[str, Tensor]
    expert_loads: list[list[float]]
    sink_rate: float | None
    sink_rates: Tensor
    residual_max: Tensor
    first_norm_ratio: Tensor

    def rows(self, name: str) -> list[list[float] | None]:
        """One of `by_head` as a row of numbers for each layer; None for those without attention weights."""
        return [
            row[:heads] if heads else None for row, heads in zip(self.by_head[name].tolist(), self.heads, strict=True)
        ]
