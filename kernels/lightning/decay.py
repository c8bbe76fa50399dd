"""Decay slopes: how fast each head of each layer forgets.

Three formulas are in circulation and they make different models, so a schedule is always named. Slopes are Python
floats, computed from global head and layer indices; whoever shards the heads slices the finished list.
"""

import difflib
import math
from collections.abc import Callable

# Keeps the last layer from not forgetting at all: its layer factor is this instead of 0.
_LAST_LAYER_FACTOR = 1e-5


def alibi_ladder(num_heads: int) -> list[float]:
    """Return the ALiBi slopes of `num_heads` heads (Press et al., arXiv 2108.12409), in the order released models use.

    For a power of two: 2^(-8(h+1)/H). Otherwise the ladder of the largest power of two P below H, then every other
    entry of the ladder of 2P; the order is then not monotone.
    """
    power = 2 ** math.floor(math.log2(num_heads))
    ladder = [2.0 ** (-8.0 * (head + 1) / power) for head in range(power)]
    if power == num_heads:
        return ladder
    return ladder + alibi_ladder(2 * power)[0::2][: num_heads - power]


def _alibi_layer(num_heads: int, layer: int, num_layers: int) -> list[float]:
    """TransNormerLLM as released: ALiBi ladder times (1 - l/(L-1) + 1e-5)."""
    layer_factor = 1.0 - layer / max(num_layers - 1, 1) + _LAST_LAYER_FACTOR
    return [slope * layer_factor for slope in alibi_ladder(num_heads)]


def _alibi_layer_minimax(num_heads: int, layer: int, num_layers: int) -> list[float]:
    """MiniMax-01 in Hugging Face transformers: 2^(-8(h+1)/H) for every H, and 1e-5 in the divisor as well."""
    layer_factor = 1.0 - layer / (num_layers - 1 + 1e-5) + _LAST_LAYER_FACTOR
    return [2.0 ** (-8.0 * (head + 1) / num_heads) * layer_factor for head in range(num_heads)]


def _paper(num_heads: int, layer: int, num_layers: int) -> list[float]:
    """The formula as printed, arXiv 2405.17381 Eq. 10, indices from zero: head 0 never forgets."""
    return [8.0 * head / num_heads * (1.0 - layer / num_layers) for head in range(num_heads)]


SCHEDULES: dict[str, Callable[[int, int, int], list[float]]] = {
    "alibi_layer": _alibi_layer,
    "alibi_layer_minimax": _alibi_layer_minimax,
    "paper": _paper,
}


def decay_slopes(schedule: str, num_heads: int, layer: int, num_layers: int) -> list[float]:
    """Return the slopes s >= 0 of one layer, one per head; a head's state shrinks by exp(-s) per token.

    Args:
        schedule: `alibi_layer` (TransNormerLLM checkpoints), `alibi_layer_minimax` (MiniMax checkpoints) or `paper`
            (arXiv 2405.17381 Eq. 10; no released checkpoint uses it).
        num_heads: heads of the whole model, not of a tensor-parallel shard.
        layer: index in the whole model, from zero, not in a pipeline stage.
        num_layers: layers of the whole model.

    Raises:
        ValueError: the schedule is unknown, or an index or a count is out of range.
    """
    if schedule not in SCHEDULES:
        nearest = difflib.get_close_matches(schedule, SCHEDULES, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"unknown decay schedule {schedule!r}; the nearest is {nearest!r}, and there are {', '.join(SCHEDULES)}"
        )
    if num_heads < 1:
        raise ValueError(f"decay slopes need at least one head, received num_heads = {num_heads}")
    if not 0 <= layer < num_layers:
        raise ValueError(f"layer must be in 0 .. num_layers - 1 = {num_layers - 1}, received {layer}")
    return SCHEDULES[schedule](num_heads, layer, num_layers)
