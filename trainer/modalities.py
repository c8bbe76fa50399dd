"""What a record says of each modality, where a model has weights for each."""

from __future__ import annotations

from model.batch import Batch
from model.untie import UntieConfig


def counted_of_each(batch: Batch, untie: UntieConfig | None) -> list[float]:
    """How many counted predictions of a batch are of each modality, by their targets; none without modalities."""
    if untie is None:
        return []
    assert batch.target_modalities is not None
    of_each = (batch.counted & (batch.target_modalities == modality) for modality in range(untie.modalities))
    return [float(counted.sum()) for counted in of_each]


def losses_of_each(
    untie: UntieConfig | None, nats: list[float], counted: list[float], name: str = "loss"
) -> dict[str, float | None]:
    """`modality/NAME/loss` of each, in nats per counted token of its own over the whole batch; null without any."""
    names = [] if untie is None else untie.called
    found = zip(names, nats, counted, strict=True)
    return {f"modality/{each}/{name}": total / tokens if tokens else None for each, total, tokens in found}


def tokens_of_each(untie: UntieConfig | None, counted: list[float]) -> dict[str, float | None]:
    """`modality/NAME/tokens`: so many predictions counted."""
    names = [] if untie is None else untie.called
    return {f"modality/{each}/tokens": int(tokens) for each, tokens in zip(names, counted, strict=True)}
