"""In what precision kernels compute, whatever they are given."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def computing_dtype(q: Tensor) -> torch.dtype:
    """Return the dtype of states, decays, weights and sums: float32, or float64 for float64 inputs."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which autocast does not turn float32 products into bfloat16 ones."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
