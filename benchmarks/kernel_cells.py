"""What `kernel_speed.py` times: for each operation the arms that do the same work, on tensors of one shape.

A cell is an operation at a shape; its arms take turns. An arm that cannot run says why in its row. Nothing here imports
more than torch and Headway's kernels until an arm is made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.dispatch import PORTABLE, TRITON, choose

OURS = "headway"


class Arm(NamedTuple):
    """One way to do a cell's work.

    Attributes:
        run: forward, from the leaves to one tensor.
        same: whether it computes what the first arm does, so that the two can be compared.
        form: which of ours runs, and why; "" for others.
        forms: the forms that are asked for while it runs, backward included.
    """

    leaves: list[Tensor]
    run: Callable[[], Tensor]
    same: bool = False
    form: str = ""
    forms: Mapping[str, str] = {}


@dataclass(frozen=True)
class Cell:
    """An operation at a shape, and the names of its arms, ours first."""

    operation: str
    arms: tuple[str, ...]
    length: int
    width: int
    batch: int = 1
    heads: int = 16
    vocabulary: int = 0

    @property
    def shape(self) -> dict[str, int]:
        """What a row says of it."""
        names = ("length", "width", "batch", "heads", "vocabulary")
        return {name: value for name in names if (value := getattr(self, name))}

    def __str__(self) -> str:
        return f"{self.operation} " + " ".join(f"{name}={value}" for name, value in self.shape.items())


def cells(cpu: bool) -> list[Cell]:
    """All of them, what is promised first; on a CPU at sizes that say nothing but that it runs."""
    found = list(_cells())
    return [_tiny(cell) for cell in found] if cpu else found


def _cells() -> Iterator[Cell]:
    gla, flash = "fla simple_gla", "flash"
    for length in (8192, 2048, 16384, 32768, 65536, 131072):
        yield _lightning(length, 128, OURS, flash)
    for width in (192, 256):
        yield _lightning(8192, width, OURS, flash)
    for length in (16384, 32768):
        yield Cell("gated attention", (OURS, "1/2", "3/4", "1/4", flash), length, 128, max(1, 2**15 // length))
    for length in (4096, 16384):
        yield Cell("sigmoid attention", (OURS, flash), length, 128, 2**15 // length)
    yield Cell("cross entropy", (OURS, "torch"), 16384, 2048, heads=0, vocabulary=32000)
    # Long enough that they are not done before the next launch.
    yield Cell("norm gate", (OURS, "torch", "torch, compiled"), 65536, 2048, heads=0)
    yield Cell("glu", (OURS, "torch", "torch, compiled"), 32768, 5632, heads=0)
    # fla searches for its settings when it is first called, which takes minutes: all that comes before is safe then.
    for length in (8192, 2048, 32768, 65536):
        yield _lightning(length, 128, OURS, gla)
    for length in (1024, 4096):
        yield _lightning(length, 128, OURS, flash)
    yield _lightning(8192, 128, OURS, "cudnn", "portable")
    yield _lightning(8192, 64, OURS, flash, "cudnn")
    yield _lightning(8192, 96, OURS, flash)
    yield Cell("gated attention", (OURS, "1/2", "3/4", "1/4", flash, "portable"), 4096, 128, 8)
    for length in (32768, 131072):
        yield _lightning(length, 64, OURS, flash)
    yield _lightning(8192, 128, OURS, "flex")
    yield _lightning(8192, 128, OURS, "fla retention")
    for width in (64, 192, 256):
        yield _lightning(8192, width, OURS, gla)
    yield Cell("cross entropy", (OURS, "torch"), 8192, 4096, heads=0, vocabulary=128256)


def _lightning(length: int, width: int, *arms: str) -> Cell:
    return Cell("lightning", arms, length, width, max(1, 2**15 // length))


def _tiny(cell: Cell) -> Cell:
    lengths = max(16, cell.length // 512)
    width = cell.width // 16
    return Cell(cell.operation, cell.arms, lengths, width, 1, min(cell.heads, 2), min(cell.vocabulary, 97))


def make_arm(cell: Cell, name: str, device: torch.device) -> Arm:
    """One arm of a cell; the same numbers, whatever its name. Raises whatever says that it cannot be."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return _MAKERS[cell.operation](cell, name, device, dtype)


def _leaves(*shapes: tuple[int, ...], device: torch.device, dtype: torch.dtype, scale: float = 1.0) -> list[Tensor]:
    return [(torch.randn(s, device=device) * scale).to(dtype).requires_grad_() for s in shapes]


def _said(operation: str, x: Tensor) -> str:
    choice = choose(operation, x)
    return f"{choice.form}: {choice.why}"


# ----------------------------------------------------------------------------------------- attention


def _attention_leaves(cell: Cell, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    shape = (cell.batch, cell.length, cell.heads, cell.width)
    return _leaves(shape, shape, shape, device=device, dtype=dtype)


def _softmax(backend: str, leaves: list[Tensor]) -> Arm:
    """Torch's causal attention by one of its backends alone; on a CPU by whichever it takes."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backends = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
    kept = [backends[backend]] if leaves[0].is_cuda else [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION]

    def run() -> Tensor:
        with sdpa_kernel(kept):
            out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in leaves), is_causal=True)
        return out.transpose(1, 2)

    return Arm(leaves, run)


def _flex(cell: Cell, leaves: list[Tensor]) -> Arm:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if not leaves[0].is_cuda:
        raise RuntimeError("FlexAttention is compiled for GPUs here")
    mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, cell.length, cell.length, device=leaves[0].device)
    compiled = torch.compile(flex_attention)

    def run() -> Tensor:
        return compiled(*(x.transpose(1, 2) for x in leaves), block_mask=mask).transpose(1, 2)

    return Arm(leaves, run)


def _lightning_arm(cell: Cell, name: str, device: torch.device, dtype: torch.dtype) -> Arm:
    from kernels.lightning import decay_slopes, lightning_attention

    leaves = _attention_leaves(cell, device, dtype)
    slopes_H = torch.tensor(decay_slopes("alibi_layer", cell.heads, 0, 24), device=device)

    def run() -> Tensor:
        return lightning_attention(*leaves, slopes_H)[0]

    if name == OURS:
        return Arm(leaves, run, form=_said("lightning", leaves[0]))
    if name == "portable":
        return Arm(leaves, run, same=True, forms={"lightning": "torch"})
    if name == "fla simple_gla":
        from fla.ops.simple_gla import chunk_simple_gla

        return Arm(leaves, lambda: chunk_simple_gla(*leaves, g_gamma=-slopes_H, scale=1.0)[0], same=True)
    if name == "fla retention":
        # Its decays are its own; the work is the same.
        from fla.ops.retention import chunk_retention

        return Arm(leaves, lambda: chunk_retention(*leaves, scale=1.0)[0])
    return _flex(cell, leaves) if name == "flex" else _softmax(name, leaves)


SHARES = {"3/4": 0.75, "1/2": 0.5, "1/4": 0.25}


def _gated_arm(cell: Cell, name: str, device: torch.device, dtype: torch.dtype) -> Arm:
    from kernels.attention import Visible
    from kernels.attention.gated import gated_attention
    from kernels.attention.selected import best_in_full

    leaves = _attention_leaves(cell, device, dtype)
    if name == "flash":
        return _softmax(name, leaves)
    index = None
    if name in SHARES:
        kept = max(1, round(SHARES[name] * cell.heads))
        index = torch.rand(cell.batch, cell.length, cell.heads, device=device).argsort(-1)[..., :kept]
    gate = torch.rand(leaves[0].shape[:3] if index is None else index.shape, device=device).requires_grad_()
    visible, scale = Visible(cell.length, cell.length), cell.width**-0.5

    def run() -> Tensor:
        return gated_attention(*leaves, gate, index, visible=visible, scale=scale)

    if name == "portable":
        return Arm([*leaves, gate], run, same=True, forms={"attention": "torch"})
    form = _said("attention", leaves[0])
    if form.startswith(TRITON) and best_in_full(index, visible, SHARES.get(name)):
        form = f"{PORTABLE}: its own attention, of all heads"
    return Arm([*leaves, gate], run, form=form)


def _sigmoid_arm(cell: Cell, name: str, device: torch.device, dtype: torch.dtype) -> Arm:
    from kernels.attention import Visible
    from kernels.attention.sigmoid import sigmoid_attention

    leaves = _attention_leaves(cell, device, dtype)
    if name == "flash":
        return _softmax(name, leaves)
    visible, scale = Visible(cell.length, cell.length), cell.width**-0.5
    bias = -torch.tensor(cell.length).log().item()
    return Arm(
        leaves,
        lambda: sigmoid_attention(*leaves, visible, scale=scale, bias=bias),
        form=_said("attention", leaves[0]),
    )


# ------------------------------------------------------------------------------------ fused operations


def _compiled(run: Callable[[], Tensor], leaves: list[Tensor]) -> Callable[[], Tensor]:
    if not leaves[0].is_cuda:
        raise RuntimeError("compiled on GPUs alone here")
    return torch.compile(run)


def _norm_gate_arm(cell: Cell, name: str, device: torch.device, dtype: torch.dtype) -> Arm:
    leaves = _leaves(*[(cell.length, cell.width)] * 2, device=device, dtype=dtype)
    x, gate = leaves
    if name == OURS:
        from kernels.fused.norm_gate import norm_gate

        return Arm(leaves, lambda: norm_gate(x, gate, eps=1e-6), form=_said("norm_gate", x))

    def plain() -> Tensor:
        return F.rms_norm(x, x.shape[-1:], eps=1e-6) * gate

    return Arm(leaves, plain if name == "torch" else _compiled(plain, leaves), same=True)


def _glu_arm(cell: Cell, name: str, device: torch.device, dtype: torch.dtype) -> Arm:
    leaves = _leaves(*[(cell.length, cell.width)] * 2, device=device, dtype=dtype)
    gate, up = leaves
    if name == OURS:
        from kernels.fused.glu import glu

        return Arm(leaves, lambda: glu(gate, up, activation="silu"), form=_said("glu", gate))

    def plain() -> Tensor:
        return F.silu(gate) * up

    return Arm(leaves, plain if name == "torch" else _compiled(plain, leaves), same=True)


def _cross_entropy_arm(cell: Cell, name: str, device: torch.device, dtype: torch.dtype) -> Arm:
    hidden, weight = _leaves((cell.length, cell.width), (cell.vocabulary, cell.width), device=device, dtype=dtype)
    with torch.no_grad():
        weight.mul_(cell.width**-0.5)
    targets = torch.randint(cell.vocabulary, (cell.length,), device=device)
    leaves = [hidden, weight]
    if name == OURS:
        from kernels.fused.cross_entropy import linear_cross_entropy

        return Arm(
            leaves, lambda: linear_cross_entropy(hidden, weight, targets)[0], form=_said("cross_entropy", hidden)
        )
    return Arm(leaves, lambda: F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum"), same=True)


_MAKERS: dict[str, Callable[[Cell, str, torch.device, torch.dtype], Arm]] = {
    "lightning": _lightning_arm,
    "gated attention": _gated_arm,
    "sigmoid attention": _sigmoid_arm,
    "norm gate": _norm_gate_arm,
    "glu": _glu_arm,
    "cross entropy": _cross_entropy_arm,
}
OPERATIONS = tuple(_MAKERS)
