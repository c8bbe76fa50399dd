"""The optimizer, its groups, and the learning rate as a pure function of the step."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from kernels.apex import fused_adam
from model.stack import undecayed_names
from parallel.muon import Muon
from parallel.spread import Spread
from parallel.zero import ZeroAdamW, ZeroSpread
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
    shapes = {name: parameter.shape for name, parameter in model.uncut.named_parameters()}
    model.freeze(frozen_names([*shapes, *model.beside], frozen))
    undecayed = {name for stage in model.stages for name in undecayed_names(stage)} | model.reparam.undecayed
    # A stage of a pipeline may have nothing for one of the groups, or nothing that is trained at all.
    cut: _Groups = {(config.weight_decay, 1.0): [], (0.0, 1.0): []}
    # A fused update does not take plain tensors together with sharded ones: what is apart has groups of its own.
    apart: _Groups = {}
    matrices: list[str] = []
    for name, parameter in model.learned.items():
        if not parameter.requires_grad:
            continue
        ndim = len(shapes.get(name, ()))
        decayed = ndim >= 2 and name not in undecayed
        if config.kind == "muon" and decayed and ndim == 2 and name.startswith("layers."):
            matrices.append(name)
            continue
        group = (config.weight_decay if decayed else 0.0, lr_factors.get(name, 1.0))
        (apart if name in model.apart else cut).setdefault(group, []).append(parameter)
    if isinstance(model, ZeroSpread):
        partitions = model.start(_adamw(config, cut, by_torch=True))
        return ZeroAdamW(model, partitions, _with_state(_adamw(config, apart)) if apart else None)
    adamw = _with_state(_adamw(config, cut, apart))
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


_Groups = dict[tuple[float, float], list[Tensor]]
"""(Weight decay, factor of the learning rate) -> parameters."""


def _adamw(config: OptimizerConfig, *groups: _Groups, by_torch: bool = False) -> torch.optim.AdamW:
    """AdamW over these groups: apex's, where it is there, right, and made for such tensors; torch's otherwise."""
    found: list[dict[str, Any]] = [
        {"params": parameters, "weight_decay": decay, "lr_factor": factor}
        for part in groups
        for (decay, factor), parameters in part.items()
    ]
    fits = not by_torch and all(_is_plain(parameter) for group in found for parameter in group["params"])
    kind: Any = (fused_adam() if fits else None) or torch.optim.AdamW
    return kind(found, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def _is_plain(parameter: Tensor) -> bool:
    """Whether it is whole, and on a GPU: apex's kernel knows nothing of other tensors."""
    return parameter.is_cuda and not isinstance(parameter, DTensor)


def _with_state(adamw: torch.optim.AdamW) -> torch.optim.AdamW:
    """All state is there from the beginning."""
    # torch's fused kernel counts on the device; apex's is told the count.
    on_device = isinstance(adamw, torch.optim.AdamW)
    for group in adamw.param_groups:
        for parameter in group["params"]:
            adamw.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device if on_device else "cpu"),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
    return adamw


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
