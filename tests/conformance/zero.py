"""Two training steps under DeepSpeed's ZeRO, told in the words of `layouts.two_steps`."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from parallel.config import ParallelConfig
from tests.conformance.layouts import SCALARS, Case, beside, build, full, note_step, updater_of


def _zero(stage: int, **settings: Any) -> ParallelConfig:
    return ParallelConfig(engine="deepspeed", zero_stage=stage, **settings)


ZERO_LAYOUTS: dict[str, tuple[int, ParallelConfig]] = {
    "zero 1 on 1": (1, _zero(1)),
    **{f"zero {stage} on 2": (2, _zero(stage, microbatches=2)) for stage in (1, 2, 3)},
    **{f"zero {stage} on 4": (4, _zero(stage)) for stage in (1, 2, 3)},
    **{
        f"zero {s} on 2, optimizer offloaded": (2, _zero(s, offload_optimizer="cpu", microbatches=2)) for s in (1, 2, 3)
    },
    "zero 3 on 2, parameters offloaded": (2, _zero(3, offload_parameters="cpu")),
    "zero 3 on 4, all offloaded": (4, _zero(3, offload_optimizer="cpu", offload_parameters="cpu", microbatches=2)),
    "zero 2 on 2, selective recomputation": (2, _zero(2, recompute="selective", microbatches=2)),
    "zero 3 on 2, recompute": (2, _zero(3, recompute="full", microbatches=2)),
    "zero 3 on 2, selective recomputation": (2, _zero(3, recompute="selective")),
}
"""DeepSpeed's engine; a name is processes and settings."""


def two_steps_by_zero(case: Case, parallel: ParallelConfig, precision: str = "fp32") -> dict[str, Any]:
    """As `layouts.two_steps`. DeepSpeed lets go of gradients before its step is done, so those of the first step are
    found in AdamW's first moments: 1 - beta of them."""
    model = build(case, parallel, precision)
    updater = updater_of(model, case)
    seen: dict[str, Any] = {what: [] for what in SCALARS}
    for step in (1, 2):
        note_step(seen, model, updater, case, step)
        if step == 1:
            states = updater.optimizer.state
            found = {name: states[p]["exp_avg"] for name, p in model.learned.items() if p in states}
            seen["gradients"] = {name: full(moment) / (1 - 0.9) for name, moment in found.items()}
    parameters = {name: full(whole).detach().clone() for name, whole in model.whole_parameters().items()}
    seen["parameters"] = parameters | {name: p.detach().clone() for name, p in model.beside.items()}
    seen["beside"] = beside(model)
    if dist.get_rank():
        seen["gradients"], seen["parameters"] = {}, {}
    return seen
