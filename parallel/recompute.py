"""Activation recomputation, compilation and observation, block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    _CachedTorchDispatchMode,
    _CachingTorchDispatchMode,
    _is_compiling,
    checkpoint,
    create_selective_checkpoint_contexts,
)

# All of them register an operator that is kept.
import kernels.attention.selected
import kernels.attention.sigmoid  # noqa: F401
import parallel.context  # noqa: F401
from kernels.attention import Visible
from model.context import Context
from model.observer import Observer
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
    torch.ops.headway.sigmoid_attention.default,
    torch.ops.headway.selected_attention.default,
} | _CROSSED


def _policy(kept: set[Any], ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in kept else CheckpointPolicy.PREFER_RECOMPUTE


class _OnlyKept:
    """Lets torch's bookkeeping see the operations that are kept, and no others.

    It counts all of them, and refuses when backward runs others than forward did. FSDP does, inside of blocks: for
    parameters that stay fp32 it has hooks there, which gather in the first place and find gathered in the second.
    """

    kept: set[Any]

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op in self.kept or _is_compiling(op, args, kwargs or {}):
            return super().__torch_dispatch__(op, types, args, kwargs)  # type: ignore[misc]
        return op(*args, **(kwargs or {}))


class _Keeping(_OnlyKept, _CachingTorchDispatchMode):
    """Forward: results are kept."""


class _Giving(_OnlyKept, _CachedTorchDispatchMode):
    """Recomputation: what was kept is given."""


def _contexts(kept: set[Any]) -> tuple[Any, Any]:
    """What `checkpoint` enters around forward, and around the recomputation of it."""
    modes = create_selective_checkpoint_contexts(partial(_policy, kept))
    for mode, kind in zip(modes, (_Keeping, _Giving), strict=True):
        mode.__class__, mode.kept = kind, kept
    return modes


Recompute = Literal["none", "selective", "full"]


def recompute_blocks(model: Model, kind: Recompute) -> None:
    """Let backward compute the blocks' activations again. Values do not change; parameter names neither."""
    if kind == "none":
        return
    options: dict[str, Any] = {"use_reentrant": False}
    kept = _KEPT if kind == "selective" else _CROSSED if model.cut.size > 1 else None
    if kept is not None:
        options["context_fn"] = partial(_contexts, kept)
    for block in model.layers.values():
        block.forward = _recomputed(block.forward, options)


def _recomputed(forward: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    # A function of ours and no `partial`: torch.compile skips frames that are torch's own, `checkpoint` among them, and
    # would compile nothing, without a word.
    def recomputed(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, **options, **kwargs)

    return recomputed


def compile_blocks(model: Model, **options: Any) -> None:
    """Compile each block by itself: blocks of one kind share code, and the compile time does not grow with depth.

    Code is made for any number of rows, so another batch size compiles nothing anew (but from or to a single row, which
    torch always treats apart). Lengths are fixed until a second one comes, and then free.

    Args:
        options: what `torch.compile` is told.
    """
    for block in model.layers.values():
        block.compile(**options)
        block._compiled_call_impl = _for_any_batch(block._compiled_call_impl)


def _for_any_batch(call: Callable[..., Any]) -> Callable[..., Any]:
    def called(x: Tensor, ctx: Context, *args: Any, **kwargs: Any) -> Any:
        # All that has the dimension has to be marked: one tensor that is not fixes it for those it meets.
        for tensor in (x, *_tensors_of(ctx)):
            if tensor.shape[0] == x.shape[0]:
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return call(x, ctx, *args, **kwargs)

    return called


def _tensors_of(ctx: Context) -> Iterator[Tensor]:
    """What blocks read of a context, with the batch as its first dimension for the most part."""
    shared = [part for value in ctx.shared.values() for part in (value if isinstance(value, tuple) else (value,))]
    seen = [part for visible in shared if isinstance(visible, Visible) for part in visible.arguments]
    for found in (ctx.positions, ctx.documents, ctx.key_documents, ctx.modalities, *shared, *seen):
        if isinstance(found, Tensor) and found.dim() > 0:
            yield found


@contextmanager
def observed(models: Sequence[Model], observer: Observer) -> Iterator[None]:
    """Within, an observer sees what happens inside of the blocks, which then run uncompiled."""
    blocks = [block for model in models for block in model.layers.values()]
    compiled = [block._compiled_call_impl for block in blocks]
    before = [model.observer for model in models]
    try:
        for model in models:
            model.observer = observer
        for block in blocks:
            block._compiled_call_impl = None
        yield
    finally:
        for model, earlier in zip(models, before, strict=True):
            model.observer = earlier
        for block, call in zip(blocks, compiled, strict=True):
            block._compiled_call_impl = call
