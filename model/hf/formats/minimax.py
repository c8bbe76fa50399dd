"""MiniMax in transformers: Lightning and softmax layers, the normalised residual, one expert or several."""

from __future__ import annotations

from typing import Any

from model.config import Architecture
from model.feedforward.moe import MoE
from model.hf.formats.format import (
    Format,
    Tables,
    Unfit,
    extra_weight_faults,
    read_with_transformers,
    refuse,
    rope_theta,
    unlike,
    written_by_transformers,
)
from model.hf.formats.llama import FULL, decoder_faults, read_dense, write_dense
from model.hf.formats.mixtral import ROUTERS, read_mixture, write_mixture
from model.mixers.minimax import MiniMax
from model.mixers.softmax import Softmax

LINEAR = "linear_attention"


def read(raw: dict[str, Any]) -> Tables:
    config = read_with_transformers(raw)
    plain = {"hidden_act": "silu", "sliding_window": None}
    faults = unlike({key: getattr(config, key) for key in plain}, plain)
    # Of one expert the gate is 1, whatever the router says: a plain feed-forward.
    feedforwards = (read_dense if config.num_local_experts == 1 else read_mixture)(config, faults)
    feedforward = next(iter(feedforwards))
    head_dim = config.head_dim or config.hidden_size // config.num_attention_heads
    softmax = {
        "num_heads": config.num_attention_heads,
        "num_kv_heads": config.num_key_value_heads,
        "head_dim": head_dim,
        "rope_theta": rope_theta(config, faults),
    }
    refuse(faults)
    minimax = {"num_heads": config.num_attention_heads, "head_dim": head_dim}
    names = {FULL: "softmax", LINEAR: "minimax"}
    pattern = [names[kind] for kind in config.layer_types]
    mixers = {name: table for name, table in (("softmax", softmax), ("minimax", minimax)) if name in pattern}
    factors = {
        "softmax": [config.full_attn_alpha_factor, config.full_attn_beta_factor],
        "minimax": [config.linear_attn_alpha_factor, config.linear_attn_beta_factor],
        feedforward: [config.mlp_alpha_factor, config.mlp_beta_factor],
    }
    model = {
        "d_model": config.hidden_size,
        "num_layers": config.num_hidden_layers,
        "vocab_size": config.vocab_size,
        "max_positions": config.max_position_embeddings,
        "pattern": pattern,
        "norm": "rmsnorm",
        "norm_eps": config.rms_norm_eps,
        "residual": "normalised",
        "residual_factors": {name: values for name, values in factors.items() if name in {*mixers, feedforward}},
        "tie_embeddings": config.tie_word_embeddings,
        "init_std": config.initializer_range,
    }
    return {"model": model, "mixers": mixers, "feedforwards": feedforwards}


def write(architecture: Architecture) -> dict[str, Any]:
    m = architecture.model
    reasons = decoder_faults(architecture)
    reasons += unlike(
        {"model.bias": m.bias, "model.residual": m.residual}, {"model.bias": False, "model.residual": "normalised"}
    )
    if any(architecture.feedforwards[name][0] is MoE for name in architecture.feedforward_names):
        feedforward = write_mixture(architecture, reasons)
    else:
        feedforward = write_dense(architecture, reasons) | {"num_local_experts": 1, "num_experts_per_tok": 1}
    used = {name: architecture.mixers[name] for name in architecture.mixer_names}
    if any(cls not in (Softmax, MiniMax) for cls, _ in used.values()):
        raise Unfit([*reasons, "mixers are softmax and minimax there."])
    factors = _factors(architecture, reasons)
    softmax = [settings for cls, settings in used.values() if cls is Softmax]
    if any(s != softmax[0] for s in softmax) or any(s.qk_norm or s.window or s.qkv_bias for s in softmax):
        reasons.append("softmax layers are all alike there, without qk_norm, window and qkv_bias.")
    reasons += extra_weight_faults(softmax)
    heads = {(s.num_heads, s.head_dim or m.d_model // s.num_heads) for _, s in used.values()}
    if len(heads) > 1:
        reasons.append("softmax and minimax layers have as many heads of the same width there.")
    if reasons:
        raise Unfit(reasons)
    ((num_heads, head_dim),) = heads
    kinds = [FULL if used[name][0] is Softmax else LINEAR for name in architecture.mixer_names]
    return written_by_transformers(
        "minimax",
        vocab_size=m.vocab_size,
        hidden_size=m.d_model,
        num_hidden_layers=m.num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=(softmax[0].num_kv_heads or num_heads) if softmax else num_heads,
        head_dim=head_dim,
        rms_norm_eps=m.norm_eps,
        initializer_range=m.init_std,
        tie_word_embeddings=m.tie_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": softmax[0].rope_theta if softmax else 10000.0},
        layer_types=kinds,
        **feedforward,
        **factors,
    )


def _factors(architecture: Architecture, reasons: list[str]) -> dict[str, float]:
    """The residual's factors under their names there."""
    given = architecture.model.residual_factors or {}
    kinds = {
        "full_attn": {name for name in architecture.mixer_names if architecture.mixers[name][0] is Softmax},
        "linear_attn": {name for name in architecture.mixer_names if architecture.mixers[name][0] is MiniMax},
        "mlp": set(architecture.feedforward_names),
    }
    factors = {}
    for kind, names in kinds.items():
        found = {tuple(given.get(name, (1.0, 1.0))) for name in names} or {(1.0, 1.0)}
        if len(found) > 1:
            reasons.append(f"model.residual_factors of {', '.join(sorted(names))} are the same there.")
        factors[f"{kind}_alpha_factor"], factors[f"{kind}_beta_factor"] = sorted(found)[0]
    return factors


MINIMAX = Format("minimax", "minimax", "MiniMaxForCausalLM", read, write, wide=ROUTERS)
