"""TransNormerLLM under its published names: packed matrices are taken apart while transformers loads them."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming

from model.hf.modeling import HeadwayConfig, HeadwayForCausalLM
from model.hf.names import Place, places
from model.stack import Model

FAMILY = "transnormer"


class TransnormerConfig(HeadwayConfig):
    """`config.json` with the keys of the published class beside our tables."""

    model_type = "transnormer"


class TransnormerForCausalLM(HeadwayForCausalLM):
    """The same model; its checkpoints have the published names."""

    config_class = TransnormerConfig

    def __init__(self, config: TransnormerConfig, model: Model | None = None):
        super().__init__(config, model)
        conversions = weight_conversions(places(self.model.architecture, FAMILY))
        # transformers looks them up by the name of the class, when it loads and when it saves.
        register_checkpoint_conversion_mapping(type(self).__name__, conversions, overwrite=True)


class TakeApart(ConversionOps):
    """One tensor of a checkpoint -> the parameters that it is made of."""

    def __init__(self, parts: list[Place]):
        self.parts = parts

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Tensor]:
        (found,) = input_dict.values()
        whole = found[0] if isinstance(found, list) else found
        return {name: part.take(whole) for name, part in zip(target_patterns, self.parts, strict=True)}

    @property
    def reverse_op(self) -> ConversionOps:
        return PutTogether(self.parts)


class PutTogether(TakeApart):
    """The parameters -> the tensor."""

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Tensor]:
        found = [input_dict[name] for name in source_patterns]
        tensors = [tensor[0] if isinstance(tensor, list) else tensor for tensor in found]
        return {target_patterns[0]: self.parts[0].lay_out(tensors).contiguous()}

    @property
    def reverse_op(self) -> ConversionOps:
        return TakeApart(self.parts)


def weight_conversions(known: dict[str, Place]) -> list[Any]:
    """What transformers is to do with each tensor of a checkpoint, said once for all layers."""
    wholes: dict[str, dict[int, tuple[str, Place]]] = {}
    for name, place in known.items():
        outside, inside = (re.sub(r"^.*layers\.\d+\.", "", text) for text in (place.name, f"model.{name}"))
        wholes.setdefault(outside, {})[place.part] = (inside, place)
    conversions: list[Any] = []
    for outside, parts in wholes.items():
        names = [parts[part][0] for part in sorted(parts)]
        there = [parts[part][1] for part in sorted(parts)]
        if len(there) == 1 and there[0] == Place(there[0].name):
            conversions.append(WeightRenaming(outside, names[0]))
        else:
            conversions.append(WeightConverter(outside, names, operations=[TakeApart(there)]))
    return conversions
