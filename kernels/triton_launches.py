"""What launches of Triton kernels have in common, whatever they compute."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
import triton
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])


def on_their_gpu(launching: F) -> F:
    """Kernels go to the current GPU, wherever their tensors are: make that of the first argument the current one."""

    @wraps(launching)
    def launched(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if x.device.type != "cuda":
            return launching(x, *args, **kwargs)
        with torch.cuda.device(x.device):
            return launching(x, *args, **kwargs)

    return launched  # type: ignore[return-value]


def block_of(width: int) -> int:
    """The block that holds so many channels: a power of two, as a product wants it."""
    return max(16, triton.next_power_of_2(width))


def in_rows(x: Tensor) -> Tensor:
    """With channels beside each other, as kernels read them."""
    return x if x.stride(-1) == 1 else x.contiguous()
