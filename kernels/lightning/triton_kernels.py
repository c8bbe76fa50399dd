"""Lightning attention as two Triton kernels, of which forward and backward are both made.

The sequence is cut into T chunks of C tokens. `states_kernel` sums up what stands at the edges of chunks, and
`outputs_kernel` then works on all chunks at once:

    S_t   = lambda^C S_{t-1} + sum over the rows r of chunk t of w_r x_r^T y_r
    out_r = w_r x_r S_t + sum over the rows c of the chunk that r sees of lambda^|r - c| (x_r . y_c) z_c

Forward takes S from (k, v) and out from (q, k, v, S). The derivative is the same two sums, forwards for q and backwards
in time for k and v: with dS from (q, dO),

    dq from (dO, v, k, S^T);    dk from (v, dO, q, dS^T);    dv from (k, q, dO, dS).

Operands of products have the dtype of q, k and v, sums are float32, and no exponent is positive. Nothing is added up by
atomics: the same inputs give the same bits.

Sources: arXiv 2405.17381 App. B (Alg. 5 and 6). arXiv 2401.04658 has a loop over chunks where these are two passes.
"""

import triton
import triton.language as tl


@triton.jit
def _edge_document(documents, row_of_batch, token, length):
    """Document that is open at the edge before a token: that of the token before it, or of the first."""
    return tl.load(documents + row_of_batch * length + tl.maximum(token - 1, 0))


@triton.jit
def _carried(log2_decay, documents, row_of_batch, first, end, length, PACKED: tl.constexpr):
    """What is left at the edge before token `end` of what stood at the edge before token `first`."""
    left = tl.exp2(log2_decay * (end - first).to(tl.float32))
    if PACKED:
        before = _edge_document(documents, row_of_batch, first, length)
        after = _edge_document(documents, row_of_batch, end, length)
        left = tl.where(before == after, left, 0.0)
    return left


@triton.jit
def states_kernel(
    x, y, slopes, documents, carry, totals, states, last,
    length, num_heads, num_segments, chunks_a_segment,
    x_row, x_token, x_head, y_row, y_token, y_head,
    D: tl.constexpr, E: tl.constexpr, C: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    PACKED: tl.constexpr, HAS_CARRY: tl.constexpr, BACKWARDS: tl.constexpr, TOTALS_ONLY: tl.constexpr,
    HAS_TOTALS: tl.constexpr, KEEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block [d, e] of the states of one head, over one segment of chunks, one chunk after the other.

    Grid: (blocks of d times blocks of e, segments, B * H). x [B, N, H, d] and y [B, N, H, e] by their strides; carry
    and last [B, H, d, e], totals [B, H, G, d, e], float32; states [B, H, T, d, e]; documents int32 [B, N].

    Forwards, the state before each chunk is written, from x = k and y = v, beginning with `carry`; BACKWARDS, the
    cotangent of the state after each chunk, from x = q and y = dO. TOTALS_ONLY: what the segment adds, to `totals`
    and nothing else; HAS_TOTALS: begin with what the segments before (after) this one have added. Without KEEP, only
    `last` is written.
    """
    block, segment, head_of_row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    row_of_batch, head = head_of_row // num_heads, head_of_row % num_heads
    blocks_e: tl.constexpr = (E + BLOCK_E - 1) // BLOCK_E
    d = (block // blocks_e) * BLOCK_D + tl.arange(0, BLOCK_D)
    e = (block % blocks_e) * BLOCK_E + tl.arange(0, BLOCK_E)
    within = (d < D)[:, None] & (e < E)[None, :]
    place = d[:, None] * E + e[None, :]
    log2_decay = tl.load(slopes + head).to(tl.float32) * -1.4426950408889634
    num_chunks = (length + C - 1) // C
    tokens_a_segment = chunks_a_segment * C

    state = tl.zeros([BLOCK_D, BLOCK_E], tl.float32)
    if HAS_CARRY:
        state += tl.load(carry + head_of_row * D * E + place, mask=within, other=0.0).to(tl.float32)
    if HAS_TOTALS:
        between = num_segments - 1 - segment if BACKWARDS else segment
        for other in range(between):
            number = num_segments - 1 - other if BACKWARDS else other
            first = tl.minimum(number * tokens_a_segment, length)
            end = tl.minimum(first + tokens_a_segment, length)
            left = _carried(log2_decay, documents, row_of_batch, first, end, length, PACKED)
            of_segment = totals + (head_of_row * num_segments + number) * D * E
            state = state * left + tl.load(of_segment + place, mask=within, other=0.0)

    x += row_of_batch * x_row + head * x_head
    y += row_of_batch * y_row + head * y_head
    states += head_of_row * num_chunks * D * E
    begin = segment * chunks_a_segment
    here = tl.minimum(chunks_a_segment, num_chunks - begin)
    rows = tl.arange(0, C)
    for step in range(here):
        chunk = begin + (here - 1 - step if BACKWARDS else step)
        if KEEP:
            at = states + chunk.to(tl.int64) * D * E
            tl.store(at + place, state.to(states.dtype.element_ty), mask=within)
        first = chunk * C
        end = tl.minimum(first + C, length)
        token = (first + rows).to(tl.int64)
        x_Cd = tl.load(
            x + token[:, None] * x_token + d[None, :], mask=(token < end)[:, None] & (d < D)[None, :], other=0.0
        )
        y_Ce = tl.load(
            y + token[:, None] * y_token + e[None, :], mask=(token < end)[:, None] & (e < E)[None, :], other=0.0
        )
        distance = rows + 1 if BACKWARDS else tl.maximum(end - 1 - first - rows, 0)
        weight = tl.exp2(log2_decay * distance.to(tl.float32))
        if PACKED:
            edge = _edge_document(documents, row_of_batch, first if BACKWARDS else end, length)
            of_row = tl.load(documents + row_of_batch * length + token, mask=token < end, other=-1)
            weight = tl.where(of_row == edge, weight, 0.0)
        weighed_Cd = (x_Cd.to(tl.float32) * weight[:, None]).to(x_Cd.dtype)
        state *= _carried(log2_decay, documents, row_of_batch, first, end, length, PACKED)
        state = tl.dot(tl.trans(weighed_Cd), y_Ce, acc=state, input_precision=PRECISION)

    if TOTALS_ONLY:
        tl.store(totals + (head_of_row * num_segments + segment) * D * E + place, state, mask=within)
    elif segment == (0 if BACKWARDS else num_segments - 1):
        tl.store(last + head_of_row * D * E + place, state, mask=within)


@triton.jit
def outputs_kernel(
    x, y, z, slopes, documents, states, out,
    length, num_heads,
    x_row, x_token, x_head, y_row, y_token, y_head, z_row, z_token, z_head, o_row, o_token, o_head,
    state_x, state_z,
    X: tl.constexpr, Z: tl.constexpr, C: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_Z: tl.constexpr,
    PACKED: tl.constexpr, BACKWARDS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of channels of the outputs of one chunk of one head.

    Grid: (blocks of Z times T, B * H). x, y [B, N, H, X] and z, out [B, N, H, Z] by their strides; states
    [B, H, T, X, Z], of which `state_x` and `state_z` are the strides of the last two, in whatever order.

    Forwards, row r sees the rows c <= r and the state before the chunk; BACKWARDS, the rows c >= r and the cotangent
    of the state after the chunk.
    """
    program, head_of_row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row_of_batch, head = head_of_row // num_heads, head_of_row % num_heads
    blocks_z: tl.constexpr = (Z + BLOCK_Z - 1) // BLOCK_Z
    chunk = program // blocks_z
    channel = (program % blocks_z) * BLOCK_Z + tl.arange(0, BLOCK_Z)
    log2_decay = tl.load(slopes + head).to(tl.float32) * -1.4426950408889634
    rows = tl.arange(0, C)
    first = chunk * C
    end = tl.minimum(first + C, length)
    token = (first + rows).to(tl.int64)
    is_token = token < end
    is_channel = channel < Z

    x += row_of_batch * x_row + head * x_head
    y += row_of_batch * y_row + head * y_head
    num_chunks = (length + C - 1) // C
    states += (head_of_row * num_chunks + chunk) * X * Z
    scores_CC = tl.zeros([C, C], tl.float32)
    out_Cz = tl.zeros([C, BLOCK_Z], tl.float32)
    for at in tl.static_range(0, X, BLOCK_X):
        inner = at + tl.arange(0, BLOCK_X)
        mask = is_token[:, None] & (inner < X)[None, :]
        x_Cx = tl.load(x + token[:, None] * x_token + inner[None, :], mask=mask, other=0.0)
        y_Cx = tl.load(y + token[:, None] * y_token + inner[None, :], mask=mask, other=0.0)
        place = inner[:, None] * state_x + channel[None, :] * state_z
        state_xz = tl.load(states + place, mask=(inner < X)[:, None] & is_channel[None, :], other=0.0)
        scores_CC = tl.dot(x_Cx, tl.trans(y_Cx), acc=scores_CC, input_precision=PRECISION)
        out_Cz = tl.dot(x_Cx, state_xz, acc=out_Cz, input_precision=PRECISION)

    z += row_of_batch * z_row + head * z_head
    mask = is_token[:, None] & is_channel[None, :]
    z_Cz = tl.load(z + token[:, None] * z_token + channel[None, :], mask=mask, other=0.0)
    ahead = rows[None, :] - rows[:, None] if BACKWARDS else rows[:, None] - rows[None, :]
    seen = ahead >= 0
    to_edge = tl.maximum(end - 1 - first - rows, 0) if BACKWARDS else rows + 1
    weight = tl.exp2(log2_decay * to_edge.to(tl.float32))
    if PACKED:
        of_row = tl.load(documents + row_of_batch * length + token, mask=is_token, other=-1)
        seen = seen & (of_row[:, None] == of_row[None, :])
        edge = _edge_document(documents, row_of_batch, end if BACKWARDS else first, length)
        weight = tl.where(of_row == edge, weight, 0.0)
    decay_CC = tl.where(seen, tl.exp2(log2_decay * tl.maximum(ahead, 0).to(tl.float32)), 0.0)
    scores_CC *= decay_CC
    out_Cz *= weight[:, None]
    out_Cz = tl.dot(scores_CC.to(z_Cz.dtype), z_Cz, acc=out_Cz, input_precision=PRECISION)
    out += row_of_batch * o_row + head * o_head
    tl.store(out + token[:, None] * o_token + channel[None, :], out_Cz.to(out.dtype.element_ty), mask=mask)


@triton.jit
def gradients_kernel(
    q, k, v, d_out, slopes, documents, states, d_states, dq, dk, dv,
    length, num_heads,
    q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head, o_row, o_token, o_head,
    D: tl.constexpr, E: tl.constexpr, C: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What three launches of `outputs_kernel` compute for the derivative, reading everything once.

    For heads that fit into one block. Grid: (T, B * H). dq, dk [B, N, H, d] and dv [B, N, H, e], contiguous; states
    before each chunk and cotangents of those after it [B, H, T, d, e].
    """
    chunk, head_of_row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row_of_batch, head = head_of_row // num_heads, head_of_row % num_heads
    log2_decay = tl.load(slopes + head).to(tl.float32) * -1.4426950408889634
    rows = tl.arange(0, C)
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    first = chunk * C
    end = tl.minimum(first + C, length)
    token = (first + rows).to(tl.int64)
    is_token = token < end
    mask_Cd = is_token[:, None] & (d < D)[None, :]
    mask_Ce = is_token[:, None] & (e < E)[None, :]
    to_q = row_of_batch * q_row + head * q_head + token[:, None] * q_token + d[None, :]
    to_k = row_of_batch * k_row + head * k_head + token[:, None] * k_token + d[None, :]
    to_v = row_of_batch * v_row + head * v_head + token[:, None] * v_token + e[None, :]
    to_o = row_of_batch * o_row + head * o_head + token[:, None] * o_token + e[None, :]
    place_de = (head_of_row * ((length + C - 1) // C) + chunk) * D * E + d[:, None] * E + e[None, :]
    mask_de = (d < D)[:, None] & (e < E)[None, :]
    in_row = (row_of_batch * length + token)[:, None] * num_heads + head

    ahead = rows[:, None] - rows[None, :]
    seen = ahead >= 0
    enter = tl.exp2(log2_decay * (rows + 1).to(tl.float32))
    leave = tl.exp2(log2_decay * tl.maximum(end - 1 - first - rows, 0).to(tl.float32))
    if PACKED:
        of_row = tl.load(documents + row_of_batch * length + token, mask=is_token, other=-1)
        seen = seen & (of_row[:, None] == of_row[None, :])
        enter = tl.where(of_row == _edge_document(documents, row_of_batch, first, length), enter, 0.0)
        leave = tl.where(of_row == _edge_document(documents, row_of_batch, end, length), leave, 0.0)
    decay_CC = tl.where(seen, tl.exp2(log2_decay * tl.maximum(ahead, 0).to(tl.float32)), 0.0)

    d_out_Ce = tl.load(d_out + to_o, mask=mask_Ce, other=0.0)
    v_Ce = tl.load(v + to_v, mask=mask_Ce, other=0.0)
    d_scores_CC = tl.dot(d_out_Ce, tl.trans(v_Ce), input_precision=PRECISION) * decay_CC
    d_scores_CC = d_scores_CC.to(v_Ce.dtype)

    state_de = tl.load(states + place_de, mask=mask_de, other=0.0)
    dq_Cd = tl.dot(d_out_Ce, tl.trans(state_de), input_precision=PRECISION) * enter[:, None]
    k_Cd = tl.load(k + to_k, mask=mask_Cd, other=0.0)
    dq_Cd = tl.dot(d_scores_CC, k_Cd, acc=dq_Cd, input_precision=PRECISION)
    tl.store(dq + in_row * D + d[None, :], dq_Cd.to(dq.dtype.element_ty), mask=mask_Cd)

    d_state_de = tl.load(d_states + place_de, mask=mask_de, other=0.0)
    dk_Cd = tl.dot(v_Ce, tl.trans(d_state_de), input_precision=PRECISION) * leave[:, None]
    q_Cd = tl.load(q + to_q, mask=mask_Cd, other=0.0)
    dk_Cd = tl.dot(tl.trans(d_scores_CC), q_Cd, acc=dk_Cd, input_precision=PRECISION)
    tl.store(dk + in_row * D + d[None, :], dk_Cd.to(dk.dtype.element_ty), mask=mask_Cd)

    # Turned, so that products have their left side in registers as it comes.
    scores_CC = tl.dot(k_Cd, tl.trans(q_Cd), input_precision=PRECISION) * tl.trans(decay_CC)
    dv_Ce = tl.dot(k_Cd, d_state_de, input_precision=PRECISION) * leave[:, None]
    dv_Ce = tl.dot(scores_CC.to(v_Ce.dtype), d_out_Ce, acc=dv_Ce, input_precision=PRECISION)
    tl.store(dv + in_row * E + e[None, :], dv_Ce.to(dv.dtype.element_ty), mask=mask_Ce)
