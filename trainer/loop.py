"""The training loop, to be read aloud."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Literal

from trainer.optimizer import learning_rate

if TYPE_CHECKING:
    from trainer.run import Run

Ending = Literal["finished", "stopped", "preempted"]


class TooManySkipped(RuntimeError):
    """The loss or the gradients stayed non-finite for as many updates in a row as the configuration allows."""


def train(run: Run) -> Ending:
    """Train from where the run stands to where it ends or is stopped, and leave a checkpoint there. Collective."""
    counters, config = run.counters, run.config
    preempted = run.asked_to_stop()
    while counters.step < run.last_step and not preempted:
        began = time.perf_counter()
        step = counters.step + 1
        lr = learning_rate(step, config.optimizer.lr, config.schedule)

        with run.profiler.step(step):
            batch = run.data.batch(counters.step, run.rows)
            outcome = run.updater.update(batch, step, lr)

        counters.step = step
        counters.samples += config.data.global_batch_size
        counters.tokens += config.data.global_batch_size * config.data.seq_len
        counters.skipped += outcome.skipped
        counters.skipped_in_a_row = counters.skipped_in_a_row + 1 if outcome.skipped else 0
        record = run.record(outcome, lr, seconds=time.perf_counter() - began)
        record |= run.diagnostics.record(run.model, batch, step)

        preempted = outcome.stop
        if run.validation is not None and run.validation.is_due(step) and not preempted:
            losses = run.validation.losses(run.model)
            preempted = losses is None
            record |= losses or {}

        run.log(record)
        if counters.skipped_in_a_row >= config.optimizer.max_skipped_in_a_row:
            raise TooManySkipped(
                f"{counters.skipped_in_a_row} updates in a row had a non-finite loss or gradient "
                "(optimizer.max_skipped_in_a_row); the newest checkpoint is older than the first of them "
                "or holds the same weights."
            )
        if run.checkpoints.is_due(step):
            run.checkpoints.save(run.state(), step)

    run.checkpoints.wait()
    if run.checkpoints.saved_step != counters.step:
        run.checkpoints.save(run.state(), counters.step)
        run.checkpoints.wait(must_succeed=True)
    if counters.step >= config.schedule.steps:
        return "finished"
    return "preempted" if preempted else "stopped"
