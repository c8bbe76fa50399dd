"""Softmax attention whose heads have a gate for each token, and of which each token may use only some.

Two forms: whole maps, to be checked against the equation, and one for training, which does not compute a head for the
tokens that do not select it (`kernels/attention/selected.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.attention.selected import selected_attention
from kernels.attention.visible import Visible, attention_faults
from kernels.precision import computing_dtype


def gated_attention(
    q_BNHd: Tensor,
    k_BMGd: Tensor,
    v_BMGe: Tensor,
    gate: Tensor | None,
    head_index: Tensor | None = None,
    *,
    selected: Tensor | None = None,
    visible: Visible,
    scale: float,
    share: float | None = None,
) -> Tensor:
    """y_ih = g_ih sum over the keys j that i sees of softmax_j(scale q_ih k_j) v_j, for the heads h that i selects.

    A head that a token does not select gives it exactly 0, hands on no gradient, and on a CPU costs next to nothing. A
    gate of exactly 0 is another thing: its head is computed, and the gate has its gradient <dy, H>. A query that sees
    nothing gives 0.

    Args:
        q_BNHd: queries, one floating-point dtype for q, k and v.
        k_BMGd, v_BMGe: keys and values; each of the G serves H / G queries, in order.
        gate: `[B, N, H]`, or `[B, N, A]` in the order of `head_index`. None: 1.
        head_index: int64 `[B, N, A]`, the heads that each token selects, each at most once. None: all of them.
        selected: bool `[B, N, H]`, the same where tokens select different numbers of heads (as of those that a
            tensor-parallel rank has); the gate is then `[B, N, H]`.
        visible: which of the M keys each of the N queries sees.
        share: about which part of the heads a token selects, if `selected` does; it decides on the way, and on nothing
            else.

    Returns:
        `[B, N, H, e]` in the dtype of v. Differentiable once, in q, k, v and gate. The gate is applied in float32
        (float64 for float64 inputs).

    Raises:
        ValueError: shapes or dtypes do not fit together; all that do not are named.

    Source: arXiv 2410.11842, eq. 5 (mixture of heads); arXiv 2408.08274 (experts in attention).
    """
    _check_gated(q_BNHd, k_BMGd, v_BMGe, gate, head_index, visible, selected)
    if head_index is not None:
        nothing_BNH = torch.zeros(q_BNHd.shape[:3], dtype=torch.bool, device=q_BNHd.device)
        selected = nothing_BNH.scatter(2, head_index, True)
        share = head_index.shape[2] / q_BNHd.shape[2]
    out_BNHe = selected_attention(q_BNHd, k_BMGd, v_BMGe, selected, visible, scale, share)
    if gate is None:
        return out_BNHe
    wide = computing_dtype(v_BMGe)
    gate = gate.to(wide)
    if head_index is not None:
        gate = gate.new_zeros(q_BNHd.shape[:3]).scatter(2, head_index, gate)
    return (out_BNHe.to(wide) * gate[..., None]).to(v_BMGe.dtype)


def gated_attention_reference(
    q_BNHd: Tensor,
    k_BMGd: Tensor,
    v_BMGe: Tensor,
    gate: Tensor | None,
    head_index: Tensor | None = None,
    *,
    visible: Visible,
    scale: float,
) -> Tensor:
    """`gated_attention` as its equation: all heads with whole maps, then the gate, in the dtype of its arguments."""
    _check_gated(q_BNHd, k_BMGd, v_BMGe, gate, head_index, visible)
    group = q_BNHd.shape[2] // k_BMGd.shape[2]
    k_BMHd, v_BMHe = (x.repeat_interleave(group, dim=2) for x in (k_BMGd, v_BMGe))
    scores_BHNM = torch.einsum("bnhd,bmhd->bhnm", q_BNHd, k_BMHd) * scale
    seen_BHNM = visible.of(torch.arange(q_BNHd.shape[1], device=q_BNHd.device))
    weights_BHNM = (
        scores_BHNM.masked_fill(~seen_BHNM, torch.finfo(scores_BHNM.dtype).min).softmax(-1).masked_fill(~seen_BHNM, 0)
    )
    out_BNHe = torch.einsum("bhnm,bmhe->bnhe", weights_BHNM, v_BMHe)
    gate = (
        torch.ones_like(q_BNHd[..., 0] if head_index is None else head_index, dtype=v_BMGe.dtype)
        if gate is None
        else gate
    )
    if head_index is not None:
        gate = torch.zeros_like(out_BNHe[..., 0]).scatter(2, head_index, gate)
    return out_BNHe * gate[..., None]


def _check_gated(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    index: Tensor | None,
    visible: Visible,
    selected: Tensor | None = None,
) -> None:
    """Raise `ValueError` that names all that does not fit."""
    faults, gates = attention_faults(q, k, v, visible), q.shape[:3]
    if index is not None:
        if index.dtype != torch.int64 or index.dim() != 3 or index.shape[:2] != q.shape[:2]:
            faults.append(
                f"head_index must be int64 [B, N, A] with B and N {list(q.shape[:2])}, received {list(index.shape)} of "
                f"{index.dtype}."
            )
        elif index.shape[2] > q.shape[2]:
            faults.append(f"head_index selects {index.shape[2]} distinct heads, and there are {q.shape[2]}.")
        gates = index.shape
    if selected is not None and (selected.dtype != torch.bool or selected.shape != q.shape[:3] or index is not None):
        faults.append(
            f"selected must be bool {list(q.shape[:3])}, without head_index, received {list(selected.shape)} of "
            f"{selected.dtype}{'' if index is None else ' and head_index'}."
        )
    if gate is not None and (gate.shape != gates or not gate.is_floating_point()):
        faults.append(
            f"gate must be floating-point numbers {list(gates)}, received {list(gate.shape)} of {gate.dtype}."
        )
    if faults:
        raise ValueError(" ".join(faults))
