"""Headway's mixers in the layers of megatron-core: a layer spec for an existing job of Megatron-LM.

    # headway_layers.py, beside pretrain_gpt.py; Headway's checkout is on PYTHONPATH
    from parallel.megatron import layer_spec

    lightning = layer_spec("lightning", {"num_heads": 16})

    # torchrun ... pretrain_gpt.py --spec headway_layers lightning --transformer-impl local \\
    #     --attention-dropout 0 --position-embedding-type none ... (all else as before)

Everything but the attention is Megatron's: norms, feed-forward, residuals, optimizer, pipeline, data parallelism, its
checkpoints. What is not proved there is refused: tensor and context parallelism, packed sequences, its inference.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from model.context import Context
from model.initialisation import all_inits, draw
from model.layer import Mixer, Site
from model.norms import make_norm
from model.registry import find_layer
from model.settings import build

_NORMS = {"RMSNorm": "rmsnorm", "LayerNorm": "layernorm"}


def layer_spec(
    mixer: str,
    settings: dict[str, Any],
    *,
    base: Any = None,
    positions: str = "rope",
    isolate_documents: bool = False,
    seed: int = 0,
) -> Any:
    """A `ModuleSpec` of megatron-core's `TransformerLayer` with a mixer of ours in the place of `self_attention`.

    Args:
        mixer: its kind, as in `[mixers.NAME]`, or `package.module:Class`.
        settings: the keys of that table.
        base: the layer to change, for example `get_gpt_layer_with_transformer_engine_spec()`. Default: the local one,
            with the norm that `--normalization` names.
        positions: "rope": the mixer rotates by itself, where it does in Headway; or "learned", "none".
        isolate_documents: read from `attention_mask` where documents begin (`--reset-attention-mask`). Otherwise the
            mask is not looked at, and every token sees all before it.
        seed: of initial values, which depend on it and on the layer's global number alone.

    Raises:
        ValueError: settings that no such mixer has, all of them.
    """
    from megatron.core.transformer.spec_utils import ModuleSpec

    faults: list[str] = []
    cls = find_layer("mixers", mixer, mixer, allow_code=True)
    config = build(cls.Config, f"mixers.{mixer}", settings, faults)
    if faults:
        raise ValueError(" ".join(faults))
    params = {
        "mixer": cls,
        "settings": config,
        "positions": positions,
        "isolate_documents": isolate_documents,
        "seed": seed,
    }
    layer = _layer_with_own_norms() if base is None else base
    names = {
        ours: theirs
        for ours, theirs in layer.submodules.sharded_state_dict_keys_map.items()
        if not theirs.startswith("self_attention.")
    }
    submodules = dataclasses.replace(
        layer.submodules,
        input_layernorm=_norm_before(layer),
        self_attention=ModuleSpec(module=MixerAttention, params=params),
        sharded_state_dict_keys_map=names,
    )
    return ModuleSpec(module=layer.module, params=layer.params, submodules=submodules)


def _layer_with_own_norms() -> Any:
    """The local layer; its norms follow the configuration."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    layer = get_gpt_layer_local_spec()
    norms = {"input_layernorm": WrappedTorchNorm, "pre_mlp_layernorm": WrappedTorchNorm}
    return dataclasses.replace(layer, submodules=dataclasses.replace(layer.submodules, **norms))


def _norm_before(layer: Any) -> Any:
    """The norm on what the attention reads: TransformerEngine's attention has it inside, so it has to stand apart."""
    from megatron.core.transformer.identity_op import IdentityOp

    if layer.submodules.input_layernorm is not IdentityOp:
        return layer.submodules.input_layernorm
    from megatron.core.extensions.transformer_engine import TENorm

    return TENorm


class MixerAttention(nn.Module):
    """A mixer, as megatron-core calls its `SelfAttention`.

    Raises:
        ValueError: what it cannot do there, all of it.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        mixer: type[Mixer],
        settings: Any,
        positions: str,
        isolate_documents: bool,
        seed: int,
        **_: Any,
    ):
        super().__init__()
        if faults := _faults(config, settings):
            raise ValueError(" ".join(faults))
        site = Site(
            layer=layer_number - 1,
            num_layers=config.num_layers,
            d_model=config.hidden_size,
            positions=positions,
            norm_eps=config.layernorm_epsilon,
            bias=config.add_bias_linear,
            init_std=config.init_method_std,
            output_init_std=config.init_method_std / (2 * config.num_layers) ** 0.5,
        )
        with torch.device("meta"):
            self.mixer = mixer(settings, site)
            hybrid = getattr(settings, "hybrid_norm", False)
            norm = make_norm(_NORMS[config.normalization], config.hidden_size, config.layernorm_epsilon)
            self.out_norm = norm if hybrid else nn.Identity()
        if self.mixer.balance is not None and self.mixer.balance.factor:
            raise ValueError(
                f"{mixer.__name__} balances its heads by a loss, which Megatron's loop does not add: take "
                "balance_weight = 0."
            )
        self.isolate_documents = isolate_documents
        self._begin(config, f"layers.{layer_number - 1}.", seed)

    def _begin(self, config: Any, prefix: str, seed: int) -> None:
        """Memory and initial values; the same on every rank."""
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        self.to(config.params_dtype).to_empty(device=device)
        inits = all_inits(self)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                parameter.copy_(draw(prefix + name, inits[name], parameter.shape, seed))

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        inference_context: Any = None,
        packed_seq_params: Any = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """`[s, b, h]` -> (`[s, b, h]`, no bias to add).

        Args:
            attention_mask: bool `[b or 1, 1, s, s]`, true where a key is hidden.

        Raises:
            ValueError: packed sequences, or inference of Megatron's.
        """
        if packed_seq_params is not None or inference_context is not None:
            what = "packed sequences" if packed_seq_params is not None else "Megatron's inference"
            raise ValueError(
                f"Headway's mixers know nothing of {what} here: train on rows of one length, for several "
                "documents in a row with isolate_documents and --reset-attention-mask, and generate with Headway."
            )
        x_BND = hidden_states.transpose(0, 1)
        ctx = self._context(x_BND, attention_mask)
        self.mixer.prepare(ctx)
        return self.out_norm(self.mixer(x_BND, ctx)).transpose(0, 1).contiguous(), None

    def _context(self, x_BND: Tensor, mask: Tensor | None) -> Context:
        batch, n, _ = x_BND.shape
        places = torch.arange(n, device=x_BND.device).expand(batch, n)
        if not self.isolate_documents:
            return Context(positions=places)
        if mask is None:
            raise ValueError(
                "isolate_documents reads from attention_mask where documents begin, and there is none: pass "
                "--reset-attention-mask and let the data loader make masks, or take isolate_documents = False."
            )
        # The first key that a query sees is where its document begins.
        begins_BN = (~mask[:, 0]).int().argmax(-1).expand(batch, n)
        return Context(positions=places - begins_BN, documents=begins_BN, key_documents=begins_BN)


def _faults(config: Any, settings: Any) -> list[str]:
    """Why a mixer cannot stand in a model of megatron-core with this configuration, in sentences."""
    check = getattr(settings, "faults", None)
    faults = list(check(config.hidden_size)) if check is not None else []
    for key, flag in (("tensor_model_parallel_size", "tensor"), ("context_parallel_size", "context")):
        if (size := getattr(config, key)) > 1:
            faults.append(
                f"{key} = {size}: Headway's mixers are whole in Megatron's layers, so {flag} parallelism is 1 there; "
                f"spread with pipeline and data parallelism, or train in Headway, which has {flag} parallelism."
            )
    if config.attention_dropout:
        faults.append(
            f"attention_dropout = {config.attention_dropout}: Headway's mixers have none, pass --attention-dropout 0."
        )
    if config.normalization not in _NORMS:
        faults.append(f"normalization = {config.normalization!r}: expected one of {', '.join(_NORMS)}.")
    return faults
