"""What a model is made of: the `[model]`, `[mixers.NAME]`, `[feedforwards.NAME]` and `[untie]` sections."""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import dataclass, field
from typing import Any, Literal

from model.layer import FeedForward, Mixer, Site
from model.untie import UntieConfig


@dataclass
class ModelConfig:
    """`[model]`"""

    d_model: int
    """Width of the residual stream."""
    num_layers: int
    """Blocks, each a mixer and a feed-forward."""
    vocab_size: int
    """Tokens; the tokenizer may have fewer, not more."""
    pattern: list[str] = field(default_factory=lambda: ["softmax"])
    """Mixer names layer by layer, "name*7" for seven; repeated until num_layers is reached."""
    feedforward_pattern: list[str] | None = None
    """Feed-forward names likewise. Default: the only one defined."""
    positions: Literal["rope", "learned", "none"] = "rope"
    """Rotary in the mixers that know it, learned vectors added to the embedding, or none."""
    max_positions: int = 0
    """The longest sequence it is for, which goes into exports; with learned positions, how many there are."""
    norm: Literal["rmsnorm", "srmsnorm", "layernorm"] = "rmsnorm"
    """The norm before each mixer and feed-forward and before the head."""
    norm_eps: float = 1e-6
    """Added to the mean square inside the root."""
    norm_position: Literal["pre", "sandwich_out"] = "pre"
    """On what a mixer and a feed-forward read; or on what they give, before it is added to the residual stream."""
    residual: Literal["sequential", "parallel", "normalised"] = "sequential"
    """x + mixer, then + feed-forward; or both on the same normalised input; or one after the other, each added to its
    own normalised input."""
    residual_factors: dict[str, tuple[float, float]] = field(default_factory=dict)
    """With "normalised": what multiplies the normalised input and the layer's output, for mixers and feed-forwards by
    their names in the patterns. Default: [1.0, 1.0] each."""
    bias: bool = False
    """Biases in linear maps (but those of Lightning, which has none)."""
    tie_embeddings: bool = False
    """One matrix for the embedding and the head."""
    embedding_scale: float | Literal["sqrt"] = 1.0
    """The embedding is multiplied by this; "sqrt" is the square root of d_model."""
    init_std: float = 0.02
    """Standard deviation of initial weights."""
    init_depth_scaled: bool = False
    """Output projections start smaller by sqrt(2 num_layers)."""
    init_from: str | None = None
    """A run, step or Hugging Face folder whose weights are the initial ones; [model] may then be left out."""

    def factors(self, name: str) -> tuple[float, float]:
        """What multiplies the normalised input, and the output, of the mixer or feed-forward of that name."""
        return self.residual_factors.get(name, (1.0, 1.0))


@dataclass
class Architecture:
    """A model's sections, resolved: which class and which settings each layer has.

    Attributes:
        mixers: name -> (class, its settings); feedforwards likewise.
        untie: what each modality has for itself; None: modalities are not told apart.
        mixer_names: name for each layer; feedforward_names likewise.
    """

    model: ModelConfig
    mixers: dict[str, tuple[type[Mixer], Any]]
    feedforwards: dict[str, tuple[type[FeedForward], Any]]
    untie: UntieConfig | None = None
    mixer_names: list[str] = field(default_factory=list)
    feedforward_names: list[str] = field(default_factory=list)

    def site(self, layer: int) -> Site:
        """Where the layer with this global index stands."""
        m = self.model
        output_std = m.init_std / math.sqrt(2 * m.num_layers) if m.init_depth_scaled else m.init_std
        return Site(
            layer=layer,
            num_layers=m.num_layers,
            d_model=m.d_model,
            positions=m.positions,
            norm_eps=m.norm_eps,
            bias=m.bias,
            init_std=m.init_std,
            output_init_std=output_std,
            feedforwards=self.feedforwards,
        )

    def resolve(self) -> list[str]:
        """Expand the patterns. Returns the faults found, in sentences; with none, the model can be built."""
        m = self.model
        faults = [
            f"model.{key} = {getattr(m, key)} must be at least 1."
            for key in ("d_model", "num_layers", "vocab_size")
            if getattr(m, key) < 1
        ]
        if m.positions == "learned" and m.max_positions < 1:
            faults.append('model.positions = "learned" needs model.max_positions, at least data.seq_len.')
        if not self.feedforwards:
            faults.append("no [feedforwards.NAME] section: define one, for example [feedforwards.swiglu] with d_ff.")
        faults += self._part_faults()
        elsewhere = {*self._parts(), *(self.untie.feedforwards.values() if self.untie else ())}
        alone = [name for name in self.feedforwards if name not in elsewhere] or list(self.feedforwards)
        default = alone[:1] or [""]
        if m.feedforward_pattern is None and len(alone) > 1:
            names = ", ".join(alone)
            faults.append(f"model.feedforward_pattern is missing: several feed-forwards are defined ({names}).")
        self.mixer_names, problems = expand_pattern("model.pattern", m.pattern, m.num_layers, self.mixers)
        faults += problems
        if self.feedforwards:
            self.feedforward_names, problems = expand_pattern(
                "model.feedforward_pattern", m.feedforward_pattern or default, m.num_layers, self.feedforwards
            )
            faults += problems
        faults += self._factor_faults()
        faults += self._untie_faults()
        if m.norm_position == "sandwich_out" and m.residual != "sequential":
            faults.append(
                f'model.norm_position = "sandwich_out" with model.residual = "{m.residual}": both say where norms '
                'stand; take residual = "sequential", or norm_position = "pre".'
            )
        sections = (("mixers", self.mixers), ("feedforwards", self.feedforwards))
        for section, parts in sections:
            for name, (_, settings) in parts.items():
                check = getattr(settings, "faults", None)
                if check is not None and m.d_model >= 1:
                    faults += [f"{section}.{name}.{fault}" for fault in check(m.d_model)]
        return faults

    def _parts(self) -> dict[str, list[str]]:
        """Feed-forwards that others are made of -> the keys that name them."""
        found: dict[str, list[str]] = {}
        for name, (_, settings) in self.feedforwards.items():
            for key, part in getattr(settings, "parts", dict)().items():
                found.setdefault(part, []).append(f"feedforwards.{name}.{key}")
        return found

    @property
    def untied(self) -> UntieConfig | None:
        """`untie`, where any weights go by it; without parts it tells metrics apart alone."""
        return self.untie if self.untie is not None and self.untie.parts else None

    def tower_names(self, layer: int) -> list[str]:
        """The feed-forward that each modality has in a layer."""
        assert self.untie is not None
        usual = self.feedforward_names[layer]
        return [self.untie.feedforwards.get(name, usual) for name in self.untie.called]

    def _untie_faults(self) -> list[str]:
        """Why there cannot be such weights per modality."""
        if self.untie is None:
            return []
        faults = self.untie.faults(self.model.vocab_size)
        for modality, name in self.untie.feedforwards.items():
            if name not in self.feedforwards:
                near = difflib.get_close_matches(name, self.feedforwards, n=1, cutoff=0.0)
                hint = f"; the nearest is {near[0]!r}" if near else ""
                faults.append(f"untie.feedforwards.{modality} = {name!r} is no [feedforwards.NAME]{hint}.")
        return faults

    def _part_faults(self) -> list[str]:
        """Feed-forwards made of what is not there, or of what is made of others itself."""
        faults = []
        for part, keys in self._parts().items():
            simple = [name for name, (_, settings) in self.feedforwards.items() if not hasattr(settings, "parts")]
            if part in simple:
                continue
            near = difflib.get_close_matches(part, simple, n=1, cutoff=0.0)
            hint = f"the nearest that will do is {near[0]!r}" if near else "define one, with d_ff"
            what = "is made of others itself" if part in self.feedforwards else "is no [feedforwards.NAME]"
            faults += [f"{key} = {part!r} {what}: {hint}." for key in keys]
        return faults

    def _factor_faults(self) -> list[str]:
        """Factors that would scale nothing, or two things of one name."""
        m, key = self.model, "model.residual_factors"
        if not m.residual_factors:
            return []
        if m.residual != "normalised":
            return [
                f'{key} is for model.residual = "normalised", and it is "{m.residual}": leave the factors out, or take '
                'model.residual = "normalised".'
            ]
        mixers, feedforwards = dict.fromkeys(self.mixer_names), dict.fromkeys(self.feedforward_names)
        if not mixers or not feedforwards:
            return []  # What is wrong with the patterns has been said.
        faults = []
        for name in m.residual_factors:
            if name not in mixers | feedforwards:
                near = difflib.get_close_matches(name, mixers | feedforwards, n=1, cutoff=0.0)[0]
                faults.append(
                    f"{key} names {name!r}, which is in no layer: the patterns have "
                    f"{', '.join(mixers | feedforwards)}; the nearest is {near!r}."
                )
            elif name in mixers and name in feedforwards:
                faults.append(
                    f"{key} names {name!r}, which is both a mixer and a feed-forward: give one of them another name."
                )
        return faults


def expand_pattern(key: str, pattern: list[str], length: int, known: Any) -> tuple[list[str], list[str]]:
    """Names for each of `length` layers, and the faults found: unknown names, a pattern that does not fit."""
    names: list[str] = []
    faults: list[str] = []
    for entry in pattern:
        match = re.fullmatch(r"\s*([^*\s]+)\s*(?:\*\s*(\d+))?\s*", entry)
        if match is None:
            faults.append(f'{key}: cannot read {entry!r}; write "name" or "name*7".')
            continue
        if match[1] not in known:
            defined = ", ".join(known) or "none"
            section = "mixers" if "feedforward" not in key else "feedforwards"
            faults.append(f"{key} names {match[1]!r}, but there is no [{section}.{match[1]}] (defined: {defined}).")
        names += [match[1]] * int(match[2] or 1)
    if not faults and (not names or length % len(names)):
        near = max(1, round(length / max(1, len(names)))) * len(names)
        faults.append(
            f"{key} covers {len(names)} layers, which does not divide model.num_layers = {length}: "
            f"take num_layers = {near}, or list all layers."
        )
    return (names * (length // len(names)) if names else []), faults
