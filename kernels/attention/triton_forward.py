"""Attention in tiles: the forward pass. What it is told is explained in `kernels/attention/triton_tiles.py`."""

import triton
import triton.language as tl

from kernels.attention.triton_tiles import key_ranges, put_rows, queries_of, seen_pairs, sigmoid_weights, tile_of


@triton.jit
def _forward_keys(
    acc,
    largest,
    total,
    q,
    k_base,
    v_base,
    k_stride,
    v_stride,
    first,
    end,
    num_keys,
    low,
    high,
    ids,
    key_ids,
    places,
    offset,
    slope,
    scale,
    d: tl.constexpr,
    D: tl.constexpr,
    e: tl.constexpr,
    E: tl.constexpr,
    KEYS: tl.constexpr,
    SIGMOID: tl.constexpr,
    SLOPES: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add the keys first .. end - 1 to sums `acc` of values; `largest` score and `total` of weights, in powers of 2."""
    near = tl.arange(0, KEYS)
    channels = tl.arange(0, D)
    value_channels = tl.arange(0, E)
    for start in range(first, end, KEYS):
        k = tile_of(k_base, start, near, channels, k_stride, num_keys, d, D, MASKED)
        v = tile_of(v_base, start, near, value_channels, v_stride, num_keys, e, E, MASKED)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        keys = (start + near)[None, :]
        if MASKED:
            of_keys = ids
            if DOCUMENTS:
                of_keys = tl.load(key_ids + start + near, mask=start + near < num_keys, other=0)
            seen = seen_pairs(keys, low[:, None], high[:, None], of_keys[None, :], ids[:, None], DOCUMENTS)
        if SIGMOID:
            weights = sigmoid_weights(scores, keys, places[:, None], offset[:, None], slope, scale, SLOPES)
            if MASKED:
                weights = tl.where(seen, weights, 0.0)
        else:
            if MASKED:
                scores = tl.where(seen, scores, float("-inf"))
            highest = tl.maximum(largest, tl.max(scores, 1) * scale)
            shift = highest
            if MASKED:
                # A row may not have seen anything yet.
                shift = tl.where(highest == float("-inf"), 0.0, highest)
            weights = tl.exp2(scores * scale - shift[:, None])
            kept = tl.exp2(largest - shift)
            total = total * kept + tl.sum(weights, 1)
            acc = acc * kept[:, None]
            largest = highest
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=PRECISION)
    return acc, largest, total


@triton.jit
def attention_forward(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    index,
    before,
    lows,
    highs,
    ids_ptr,
    key_ids,
    rising,
    offsets,
    slopes,
    q_row,
    q_query,
    q_head,
    k_row,
    k_key,
    k_group,
    v_row,
    v_key,
    v_group,
    range_row,
    id_row,
    key_id_row,
    num_queries,
    space,
    num_keys,
    first_index,
    heads,
    scale,
    GROUP: tl.constexpr,
    d: tl.constexpr,
    D: tl.constexpr,
    e: tl.constexpr,
    E: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    SELECTED: tl.constexpr,
    SIGMOID: tl.constexpr,
    SLOPES: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    BOTH_SIDES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of queries of one head: out `[B, N, H, e]`, and for softmax the logarithm of the sums `[B, N, H]`."""
    head = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    which = row * heads + head
    count = num_queries
    if SELECTED:
        count = tl.load(before + which * (num_queries + 1) + num_queries)
    # The last see most, and begin first.
    first = (tl.cdiv(count, QUERIES) - 1 - tl.program_id(0)) * QUERIES
    if first < 0:
        return
    index += which * space
    rows = first + tl.arange(0, QUERIES)
    queries = queries_of(rows, index, SELECTED)
    within = rows < count
    first_query = first
    last_query = tl.minimum(first + QUERIES, count) - 1
    if SELECTED:
        last_query = tl.load(index + last_query)
        first_query = tl.load(index + first)

    lows += row * range_row
    highs += row * range_row
    low = tl.load(lows + queries)
    high = tl.load(highs + queries)
    places = queries + first_index
    ids = places
    if DOCUMENTS:
        ids = tl.load(ids_ptr + row * id_row + queries)
        key_ids += row * key_id_row
    offset = tl.zeros([QUERIES], tl.float32)
    if SIGMOID:
        offset = tl.load(offsets + row * range_row + queries)
    slope = 0.0
    if SLOPES:
        slope = tl.load(slopes + head)

    channels = tl.arange(0, D)
    value_channels = tl.arange(0, E)
    q_rows = q_ptr + row * q_row + head * q_head + queries.to(tl.int64)[:, None] * q_query
    q = tl.load(q_rows + channels[None, :], mask=within[:, None] & (channels < d)[None, :], other=0.0)
    k_base = k_ptr + row * k_row + (head // GROUP) * k_group
    v_base = v_ptr + row * v_row + (head // GROUP) * v_group
    acc = tl.zeros([QUERIES, E], tl.float32)
    largest = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    begin, clear, clear_end, end = key_ranges(lows, highs, rising + row, first_query, last_query, KEYS, DOCUMENTS)
    if BOTH_SIDES:
        acc, largest, total = _forward_keys(
            acc, largest, total, q, k_base, v_base, k_key, v_key, begin, clear, num_keys, low, high, ids, key_ids,
            places, offset, slope, scale, d, D, e, E, KEYS, SIGMOID, SLOPES, DOCUMENTS, True, PRECISION,
        )  # fmt: skip
    acc, largest, total = _forward_keys(
        acc, largest, total, q, k_base, v_base, k_key, v_key, clear, clear_end, num_keys, low, high, ids, key_ids,
        places, offset, slope, scale, d, D, e, E, KEYS, SIGMOID, SLOPES, DOCUMENTS, False, PRECISION,
    )  # fmt: skip
    acc, largest, total = _forward_keys(
        acc, largest, total, q, k_base, v_base, k_key, v_key, clear_end, end, num_keys, low, high, ids, key_ids,
        places, offset, slope, scale, d, D, e, E, KEYS, SIGMOID, SLOPES, DOCUMENTS, True, PRECISION,
    )  # fmt: skip

    if not SIGMOID:
        nothing = total == 0.0
        total = tl.where(nothing, 1.0, total)
        acc = acc / total[:, None]
        lse = tl.where(nothing, 0.0, (largest + tl.log2(total)) * 0.6931471805599453)
        tl.store(lse_ptr + (row * num_queries + queries) * heads + head, lse, mask=within)
    out_base = out_ptr + (row * num_queries * heads + head) * e
    put_rows(out_base, acc, queries, value_channels, heads * e, within, e)
