"""Lightning attention in two forms to check by eye: the dense quadratic one, and the recurrence token by token."""

import torch
from torch import Tensor

from kernels.lightning.arguments import check_arguments
from kernels.precision import computing_dtype


def lightning_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    *,
    initial_state: Tensor | None = None,
    documents: Tensor | None = None,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return what `lightning_attention` returns, from the dense equation (arXiv 2405.17381 App. A).

        o_t = sum over s <= t of exp(-slope (t - s)) (q_t . k_s) v_s  +  exp(-slope (t + 1)) q_t S_in

    with t from 0, and only over s in the document of t. Time and memory are quadratic in N. Arguments, results and
    errors are those of `lightning_attention`; `chunk_size` is ignored.
    """
    check_arguments(q, k, v, slopes, initial_state, documents)
    dtype = computing_dtype(q)
    q_BHNd, k_BHNd, v_BHNe = (x.transpose(1, 2).to(dtype) for x in (q, k, v))
    s = slopes.to(dtype)
    t = torch.arange(q.shape[1], device=q.device)

    if documents is None:
        documents = torch.zeros(q.shape[:2], dtype=torch.long, device=q.device)
    same_B1NN = (documents[:, :, None] == documents[:, None, :])[:, None]
    in_first_B1N1 = same_B1NN[..., 0, None]

    distance_NN = t[:, None] - t[None, :]
    decay_HNN = torch.exp(-s[:, None, None] * distance_NN.clamp(min=0)) * (distance_NN >= 0)
    weight_BHNN = decay_HNN * same_B1NN
    out_BHNe = (q_BHNd @ k_BHNd.mT * weight_BHNN) @ v_BHNe
    # The last row of the weights says what of each token is left at the end.
    final_BHde = (weight_BHNN[..., -1, :, None] * k_BHNd).mT @ v_BHNe

    if initial_state is not None:
        since_start_BHN1 = torch.exp(-s[:, None, None] * (t + 1)[:, None]) * in_first_B1N1
        out_BHNe = out_BHNe + since_start_BHN1 * (q_BHNd @ initial_state.to(dtype))
        final_BHde = final_BHde + since_start_BHN1[..., -1:, :] * initial_state.to(dtype)
    return out_BHNe.transpose(1, 2).to(v.dtype), final_BHde


def lightning_attention_recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    *,
    initial_state: Tensor | None = None,
    documents: Tensor | None = None,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return what `lightning_attention` returns, token by token (arXiv 2405.17381 Eq. 17).

        S_t = exp(-slope) S_{t-1} + k_t^T v_t,    o_t = q_t S_t

    with S_{t-1} = 0 where token t opens a document. It multiplies matrices and nothing else, 4 d e operations per token
    and head, so a counter of matrix products sees exactly what the layer declares. Arguments, results and errors are
    those of `lightning_attention`; `chunk_size` is ignored.
    """
    check_arguments(q, k, v, slopes, initial_state, documents)
    dtype = computing_dtype(q)
    batch, length, heads, key_width = q.shape
    q_BHNd, k_BHNd, v_BHNe = (x.transpose(1, 2).to(dtype) for x in (q, k, v))
    decay_H11 = torch.exp(-slopes.to(dtype))[:, None, None]

    state_BHde = q_BHNd.new_zeros(batch, heads, key_width, v.shape[3])
    if initial_state is not None:
        state_BHde = initial_state.to(dtype)
    out = []
    for t in range(length):
        if documents is not None and t > 0:
            state_BHde = state_BHde * (documents[:, t] == documents[:, t - 1])[:, None, None, None]
        state_BHde = decay_H11 * state_BHde + k_BHNd[:, :, t, :, None] @ v_BHNe[:, :, t, None, :]
        out.append(q_BHNd[:, :, t, None, :] @ state_BHde)
    return torch.cat(out, dim=2).transpose(1, 2).to(v.dtype), state_BHde
