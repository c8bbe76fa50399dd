"""Activation recomputation and compilation, block by block."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import parallel.context  # noqa: F401  (registers the operator that is kept)
from model.stack import Model

# The states that entered a piece of the sequence are always kept: they are small, and to ask for them again would be
# another collective in each layer.
_CROSSED = {torch.ops.headway.exchange_states.default}

# What `selective` keeps: the results of linear maps and of fused attention. All else is cheap to compute again.
# Batched products are left out: inside linear attention they make scores and states, which are large, and a result
# that is then changed in place (as kernels do) would come back changed: torch does not notice, and gradients are wrong.
_KEPT = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
} | _CROSSED


def _policy(kept: set[Any], ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in kept else CheckpointPolicy.PREFER_RECOMPUTE


Recompute = Literal["none", "selective", "full"]


def recompute_blocks(model: Model, kind: Recompute) -> None:
    """Let backward compute the blocks' activations again. Values do not change; parameter names neither."""
    if kind == "none":
        return
    options: dict[str, Any] = {"use_reentrant": False}
    kept = _KEPT if kind == "selective" else _CROSSED if model.cut.size > 1 else None
    if kept is not None:
        options["context_fn"] = partial(create_selective_checkpoint_contexts, partial(_policy, kept))
    for block in model.layers.values():
        block.forward = _recomputed(block.forward, options)


def _recomputed(forward: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    # A function of ours and no `partial`: torch.compile skips frames that are torch's own, `checkpoint` among them, and
    # would compile nothing, without a word.
    def recomputed(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, **options, **kwargs)

    return recomputed


def compile_blocks(model: Model) -> None:
    """Compile each block by itself: blocks of one kind share code, and the compile time does not grow with depth."""
    for block in model.layers.values():
        block.compile()
