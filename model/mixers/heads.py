"""What mixers with heads have in common: how their projections are cut, and what is wrong with counts and widths."""

from __future__ import annotations

from collections.abc import Mapping

from model.layer import Sharding

PROJECTIONS: Mapping[str, Sharding] = {
    "q.weight": "column",
    "k.weight": "column",
    "v.weight": "column",
    "q.bias": "column",
    "k.bias": "column",
    "v.bias": "column",
    "o.weight": "row",
    "o.bias": "replicate",
}
"""How queries, keys, values and the output projection are cut: by heads."""


def head_faults(d_model: int, num_heads: int, **widths: int | None) -> list[str]:
    """Why so many heads cannot be built; `widths` by their keys, `head_dim` among them, None where left out."""
    if num_heads < 1:
        return [f"num_heads = {num_heads} must be at least 1."]
    faults = [
        f"{key} = {width} must be at least 1." for key, width in widths.items() if width is not None and width < 1
    ]
    if widths["head_dim"] is None and d_model % num_heads:
        faults.append(
            f"num_heads = {num_heads} does not divide model.d_model = {d_model}: set head_dim, or take "
            f"num_heads = {nearest_divisor(d_model, num_heads)}."
        )
    return faults


def rotation_faults(d_model: int, num_heads: int, head_dim: int | None, otherwise: str = "") -> list[str]:
    """Why heads of this width cannot be rotated; `otherwise` is another way out."""
    if num_heads < 1 or (head_dim is None and d_model % num_heads):
        return []  # That has been said.
    width = d_model // num_heads if head_dim is None else head_dim
    if width % 2 == 0:
        return []
    return [f"head_dim = {width} must be even, since positions turn pairs of channels: take {width + 1}{otherwise}."]


def nearest_divisor(number: int, wanted: int) -> int:
    """The divisor of `number` nearest to `wanted`."""
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    return min(divisors, key=lambda d: abs(d - wanted))
