"""What every form of Lightning attention checks about its arguments."""

import torch
from torch import Tensor


def check_arguments(
    q_BNHd: Tensor,
    k_BNHd: Tensor,
    v_BNHe: Tensor,
    slopes_H: Tensor,
    initial_BHde: Tensor | None,
    documents: Tensor | None,
) -> None:
    """Raise `ValueError` for arguments that do not fit together; looks at shapes and dtypes only, never at values."""
    if q_BNHd.dim() != 4 or 0 in q_BNHd.shape:
        raise ValueError(f"q must be [B, N, H, d] with no empty dimension, received {list(q_BNHd.shape)}")
    batch, length, heads, key_width = q_BNHd.shape
    if k_BNHd.shape != q_BNHd.shape:
        raise ValueError(f"k must have the shape of q, {list(q_BNHd.shape)}, received {list(k_BNHd.shape)}")
    if v_BNHe.dim() != 4 or v_BNHe.shape[:3] != q_BNHd.shape[:3] or v_BNHe.shape[3] == 0:
        raise ValueError(f"v must be [{batch}, {length}, {heads}, e], received {list(v_BNHe.shape)}")
    if not (q_BNHd.dtype == k_BNHd.dtype == v_BNHe.dtype and q_BNHd.is_floating_point()):
        raise ValueError(
            f"q, k and v must share one floating-point dtype, received {q_BNHd.dtype}, {k_BNHd.dtype}, {v_BNHe.dtype}"
        )
    if slopes_H.shape != (heads,):
        raise ValueError(f"slopes must hold one number for each of {heads} heads, received {list(slopes_H.shape)}")
    if slopes_H.dtype not in (torch.float32, torch.float64):
        # bfloat16 rounds exp(-s) to 1 for s < 0.002: the slow heads would stop forgetting.
        raise ValueError(f"slopes must be float32 or float64, received {slopes_H.dtype}")
    state_shape = (batch, heads, key_width, v_BNHe.shape[3])
    if initial_BHde is not None and initial_BHde.shape != state_shape:
        raise ValueError(f"initial_state must be {list(state_shape)}, received {list(initial_BHde.shape)}")
    if initial_BHde is not None and initial_BHde.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"initial_state must be float32 (float64 with float64 inputs), received {initial_BHde.dtype}")
    if documents is not None and documents.shape != (batch, length):
        raise ValueError(f"documents must be [{batch}, {length}], received {list(documents.shape)}")
    if documents is not None and (documents.is_floating_point() or documents.is_complex()):
        raise ValueError(f"documents must be integers, received {documents.dtype}")


WIDEST = 256
"""Channels of a head that the Triton form takes at most."""


def too_large(q_BNHd: Tensor, v_BNHe: Tensor) -> str:
    """Why the Triton form does not take such shapes, in words; "" if it does."""
    widest = max(q_BNHd.shape[3], v_BNHe.shape[3])
    if widest > WIDEST:
        return f"a head is {widest} wide, and {WIDEST} is the most"
    if q_BNHd.shape[0] * q_BNHd.shape[2] > 65535:
        return "there are more than 65535 rows times heads"
    return ""
