"""TransNormerLLM as its authors published it: `configuration_transnormer.py` and its names."""

from __future__ import annotations

from typing import Any

from model.config import Architecture
from model.hf.formats.format import Format, Tables, Unfit, refuse, single_feedforward, unlike
from model.hf.formats.own import write as own_entries
from model.mixers.lightning import ACTIVATIONS, Lightning

# What configuration_transnormer.py of the released models says where config.json does not.
_DEFAULTS: dict[str, Any] = {
    "vocab_size": 64000,
    "linear_act_fun": "silu",
    "linear_use_lrpe_list": None,
    "norm_type": "simplermsnorm",
    "no_scale_embedding": False,
    "bias": False,
    "init_std": 0.02,
    "glu_act": "none",
    "causal": True,
    "gate_dim": None,
    "tie_word_embeddings": True,
}
_NEEDED = ("decoder_embed_dim", "decoder_layers", "decoder_attention_heads", "hidden_dim", "glu_dim")


def read(raw: dict[str, Any]) -> Tables:
    config = _DEFAULTS | raw
    faults = [f"{key} is missing." for key in _NEEDED if not isinstance(config.get(key), int)]
    plain = {"norm_type": "simplermsnorm", "bias": False, "glu_act": "none", "causal": True}
    faults += unlike(config, plain)
    if config["gate_dim"] is not None:
        faults.append(
            f"gate_dim = {config['gate_dim']}: the low-rank gate of TransNormerLLM3 has no published formula; "
            "models with a full gate (385M, 1B, 7B) are read."
        )
    activation = {"swish": "silu"}.get(config["linear_act_fun"], config["linear_act_fun"])
    if activation not in ACTIVATIONS:
        faults.append(f"linear_act_fun = {config['linear_act_fun']!r}: expected one of {', '.join(ACTIVATIONS)}.")
    refuse(faults)
    layers, heads = config["decoder_layers"], config["decoder_attention_heads"]
    flags = config["linear_use_lrpe_list"] or [1] + [0] * (layers - 1)
    if len(flags) != layers:
        faults.append(f"linear_use_lrpe_list has {len(flags)} entries for decoder_layers = {layers}.")
    if config["hidden_dim"] % heads:
        faults.append(f"hidden_dim = {config['hidden_dim']} is no multiple of decoder_attention_heads = {heads}.")
    refuse(faults)
    model = {
        "d_model": config["decoder_embed_dim"],
        "num_layers": layers,
        "vocab_size": config["vocab_size"],
        "max_positions": config.get("max_position_embeddings") or 0,
        "pattern": ["lightning"],
        "positions": "none",
        "norm": "srmsnorm",
        "norm_eps": 1e-6,
        "tie_embeddings": config["tie_word_embeddings"],
        "embedding_scale": 1.0 if config["no_scale_embedding"] else "sqrt",
        "init_std": config["init_std"],
    }
    mixer = {
        "num_heads": heads,
        "head_dim": config["hidden_dim"] // heads,
        "lrpe_layers": [layer for layer, flag in enumerate(flags) if flag],
        "activation": activation,
    }
    return {"model": model, "mixers": {"lightning": mixer}, "feedforwards": {"sglu": {"d_ff": config["glu_dim"]}}}


def write(architecture: Architecture) -> dict[str, Any]:
    m = architecture.model
    wanted = {"norm": "srmsnorm", "norm_eps": 1e-6, "positions": "none", "bias": False, "residual": "sequential"}
    reasons = [f"model.{fault}" for fault in unlike({key: getattr(m, key) for key in wanted}, wanted)]
    if m.embedding_scale not in (1.0, "sqrt"):
        reasons.append(f'model.embedding_scale = {m.embedding_scale}, expected "sqrt" or 1.0.')
    feedforward, faults = single_feedforward(architecture, "sglu")
    reasons += faults
    used = [architecture.mixers[name] for name in architecture.mixer_names]
    cls, first = used[0]
    if cls is not Lightning or any(settings != first for _, settings in used):
        raise Unfit([*reasons, "mixers are all the same Lightning attention there."])
    if first.decay != "alibi_layer":
        reasons.append(f'decay = {first.decay!r}, expected "alibi_layer".')
    head_dim = first.head_dim or m.d_model // first.num_heads
    if first.value_head_dim not in (None, head_dim):
        reasons.append(f"value_head_dim = {first.value_head_dim}, expected head_dim = {head_dim}.")
    if reasons:
        raise Unfit(reasons)
    return own_entries(architecture) | {
        "decoder_embed_dim": m.d_model,
        "decoder_layers": m.num_layers,
        "decoder_attention_heads": first.num_heads,
        "hidden_dim": first.num_heads * head_dim,
        "glu_dim": feedforward.d_ff,
        "linear_act_fun": first.activation,
        "linear_use_lrpe_list": [int(layer in first.lrpe_layers) for layer in range(m.num_layers)],
        "norm_type": "simplermsnorm",
        "no_scale_embedding": m.embedding_scale == 1.0,
        "bias": False,
        "init_std": m.init_std,
        "tie_word_embeddings": m.tie_embeddings,
    }


TRANSNORMER = Format(
    "transnormer",
    "transnormer",
    "TransnormerForCausalLM",
    read,
    write,
    code="model.hf.modeling_transnormer",
    tied_unless_given=True,
)
