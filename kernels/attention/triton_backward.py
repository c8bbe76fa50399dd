"""Attention in tiles: gradients, of queries and of keys with values, each summed by one program.

What they are told is explained in `kernels/attention/triton_tiles.py`.
"""

import triton
import triton.language as tl

from kernels.attention.triton_tiles import key_ranges, put_rows, queries_of, seen_pairs, sigmoid_weights, tile_of


@triton.jit
def attention_prepare(
    q_ptr,
    d_out_ptr,
    out_ptr,
    lse_ptr,
    packed_q,
    packed_d_out,
    packed_lse,
    delta_ptr,
    index,
    before,
    q_row,
    q_query,
    q_head,
    d_row,
    d_query,
    d_head,
    out_row,
    out_query,
    out_head,
    num_queries,
    space,
    heads,
    d: tl.constexpr,
    D: tl.constexpr,
    e: tl.constexpr,
    E: tl.constexpr,
    QUERIES: tl.constexpr,
    SELECTED: tl.constexpr,
    SIGMOID: tl.constexpr,
):
    """By head, rows beside each other: <d_out, out> and the logarithm of the sums, to base 2; selected q and d_out.

    The last rows of a head are followed by zeros to the end of their block, `space` rows at most. They add nothing to
    what is summed over rows: so sums need no mask there.
    """
    head = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    which = row * heads + head
    count = num_queries
    if SELECTED:
        count = tl.load(before + which * (num_queries + 1) + num_queries)
    first = tl.program_id(0) * QUERIES
    if first >= count:
        return
    rows = first + tl.arange(0, QUERIES)
    within = rows < count
    queries = queries_of(rows, index + which * space, SELECTED).to(tl.int64)
    channels = tl.arange(0, D)
    value_channels = tl.arange(0, E)
    there = within[:, None] & (value_channels < e)[None, :]
    d_out_rows = d_out_ptr + row * d_row + head * d_head + queries[:, None] * d_query
    d_out = tl.load(d_out_rows + value_channels[None, :], mask=there, other=0.0)
    if not SIGMOID:
        out_rows = out_ptr + row * out_row + head * out_head + queries[:, None] * out_query
        out = tl.load(out_rows + value_channels[None, :], mask=there, other=0.0)
        delta = tl.sum(out.to(tl.float32) * d_out.to(tl.float32), 1)
        tl.store(delta_ptr + which * space + rows, delta)
        lse = tl.load(lse_ptr + (row * num_queries + queries) * heads + head, mask=within, other=0.0)
        tl.store(packed_lse + which * space + rows, lse * 1.4426950408889634)
    if SELECTED:
        everywhere = rows < space
        put_rows(packed_d_out + which * space * e, d_out, rows, value_channels, e, everywhere, e)
        q_rows = q_ptr + row * q_row + head * q_head + queries[:, None] * q_query
        q = tl.load(q_rows + channels[None, :], mask=within[:, None] & (channels < d)[None, :], other=0.0)
        put_rows(packed_q + which * space * d, q, rows, channels, d, everywhere, d)


@triton.jit
def _backward_keys(
    dq,
    q,
    d_out,
    lse,
    delta,
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
    """Add to the gradient of queries what comes through the keys first .. end - 1."""
    near = tl.arange(0, KEYS)
    channels = tl.arange(0, D)
    value_channels = tl.arange(0, E)
    for start in range(first, end, KEYS):
        k = tile_of(k_base, start, near, channels, k_stride, num_keys, d, D, MASKED)
        v = tile_of(v_base, start, near, value_channels, v_stride, num_keys, e, E, MASKED)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        d_weights = tl.dot(d_out, tl.trans(v), input_precision=PRECISION)
        keys = (start + near)[None, :]
        if SIGMOID:
            weights = sigmoid_weights(scores, keys, places[:, None], offset[:, None], slope, scale, SLOPES)
            d_scores = weights * (1.0 - weights) * d_weights
        else:
            weights = tl.exp2(scores * scale - lse[:, None])
            d_scores = weights * (d_weights - delta[:, None])
        if MASKED:
            of_keys = ids
            if DOCUMENTS:
                of_keys = tl.load(key_ids + start + near, mask=start + near < num_keys, other=0)
            seen = seen_pairs(keys, low[:, None], high[:, None], of_keys[None, :], ids[:, None], DOCUMENTS)
            d_scores = tl.where(seen, d_scores, 0.0)
        dq = tl.dot(d_scores.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit
def attention_backward_queries(
    q_ptr,
    k_ptr,
    v_ptr,
    d_out_ptr,
    lse_ptr,
    delta_ptr,
    dq_ptr,
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
    d_row,
    d_query,
    d_head,
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
    d_scale,
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
    """Gradient of one tile of queries of one head. q and d_out by row of the head, what is written by query."""
    head = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    which = row * heads + head
    count = num_queries
    if SELECTED:
        count = tl.load(before + which * (num_queries + 1) + num_queries)
    first = (tl.cdiv(count, QUERIES) - 1 - tl.program_id(0)) * QUERIES
    if first < 0:
        return
    index += which * space
    local = tl.arange(0, QUERIES)
    rows = first + local
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
    lse = tl.zeros([QUERIES], tl.float32)
    delta = tl.zeros([QUERIES], tl.float32)
    offset = tl.zeros([QUERIES], tl.float32)
    if SIGMOID:
        offset = tl.load(offsets + row * range_row + queries)
    else:
        lse = tl.load(lse_ptr + which * space + rows, mask=within, other=0.0)
        delta = tl.load(delta_ptr + which * space + rows, mask=within, other=0.0)
    slope = 0.0
    if SLOPES:
        slope = tl.load(slopes + head)

    channels = tl.arange(0, D)
    value_channels = tl.arange(0, E)
    q = tile_of(q_ptr + row * q_row + head * q_head, first, local, channels, q_query, count, d, D, True)
    d_out = tile_of(d_out_ptr + row * d_row + head * d_head, first, local, value_channels, d_query, count, e, E, True)
    k_base = k_ptr + row * k_row + (head // GROUP) * k_group
    v_base = v_ptr + row * v_row + (head // GROUP) * v_group
    dq = tl.zeros([QUERIES, D], tl.float32)
    begin, clear, clear_end, end = key_ranges(lows, highs, rising + row, first_query, last_query, KEYS, DOCUMENTS)
    if BOTH_SIDES:
        dq = _backward_keys(
            dq, q, d_out, lse, delta, k_base, v_base, k_key, v_key, begin, clear, num_keys, low, high, ids, key_ids,
            places, offset, slope, scale, d, D, e, E, KEYS, SIGMOID, SLOPES, DOCUMENTS, True, PRECISION,
        )  # fmt: skip
    dq = _backward_keys(
        dq, q, d_out, lse, delta, k_base, v_base, k_key, v_key, clear, clear_end, num_keys, low, high, ids, key_ids,
        places, offset, slope, scale, d, D, e, E, KEYS, SIGMOID, SLOPES, DOCUMENTS, False, PRECISION,
    )  # fmt: skip
    dq = _backward_keys(
        dq, q, d_out, lse, delta, k_base, v_base, k_key, v_key, clear_end, end, num_keys, low, high, ids, key_ids,
        places, offset, slope, scale, d, D, e, E, KEYS, SIGMOID, SLOPES, DOCUMENTS, True, PRECISION,
    )  # fmt: skip
    dq_base = dq_ptr + (row * num_queries * heads + head) * d
    put_rows(dq_base, dq * d_scale, queries, channels, heads * d, within, d)


@triton.jit
def _backward_rows(
    dk,
    dv,
    k,
    v,
    keys,
    of_keys,
    q_base,
    d_base,
    q_stride,
    d_stride,
    lse_base,
    delta_base,
    first,
    end,
    count,
    index,
    lows,
    highs,
    ids_ptr,
    offsets,
    first_index,
    slope,
    scale,
    d: tl.constexpr,
    D: tl.constexpr,
    e: tl.constexpr,
    E: tl.constexpr,
    QUERIES: tl.constexpr,
    SELECTED: tl.constexpr,
    SIGMOID: tl.constexpr,
    SLOPES: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    BOUNDED: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add to the gradients of keys and values what comes through tiles first .. end - 1 of rows of a head."""
    local = tl.arange(0, QUERIES)
    channels = tl.arange(0, D)
    value_channels = tl.arange(0, E)
    for tile in range(first, end):
        start = tile * QUERIES
        rows = start + local
        q = tile_of(q_base, start, local, channels, q_stride, count, d, D, BOUNDED)
        d_out = tile_of(d_base, start, local, value_channels, d_stride, count, e, E, BOUNDED)
        # Keys come first, so that weights are ready as the left side of the products that follow.
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        d_weights = tl.dot(v, tl.trans(d_out), input_precision=PRECISION)
        if MASKED or SIGMOID:
            queries = queries_of(rows, index, SELECTED)
        if SIGMOID:
            offset = tl.load(offsets + queries)
            places = (queries + first_index)[None, :]
            weights = sigmoid_weights(scores, keys[:, None], places, offset[None, :], slope, scale, SLOPES)
            d_scores = weights * (1.0 - weights) * d_weights
        else:
            lse = tl.load(lse_base + rows)
            delta = tl.load(delta_base + rows)
            weights = tl.exp2(scores * scale - lse[None, :])
            d_scores = weights * (d_weights - delta[None, :])
        if MASKED:
            low = tl.load(lows + queries)
            high = tl.load(highs + queries)
            ids = low
            if DOCUMENTS:
                ids = tl.load(ids_ptr + queries)
            seen = seen_pairs(keys[:, None], low[None, :], high[None, :], of_keys[:, None], ids[None, :], DOCUMENTS)
            weights = tl.where(seen, weights, 0.0)
            d_scores = tl.where(seen, d_scores, 0.0)
        dv = tl.dot(weights.to(d_out.dtype), d_out, dv, input_precision=PRECISION)
        dk = tl.dot(d_scores.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def attention_backward_keys(
    q_ptr,
    k_ptr,
    v_ptr,
    d_out_ptr,
    lse_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    index,
    before,
    bounds,
    lows,
    highs,
    ids_ptr,
    key_ids,
    offsets,
    slopes,
    q_row,
    q_query,
    q_head,
    d_row,
    d_query,
    d_head,
    k_row,
    k_key,
    k_group,
    v_row,
    v_key,
    v_group,
    bounds_row,
    range_row,
    id_row,
    key_id_row,
    num_queries,
    space,
    num_keys,
    first_index,
    heads,
    scale,
    d_scale,
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
    BOUNDED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of one tile of keys and values of one head of keys, through all the heads of queries that it serves."""
    group = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    first_key = tl.program_id(0) * KEYS
    local = tl.arange(0, KEYS)
    channels = tl.arange(0, D)
    value_channels = tl.arange(0, E)
    k = tile_of(k_ptr + row * k_row + group * k_group, first_key, local, channels, k_key, num_keys, d, D, True)
    v = tile_of(v_ptr + row * v_row + group * v_group, first_key, local, value_channels, v_key, num_keys, e, E, True)
    keys = first_key + local
    of_keys = keys
    if DOCUMENTS:
        of_keys = tl.load(key_ids + row * key_id_row + keys, mask=keys < num_keys, other=0)
    # Queries that see one of the keys, and those of them that see all.
    bounds += row * bounds_row + tl.program_id(0) * 4
    first_query = tl.load(bounds)
    clear_query = tl.load(bounds + 1)
    clear_end_query = tl.load(bounds + 2)
    end_query = tl.load(bounds + 3)
    lows += row * range_row
    highs += row * range_row
    offsets += row * range_row
    ids_ptr += row * id_row
    dk = tl.zeros([KEYS, D], tl.float32)
    dv = tl.zeros([KEYS, E], tl.float32)
    for member in range(GROUP):
        head = group * GROUP + member
        which = row * heads + head
        begin, clear, clear_end, end, count = first_query, clear_query, clear_end_query, end_query, num_queries
        if SELECTED:
            of_head = before + which * (num_queries + 1)
            begin = tl.load(of_head + first_query)
            clear = tl.load(of_head + clear_query)
            clear_end = tl.load(of_head + clear_end_query)
            end = tl.load(of_head + end_query)
            count = tl.load(of_head + num_queries)
        # Whole tiles, so that rows are where memory is aligned. Beyond the last row there are zeros.
        begin = begin // QUERIES
        end = tl.cdiv(end, QUERIES)
        clear = tl.maximum(tl.minimum(tl.cdiv(clear, QUERIES), end), begin)
        clear_end = tl.maximum(clear_end // QUERIES, clear) if BOTH_SIDES else end
        slope = 0.0
        if SLOPES:
            slope = tl.load(slopes + head)
        q_base = q_ptr + row * q_row + head * q_head
        d_base = d_out_ptr + row * d_row + head * d_head
        lse_base = lse_ptr + which * space
        delta_base = delta_ptr + which * space
        of_rows = index + which * space
        dk, dv = _backward_rows(
            dk, dv, k, v, keys, of_keys, q_base, d_base, q_query, d_query, lse_base, delta_base, begin, clear, count,
            of_rows, lows, highs, ids_ptr, offsets, first_index, slope, scale,
            d, D, e, E, QUERIES, SELECTED, SIGMOID, SLOPES, DOCUMENTS, BOUNDED, True, PRECISION,
        )  # fmt: skip
        dk, dv = _backward_rows(
            dk, dv, k, v, keys, of_keys, q_base, d_base, q_query, d_query, lse_base, delta_base, clear, clear_end,
            count, of_rows, lows, highs, ids_ptr, offsets, first_index, slope, scale,
            d, D, e, E, QUERIES, SELECTED, SIGMOID, SLOPES, DOCUMENTS, BOUNDED, False, PRECISION,
        )  # fmt: skip
        if BOTH_SIDES:
            dk, dv = _backward_rows(
                dk, dv, k, v, keys, of_keys, q_base, d_base, q_query, d_query, lse_base, delta_base, clear_end, end,
                count, of_rows, lows, highs, ids_ptr, offsets, first_index, slope, scale,
                d, D, e, E, QUERIES, SELECTED, SIGMOID, SLOPES, DOCUMENTS, BOUNDED, True, PRECISION,
            )  # fmt: skip
    there = keys < num_keys
    groups = heads // GROUP
    dk_base = dk_ptr + (row * num_keys * groups + group) * d
    dv_base = dv_ptr + (row * num_keys * groups + group) * e
    put_rows(dk_base, dk * d_scale, keys, channels, groups * d, there, d)
    put_rows(dv_base, dv, keys, value_channels, groups * e, there, e)
