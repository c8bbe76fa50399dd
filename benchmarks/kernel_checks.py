"""Whether operations are right on this device, before anyone asks how fast: against fp64 references, at small shapes.

Every check is one operation in one dtype, width and length, outputs and gradients; the error is the norm of the
difference over the norm of what is wanted. Lengths are ragged (some not a multiple of any block), and even as the ones
that are timed: compilers make other code for them.
"""

from __future__ import annotations

import itertools
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.dispatch import choose

TOLERANCE = {torch.bfloat16: 1.5e-2, torch.float32: 2e-5}
"""bfloat16 has 8 bits; weights and states are rounded to it once more before they are multiplied."""

Made = tuple[list[Tensor], Callable[..., Tensor], Callable[..., Tensor], str]
"""Leaves, ours, the reference, and what the dispatch calls the operation."""


class Check(NamedTuple):
    """What is checked."""

    operation: str
    dtype: str
    width: int
    length: int
    device: str


def checks(device: str, operations: list[str]) -> list[Check]:
    """All of them."""
    gpu = device == "cuda"
    dtypes = ["bfloat16", "float32"] if gpu else ["float32"]
    widths: dict[str, tuple[int, ...]] = {
        "lightning": (64, 96, 128, 192, 256) if gpu else (8,),
        "gated attention": (64, 128) if gpu else (8,),
        "sigmoid attention": (64, 128) if gpu else (8,),
    }
    lengths = (333, 512) if gpu else (37,)
    return [
        Check(operation, dtype, width, length, device)
        for dtype, operation in itertools.product(dtypes, operations)
        for width in widths.get(operation, (256,) if gpu else (8,))
        for length in lengths
    ]


def run_check(check: Check) -> dict[str, Any]:
    """A row: the largest error of outputs and gradients, which form ran, and whether it is right."""
    row: dict[str, Any] = check._asdict()
    dtype = getattr(torch, check.dtype)
    try:
        torch.manual_seed(0)
        leaves, ours, reference, name = _MAKERS[check.operation](check)
        row |= {"form": choose(name, leaves[0]).form} | errors(leaves, ours, reference)
        worst = max(row["errors"].values())
        return row | {"error": worst, "right": worst < TOLERANCE[dtype]}
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        reason = f"{type(error).__name__}: {str(error).strip()[-400:]} ({where.name}, line {where.lineno})"
        return row | {"error": None, "right": False, "reason": reason}


def errors(leaves: list[Tensor], ours: Callable[..., Tensor], reference: Callable[..., Tensor]) -> dict[str, Any]:
    """Of the output and of each leaf's gradient."""
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    out, wanted = ours(*leaves), reference(*wide)
    cotangent = torch.randn_like(wanted)
    found = [out, *torch.autograd.grad(out, leaves, cotangent.to(out.dtype))]
    exact = [wanted, *torch.autograd.grad(wanted, wide, cotangent.to(out.dtype).double())]
    names = ["out", *(f"d{place}" for place in range(len(leaves)))]
    return {
        "errors": {
            name: ((a.double() - b).norm() / b.norm().clamp(min=1e-30)).item()
            for name, a, b in zip(names, found, exact, strict=True)
        }
    }


def _tensors(check: Check, *shapes: tuple[int, ...], scale: float = 1.0) -> list[Tensor]:
    dtype = getattr(torch, check.dtype)
    return [(torch.randn(s, device=check.device) * scale).to(dtype).requires_grad_() for s in shapes]


def _qkv(check: Check) -> list[Tensor]:
    return _tensors(check, *[(2, check.length, 4, check.width)] * 3)


def _documents(check: Check) -> Tensor:
    """[2, N], three documents a row at uneven places."""
    places = torch.arange(check.length, device=check.device)
    ends = [[check.length // 5, check.length // 2 + 3], [1, check.length - 7]]
    return torch.stack([(places >= first).long() + (places >= second).long() for first, second in ends])


def _lightning(check: Check) -> Made:
    from kernels.lightning import decay_slopes, lightning_attention, lightning_attention_reference

    slopes = torch.tensor(decay_slopes("alibi_layer", 4, 0, 24), device=check.device)
    # The ragged length has documents, too.
    documents = _documents(check) if check.length % 2 else None
    return (
        _qkv(check),
        lambda q, k, v: lightning_attention(q, k, v, slopes, documents=documents)[0],
        lambda q, k, v: lightning_attention_reference(q, k, v, slopes.double(), documents=documents)[0],
        "lightning",
    )


def _visible(check: Check) -> Any:
    from kernels.attention import Visible

    documents = _documents(check) if check.length % 2 else None
    return Visible(check.length, check.length, documents=documents, key_documents=documents)


def _gated(check: Check) -> Made:
    from kernels.attention.gated import gated_attention, gated_attention_reference

    q, k, v = _qkv(check)
    index = torch.rand(2, check.length, 4, device=check.device).argsort(-1)[..., :2]
    gate = torch.rand(2, check.length, 2, device=check.device).requires_grad_()
    how: dict[str, Any] = {"visible": _visible(check), "scale": check.width**-0.5}
    return (
        [q, k, v, gate],
        lambda q, k, v, gate: gated_attention(q, k, v, gate, index, **how),
        lambda q, k, v, gate: gated_attention_reference(q, k, v, gate, index, **how),
        "attention",
    )


def _sigmoid(check: Check) -> Made:
    from kernels.attention.sigmoid import sigmoid_attention, sigmoid_attention_reference

    slopes = torch.tensor([0.5, 0.1, 0.02, 0.0], device=check.device)
    how: dict[str, Any] = {"scale": check.width**-0.5, "bias": -3.0, "slopes_H": slopes}
    visible = _visible(check)
    return (
        _qkv(check),
        lambda q, k, v: sigmoid_attention(q, k, v, visible, **how),
        lambda q, k, v: sigmoid_attention_reference(q, k, v, visible, **how),
        "attention",
    )


def _norm_gate(check: Check) -> Made:
    from kernels.fused.norm_gate import norm_gate

    leaves = _tensors(check, *[(check.length, check.width)] * 2, (check.width,))
    return (
        leaves,
        lambda x, gate, weight: norm_gate(x, gate, weight, eps=1e-5, activation="sigmoid"),
        lambda x, gate, w: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * w * torch.sigmoid(gate),
        "norm_gate",
    )


def _glu(check: Check) -> Made:
    from kernels.fused.glu import glu

    leaves = _tensors(check, *[(check.length, check.width)] * 2)
    return leaves, lambda gate, up: glu(gate, up, activation="silu"), lambda gate, up: F.silu(gate) * up, "glu"


def _cross_entropy(check: Check) -> Made:
    from kernels.fused.cross_entropy import linear_cross_entropy

    vocabulary = 1003
    leaves = [*_tensors(check, (check.length, check.width)), *_tensors(check, (vocabulary, check.width), scale=0.1)]
    targets = torch.randint(vocabulary, (check.length,), device=check.device)
    return (
        leaves,
        lambda hidden, weight: linear_cross_entropy(hidden, weight, targets)[0],
        lambda hidden, weight: F.cross_entropy(F.linear(hidden, weight), targets, reduction="sum"),
        "cross_entropy",
    )


_MAKERS: dict[str, Callable[[Check], Made]] = {
    "lightning": _lightning,
    "gated attention": _gated,
    "sigmoid attention": _sigmoid,
    "norm gate": _norm_gate,
    "glu": _glu,
    "cross entropy": _cross_entropy,
}
