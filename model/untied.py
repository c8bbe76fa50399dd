"""A block whose modalities have weights of their own: the `[untie]` section, carried out.

A mixer or a feed-forward is written for one set of weights. Here its linear maps and norms are exchanged for towers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from model.config import Architecture
from model.context import Context
from model.feedforward.towers import FeedForwardTowers
from model.initialisation import all_inits
from model.layer import FeedForward, Layer, Mixer, Site
from model.routing import Router
from model.towers import MARK, Current, LinearTowers, Towers, tied


def make_feedforward(architecture: Architecture, layer: int, site: Site) -> FeedForward:
    """The feed-forward of a layer."""
    untie = architecture.untie
    if untie is None or "feedforward" not in untie.parts:
        cls, settings = architecture.feedforwards[architecture.feedforward_names[layer]]
        return cls(settings, site)
    towers = [architecture.feedforwards[name] for name in architecture.tower_names(layer)]
    return FeedForwardTowers([cls(settings, site) for cls, settings in towers], site)


def untie_mixer(mixer: Mixer, architecture: Architecture) -> None:
    """Exchange in place what each modality is to have for itself of a mixer's linear maps and norms."""
    untie = architecture.untied
    if untie is None:
        return
    current, sharding, inits = Current(), dict(mixer.sharding), all_inits(mixer)
    for name in list(_untied(mixer, untie.parts)):
        owner, _, last = name.rpartition(".")
        one = mixer.get_submodule(name)
        own = {kind: inits[f"{name}.{kind}"] for kind, _ in one.named_parameters()}
        kind = LinearTowers if isinstance(one, nn.Linear) else Towers
        setattr(mixer.get_submodule(owner), last, kind(one, untie.modalities, own, current))
    here = [*mixer.named_parameters(), *mixer.named_buffers()]
    mixer.sharding = {name: sharding[tied(name)] for name, _ in here if tied(name) in sharding}
    mixer.current = current
    mixer.register_forward_pre_hook(_tell, with_kwargs=True)


def untie_norm(norm: nn.Module, architecture: Architecture, current: Current) -> nn.Module:
    """A norm of the residual stream, or one for each modality."""
    untie = architecture.untie
    if untie is None or "norms" not in untie.parts or not list(norm.parameters()):
        return norm
    return Towers(norm, untie.modalities, norm.init_weights(), current)


def maps_out(layer: Layer) -> list[str]:
    """Names of the linear maps whose results, each of some tokens or all, add up to what a layer gives."""
    found, modules = [], dict(layer.named_modules())
    for name in layer.output_projections:
        module = modules.get(name)
        found += [f"{name}.{MARK}.{m}" for m in range(len(module.towers))] if isinstance(module, Towers) else [name]
    return found


def _tell(mixer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    ctx: Context = args[1] if len(args) > 1 else kwargs["ctx"]
    mixer.current.groups = ctx.groups


def _untied(mixer: Mixer, parts: Sequence[str]) -> Iterator[str]:
    """Names of the modules that each modality has for itself. A norm over all heads together stays one: it stands
    between mixing and the map out, where a head is of no modality."""
    out = set(mixer.output_projections)
    for name, module in mixer.named_modules():
        if isinstance(module, nn.Linear) and not isinstance(module, Router):
            if ("o" if name in out else "qkv") in parts:
                yield name
        elif "norms" in parts and name.rpartition(".")[2] in mixer.token_norms and list(module.parameters()):
            yield name
