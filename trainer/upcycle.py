"""A dense checkpoint as one that chooses its heads."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from model.config import Architecture
from model.hf.check import Agreement
from model.hf.loading import load_source
from model.hf.names import parameter_shapes
from model.hf.source import Source, Weights
from model.initialisation import Normal, draw
from model.mixers.attention import AttentionConfig
from model.mixers.moh import MoH
from model.mixers.softmax import Softmax, SoftmaxConfig
from model.settings import architecture_tables, build_architecture, without_none
from trainer.convert import Say
from trainer.remaking import Change, remake

ROUTER_STD = 0.002
"""Of a learned router's weights for routed heads. So small that gates are 1 within a few percent, while which heads are
chosen differs between tokens all the same; the other routers begin as zeros, which is 1."""


@dataclass(frozen=True)
class HeadChoice:
    """What `headway upcycle moh` is told about heads."""

    shared_heads: int
    active_heads: int
    router: Literal["learned", "norm"] = "norm"
    route_unit: Literal["head", "kv_group"] = "head"


def to_moh(
    model: Path,
    out: Path,
    choice: HeadChoice,
    *,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    say: Say = print,
) -> Agreement:
    """Write MODEL with mixture-of-head attention in place of softmax attention, as `remake` does.

    The weights are the model's own. With all heads on, logits are those of the model: that is what is compared.
    """

    def change_of(dense: Architecture) -> Change:
        routed = with_routed_heads(dense, choice)
        return Change(
            routed,
            weights=lambda weights: _WithRouters(weights, dense, routed),
            words=lambda _: f"; {_heads(routed)}",
            said=lambda same: f"logits with all heads on and of the source: {same}",
            logits=all_heads_logits,
        )

    return remake(model, out, change_of, dtype=dtype, max_shard_size=max_shard_size, overwrite=overwrite, say=say)


def with_routed_heads(dense: Architecture, choice: HeadChoice) -> Architecture:
    """The same model with mixture-of-head attention wherever it has softmax attention, heads kept as they are numbered.

    Raises:
        ValueError: with every reason why it cannot be.
    """
    faults = [
        f"mixers.{name} is mixture-of-head attention already: begin with the dense model."
        for name, (mixer, _) in dense.mixers.items()
        if mixer is MoH
    ]
    if not any(mixer in (Softmax, MoH) for mixer, _ in dense.mixers.values()):
        kinds = ", ".join(mixer.__name__ for mixer, _ in dense.mixers.values())
        faults.append(f"no layer has softmax attention, whose heads could be chosen (the mixers are {kinds}).")
    tables, problems = in_place_of_softmax(
        dense,
        "moh",
        "mixture-of-head attention",
        lambda settings: {"group_order": list(range(settings.groups))} | without_none(choice),
    )
    faults += problems
    _, routed = build_architecture(tables, faults)
    if routed is None or faults:
        raise ValueError("\n".join(faults))
    return routed


def in_place_of_softmax(
    dense: Architecture, kind: str, called: str, added: Callable[[SoftmaxConfig], dict[str, Any]]
) -> tuple[dict[str, Any], list[str]]:
    """The tables of a model with other attention wherever it has softmax attention, and why that cannot be.

    Args:
        kind: of the other attention; `called` so in sentences.
        added: its settings beside those that all attention has.
    """
    faults, names = [], {}
    tables = architecture_tables(dense)
    before, tables["mixers"] = tables["mixers"], {}
    for name, (mixer, settings) in dense.mixers.items():
        table = before[name]
        if mixer is Softmax:
            if settings.takes_weight:
                faults.append(f"mixers.{name} has a key bias or a sink, which {called} has not.")
            kept = {field.name for field in fields(AttentionConfig)}
            table = {key: value for key, value in table.items() if key in kept}
            table |= {"kind": kind} | added(settings)
        names[name] = kind if name == "softmax" and kind not in dense.mixers else name
        tables["mixers"][names[name]] = table
    pattern = [names[name] for name in dense.mixer_names]
    tables["model"]["pattern"] = pattern[:1] if len(set(pattern)) == 1 else pattern
    factors = tables["model"].get("residual_factors", {})
    tables["model"]["residual_factors"] = {names.get(name, name): factor for name, factor in factors.items()}
    return tables, faults


def all_heads_logits(made: Source, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """Logits of a model with mixture-of-head attention in which every head runs, with a gate of 1, in fp32."""
    model = load_source(made, dtype=dtype).to(torch.float32)
    for block in model.layers.values():
        if isinstance(block.mixer, MoH):
            settings = block.mixer.config
            block.mixer.config = replace(settings, active_heads=settings.num_heads - settings.shared_heads)
            for name, parameter in block.mixer.named_parameters():
                if name.split(".")[0] in MoH.routers:
                    parameter.data.zero_()
    with torch.no_grad():
        return model(tokens)


class _WithRouters(Weights):
    """The weights of a dense model, and initial ones for the routers that it has not."""

    def __init__(self, dense: Weights, before: Architecture, after: Architecture):
        self._dense = dense
        self._known, self._shapes = parameter_shapes(before).keys(), parameter_shapes(after)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name in names:
            if name in self._known:
                found |= self._dense.read([name])
            else:
                std = ROUTER_STD if name.endswith(".route.weight") else 0.0
                found[name] = draw(name, Normal(std), torch.Size(self._shapes[name]), seed=0)
        return found


def _heads(routed: Architecture) -> str:
    """How many heads run, in words."""
    told: dict[str, Any] = {}
    for mixer, settings in routed.mixers.values():
        if mixer is MoH:
            running = settings.shared_heads + settings.active_heads
            told[
                f"of {settings.num_heads} query heads {running} run for a token: {settings.shared_heads} shared, "
                f"{settings.active_heads} of {settings.num_heads - settings.shared_heads} chosen by {settings.router}"
            ] = None
    return "; ".join(told)
