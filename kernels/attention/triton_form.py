"""Softmax attention of selected heads and sigmoid attention by Triton kernels: tables, launches, tile sizes.

Nothing here waits for the GPU: which queries are selected, and what they see, is found out and stays there. So all
programs are started that there could be, and those that have nothing to do return at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from kernels.attention.triton_backward import (
    attention_backward_keys,
    attention_backward_queries,
    attention_prepare,
)
from kernels.attention.triton_forward import attention_forward
from kernels.attention.triton_tables import LONGEST_TILE, Ranges, Selection, selection_of, table_length
from kernels.attention.visible import Visible
from kernels.dispatch import interpreting
from kernels.triton_launches import block_of, in_rows, on_their_gpu


class Tiles(NamedTuple):
    """Queries and keys of a tile, and how a program is run."""

    queries: int
    keys: int
    warps: int
    stages: int


FORWARD, QUERIES, KEYS = "forward", "queries", "keys"

TILES: dict[tuple[str, int], Tiles] = {
    (FORWARD, 16): Tiles(128, 128, 4, 3),
    (FORWARD, 32): Tiles(128, 128, 4, 3),
    (FORWARD, 64): Tiles(64, 64, 4, 3),
    (FORWARD, 128): Tiles(64, 64, 4, 3),
    (FORWARD, 256): Tiles(128, 32, 8, 3),
    (QUERIES, 16): Tiles(128, 64, 4, 3),
    (QUERIES, 32): Tiles(128, 64, 4, 3),
    (QUERIES, 64): Tiles(64, 32, 4, 3),
    (QUERIES, 128): Tiles(128, 128, 8, 2),
    (QUERIES, 256): Tiles(128, 32, 8, 2),
    (KEYS, 16): Tiles(64, 128, 4, 3),
    (KEYS, 32): Tiles(64, 128, 8, 3),
    (KEYS, 64): Tiles(32, 128, 4, 3),
    (KEYS, 128): Tiles(64, 64, 4, 2),
    (KEYS, 256): Tiles(32, 64, 8, 2),
}
"""By pass (forward, gradient of queries, gradients of keys and values) and padded head size, of 2-byte numbers."""

WIDE_TILES: dict[tuple[str, int], Tiles] = {
    (name, size): Tiles(32, 32, 8, 2) if size <= 128 else Tiles(16, 16, 8, 1)
    for name in (FORWARD, QUERIES, KEYS)
    for size in (16, 32, 64, 128, 256)
}
"""The same of float32."""

SMALL_TILES: dict[tuple[str, int], Tiles] = {
    (name, size): Tiles(64, 64, 4, 2) if size <= 64 else Tiles(64, 32, 4, 2) if size <= 128 else Tiles(32, 32, 4, 1)
    for name in (FORWARD, QUERIES, KEYS)
    for size in (16, 32, 64, 128, 256)
}
"""Of 2-byte numbers on GPUs older than Hopper, whose multiprocessors share less memory."""

INTERPRETED_TILES = Tiles(16, 32, 1, 1)
_PER_LOG2 = math.log2(math.e)


# -------------------------------------------------------------------------------------------- launches


@dataclass(frozen=True)
class _Problem:
    """What all passes are told.

    Attributes:
        offsets: for sigmoid weights float32 `[B or 1, N]` like `ranges.low`, to be added to scores in units of log 2.
        slopes: float32 `[H]`, in units of log 2.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    ranges: Ranges
    selection: Selection | None
    first_index: int
    scale: float
    offsets: Tensor | None = None
    slopes: Tensor | None = None

    @property
    def space(self) -> int:
        """Length of tables of queries."""
        return table_length(self.q.shape[1])

    @property
    def group(self) -> int:
        return self.q.shape[2] // self.k.shape[2]

    @property
    def sizes(self) -> dict[str, int]:
        d, e = self.q.shape[3], self.v.shape[3]
        return {"d": d, "D": block_of(d), "e": e, "E": block_of(e)}

    @property
    def switches(self) -> dict[str, Any]:
        return {
            "GROUP": self.group,
            "SELECTED": self.selection is not None,
            "SIGMOID": self.offsets is not None,
            "SLOPES": self.slopes is not None,
            "DOCUMENTS": self.ranges.ids is not None,
            "BOTH_SIDES": self.ranges.both_sides,
            "PRECISION": _precision(self.q),
        }

    def tiles(self, name: str) -> Tiles:
        if interpreting():
            return INTERPRETED_TILES
        table = TILES if torch.cuda.get_device_capability(self.q.device) >= (9, 0) else SMALL_TILES
        if self.q.dtype == torch.float32:
            table = WIDE_TILES
        return table[name, max(self.sizes["D"], self.sizes["E"])]

    def tables(self, *more: Tensor) -> tuple[Any, ...]:
        """In the order of the kernels' arguments; what there is none of is not read, whatever is in its place."""
        some = self.ranges.low
        index, before = self.selection or (some, some)
        seen = (self.ranges.low, self.ranges.high, *(x if x is not None else some for x in self._documents))
        return index, before, *more, *seen

    @property
    def _documents(self) -> tuple[Tensor | None, Tensor | None]:
        return self.ranges.ids, self.ranges.key_ids

    @property
    def weighing(self) -> tuple[Tensor, Tensor]:
        some = self.ranges.low
        return some if self.offsets is None else self.offsets, some if self.slopes is None else self.slopes

    @property
    def rising(self) -> Tensor:
        return self.ranges.low if self.ranges.rising is None else self.ranges.rising

    @property
    def numbers(self) -> tuple[Any, ...]:
        """Strides of tables, and what comes after them."""
        id_strides = (0 if x is None else x.shape[1] for x in self._documents)
        shape = (self.q.shape[1], self.space, self.k.shape[1], self.first_index, self.q.shape[2])
        return self.ranges.stride, *id_strides, *shape, self.scale * _PER_LOG2


def _forward(problem: _Problem) -> tuple[Tensor, Tensor]:
    """[B, N, H, e] and, of softmax, the logarithm of the sums [B, N, H]."""
    q, k, v = problem.q, problem.k, problem.v
    rows, n, heads = q.shape[:3]
    # Nobody writes what is not selected.
    make = torch.empty if problem.selection is None else torch.zeros
    out = make(rows, n, heads, v.shape[3], dtype=v.dtype, device=v.device)
    softmax = problem.offsets is None
    lse = make(rows, n, heads if softmax else 0, dtype=torch.float32, device=v.device)
    tiles = problem.tiles(FORWARD)
    attention_forward[triton.cdiv(n, tiles.queries), heads, rows](
        q,
        k,
        v,
        out,
        lse,
        *problem.tables(),
        problem.rising,
        *problem.weighing,
        *_strides(q, k, v),
        *problem.numbers,
        **problem.sizes,
        **problem.switches,
        **_options(tiles),
    )
    return out, lse


def _backward(problem: _Problem, d_out: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    q, k, v = problem.q, problem.k, problem.v
    rows, n, heads = q.shape[:3]
    prepared = _prepare(problem, d_out, out, lse)
    make = torch.empty if problem.selection is None else torch.zeros
    dq = make(q.shape, dtype=q.dtype, device=q.device)
    dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
    given = (prepared.q, k, v, prepared.d_out, prepared.lse, prepared.delta)
    strides = (*_by_head(prepared.q), *_by_head(prepared.d_out), *_strides(k, v))
    common = problem.sizes | problem.switches
    tiles = problem.tiles(QUERIES)
    attention_backward_queries[triton.cdiv(n, tiles.queries), heads, rows](
        *given,
        dq,
        *problem.tables(),
        problem.rising,
        *problem.weighing,
        *strides,
        *problem.numbers,
        problem.scale,
        **common,
        **_options(tiles),
    )
    tiles = problem.tiles(KEYS)
    bounds = problem.ranges.bounds(k.shape[1], tiles.keys)
    attention_backward_keys[triton.cdiv(k.shape[1], tiles.keys), k.shape[2], rows](
        *given,
        dk,
        dv,
        *problem.tables(bounds),
        *problem.weighing,
        *strides,
        0 if bounds.shape[0] == 1 else bounds.stride(0),
        *problem.numbers,
        problem.scale,
        **common,
        BOUNDED=problem.selection is None and n % tiles.queries > 0,
        **_options(tiles),
    )
    return dq, dk, dv


class _Prepared(NamedTuple):
    """q and d_out as `[B, H, N, d]`, or packed, with selected rows first, `[B, H, space, d]`; statistics
    `[B, H, space]`, of softmax alone."""

    q: Tensor
    d_out: Tensor
    lse: Tensor
    delta: Tensor


def _prepare(problem: _Problem, d_out: Tensor, out: Tensor, lse: Tensor) -> _Prepared:
    q, selection, softmax = problem.q, problem.selection, problem.offsets is None
    rows, n, heads = q.shape[:3]
    # Rows beyond those that are selected stay as they are, and nobody reads them.
    packed = [
        x.transpose(1, 2) if selection is None else x.new_empty(rows, heads, problem.space, x.shape[3])
        for x in (q, d_out)
    ]
    statistics = torch.empty(2, rows, heads, problem.space if softmax else 0, dtype=torch.float32, device=q.device)
    prepared = _Prepared(*packed, *statistics)
    if selection is None and not softmax:
        return prepared
    switches = {name: problem.switches[name] for name in ("SELECTED", "SIGMOID")}
    attention_prepare[triton.cdiv(n, LONGEST_TILE), heads, rows](
        q,
        d_out,
        out,
        lse,
        *prepared,
        *problem.tables()[:2],
        *_strides(q, d_out, out),
        n,
        problem.space,
        heads,
        **problem.sizes,
        QUERIES=LONGEST_TILE,
        **switches,
    )
    return prepared


def _strides(*some: Tensor) -> list[int]:
    """Of rows, tokens and heads of `[B, N, H, d]`."""
    return [stride for x in some for stride in x.stride()[:3]]


def _by_head(x_BHNd: Tensor) -> tuple[int, int, int]:
    """The same of `[B, H, N, d]`."""
    row, head, token, _ = x_BHNd.stride()
    return row, token, head


def _options(tiles: Tiles) -> dict[str, int]:
    return {"QUERIES": tiles.queries, "KEYS": tiles.keys, "num_warps": tiles.warps, "num_stages": tiles.stages}


def _precision(x: Tensor) -> str:
    wide = x.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    return "ieee" if wide or interpreting() else "tf32"


# ------------------------------------------------------------------------------------------ the two weights


@on_their_gpu
def selected_forward(
    q_BNHd: Tensor, k_BMGd: Tensor, v_BMGe: Tensor, selected_BNH: Tensor | None, visible: Visible, scale: float
) -> tuple[Tensor, Tensor]:
    """Softmax attention of selected heads.

    Args:
        q_BNHd, k_BMGd, v_BMGe: float32, bfloat16 or float16; d and e up to 256.
        selected_BNH: bool; None: all.
        scale: above 0.

    Returns:
        `[B, N, H, e]`, and the logarithm of the sums of weights, float32 `[B, N, H]`: both 0 where nothing is selected
        or seen.
    """
    return _forward(_softmax(q_BNHd, k_BMGd, v_BMGe, selected_BNH, visible, scale))


@on_their_gpu
def selected_backward(
    d_out: Tensor,
    q_BNHd: Tensor,
    k_BMGd: Tensor,
    v_BMGe: Tensor,
    out: Tensor,
    lse: Tensor,
    selected_BNH: Tensor | None,
    visible: Visible,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, from what `selected_forward` was given and returned."""
    problem = _softmax(q_BNHd, k_BMGd, v_BMGe, selected_BNH, visible, scale)
    return _backward(problem, in_rows(d_out), in_rows(out), lse.contiguous())


def _softmax(q: Tensor, k: Tensor, v: Tensor, selected: Tensor | None, visible: Visible, scale: float) -> _Problem:
    selection = None if selected is None else selection_of(selected)
    ranges = Ranges.of(visible, q.device)
    return _Problem(in_rows(q), in_rows(k), in_rows(v), ranges, selection, visible.first_index, scale)


@on_their_gpu
def sigmoid_forward(
    q_BNHd: Tensor,
    k_BMGd: Tensor,
    v_BMGe: Tensor,
    visible: Visible,
    slopes_H: Tensor | None,
    scale: float,
    bias: float,
    per_row: bool,
) -> Tensor:
    """`kernels.attention.sigmoid.sigmoid_attention`: `[B, N, H, e]`; d and e up to 256."""
    return _forward(_sigmoid(q_BNHd, k_BMGd, v_BMGe, visible, slopes_H, scale, bias, per_row))[0]


@on_their_gpu
def sigmoid_backward(
    d_out: Tensor,
    q_BNHd: Tensor,
    k_BMGd: Tensor,
    v_BMGe: Tensor,
    visible: Visible,
    slopes_H: Tensor | None,
    scale: float,
    bias: float,
    per_row: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    d_out = in_rows(d_out)
    return _backward(_sigmoid(q_BNHd, k_BMGd, v_BMGe, visible, slopes_H, scale, bias, per_row), d_out, d_out, d_out)


def _sigmoid(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Visible,
    slopes: Tensor | None,
    scale: float,
    bias: float,
    per_row: bool,
) -> _Problem:
    ranges = Ranges.of(visible, q.device)
    offsets = torch.full_like(ranges.low, bias, dtype=torch.float32)
    if per_row:
        offsets = offsets - ranges.counts().clamp(min=1).float().log()
    if slopes is not None:
        slopes = slopes.float() * _PER_LOG2
    q, k, v = (in_rows(x) for x in (q, k, v))
    return _Problem(q, k, v, ranges, None, visible.first_index, scale, offsets * _PER_LOG2, slopes)
