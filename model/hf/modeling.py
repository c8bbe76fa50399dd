"""Headway's models as transformers knows models: `from_pretrained`, `generate`, lm-evaluation-harness.

An export carries this file together with the layers its model is made of, joined into one (`model/hf/bundle.py`), so it
loads where Headway is not installed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.configuration_utils import PretrainedConfig
from transformers.modeling_outputs import CausalLMOutputWithPast

from model.cache import Cache
from model.config import Architecture, ModelConfig
from model.initialisation import Computed, Constant, Normal
from model.layer import Layer
from model.stack import Model
from model.untie import UntieConfig

LAYERS: dict[str, type[Layer]] = {}
"""Classes by section and `kind` (`mixers.softmax`); an export fills it in at its end."""


class HeadwayConfig(PretrainedConfig):
    """`config.json`: `headway` holds the tables `[model]`, `[mixers.NAME]`, `[feedforwards.NAME]`, `[untie]`."""

    model_type = "headway"

    def __init__(self, headway: dict[str, Any] | None = None, **kwargs: Any):
        super().__init__(**kwargs)
        self.headway = headway or {}


def read_architecture(tables: dict[str, Any]) -> Architecture:
    """The architecture that the tables of a finished model describe."""
    sections: dict[str, dict[str, Any]] = {"mixers": {}, "feedforwards": {}}
    for section, found in sections.items():
        for name, table in tables[section].items():
            layer_class = LAYERS[f"{section}.{table.get('kind', name)}"]
            settings = {key: value for key, value in table.items() if key != "kind"}
            found[name] = (layer_class, layer_class.Config(**settings))
    untie = UntieConfig(**tables["untie"]) if "untie" in tables else None
    architecture = Architecture(ModelConfig(**tables["model"]), sections["mixers"], sections["feedforwards"], untie)
    if faults := architecture.resolve():
        raise ValueError(" ".join(faults))
    return architecture


class HeadwayCache(Cache):
    """What decoding remembers, with the methods that `generate` calls."""

    is_compileable = False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens consumed, padding included."""
        return self.num_tokens

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """No limit."""
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequence `beam_idx[i]` goes on as number i."""
        self.reorder(beam_idx)


class HeadwayForCausalLM(PreTrainedModel, GenerationMixin):
    """A decoder over tokens. `logits [B, N, vocab]` in the dtype of the weights."""

    config_class = HeadwayConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = False
    # A recurrent state cannot be rolled back, so assisted decoding is refused.
    _is_stateful = True
    _no_split_modules = ["Block"]
    _supports_sdpa = True

    def __init__(self, config: HeadwayConfig, model: Model | None = None):
        """`model`: one that stands already, to be seen through the eyes of transformers."""
        super().__init__(config)
        self.model = Model(read_architecture(config.headway)) if model is None else model
        for module in [] if model is None else model.modules():
            # transformers gives new values to all that is not marked as having its own.
            module._is_hf_initialized = True
        self._keep_in_fp32_modules_strict = {
            f"{prefix}.{name}"
            for prefix, module in self.named_modules()
            if getattr(module, "keep_fp32", False)
            for name, _ in module.named_parameters(recurse=False)
        }
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: HeadwayCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        modalities: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """As the decoders of transformers.

        Args:
            attention_mask: `[B, M]`, 0 where a token (of those cached or of `input_ids`) is padding, left or right.
            position_ids: `[B, N]`; only the distances between them matter, but to learned positions.
            labels: `[B, N]`, the tokens themselves, -100 where they do not count; gives `loss`.
            modalities: `[B, N]`, where each modality has weights of its own and ids do not say which one a token is of.
            logits_to_keep: logits of the last so many tokens only, or of those with these indices; 0: of all.
        """
        cache = past_key_values
        if use_cache and cache is None and not self.training:
            cache = HeadwayCache()
        documents, positions = read_padding(attention_mask, input_ids.shape[1])
        x = self.model.hidden(
            input_ids,
            documents=documents,
            positions=positions if position_ids is None else position_ids.expand_as(input_ids),
            cache=cache,
            modalities=modalities,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.model.logits(x[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        if return_dict is False:
            return tuple(item for item in (loss, logits, cache) if item is not None)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embedding = value

    def get_output_embeddings(self) -> nn.Module | None:
        return self.model.head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.model.head = value

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """What no file holds: buffers that are computed, and all of a model that is made anew."""
        if isinstance(module, Layer):
            module.remake_buffers()
        declare = getattr(module, "init_weights", None)
        for name, init in ({} if declare is None or module is self else declare()).items():
            parameter = module.get_parameter(name)
            if isinstance(init, Normal):
                nn.init.normal_(parameter, 0.0, init.std)
            elif isinstance(init, Constant):
                nn.init.constant_(parameter, init.value)
            elif isinstance(init, Computed) and not getattr(parameter, "_is_hf_initialized", False):
                parameter.copy_(init.values(parameter.shape))


def read_padding(attention_mask: Tensor | None, n: int) -> tuple[Tensor | None, Tensor | None]:
    """Document ids and positions `[B, n]` of the last n tokens: padding is a document of its own, which none sees.

    (None, None) where nothing is padding.

    Raises:
        ValueError: padding between tokens of a text.
    """
    if attention_mask is None or bool(attention_mask.all()):
        return None, None
    text = attention_mask.bool()
    begins = torch.zeros_like(text)
    begins[:, 1:] = text[:, 1:] != text[:, :-1]
    if bool(((begins & text).sum(1) + text[:, 0] > 1).any()):
        raise ValueError("attention_mask has padding between tokens of one text: pad on the left or on the right.")
    positions = (text.cumsum(1) - 1).clamp(min=0)
    return begins.cumsum(1)[:, -n:], positions[:, -n:]
