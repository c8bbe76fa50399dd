"""Dense checkpoints as mixtures of experts: every expert begins as a copy of the feed-forward that stood there."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from model.config import Architecture
from model.hf.check import Agreement
from model.hf.names import parameter_shapes
from model.hf.source import Weights
from model.initialisation import Normal, draw
from model.settings import architecture_tables, build_architecture
from trainer.convert import Say
from trainer.remaking import SAME, Change, remake

ROUTER_STD = 0.02
"""Of a new router's weights: that of a model's other matrices."""

GateNorm = Literal["selected", "scale_n", "none"]


@dataclass(frozen=True)
class ExpertChoice:
    """What `headway upcycle moe` is told.

    With N copies of a feed-forward E, K of which run, the layer computes s E(x), s being the sum of their gates:

        "selected"  gates are divided by their sum: s = 1, whatever the router says
        "scale_n"   softmax over all N, and all times N / K: s = 1 where the router is zero, near it where it is small
        "none"      softmax over all N: s is about K / N
    """

    experts: int
    top_k: int
    gate_norm: GateNorm | None = None
    router_std: float | None = None

    @property
    def gates(self) -> GateNorm:
        """A single gate divided by its sum is 1, and teaches its router nothing."""
        return self.gate_norm or ("selected" if self.top_k > 1 else "scale_n")

    @property
    def std(self) -> float:
        """Of the routers' weights."""
        return self.router_std if self.router_std is not None else 0.0 if self.gates == "scale_n" else ROUTER_STD

    @property
    def factors(self) -> tuple[float, float]:
        """What multiplies the output projection of each copy, and the gates: no weight is to be rounded once more, so
        projections get the power of 2 in N / K, and the gates what is left."""
        if self.gates != "scale_n":
            return 1.0, 1.0
        power = 2.0 ** math.floor(math.log2(self.experts / self.top_k))
        return power, self.experts / self.top_k / power

    @property
    def unchanged(self) -> bool:
        """Whether the model computes what it did."""
        return self.gates == "selected" or (self.gates == "scale_n" and self.std == 0)

    def __str__(self) -> str:
        first = "first" if self.top_k == 1 else f"first {self.top_k}"
        begins = f"; all tokens begin with the {first} of them" if self.std == 0 else ""
        if self.gates == "selected":
            words = "gates are divided by their sum, so that copies add up to one"
            return f"{words}: the function is unchanged{begins}"
        if self.gates == "none":
            small = f"{self.top_k}/{self.experts}"
            return f"gates are left as they are, about {small} together: the function is another until it is trained"
        projections, gates = self.factors
        words = f"output projections are multiplied by {projections:g}" + (
            f", gates by {gates:.4g}" if gates > 1 else ""
        )
        if self.unchanged:
            return f"{words}, and routers are zero: the function is unchanged{begins}"
        return f"{words}, and routers are not zero: the function changes a little"


def to_moe(
    model: Path,
    out: Path,
    choice: ExpertChoice,
    *,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    form: str | None = None,
    overwrite: bool = False,
    say: Say = print,
) -> Agreement:
    """Write MODEL with several copies of each feed-forward and a router in front, as `remake` does.

    Where the function is unchanged, logits are those of the model: that is what is compared; elsewhere it is said how
    far they moved.
    """

    def change_of(dense: Architecture) -> Change:
        mixed = with_experts(dense, choice)
        copies = f"each feed-forward {choice.experts} times, of which {choice.top_k} run for a token; {choice}"
        return Change(
            mixed,
            weights=lambda weights: _Copies(weights, dense, mixed, choice),
            words=lambda layout: f", as {layout.model_type} ({layout.class_name})\n{copies}",
            said=lambda moved: _moved(moved, choice),
            tolerance=SAME if choice.unchanged else math.inf,
        )

    options: dict[str, Any] = {"dtype": dtype, "max_shard_size": max_shard_size, "form": form, "overwrite": overwrite}
    return remake(model, out, change_of, **options, say=say)


def with_experts(dense: Architecture, choice: ExpertChoice) -> Architecture:
    """The same model with a mixture in place of each feed-forward, whose experts are such feed-forwards.

    Raises:
        ValueError: with every reason why it cannot be.
    """
    faults = []
    if choice.experts < 2:
        faults.append(f"--experts {choice.experts}: one copy is the dense model itself; the nearest that works is 2.")
    if choice.gates == "selected" and choice.top_k == 1:
        faults.append(
            "--gate-norm selected with --top-k 1: the one gate of a token would always be 1, and the router would "
            "learn nothing from the loss. Take --gate-norm scale_n, or --top-k 2."
        )
    tables = architecture_tables(dense)
    settings = {
        "num_experts": max(choice.experts, 2),
        "top_k": choice.top_k,
        "gate_norm": "selected" if choice.gates == "selected" and choice.top_k != 1 else "none",
        "gate_scale": choice.factors[1] if choice.top_k in range(1, choice.experts) else 1.0,
        "router_init_std": choice.std,
    }
    faults += in_place_of_feedforwards(dense, tables, settings)
    _, mixed = build_architecture(tables, faults)
    if mixed is None or faults:
        raise ValueError("\n".join(faults))
    return mixed


def in_place_of_feedforwards(dense: Architecture, tables: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    """Put mixtures of feed-forwards of their kinds in place of all feed-forwards of a model, in its tables.

    Args:
        settings: of each mixture, beside what its experts are.

    Returns:
        Why that cannot be.
    """
    faults = []
    names: dict[str, str] = {}
    kinds = dict.fromkeys(dense.feedforward_names)
    for name in kinds:
        if hasattr(dense.feedforwards[name][1], "parts"):
            faults.append(f"feedforwards.{name} is a mixture of experts already: begin with the dense model.")
            continue
        called = "moe" if len(kinds) == 1 else f"moe_{name}"
        while called in tables["feedforwards"] or called in tables["mixers"]:
            called += "_"
        names[name] = called
        tables["feedforwards"][called] = {"kind": "moe", "expert": name} | settings
    pattern = [names.get(name, name) for name in dense.feedforward_names]
    tables["model"]["feedforward_pattern"] = pattern[:1] if len(set(pattern)) == 1 else pattern
    factors = tables["model"].get("residual_factors", {})
    tables["model"]["residual_factors"] = {names.get(name, name): factor for name, factor in factors.items()}
    return faults


class _Copies(Weights):
    """The weights of a dense model, each feed-forward's as often as there are experts, and initial ones for routers."""

    def __init__(self, dense: Weights, before: Architecture, after: Architecture, choice: ExpertChoice):
        self._dense, self._choice = dense, choice
        self._known, self._shapes = parameter_shapes(before).keys(), parameter_shapes(after)
        self._outputs = tuple(
            f"layers.{layer}.feedforward.{before.feedforwards[name][0].output_projection}."
            for layer, name in enumerate(before.feedforward_names)
        )

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        return {name: self._read(name) for name in names}

    def _read(self, name: str) -> Tensor:
        taken = _source_of(name)
        if taken not in self._known:
            return draw(name, Normal(self._choice.std), torch.Size(self._shapes[name]), seed=0)
        tensor = self._dense.read([taken])[taken]
        # A copy has memory of its own: a file of weights takes no tensor twice.
        return tensor * (self._choice.factors[0] if taken.startswith(self._outputs) else 1.0)


def _source_of(name: str) -> str:
    """`layers.7.feedforward.experts.3.up.weight` -> `layers.7.feedforward.up.weight`; others keep their names."""
    before, found, behind = name.partition(".feedforward.experts.")
    return f"{before}.feedforward.{behind.partition('.')[2]}" if found else name


def _moved(moved: Agreement, choice: ExpertChoice) -> str:
    """What became of the logits, in words."""
    if choice.unchanged:
        return f"logits of the result and of the source: {moved}"
    return (
        f"logits moved by {moved.error:.1e} of the largest logit {moved.largest:.3g}; same likeliest token at "
        f"{moved.same_choice:.1%} of places"
    )
