"""Validation in the loop: the same batches each time, summed over all ranks."""

from __future__ import annotations

from collections.abc import Iterable

from model.objective import Objective
from parallel.data import sum_over_ranks
from parallel.spread import Spread
from trainer.data.evaluation import EvaluationData
from trainer.modalities import counted_of_each, losses_of_each
from trainer.signals import StopRequest


class Validation:
    """Mean loss over the first `batches` global batches (0: all) of each validation source."""

    def __init__(
        self,
        sources: dict[str, EvaluationData],
        objective: Objective,
        *,
        every_steps: int,
        last_step: int,
        batch_size: int,
        batches: int,
        rows: range,
        stop: StopRequest,
    ):
        self.sources, self.objective = sources, objective
        self.every_steps, self.last_step = every_steps, last_step
        self.batch_size, self.batches, self.rows, self.stop = batch_size, batches, rows, stop

    def is_due(self, step: int) -> bool:
        """Whether one follows this update: every so many steps, and after the last."""
        return step % self.every_steps == 0 or step == self.last_step

    def losses(self, model: Spread) -> dict[str, float | None] | None:
        """`val_loss` over all sources together, `val_loss/NAME` of each, and `modality/NAME/val_loss` of each modality
        that the model tells apart, in nats per token. Collective.

        None when some rank was asked to stop meanwhile: a stop must not wait for a long validation.
        """
        sums: dict[str, list[list[float]]] = {}
        model.evaluating(True)
        try:
            for name, source in self.sources.items():
                if (found := self._source_sums(model, source)) is None:
                    return None
                sums[name] = found
        finally:
            model.evaluating(False)
        nats, counted = (_added(parts) for parts in zip(*sums.values(), strict=True))
        losses: dict[str, float | None] = {"val_loss": nats[0] / max(counted[0], 1.0)}
        if len(sums) > 1:
            losses |= {f"val_loss/{name}": found[0][0] / max(found[1][0], 1.0) for name, found in sums.items()}
        return losses | losses_of_each(model.architecture.untie, nats[1:], counted[1:], "val_loss")

    def _source_sums(self, model: Spread, source: EvaluationData) -> list[list[float]] | None:
        """Nats, and counted predictions: of all, then of each modality."""
        count = source.num_batches(self.batch_size)
        found = [[0.0] * (1 + model.modalities)] * 2
        for index in range(min(count, self.batches) if self.batches else count):
            batch = model.labelled(source.batch(index, self.rows, self.batch_size))
            counted = [float(batch.counted.sum()), *counted_of_each(batch, model.architecture.untie)]
            if not model.mesh.is_first_of_share:
                counted = [0.0] * len(counted)
            nats = [model.evaluate(batch, self.objective), *model.modality_nats]
            stops, *told = sum_over_ranks([float(self.stop.requested), *nats, *counted])
            if stops:
                return None
            found = [_added(parts) for parts in zip(found, (told[: len(nats)], told[len(nats) :]), strict=True)]
        return found


def _added(parts: Iterable[list[float]]) -> list[float]:
    """Sums, place by place."""
    return [sum(values) for values in zip(*parts, strict=True)]
