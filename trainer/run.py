"""A run put together from its configuration: model, data, optimizer, checkpoints and logs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kernels.dispatch import force, parse_wishes
from model.files import write_json
from model.hf.source import open_model
from parallel.data import sum_over_ranks
from parallel.mesh import Mesh, build_mesh, resolve_layout
from parallel.processes import Process, from_first_rank
from parallel.spread import Spread, spread
from parallel.zero import spread_by_zero
from parallel.zero_config import resolve_zero
from trainer.checkpoint import CheckpointWriter, Counters, load_training_state, load_weights, training_state
from trainer.config import Config
from trainer.data.evaluation import validation_sets
from trainer.data.training import TrainingData
from trainer.diagnostics import Diagnostics, unchosen
from trainer.metrics import MetricsLog, last_record
from trainer.objective import add_auxiliary_losses, make_objective
from trainer.optimizer import build_optimizer
from trainer.profiling import Profiler
from trainer.progress import Progress
from trainer.resume import Plan, checkpoint_files
from trainer.signals import StopRequest
from trainer.status import Status
from trainer.step import Outcome, Updater
from trainer.summary import summarise
from trainer.throughput import peak_flops, training_flops_per_token
from trainer.validation import Validation


@dataclass
class Run:
    """Everything the loop speaks of."""

    config: Config
    model: Spread
    optimizer: torch.optim.Optimizer
    updater: Updater
    data: TrainingData
    validation: Validation | None
    diagnostics: Diagnostics
    profiler: Profiler
    checkpoints: CheckpointWriter
    counters: Counters
    rows: range
    metrics: MetricsLog | None
    progress: Progress
    status: Status
    stop: StopRequest
    world_size: int
    flops_per_token: float
    peak_flops: float | None

    @property
    def last_step(self) -> int:
        """The step after which this process ends, unless it is asked to stop before."""
        return min(self.config.schedule.steps, self.config.run.stop_at_step or self.config.schedule.steps)

    def asked_to_stop(self) -> bool:
        """Whether any rank was asked to stop. Collective."""
        return sum_over_ranks([float(self.stop.requested)])[0] > 0

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return training_state(self.model, self.optimizer, self.counters)

    def record(self, outcome: Outcome, lr: float, seconds: float) -> dict[str, Any]:
        """The object that `metrics.jsonl` gets for this step."""
        tokens_per_second = self.config.data.global_batch_size * self.config.data.seq_len / seconds
        mfu = None
        if self.peak_flops is not None:
            mfu = tokens_per_second * self.flops_per_token / (self.peak_flops * self.world_size)
        return {
            "step": self.counters.step,
            "loss": outcome.loss,
            **outcome.auxiliary,
            **({"total_loss": outcome.total_loss} if outcome.auxiliary else {}),
            **outcome.by_modality,
            "grad_norm": outcome.grad_norm,
            "tokens": self.counters.tokens,
            "lr": lr,
            "step_time": seconds,
            "tokens_per_second": tokens_per_second,
            "mfu": mfu,
            "skipped": outcome.skipped,
        }

    def log(self, record: dict[str, Any]) -> None:
        """Metrics, console and status; the first rank's business."""
        self.status.step = record["step"]
        if self.metrics is not None:
            self.metrics.write(record)
            if record["skipped"]:
                self.status.event("skipped", step=record["step"], loss=str(record["loss"]))
                self.progress.note(f"step {record['step']}: loss or gradient is not finite, the update is skipped")
            for idle in unchosen(record):
                self.progress.note(f"step {record['step']}: {idle}")
        self.progress.update(record)


@contextmanager
def open_run(config: Config, plan: Plan, process: Process, stop: StopRequest, status: Status) -> Iterator[Run]:
    """Build the run that `config` and `plan` describe; its files are closed at the end. Collective."""
    mesh = build_mesh(resolve_layout(config.parallel, process.world_size), process.device_type)
    force(parse_wishes(config.run.kernels))
    if config.run.deterministic:
        torch.use_deterministic_algorithms(True)
    model = _spread(config, plan.precision, mesh, process.device)
    model.initialise(config.run.seed)
    lr_factors = add_auxiliary_losses(model, config)
    optimizer = build_optimizer(model, config.optimizer, config.run.freeze, lr_factors)
    model.keep_rows(config.run.frozen_ids)
    counters = _restore(plan, model, optimizer)
    status.step = counters.step
    share = config.data.global_batch_size // mesh.layout.data_parallel
    rows = range(mesh.data_rank * share, (mesh.data_rank + 1) * share)
    objective = make_objective(model, config)
    updater = Updater(
        model, optimizer, objective, grad_clip=config.optimizer.grad_clip, seed=config.run.seed, stop=stop
    )
    data = TrainingData(
        config.data,
        seed=config.run.seed,
        samples=config.samples,
        cache_dir=plan.cache_dir,
        vocab_size=config.model.vocab_size,
        untie=config.architecture.untie,
    )
    validation = _validation(config, objective, rows, stop)
    checkpoints = CheckpointWriter(
        Path(config.run.dir), config.checkpoint, lambda folder: checkpoint_files(folder, config, plan), status.event
    )
    if plan.resume_from is not None:
        checkpoints.saved_step = counters.step
    flops_per_token = training_flops_per_token(model.uncut.flops(config.data.seq_len))
    peak = peak_flops(process.device, plan.precision)
    if process.is_first:
        summary = summarise(model.uncut, mesh.layout, process, plan.precision, flops_per_token)
        write_json(Path(config.run.dir) / "summary.json", summary)
    made_up = _left_out_validation(config, process, model, validation, counters.step)
    profiler = Profiler(config.run.profile_steps, Path(config.run.dir) / "logs", process.rank)
    with _logs(config, process, counters.step, peak, made_up) as (metrics, progress), closing(profiler):
        yield Run(
            config=config,
            model=model,
            optimizer=optimizer,
            updater=updater,
            data=data,
            validation=validation,
            diagnostics=Diagnostics(config.metrics.diagnose_every_steps),
            profiler=profiler,
            checkpoints=checkpoints,
            counters=counters,
            rows=rows,
            metrics=metrics,
            progress=progress,
            status=status,
            stop=stop,
            world_size=process.world_size,
            flops_per_token=flops_per_token,
            peak_flops=peak,
        )
        checkpoints.close()


def _spread(config: Config, precision: str, mesh: Mesh, device: torch.device) -> Spread:
    """This process's part of the model, by the engine that the configuration names."""
    how: dict[str, Any] = {
        "precision": precision,
        "recompute": config.parallel.recompute,
        "compiled": config.run.compile,
    }
    if (zero := resolve_zero(config.parallel)) is not None:
        rows = config.data.global_batch_size // mesh.layout.data_parallel // mesh.layout.microbatches
        return spread_by_zero(config.architecture, mesh, device, zero, micro_batch_size=rows, **how)
    return spread(config.architecture, mesh, device, seq_len=config.data.seq_len, reparam=config.reparam, **how)


def _restore(plan: Plan, model: Spread, optimizer: torch.optim.Optimizer) -> Counters:
    """Continue from a checkpoint, begin with another model's weights, or begin. Collective."""
    if plan.resume_from is not None:
        return load_training_state(plan.resume_from, model, optimizer)
    if plan.init_from is not None:
        load_weights(open_model(plan.init_from), model)
    model.reparam.begin()
    return Counters()


def _left_out_validation(
    config: Config, process: Process, model: Spread, validation: Validation | None, step: int
) -> dict[str, Any] | None:
    """A stop does not wait for a validation; the run that goes on makes up for it. Collective.

    Returns the record of `step` with its validation losses, on the first rank, if that step still lacks them.
    """
    if validation is None or step == 0 or not validation.is_due(step):
        return None
    record = last_record(Path(config.run.dir)) if process.is_first else None
    left_out = record is not None and record["step"] == step and "val_loss" not in record
    if not from_first_rank(left_out):
        return None
    losses = validation.losses(model)
    return None if record is None else record | (losses or {})


@contextmanager
def _logs(
    config: Config, process: Process, step: int, peak: float | None, made_up: dict[str, Any] | None
) -> Iterator[tuple[MetricsLog | None, Progress]]:
    """Metrics and console of a run that stands at `step`; the first rank's business.

    `made_up` is written in place of the last step's record.
    """
    with ExitStack() as stack:
        metrics = None
        if process.is_first:
            kept = step if made_up is None else step - 1
            metrics = MetricsLog(Path(config.run.dir), config.metrics.sinks, resumed_step=kept)
            stack.enter_context(metrics)
            if made_up is not None:
                metrics.write(made_up)
        progress = Progress(
            config.schedule.steps,
            step + 1,
            log_every_steps=config.metrics.log_every_steps,
            enabled=process.is_first,
            peak=None if peak is None else f"{peak / 1e12:.0f} TFLOP/s per device",
        )
        yield metrics, stack.enter_context(progress)


def _validation(config: Config, objective: Any, rows: range, stop: StopRequest) -> Validation | None:
    if config.data.validate_every_steps == 0:
        return None
    return Validation(
        validation_sets(config.data, vocab_size=config.model.vocab_size, untie=config.architecture.untie),
        objective,
        every_steps=config.data.validate_every_steps,
        last_step=config.schedule.steps,
        batch_size=config.data.global_batch_size,
        batches=config.data.validation_batches,
        rows=rows,
        stop=stop,
    )
