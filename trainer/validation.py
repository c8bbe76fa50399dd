"""Validation in the loop: the same batches each time, summed over all ranks."""

from __future__ import annotations

from model.objective import Objective
from parallel.data import sum_over_ranks
from parallel.spread import Spread
from trainer.data.evaluation import EvaluationData
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

    def losses(self, model: Spread) -> dict[str, float] | None:
        """`val_loss` over all sources together and `val_loss/NAME` of each, in nats per token. Collective.

        None when some rank was asked to stop meanwhile: a stop must not wait for a long validation.
        """
        sums = {}
        model.evaluating(True)
        try:
            for name, source in self.sources.items():
                if (found := self._source_sums(model, source)) is None:
                    return None
                sums[name] = found
        finally:
            model.evaluating(False)
        nats = sum(found[0] for found in sums.values())
        counted = sum(found[1] for found in sums.values())
        losses = {"val_loss": nats / max(counted, 1.0)}
        if len(sums) > 1:
            losses |= {f"val_loss/{name}": found[0] / max(found[1], 1.0) for name, found in sums.items()}
        return losses

    def _source_sums(self, model: Spread, source: EvaluationData) -> tuple[float, float] | None:
        count = source.num_batches(self.batch_size)
        nats, counted = 0.0, 0.0
        for index in range(min(count, self.batches) if self.batches else count):
            batch = source.batch(index, self.rows, self.batch_size)
            mine_counted = batch.counted.sum().item() if model.mesh.is_first_of_share else 0.0
            mine = [model.evaluate(batch, self.objective), mine_counted, float(self.stop.requested)]
            batch_nats, batch_counted, stops = sum_over_ranks(mine)
            if stops:
                return None
            nats, counted = nats + batch_nats, counted + batch_counted
        return nats, counted
