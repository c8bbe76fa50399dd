"""NVIDIA's apex, where it is really there and computes what it should: its fused Adam.

The package index has another project of that name, and a build of NVIDIA's may not fit the torch beside it. So nothing
of it is used before it was found, recognised and compared with torch on a small tensor, once for each process.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

TOLERANCE = 1e-6
"""Largest difference of a parameter after three updates, of parameters around 1; in fp32 rounding leaves some 1e-7."""


@dataclass(frozen=True)
class Apex:
    """What was found.

    Attributes:
        state: `missing`; `another` project of the name; `unchecked`, for want of a CUDA device; `broken`: it cannot be
            imported or run; `wrong`: it computes something else than torch; `taken`.
        said: a sentence about it.
        adam: a class that takes the place of `torch.optim.AdamW`; None unless it is taken.
    """

    state: Literal["missing", "another", "unchecked", "broken", "wrong", "taken"]
    said: str
    adam: type[torch.optim.Optimizer] | None = None


@cache
def apex() -> Apex:
    """NVIDIA's apex on this machine, looked at once."""
    return examine("cuda" if torch.cuda.is_available() else None)


def fused_adam() -> type[torch.optim.Optimizer] | None:
    """apex's Adam with decoupled decay, in the place of `torch.optim.AdamW`; None where it is not there or not right.

    For plain tensors alone: its kernel knows nothing of sharded ones.
    """
    return apex().adam


def examine(device: str | None) -> Apex:
    """Look for apex and compare it with torch on a device; None: there is none on which it runs."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return Apex("missing", "not installed; torch's fused AdamW is used")
    # Importing a package to see what it is would run it.
    places = [Path(place) for place in spec.submodule_search_locations or ()]
    if not any((place / "optimizers").is_dir() for place in places):
        return Apex("another", f"{_named()} is another project, not NVIDIA's apex; torch's fused AdamW is used")
    if device is None:
        return Apex("unchecked", "there is no CUDA device to compare it on; torch's AdamW is used")
    try:
        adam = _as_torch_has_it(importlib.import_module("apex.optimizers").FusedAdam)
        difference = _difference(adam, device)
    except Exception as error:  # whatever an extension that does not fit may raise
        said = (str(error).strip().splitlines() or [""])[0]
        return Apex("broken", f"cannot be used ({type(error).__name__}: {said}); torch's fused AdamW is used")
    if not difference <= TOLERANCE:
        return Apex("wrong", f"FusedAdam is {difference:.1e} off torch's AdamW, so torch's is used")
    return Apex("taken", f"FusedAdam is within {difference:.1e} of torch's AdamW, and used", adam)


def _named() -> str:
    """The distribution, with what it says of itself."""
    try:
        found = distribution("apex")
    except PackageNotFoundError:
        return "what `import apex` finds"
    return f"apex {found.version} ({found.metadata['Summary'] or 'no summary'})"


def _as_torch_has_it(theirs: Any) -> type[torch.optim.Optimizer]:
    """FusedAdam with torch's signature and state: `step` of each parameter, where apex counts in its groups. It is kept
    on the CPU, since it is looked at before each update."""

    class FusedAdamW(theirs):
        """apex's FusedAdam, in the place of torch's AdamW."""

        def __init__(self, params: Any, lr: float, betas: Any, eps: float, weight_decay: float = 0.0, **_: Any):
            super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, adam_w_mode=True)

        def step(self, closure: Any = None) -> Any:
            """One update of every parameter that has a gradient."""
            for group in self.param_groups:
                steps = {int(self._state(parameter)["step"]) for parameter in _with_gradient(group)}
                assert len(steps) <= 1, f"parameters of a group have seen {steps} updates"
                # It counts up before it computes.
                group["step"] = next(iter(steps), 0)
            loss = super().step(closure)
            for group in self.param_groups:
                for parameter in _with_gradient(group):
                    self.state[parameter]["step"] += 1
            return loss

        def zero_grad(self, set_to_none: bool = True) -> None:
            """As torch's; apex's takes no argument."""
            torch.optim.Optimizer.zero_grad(self, set_to_none)

        def _state(self, parameter: Tensor) -> Any:
            state = self.state[parameter]
            if "step" not in state:
                state["step"] = torch.zeros((), dtype=torch.float32)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
            return state

    return FusedAdamW


def _with_gradient(group: Any) -> Iterator[Tensor]:
    return (parameter for parameter in group["params"] if parameter.grad is not None)


def _difference(adam: Any, device: str) -> float:
    """The largest after three updates, with decay, from the same gradients."""
    generator = torch.Generator().manual_seed(0)
    start, *gradients = torch.randn(4, 33, 17, generator=generator).to(device)
    ends = []
    for kind in (adam, torch.optim.AdamW):
        parameter = start.clone().requires_grad_()
        optimizer = kind([parameter], lr=0.05, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
        for gradient in gradients:
            parameter.grad = gradient.clone()
            optimizer.step()
        ends.append(parameter.detach())
    return (ends[0] - ends[1]).abs().max().item()
