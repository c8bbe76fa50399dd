"""The optimizer, its groups, and the learning rate as a pure function of the step."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from model.stack import undecayed_names
from parallel.muon import Muon
from parallel.spread import Spread
from trainer.config import OptimizerConfig, ScheduleConfig


def build_optimizer(
    model: Spread, config: OptimizerConfig, frozen: list[str], lr_factors: Mapping[str, float] = {}
) -> torch.optim.Optimizer:
    """AdamW, or Muon beside it, with weight decay on matrices only.

    Muon updates the matrices of layers that weight decay touches; embedding, positions, head, norms, biases and what
    layers exempt go by AdamW, and so does what is trained beside the model. All state is there already, so that a
    checkpoint can be read into it.

    Args:
        frozen: patterns of parameter names that are not trained.
        lr_factors: name -> what multiplies the learning rate of something trained beside the model; 1 where absent.

    Raises:
        ValueError: a pattern that no parameter matches, or nothing left to train.
    """
    names = [name for name, _ in model.uncut.named_parameters()]
    model.freeze(frozen_names([*names, *model.beside], frozen))
    undecayed = {name for stage in model.stages for name in undecayed_names(stage)} | model.reparam.undecayed
    groups: dict[float, list[Tensor]] = {config.weight_decay: [], 0.0: []}
    beside: dict[float, list[Tensor]] = {}
    matrices: list[str] = []
    for name, parameter in model.learned.items():
        if not parameter.requires_grad:
            continue
        decayed = parameter.ndim >= 2 and name not in undecayed
        if name in model.beside:
            # Plain tensors, which a fused update does not take together with sharded ones.
            beside.setdefault(lr_factors.get(name, 1.0), []).append(parameter)
        elif config.kind == "muon" and decayed and parameter.ndim == 2 and name.startswith("layers."):
            matrices.append(name)
        else:
            groups[config.weight_decay if decayed else 0.0].append(parameter)
    adamw = torch.optim.AdamW(
        # A stage of a pipeline may have nothing for one of the groups, or nothing that is trained at all.
        [{"params": parameters, "weight_decay": decay} for decay, parameters in groups.items()]
        + [{"params": found, "weight_decay": 0.0, "lr_factor": factor} for factor, found in beside.items()],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )
    for group in adamw.param_groups:
        for parameter in group["params"]:
            adamw.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
    if config.kind == "adamw":
        return adamw
    return Muon(
        model,
        matrices,
        adamw,
        lr=config.lr,
        weight_decay=config.weight_decay,
        momentum=config.momentum,
        nesterov=config.nesterov,
        ns_steps=config.ns_steps,
        adjust_lr=config.adjust_lr,
    )


def frozen_names(names: list[str], patterns: list[str]) -> set[str]:
    """The parameters that these patterns freeze, of the whole model's.

    Raises:
        ValueError: a pattern that no parameter matches, or nothing left to train.
    """
    unmatched = [pattern for pattern in patterns if not fnmatch.filter(names, pattern)]
    if unmatched:
        raise ValueError(f"run.freeze = {unmatched} matches no parameter; they are named like {names[0]}.")
    frozen = {name for pattern in patterns for name in fnmatch.filter(names, pattern)}
    if len(frozen) == len(names):
        raise ValueError(f"run.freeze = {patterns} leaves no parameter to train.")
    return frozen


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
    """The same learning rate for every group, times the factor that a group may have."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_factor", 1.0)
