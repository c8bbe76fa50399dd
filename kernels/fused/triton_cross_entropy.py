"""The Triton form of one chunk's cross-entropy: a program has one token, and goes over its logits twice."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton_launches import on_their_gpu

BLOCK, NUM_WARPS = 4096, 8
"""Logits that a program has before it at a time, and its warps."""


@triton.jit
def _cross_entropy(logits_ptr, targets_ptr, nats_ptr, vocab_size, ignored, DERIVED: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * vocab_size
    target = tl.load(targets_ptr + row)
    columns = tl.arange(0, BLOCK)
    if target == ignored:
        tl.store(nats_ptr + row, 0.0)
        if DERIVED:
            for first in range(0, vocab_size, BLOCK):
                at = first + columns
                tl.store(logits_ptr + at, tl.zeros([BLOCK], tl.float32), at < vocab_size)
    else:
        own = tl.load(logits_ptr + target).to(tl.float32)
        # Largest logit and sum of odds of each column of blocks for itself; they come together once, in the end.
        tops = tl.full([BLOCK], -float("inf"), tl.float32)
        sums = tl.zeros([BLOCK], tl.float32)
        for first in range(0, vocab_size, BLOCK):
            at = first + columns
            logits = tl.load(logits_ptr + at, at < vocab_size, -float("inf")).to(tl.float32)
            higher = tl.maximum(tops, logits)
            # Where nothing has been seen there is nothing to scale: -inf less itself is no number.
            base = tl.where(higher == -float("inf"), 0.0, higher)
            sums = sums * tl.exp(tops - base) + tl.exp(logits - base)
            tops = higher
        top = tl.max(tops, 0)
        # Less the largest first: sums of small numbers lose nothing, those with large logits would.
        total = tl.sum(sums * tl.exp(tops - top), 0)
        tl.store(nats_ptr + row, tl.log(total) - (own - top))
        share = 1.0 / total
        if DERIVED:
            for first in range(0, vocab_size, BLOCK):
                at = first + columns
                logits = tl.load(logits_ptr + at, at < vocab_size, 0.0).to(tl.float32)
                gradient = tl.exp(logits - top) * share - tl.where(at == target, 1.0, 0.0)
                tl.store(logits_ptr + at, gradient, at < vocab_size)


@on_their_gpu
def nats_and_gradient(logits_CV: Tensor, targets_C: Tensor, ignored: int, derived: bool) -> tuple[Tensor, Tensor]:
    """Nats `[C]`, fp32, and where it is wanted softmax less one-hot, in place of the logits, which are contiguous."""
    nats_C = torch.empty(targets_C.shape, dtype=torch.float32, device=logits_CV.device)
    if len(nats_C):
        _cross_entropy[(len(nats_C),)](
            logits_CV, targets_C.contiguous(), nats_C, logits_CV.shape[1], ignored, derived, BLOCK, num_warps=NUM_WARPS
        )
    return nats_C, logits_CV
