"""The state that a sequence leaves behind, without its outputs: what is handed on where the sequence is cut."""

from typing import Any

import torch
from torch import Tensor

from kernels.dispatch import triton_form, uses_triton
from kernels.lightning.arguments import check_arguments, too_large
from kernels.precision import computing_dtype, without_autocast


def lightning_final_state(k: Tensor, v: Tensor, slopes: Tensor, documents: Tensor | None = None) -> Tensor:
    """The final state that `lightning_attention` returns for these keys and values when it begins from zero.

        S = sum over the s in the document of the last token of exp(-slope (N - 1 - s)) k_s^T v_s

    Arguments and errors are those of `lightning_attention`. Keeps k and v for backward, and nothing else.

    Returns:
        [B, H, d, e], float32 (float64 with float64 inputs).

    Source: arXiv 2405.17381 App. A (Eq. 15-17), unrolled; LASP-2 (arXiv 2502.07563) gathers it.
    """
    check_arguments(k, k, v, slopes, None, documents)
    slopes = slopes.detach().to(computing_dtype(k))
    if uses_triton("lightning", k, too_large(k, v)):
        return triton_form("lightning").final_state(k, v, slopes, documents)
    return _FinalState.apply(k, v, slopes, documents)


def _left_at_end(slopes_H: Tensor, length: int, documents: Tensor | None) -> Tensor:
    """What of each token is left after the last one, [1 or B, H, N, 1]."""
    distance_N = torch.arange(length - 1, -1, -1, device=slopes_H.device)
    left_BHN1 = torch.exp(-slopes_H[:, None] * distance_N)[None, :, :, None]
    if documents is None:
        return left_BHN1
    return left_BHN1 * (documents == documents[:, -1:])[:, None, :, None]


class _FinalState(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(k: Tensor, v: Tensor, slopes_H: Tensor, documents: Tensor | None) -> Tensor:
        with without_autocast(k.device):
            k_BHNd, v_BHNe = (x.transpose(1, 2).to(slopes_H.dtype) for x in (k, v))
            return (k_BHNd * _left_at_end(slopes_H, k.shape[1], documents)).mT @ v_BHNe

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, d_state_BHde: Tensor) -> tuple[Tensor | None, ...]:
        k, v, slopes_H, documents = ctx.saved_tensors
        with without_autocast(k.device):
            left_BHN1 = _left_at_end(slopes_H, k.shape[1], documents)
            k_BHNd, v_BHNe = (x.transpose(1, 2).to(slopes_H.dtype) for x in (k, v))
            dk_BHNd = (v_BHNe @ d_state_BHde.mT) * left_BHN1
            dv_BHNe = (k_BHNd * left_BHN1) @ d_state_BHde
        return dk_BHNd.transpose(1, 2).to(k.dtype), dv_BHNe.transpose(1, 2).to(v.dtype), None, None
