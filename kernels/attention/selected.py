"""Softmax attention of selected heads: what a token does not ask a head for is not computed.

The selected queries of a head are taken together, in order, and the triangle below the diagonal is gone through in
halves, so that most products need no mask. Keys and values are those of all tokens whatever is selected: any later one
may ask for them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.attention.parts import SeenPart, Sight, sights, whole_triangle
from kernels.attention.visible import VISIBLE_SCHEMA, Visible, triton_faults
from kernels.dispatch import triton_form, uses_triton
from kernels.precision import computing_dtype

_FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_FUSED_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default

# By measurement on two cores of a CPU (benchmarks/gated_attention.py). Shorter sequences are computed in full and what
# was not asked for is set to zero, and so are heads that more of the tokens ask for: copies and the squares on the
# diagonal then cost what is saved.
_FEWEST_QUERIES = 1024
_LARGEST_SHARE = 0.85
# The same of Triton's tiles, by measurement on an H200 (docs/performance.md): what torch chooses there takes as long
# for all heads as tiles for a little more than half of them.
_LARGEST_SHARE_OF_TILES = 0.55
# Queries of a square on the diagonal, of one head of keys: fewer make slow products, more waste half a larger square.
_QUERIES_OF_A_SQUARE = 128
_LARGEST_SQUARE = 1024
# Heads go together while none has less than this part of the queries of the largest: all are padded to that one.
_EVEN = 0.75
# A score that is hidden. Finite, so that a part in which a query sees nothing has a logarithm that can be merged.
_HIDDEN = -1e30


def selected_attention(
    q_BNHd: Tensor,
    k_BMGd: Tensor,
    v_BMGe: Tensor,
    selected_BNH: Tensor | None,
    visible: Visible,
    scale: float,
    share: float | None = None,
) -> Tensor:
    """`gated_attention` without a gate, of the heads that a bool `[B, N, H]` selects (None: all), and 0 elsewhere.

    Args:
        share: about which part of all it selects, where that is known beforehand.
    """
    if uses_triton("attention", q_BNHd, triton_faults(q_BNHd, v_BMGe, scale)):
        if q_BNHd.device.type != "cpu" and best_in_full(selected_BNH, visible, share):
            return _all_then_zero(q_BNHd, k_BMGd, v_BMGe, selected_BNH, visible, scale)
        return torch.ops.headway.selected_attention(q_BNHd, k_BMGd, v_BMGe, selected_BNH, *visible.arguments, scale)[0]
    if q_BNHd.device.type != "cpu" or q_BNHd.dtype not in (torch.float32, torch.float64, torch.bfloat16):
        return _all_then_zero(q_BNHd, k_BMGd, v_BMGe, selected_BNH, visible, scale)
    # The fused form wants heads of one width; a channel of zeros changes neither scores nor what comes out beside it.
    width = v_BMGe.shape[3]
    widest = max(q_BNHd.shape[3], width)
    q, k, v = (F.pad(x, (0, widest - x.shape[3])) if x.shape[3] < widest else x for x in (q_BNHd, k_BMGd, v_BMGe))
    out_BNHe, _ = torch.ops.headway.selected_attention(q, k, v, selected_BNH, *visible.arguments, scale)
    return out_BNHe[..., :width]


def best_in_full(selected_BNH: Tensor | None, visible: Visible, share: float | None) -> bool:
    """Whether torch's own attention, of all heads, is the fastest on a GPU: little or nothing can be left out, or there
    is one query, whose keys it shares out among more programs than one."""
    if whole_triangle(visible) is None:
        return False
    much = share is not None and share > _LARGEST_SHARE_OF_TILES
    return selected_BNH is None or much or visible.num_queries == 1


def _all_then_zero(
    q: Tensor, k: Tensor, v: Tensor, selected_BNH: Tensor | None, visible: Visible, scale: float
) -> Tensor:
    """`selected_attention` where there is no form that skips: all heads by torch's own attention."""
    plain = whole_triangle(visible)
    out_BHNe = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)),
        attn_mask=None if plain is not None else visible.of(torch.arange(q.shape[1], device=q.device)),
        is_causal=bool(plain),
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    out_BNHe = out_BHNe.transpose(1, 2)
    return out_BNHe if selected_BNH is None else out_BNHe.masked_fill(~selected_BNH[..., None], 0)


# ------------------------------------------------------------------------- selected queries, taken together


@dataclass(frozen=True)
class _Taken:
    """Selected queries of some heads of keys, those of a square beside each other, padded to the most of a head.

    Attributes:
        units: int64 [U], which of the B * G heads of keys.
        rows_US: int64 [U, S], which of the B * N * H queries, in order; B * N * H where there is none.
        square: length of a square.
        starts: first of the S of every square, and S.
    """

    units: Tensor
    rows_US: Tensor
    square: int
    starts: list[int]

    def span(self, part: SeenPart) -> slice:
        """Which of the S belong to a part's queries."""
        return slice(self.starts[part.first // self.square], self.starts[-(-part.end // self.square)])

    def take(self, x_BNHd: Tensor) -> Tensor:
        """[U, S, d]: their rows, and zeros."""
        x_Rd = x_BNHd.reshape(-1, x_BNHd.shape[-1])
        rows_S = self.rows_US.flatten()
        taken_Sd = x_Rd.index_select(0, rows_S.clamp(max=len(x_Rd) - 1))
        nothing = (rows_S == len(x_Rd)).nonzero()[:, 0]
        return taken_Sd.index_fill_(0, nothing, 0).view(*self.rows_US.shape, -1)

    def put(self, taken_US: Tensor, x_RD: Tensor) -> None:
        """The inverse, into rows B * N * H with one more for what is no query."""
        x_RD.index_copy_(0, self.rows_US.flatten(), taken_US.reshape(-1, *x_RD.shape[1:]).to(x_RD.dtype))


def _take_together(selected_UNr: Tensor, rows_UNr: Tensor, first_unit: int, nowhere: int) -> Iterator[_Taken]:
    """Heads of keys with about as many queries each, so that little is padded; those without any not at all."""
    n = selected_UNr.shape[1]
    loads = selected_UNr.sum((1, 2)).tolist()
    waiting = [unit for unit, load in enumerate(loads) if load]
    while waiting:
        most = max(loads[unit] for unit in waiting)
        units = torch.tensor([unit for unit in waiting if loads[unit] >= _EVEN * most])
        waiting = [unit for unit in waiting if loads[unit] < _EVEN * most]
        # Halves of halves: where all are equally long, their products are largest.
        halvings = max(0, round(math.log2(most / _QUERIES_OF_A_SQUARE)))
        square = min(math.ceil(n / 2**halvings), _LARGEST_SQUARE)
        yield _take(selected_UNr[units], rows_UNr[units], units + first_unit, square, nowhere)


def _take(selected_UNr: Tensor, rows_UNr: Tensor, units: Tensor, square: int, nowhere: int) -> _Taken:
    padded_UNr = F.pad(selected_UNr, (0, 0, 0, -selected_UNr.shape[1] % square))
    by_square_UQs = padded_UNr.reshape(len(units), -1, square * padded_UNr.shape[2])
    starts = [0, *by_square_UQs.sum(2).amax(0).cumsum(0).tolist()]
    u, n, r = selected_UNr.nonzero(as_tuple=True)
    # The first of its square, and its number among the selected of that.
    number = (by_square_UQs.cumsum(2) - 1).view(padded_UNr.shape)[u, n, r]
    rows_US = rows_UNr.new_full((len(units), starts[-1]), nowhere)
    rows_US[u, torch.tensor(starts)[n // square] + number] = rows_UNr[u, n, r]
    return _Taken(units, rows_US, square, starts)


@dataclass(frozen=True)
class _Bundle:
    """Selected queries, and the keys and values of their heads, [b, u, M, d] with b * u = U: four dimensions."""

    taken: _Taken
    k_buMd: Tensor
    v_buMd: Tensor
    sight: Sight
    places_US: Tensor
    scale: float

    def take(self, x_BNHd: Tensor) -> Tensor:
        """[b, u, S, d] of the queries."""
        return self.taken.take(x_BNHd).unflatten(0, self.k_buMd.shape[:2])

    def parts(self) -> Iterator[tuple[SeenPart, slice]]:
        """Parts in which there are queries, and which they are."""
        visible = self.sight.visible
        for part in self.sight.parts(0, visible.num_queries, (0, visible.num_keys), self.taken.square):
            span = self.taken.span(part)
            if span.start < span.stop:
                yield part, span

    def keys(self, part: SeenPart) -> tuple[Tensor, Tensor]:
        """With the values."""
        keys = slice(part.first_key, part.end_key)
        return self.k_buMd[:, :, keys], self.v_buMd[:, :, keys]

    def mask(self, part: SeenPart, span: slice) -> Tensor | None:
        """[b, u, S, M], to be added to scores: by the queries' places, not by how many come before them."""
        if not part.masked:
            return None
        visible = self.sight.visible
        places_US = self.places_US[:, span].clamp(part.first, part.end - 1) - part.first
        dtype = self.k_buMd.dtype
        if whole_triangle(visible):
            # Squares on the diagonal are alike, wherever they stand.
            first, end = part.first_key - part.first, part.end_key - part.first
            added_RM = _added_ahead(part.end - part.first, first, end, dtype)
        else:
            queries_R = torch.arange(part.first, part.end)
            added_RM = _added(~visible.of(queries_R, (part.first_key, part.end_key))[0, 0], dtype)
        added_USM = added_RM.index_select(0, places_US.flatten())
        return added_USM.view(*self.k_buMd.shape[:2], places_US.shape[1], -1)


def _added(hidden_RM: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(hidden_RM.shape, dtype=dtype).masked_fill_(hidden_RM, _HIDDEN)


@lru_cache(maxsize=16)
def _added_ahead(rows: int, first_key: int, end_key: int, dtype: torch.dtype) -> Tensor:
    """[R, M], to be added to scores of queries 0, 1, ... that see the keys up to their own."""
    return _added(torch.arange(first_key, end_key) > torch.arange(rows)[:, None], dtype)


def _bundles(
    q: Tensor, k: Tensor, v: Tensor, selected_BNH: Tensor, visible: Visible, scale: float
) -> Iterator[_Bundle]:
    rows, n, heads = q.shape[:3]
    groups, count = k.shape[2], rows * n * heads
    rows_BNH = torch.arange(count).view(rows, n, heads)
    for some, sight in sights(visible, rows):
        # [B * G, N, H / G]
        selected_UNr, rows_UNr = (
            x[some].unflatten(2, (groups, -1)).transpose(1, 2).flatten(0, 1) for x in (selected_BNH, rows_BNH)
        )
        for taken in _take_together(selected_UNr, rows_UNr, some.start * groups, count):
            places_US = taken.rows_US // heads % n
            yield _Bundle(taken, _of_units(k, taken.units), _of_units(v, taken.units), sight, places_US, scale)


def _of_units(x_BMGd: Tensor, units: Tensor) -> Tensor:
    """[b, u, M, d] of these heads of keys: without a copy if they are all."""
    rows, _, groups, _ = x_BMGd.shape
    if len(units) == rows * groups:
        return x_BMGd.transpose(1, 2)
    return torch.stack([x_BMGd[unit // groups, :, unit % groups] for unit in units.tolist()])[None]


def _forward_of(bundle: _Bundle, q: Tensor) -> tuple[Tensor, Tensor]:
    """[b, u, S, d] and the logarithm of the sums [b, u, S], wide."""
    q_buSd = bundle.take(q)
    out_buSd = torch.zeros_like(q_buSd, dtype=computing_dtype(q))
    lse_buS = out_buSd.new_full(q_buSd.shape[:3], _HIDDEN)
    for part, span in bundle.parts():
        part_out, part_lse = _FUSED(
            q_buSd[:, :, span], *bundle.keys(part), 0.0, False, attn_mask=bundle.mask(part, span), scale=bundle.scale
        )
        # Both are divided by their own sums, so the share of each is that of its sum in both together.
        before = lse_buS[:, :, span]
        out_buSd[:, :, span].lerp_(part_out.to(out_buSd.dtype), torch.sigmoid(part_lse - before)[..., None])
        before.copy_(torch.logaddexp(before, part_lse))
    unseen_buS = lse_buS < _HIDDEN / 2
    return out_buSd.masked_fill_(unseen_buS[..., None], 0), lse_buS.masked_fill_(unseen_buS, 0)


def _backward_of(
    bundle: _Bundle, d_out: Tensor, q: Tensor, out: Tensor, lse: Tensor, dk_buMd: Tensor, dv_buMd: Tensor
) -> Tensor:
    """Gradient [b, u, S, d] of the queries, wide; those of keys and values are added to what is given."""
    d_buSd, q_buSd, out_buSd = (bundle.take(x) for x in (d_out, q, out))
    lse_buS = bundle.take(lse[..., None])[..., 0]
    dq_buSd = torch.zeros_like(q_buSd, dtype=computing_dtype(q))
    for part, span in bundle.parts():
        # Given what all parts have come to, it makes the gradients of one.
        dq, dk, dv = _FUSED_BACKWARD(
            d_buSd[:, :, span],
            q_buSd[:, :, span],
            *bundle.keys(part),
            out_buSd[:, :, span],
            lse_buS[:, :, span],
            0.0,
            False,
            attn_mask=bundle.mask(part, span),
            scale=bundle.scale,
        )
        keys = slice(part.first_key, part.end_key)
        for whole, d_part in ((dq_buSd[:, :, span], dq), (dk_buMd[:, :, keys], dk), (dv_buMd[:, :, keys], dv)):
            whole.add_(d_part)
    return dq_buSd


# --------------------------------------------------------------------- heads in full, and all together


def _heads_in_full(selected_BNH: Tensor | None, visible: Visible, heads: int) -> Tensor:
    """The one rule: which heads are computed for all tokens, and set to zero where they were not asked for."""
    everything = torch.arange(heads)
    if visible.num_queries < _FEWEST_QUERIES:
        return everything
    if whole_triangle(visible) is None:
        # With a mask that hides more, what hardly any query sees is left out even where all heads are selected.
        return everything[:0]
    if selected_BNH is None:
        return everything
    return everything[selected_BNH.sum((0, 1)) >= _LARGEST_SHARE * selected_BNH[..., 0].numel()]


@dataclass(frozen=True)
class _InFull:
    """Some heads of all tokens, with the heads of keys that serve them: [B, H, N, d]."""

    q_BHNd: Tensor
    k_BHMd: Tensor
    v_BHMd: Tensor
    settings: dict[str, Any]


def _in_full(q: Tensor, k: Tensor, v: Tensor, heads: Tensor, visible: Visible, scale: float) -> _InFull:
    served_by = heads // (q.shape[2] // k.shape[2])
    q, k, v = _heads_of(q, heads), _heads_of(k, served_by), _heads_of(v, served_by)
    plain = whole_triangle(visible)
    mask = None
    if plain is None:
        seen_BHNM = visible.of(torch.arange(visible.num_queries))
        mask = torch.zeros(seen_BHNM.shape, dtype=q.dtype).masked_fill_(~seen_BHNM, -math.inf)
    settings = {"attn_mask": mask, "dropout_p": 0.0, "is_causal": bool(plain), "scale": scale}
    return _InFull(q, k, v, settings)


def _heads_of(x_BNHd: Tensor, heads: Tensor) -> Tensor:
    """[B, H, N, d] of these heads, in order: without a copy if they are all, each once."""
    if len(heads) == x_BNHd.shape[2] and bool((heads.diff() > 0).all()):
        return x_BNHd.transpose(1, 2)
    return torch.stack([x_BNHd[:, :, head] for head in heads.tolist()], 1)


def _selected_forward(
    q: Tensor, k: Tensor, v: Tensor, selected: Tensor | None, visible: Visible, scale: float
) -> tuple[Tensor, Tensor]:
    """[B, N, H, d], and the logarithm of the sums [B, N, H], wide; of what is not selected, 0 and anything finite."""
    if uses_triton("attention", q, triton_faults(q, v, scale)):
        form = triton_form("attention")
        return form.selected_forward(q, k, v, selected, visible, scale)
    q, k, v = (_in_rows(x) for x in (q, k, v))
    rows, n, heads, width = q.shape
    full = _heads_in_full(selected, visible, heads)
    if len(full):
        whole = _in_full(q, k, v, full, visible, scale)
        out_BHNd, lse_BHN = _FUSED(whole.q_BHNd, whole.k_BHMd, whole.v_BHMd, **whole.settings)
        out_full, lse_full = out_BHNd.transpose(1, 2), lse_BHN.transpose(1, 2).contiguous()
        if selected is not None:
            out_full = out_full.masked_fill(~selected.index_select(2, full)[..., None], 0)
        if len(full) == heads:
            return out_full.contiguous(), lse_full
    out_RD = q.new_zeros(rows * n * heads + 1, width)
    lse_R = torch.zeros(len(out_RD), dtype=computing_dtype(q))
    for bundle in _bundles(q, k, v, _taken_together(selected, full, q), visible, scale):
        out_USd, lse_US = _forward_of(bundle, q)
        bundle.taken.put(out_USd, out_RD)
        bundle.taken.put(lse_US, lse_R)
    out, lse = out_RD[:-1].view(q.shape), lse_R[:-1].view(q.shape[:3])
    if len(full):
        out.index_copy_(2, full, out_full)
        lse.index_copy_(2, full, lse_full)
    return out, lse


def _in_rows(x: Tensor) -> Tensor:
    """The fused form reads channels that lie beside each other, whatever the strides say."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _taken_together(selected: Tensor | None, full: Tensor, q: Tensor) -> Tensor:
    """[B, N, H] without the heads that are computed in full."""
    selected = torch.ones(q.shape[:3], dtype=torch.bool) if selected is None else selected
    return selected.index_fill(2, full, False)


def _selected_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    selected: Tensor | None,
    visible: Visible,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; those of keys and values are summed wide."""
    if uses_triton("attention", q, triton_faults(q, v, scale)):
        form = triton_form("attention")
        return form.selected_backward(d_out, q, k, v, out, lse, selected, visible, scale)
    d_out, q, k, v = (_in_rows(x) for x in (d_out, q, k, v))
    rows, n, heads, width = q.shape
    full = _heads_in_full(selected, visible, heads)
    if len(full):
        whole = _in_full(q, k, v, full, visible, scale)
        d_full, out_full, lse_full = (x if len(full) == heads else x.index_select(2, full) for x in (d_out, out, lse))
        if selected is not None:
            d_full = d_full.masked_fill(~selected.index_select(2, full)[..., None], 0)
        dq_full, dk_full, dv_full = (
            x.transpose(1, 2)
            for x in _FUSED_BACKWARD(
                d_full.transpose(1, 2),
                whole.q_BHNd,
                whole.k_BHMd,
                whole.v_BHMd,
                out_full.transpose(1, 2),
                lse_full.transpose(1, 2),
                **whole.settings,
            )
        )
        if len(full) == heads == k.shape[2]:
            return dq_full.contiguous(), dk_full.contiguous(), dv_full.contiguous()
    dq_RD = q.new_zeros(rows * n * heads + 1, width)
    dk, dv = (torch.zeros_like(x, dtype=computing_dtype(q), memory_format=torch.contiguous_format) for x in (k, v))
    for bundle in _bundles(q, k, v, _taken_together(selected, full, q), visible, scale):
        units, groups = bundle.taken.units, k.shape[2]
        d_keys = [_of_units(x, units) for x in (dk, dv)]
        bundle.taken.put(_backward_of(bundle, d_out, q, out, lse, *d_keys), dq_RD)
        if len(units) < rows * groups:
            for whole, d_some in zip((dk, dv), d_keys, strict=True):
                for unit, d_unit in zip(units.tolist(), d_some[0], strict=True):
                    whole[unit // groups, :, unit % groups] = d_unit
    dq = dq_RD[:-1].view(q.shape)
    if len(full):
        dq.index_copy_(2, full, dq_full)
        served_by = full // (heads // k.shape[2])
        dk.index_add_(2, served_by, dk_full.to(dk.dtype))
        dv.index_add_(2, served_by, dv_full.to(dv.dtype))
    return dq, dk.to(k.dtype), dv.to(v.dtype)


# ------------------------------------------------------------- as operators, into which a compiler does not look

_SIGHT = f"Tensor? selected, {VISIBLE_SCHEMA}, float scale"


def _selection(q: Tensor, k: Tensor, selected: Tensor | None, *rest: Any) -> tuple[Tensor | None, Visible, float]:
    *arguments, scale = rest
    return selected, Visible.from_arguments(q, k, *arguments), scale


def _define_selected_attention() -> None:
    """What is done depends on what is selected, which a compiler cannot know."""
    forward = torch.library.custom_op(
        "headway::selected_attention",
        lambda q, k, v, *rest: _selected_forward(q, k, v, *_selection(q, k, *rest)),
        mutates_args=(),
        schema=f"(Tensor q, Tensor k, Tensor v, {_SIGHT}) -> (Tensor, Tensor)",
    )
    backward = torch.library.custom_op(
        "headway::selected_attention_backward",
        lambda d_out, q, k, v, out, lse, *rest: _selected_backward(d_out, q, k, v, out, lse, *_selection(q, k, *rest)),
        mutates_args=(),
        schema=f"(Tensor d_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_SIGHT}) -> "
        "(Tensor, Tensor, Tensor)",
    )
    forward.register_fake(
        lambda q, k, v, *rest: (
            v.new_empty(*q.shape[:3], v.shape[3]),
            q.new_empty(q.shape[:3], dtype=computing_dtype(q)),
        )
    )
    backward.register_fake(
        lambda d_out, q, k, v, *rest: (q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape))
    )
    forward.register_autograd(_differentiate_selected, setup_context=_keep_selected)


def _keep_selected(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, selected, documents, key_documents, *ctx.settings = inputs
    ctx.save_for_backward(q, k, v, *output, selected, documents, key_documents)


def _differentiate_selected(ctx: Any, d_out: Tensor, d_lse: Tensor) -> tuple[Tensor | None, ...]:
    grads = torch.ops.headway.selected_attention_backward(d_out, *ctx.saved_tensors, *ctx.settings)
    return (*grads, *[None] * 7)


# An exported model carries this file with it. Where it is loaded beside Headway, or beside another export, the
# operators are there: to define them again would take them away from who has them.
if not hasattr(torch.ops.headway, "selected_attention"):
    _define_selected_attention()
