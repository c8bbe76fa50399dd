"""Initial values by name: a parameter's value depends on the seed and its full name, never on who holds which part.

A matrix is drawn in blocks of rows, each from a generator of its own seeded by (seed, name, block), on the CPU in fp32,
so that a rank draws only the rows it holds and a layout cannot change the model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

ROWS_PER_BLOCK = 256


@dataclass(frozen=True)
class Normal:
    """Independent normals with mean 0 and this standard deviation."""

    std: float


@dataclass(frozen=True)
class Constant:
    """The same value everywhere."""

    value: float


@dataclass(frozen=True)
class Computed:
    """A function of the global shape, for values that follow a formula (fp32, on the CPU)."""

    values: Callable[[torch.Size], Tensor]


Init = Normal | Constant | Computed


def draw(name: str, init: Init, shape: torch.Size, seed: int, rows: range | None = None) -> Tensor:
    """Initial values of rows `rows` (default: all) of the parameter `name` of global shape `shape`.

    Returns an fp32 CPU tensor of shape `[len(rows), *shape[1:]]`.
    """
    rows = range(shape[0]) if rows is None else rows
    if isinstance(init, Constant):
        return torch.full((len(rows), *shape[1:]), init.value)
    if isinstance(init, Computed):
        return init.values(shape).float()[rows.start : rows.stop].clone()
    part = torch.empty(len(rows), *shape[1:])
    if len(rows) == 0:
        return part
    for block in range(rows.start // ROWS_PER_BLOCK, (rows.stop - 1) // ROWS_PER_BLOCK + 1):
        first = block * ROWS_PER_BLOCK
        last = min(first + ROWS_PER_BLOCK, shape[0])
        values = torch.empty(last - first, *shape[1:])
        values.normal_(0.0, init.std, generator=_generator(seed, name, block))
        begin, end = max(first, rows.start), min(last, rows.stop)
        part[begin - rows.start : end - rows.start] = values[begin - first : end - first]
    return part


def _generator(seed: int, name: str, block: int) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed}/{name}/{block}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def all_inits(model: nn.Module) -> dict[str, Init]:
    """Initial value of every parameter by its full name, collected from the modules that declare them.

    Raises:
        ValueError: parameters without a declared initial value.
    """
    inits: dict[str, Init] = {}
    for prefix, module in model.named_modules():
        declare = getattr(module, "init_weights", None)
        if declare is not None:
            inits |= {f"{prefix}.{name}".lstrip("."): init for name, init in declare().items()}
    missing = [name for name, _ in model.named_parameters() if name not in inits]
    if missing:
        raise ValueError(f"init_weights() declares no initial value for {', '.join(missing)}.")
    return inits
