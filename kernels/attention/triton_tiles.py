"""Attention in tiles, for GPUs: softmax and sigmoid weights, of all queries or of those that a head is asked for.

What a query sees is a range of keys, `low` to `high - 1`, and both rise from query to query: so causal attention, a
window, documents and an offset of the queries are one thing here. Tiles that a range covers in full are computed
without a mask, those that it does not touch not at all. Where documents do not follow each other (`rising` is 0) their
ids are compared, and every tile has a mask.

The selected queries of a head are rows 0, 1, ... of a shorter matrix. `index[b, h, r]` says which query row r is, and
`before[b, h, n]` how many of the queries 0 .. n - 1 are selected. What there is for each query or row, `index` and
ranges and more, is `space` long, which a tile divides and which is more than there are queries: what follows them sees
nothing. So tables need no masks, which would keep neighbours from being loaded together.

Sums are float32, and there are no atomics.

Source: arXiv 2205.14135 and 2307.08691 (tiles, and sums that are rescaled); arXiv 2409.04431 (sigmoid weights).
"""

import triton
import triton.language as tl


@triton.jit
def tile_of(base, first, rows, columns, stride, end, WIDTH: tl.constexpr, PADDED: tl.constexpr, BOUNDED: tl.constexpr):
    """Rows first + `rows` of a matrix; zeros beyond its columns, and where BOUNDED beyond its rows."""
    # A product of the first row and the stride may need 64 bits, one within a tile does not.
    pointers = base + tl.cast(first, tl.int64) * stride + (rows[:, None] * stride + columns[None, :])
    if BOUNDED:
        within = ((first + rows >= 0) & (first + rows < end))[:, None]
        if WIDTH < PADDED:
            within = within & (columns < WIDTH)[None, :]
        tile = tl.load(pointers, mask=within, other=0.0)
    elif WIDTH < PADDED:
        tile = tl.load(pointers, mask=(columns < WIDTH)[None, :], other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def put_rows(base, tile, rows, columns, stride, within, WIDTH: tl.constexpr):
    """Write rows of a matrix, which need not be neighbours."""
    pointers = base + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=within[:, None] & (columns < WIDTH)[None, :])


@triton.jit
def sigmoid_weights(scores, keys, places, offset, slope, scale, SLOPES: tl.constexpr):
    """1 / (1 + 2^-x); scale, offset and slope are in units of log 2. Not by tanh, which rounds small weights away."""
    x = scores * scale + offset
    if SLOPES:
        # Exact up to 2^24 tokens, and converted before there is one for each pair.
        x -= slope * tl.abs(places.to(tl.float32) - keys.to(tl.float32))
    return 1.0 / (1.0 + tl.exp2(-x))


@triton.jit
def seen_pairs(keys, low, high, key_ids, ids, DOCUMENTS: tl.constexpr):
    seen = (keys >= low) & (keys < high)
    if DOCUMENTS:
        seen = seen & (key_ids == ids)
    return seen


@triton.jit
def queries_of(rows, index, SELECTED: tl.constexpr):
    """Which queries these rows are; beyond the last one that there is none of, for which tables have an entry too."""
    queries = rows
    if SELECTED:
        queries = tl.load(index + rows)
    return queries


@triton.jit
def key_ranges(lows, highs, rising, first_query, last_query, KEYS: tl.constexpr, DOCUMENTS: tl.constexpr):
    """Of a tile of queries: the first key that one sees, the first and end of those that all see, the end.

    The two between are at bounds of tiles of keys.
    """
    begin = tl.load(lows + first_query) // KEYS * KEYS
    end = tl.load(highs + last_query)
    clear = tl.cdiv(tl.load(lows + last_query), KEYS) * KEYS
    clear_end = tl.load(highs + first_query) // KEYS * KEYS
    if DOCUMENTS:
        risen = tl.load(rising) != 0
        clear = tl.where(risen, clear, begin)
        clear_end = tl.where(risen, clear_end, begin)
    clear = tl.maximum(tl.minimum(clear, end), begin)
    return begin, clear, tl.maximum(clear_end, clear), end
