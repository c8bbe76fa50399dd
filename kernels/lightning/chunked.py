"""Lightning attention in chunks, in plain PyTorch: exact, on any device, at a cost per token that does not grow with N.

Inside a chunk of C tokens the dense form; between chunks a state. Both directions are the block algorithms of
arXiv 2405.17381 App. B (Alg. 5 and 6), with the loops over blocks replaced by batched products and by `carry_states`.
The backward is written out because autograd would keep seven tensors of the size of q where this keeps q, k and v; it
is as fast, since making the others again costs about what writing and reading them does.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.dispatch import triton_form, uses_triton
from kernels.lightning.arguments import check_arguments, too_large
from kernels.lightning.states import Boundaries, carry_states, transfer
from kernels.precision import computing_dtype, without_autocast


def lightning_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    *,
    initial_state: Tensor | None = None,
    documents: Tensor | None = None,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal linear attention with a fixed decay per head: S_t = exp(-s) S_{t-1} + k_t^T v_t, o_t = q_t S_t.

    There is no scale and no row normaliser. Memory is linear in N, time per token constant; nothing [N, N] is made, and
    no exponential has a positive exponent, so no length overflows.

    Args:
        q, k: [B, N, H, d], one floating-point dtype for q, k and v. Any N >= 1.
        v: [B, N, H, e]; e may differ from d.
        slopes: [H], float32 or float64, finite and >= 0: the state shrinks by exp(-s) per token. Not differentiated.
        initial_state: [B, H, d, e], float32 (float64 with float64 inputs): the state S after the token before the
            first. It belongs to the document of the first token: where that token opens a document, pass zeros.
        documents: integers [B, N], non-decreasing along N. Where the number changes, the state is cleared.
        chunk_size: tokens per chunk; changes speed, memory and rounding, never the function.

    Returns:
        out: [B, N, H, e] in the dtype of v; strided as [B, H, N, e] in memory.
        final_state: [B, H, d, e], float32 (float64 with float64 inputs): S after the last token, of its document.

    Differentiable in q, k, v and initial_state, through both results, any number of times. Sums are float32 (float64),
    also under autocast.

    Raises:
        ValueError: shapes or dtypes do not fit together, or `chunk_size` is below 1.

    Source: arXiv 2405.17381 App. A (Eq. 15-17) and App. B; for documents, the same masks applied to states.
    """
    check_arguments(q, k, v, slopes, initial_state, documents)
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, received {chunk_size}")
    dtype = computing_dtype(q)
    slopes = slopes.detach().to(dtype)
    if initial_state is not None:
        initial_state = initial_state.to(dtype)
    if q.shape[1] == 1:
        return _one_token(q, k, v, slopes, initial_state)
    if uses_triton("lightning", q, too_large(q, v)):
        return triton_form("lightning").lightning(q, k, v, slopes, initial_state, documents)
    chunk = _default_chunk(q, v) if chunk_size is None else min(chunk_size, q.shape[1])
    return _ChunkedLightning.apply(q, k, v, slopes, initial_state, documents, chunk)


def _default_chunk(q: Tensor, v: Tensor) -> int:
    """Choose the tokens per chunk: about as many as heads are wide, by measurement on CPUs, and evenly filled."""
    length = q.shape[1]
    target = 64 if max(q.shape[3], v.shape[3]) <= 64 else 128
    chunks = -(-length // target)
    return -(-length // chunks)


def _one_token(q: Tensor, k: Tensor, v: Tensor, slopes_H: Tensor, state_BHde: Tensor | None) -> tuple[Tensor, Tensor]:
    """Decode one token. Elementwise, so that autocast cannot round the state; the document is the state's own."""
    dtype = slopes_H.dtype
    q_BHd, k_BHd, v_BHe = (x[:, 0].to(dtype) for x in (q, k, v))
    new_BHde = k_BHd[..., :, None] * v_BHe[..., None, :]
    if state_BHde is not None:
        new_BHde = torch.addcmul(new_BHde, torch.exp(-slopes_H)[:, None, None], state_BHde)
    out_BHe = (q_BHd[..., :, None] * new_BHde).sum(dim=-2)
    return out_BHe[:, None].to(v.dtype), new_BHde


class _Decays(NamedTuple):
    """What the past is worth, inside chunks and at their edges. A dimension on which nothing depends is 1."""

    within: Tensor  # [1, H, 1, C, C]: what a query row sees of a key column
    same: Tensor | None  # [B, 1, T, C, C]: 1 where row and column share a document
    enter: Tensor  # [., H, ., C, 1]: what a query sees of the state before its chunk
    leave: Tensor  # [., H, T, C, 1]: what a key adds to the state after its chunk
    boundaries: Boundaries

    def weigh_(self, scores_BHTCC: Tensor) -> Tensor:
        """Multiply scores by the decay and the causal and document masks, in place."""
        scores_BHTCC.mul_(self.within)
        return scores_BHTCC if self.same is None else scores_BHTCC.mul_(self.same)


def _decays(slopes_H: Tensor, length: int, chunk: int, documents: Tensor | None) -> _Decays:
    """Work out the decays of `length` tokens in chunks; the last chunk may be partly filled."""
    chunks = -(-length // chunk)
    row_C = torch.arange(chunk, device=slopes_H.device)
    edge_P = (torch.arange(chunks + 1, device=slopes_H.device) * chunk).clamp(max=length)
    # Keys are counted from the true end of their chunk. Past the end of the sequence there are zeros, worth anything.
    to_end_TC = (edge_P[1:, None] - 1 - (edge_P[:-1, None] + row_C)).clamp(min=0)
    slopes = slopes_H[:, None, None, None]
    within = transfer(Boundaries(row_C, None), slopes_H).unsqueeze(2)
    enter = torch.exp(-slopes * (row_C + 1)[:, None])[None]
    leave = torch.exp(-slopes * to_end_TC[..., None])[None]
    if documents is None:
        return _Decays(within, None, enter, leave, Boundaries(edge_P, None))

    padding = documents[:, -1:].expand(-1, chunks * chunk - length)
    document_BTC = torch.cat([documents, padding], dim=1).unflatten(1, (chunks, chunk))
    edge_BP = torch.cat([documents[:, :1], document_BTC[:, :, -1]], dim=1)
    same = (document_BTC[..., :, None] == document_BTC[..., None, :]).to(slopes_H.dtype).unsqueeze(1)
    enter = enter * (document_BTC == edge_BP[:, :-1, None])[:, None, :, :, None]
    leave = leave * (document_BTC == edge_BP[:, 1:, None])[:, None, :, :, None]
    return _Decays(within, same, enter, leave, Boundaries(edge_P, edge_BP))


def _to_chunks(x_BNHd: Tensor, chunk: int, dtype: torch.dtype) -> Tensor:
    """Lay out as [B, H, T, C, d], contiguous, for batched products; zeros fill the last chunk."""
    length = x_BNHd.shape[1]
    chunks = -(-length // chunk)
    x_BHNd = x_BNHd.transpose(1, 2)
    if chunks * chunk != length:
        x_BHNd = F.pad(x_BHNd, (0, 0, 0, chunks * chunk - length))
    return x_BHNd.to(dtype).contiguous().unflatten(2, (chunks, chunk))


def _from_chunks(x_BHTCd: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """Undo `_to_chunks`, as a view when the dtype stays."""
    return x_BHTCd.flatten(2, 3)[:, :, :length].transpose(1, 2).to(dtype)


def _add_product_(sum_BHTxy: Tensor, a_BHTxz: Tensor, b_BHTzy: Tensor) -> Tensor:
    """Add a @ b to `sum` in place, in one pass."""
    sum_BHTxy.flatten(0, 2).baddbmm_(a_BHTxz.flatten(0, 2), b_BHTzy.flatten(0, 2))
    return sum_BHTxy


def _states_before(
    leaving_BHTCd: Tensor, v_BHTCe: Tensor, initial_BHde: Tensor | None, decays: _Decays, slopes_H: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the state before each chunk [B, H, T, d, e] and the last one [B, H, d, e]; keys come decayed."""
    widths = (leaving_BHTCd.shape[-1], v_BHTCe.shape[-1])
    added_BHTx = torch.matmul(leaving_BHTCd.mT, v_BHTCe).flatten(-2)
    initial_BHx = None if initial_BHde is None else initial_BHde.flatten(-2)
    before_BHTx, final_BHx = carry_states(added_BHTx, initial_BHx, decays.boundaries, slopes_H)
    return before_BHTx.unflatten(-1, widths), final_BHx.unflatten(-1, widths)


class _ChunkedLightning(torch.autograd.Function):
    """Forward and backward of Lightning attention; keeps its inputs and makes everything else again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        slopes_H: Tensor,
        initial_BHde: Tensor | None,
        documents: Tensor | None,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        with without_autocast(q.device):
            decays = _decays(slopes_H, q.shape[1], chunk, documents)
            q_BHTCd, k_BHTCd, v_BHTCe = (_to_chunks(x, chunk, slopes_H.dtype) for x in (q, k, v))
            before_BHTde, final_BHde = _states_before(k_BHTCd * decays.leave, v_BHTCe, initial_BHde, decays, slopes_H)
            out_BHTCe = torch.matmul(q_BHTCd, before_BHTde).mul_(decays.enter)
            del before_BHTde
            scores_BHTCC = decays.weigh_(torch.matmul(q_BHTCd, k_BHTCd.mT))
            _add_product_(out_BHTCe, scores_BHTCC, v_BHTCe)
        return _from_chunks(out_BHTCe, q.shape[1], v.dtype), final_BHde

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.chunk = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor, d_final: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, slopes_H, initial_BHde, documents = ctx.saved_tensors
        with without_autocast(q.device):
            dq, dk, dv, d_initial = _backward(q, k, v, slopes_H, initial_BHde, documents, ctx.chunk, d_out, d_final)
        dq, dk, dv = (_from_chunks(x, q.shape[1], q.dtype) for x in (dq, dk, dv))
        return dq, dk, dv, None, None if initial_BHde is None else d_initial, None, None


def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes_H: Tensor,
    initial_BHde: Tensor | None,
    documents: Tensor | None,
    chunk: int,
    d_out: Tensor,
    d_final: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v in chunks, and of the initial state (arXiv 2405.17381 App. B Alg. 6).

    Ordered so that as little as possible is held at once, and let go where it is last used.
    """
    decays = _decays(slopes_H, q.shape[1], chunk, documents)
    q_BHTCd, k_BHTCd, v_BHTCe, d_BHTCe = (_to_chunks(x, chunk, slopes_H.dtype) for x in (q, k, v, d_out))
    leaving_BHTCd = k_BHTCd * decays.leave
    before_BHTde, _ = _states_before(leaving_BHTCd, v_BHTCe, initial_BHde, decays, slopes_H)

    entering_BHTCe = d_BHTCe * decays.enter
    dq_BHTCd = torch.matmul(entering_BHTCe, before_BHTde.mT)
    del before_BHTde
    d_before_BHTx = torch.matmul(q_BHTCd.mT, entering_BHTCe).flatten(-2)
    del entering_BHTCe
    d_added_BHTx, d_initial_BHx = carry_states(
        d_before_BHTx, d_final.flatten(-2), decays.boundaries, slopes_H, transposed=True
    )
    del d_before_BHTx
    d_added_BHTde = d_added_BHTx.unflatten(-1, d_final.shape[-2:])

    d_scores_BHTCC = decays.weigh_(torch.matmul(d_BHTCe, v_BHTCe.mT))
    _add_product_(dq_BHTCd, d_scores_BHTCC, k_BHTCd)
    dk_BHTCd = torch.matmul(v_BHTCe, d_added_BHTde.mT).mul_(decays.leave)
    _add_product_(dk_BHTCd, d_scores_BHTCC.mT, q_BHTCd)
    del d_scores_BHTCC, v_BHTCe

    dv_BHTCe = torch.matmul(leaving_BHTCd, d_added_BHTde)
    del leaving_BHTCd, d_added_BHTx, d_added_BHTde
    scores_BHTCC = decays.weigh_(torch.matmul(q_BHTCd, k_BHTCd.mT))
    _add_product_(dv_BHTCe, scores_BHTCC.mT, d_BHTCe)
    return dq_BHTCd, dk_BHTCd, dv_BHTCe, d_initial_BHx.unflatten(-1, d_final.shape[-2:])
