"""The optimizer, its groups, and the learning rate as a pure function of the step."""

from __future__ import annotations

import fnmatch
import math

import torch
from torch import Tensor

from model.stack import Model, undecayed_names
from trainer.config import OptimizerConfig, ScheduleConfig


def build_optimizer(model: Model, config: OptimizerConfig, frozen: list[str]) -> torch.optim.Optimizer:
    """AdamW with weight decay on matrices only, its state already there (so that a checkpoint can be read into it).

    Args:
        frozen: patterns of parameter names that are not trained.

    Raises:
        ValueError: a pattern that no parameter matches, or nothing left to train.
    """
    names = dict(model.named_parameters())
    unmatched = [pattern for pattern in frozen if not fnmatch.filter(names, pattern)]
    if unmatched:
        raise ValueError(f"run.freeze = {unmatched} matches no parameter; they are named like {next(iter(names))}.")
    undecayed = undecayed_names(model)
    groups: dict[float, list[Tensor]] = {config.weight_decay: [], 0.0: []}
    for name, parameter in names.items():
        if any(fnmatch.fnmatch(name, pattern) for pattern in frozen):
            parameter.requires_grad_(False)
            continue
        decayed = parameter.ndim >= 2 and name not in undecayed
        groups[config.weight_decay if decayed else 0.0].append(parameter)
    if not any(groups.values()):
        raise ValueError(f"run.freeze = {frozen} leaves no parameter to train.")
    optimizer = torch.optim.AdamW(
        [{"params": parameters, "weight_decay": decay} for decay, parameters in groups.items() if parameters],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
    return optimizer


def learning_rate(step: int, peak: float, schedule: ScheduleConfig) -> float:
    """Learning rate of update number `step`, counted from 1; the last of the schedule ends at its final fraction."""
    final = peak * schedule.final_lr_fraction
    if step <= schedule.warmup_steps:
        return peak * step / schedule.warmup_steps
    if schedule.kind == "wsd":
        length = max(1, round(schedule.steps * schedule.decay_fraction))
        done = max(0.0, (step - (schedule.steps - length)) / length)
    else:
        done = (step - schedule.warmup_steps) / max(1, schedule.steps - schedule.warmup_steps)
    done = min(done, 1.0)
    if schedule.kind == "cosine":
        done = (1 - math.cos(math.pi * done)) / 2
    return peak + (final - peak) * done


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The same learning rate for every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr
