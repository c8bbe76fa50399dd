"""What the arguments in a Megatron checkpoint say of its GPT model, as our tables; and a model as such arguments."""

from __future__ import annotations

from typing import Any

from model.config import Architecture
from model.hf.formats.format import Tables, Unfit, extra_weight_faults, refuse, single_feedforward, unlike
from model.mixers.softmax import Softmax, SoftmaxConfig

NORMS = {"LayerNorm": "layernorm", "RMSNorm": "rmsnorm"}
POSITIONS = {"learned_absolute": "learned", "rope": "rope", "none": "none"}

# What a GPT of ours has in one way alone, as Megatron-LM's arguments say it; not said is as good.
_PLAIN: dict[str, Any] = {
    "num_experts": None,
    "multi_latent_attention": False,
    "heterogeneous_layers_config_path": None,
    "hybrid_layer_pattern": None,
    "hybrid_override_pattern": None,
    "is_hybrid_model": False,
    "experimental_attention_variant": None,
    "mtp_num_layers": None,
    "apply_layernorm_1p": False,
    "apply_residual_connection_post_layernorm": False,
    "attention_output_gate": False,
    "qk_l2_norm": False,
    "softmax_type": "vanilla",
    "window_size": None,
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "rotary_seq_len_interpolation_factor": None,
    "use_rope_scaling": False,
    "no_rope_freq": None,
    "squared_relu": False,
    "quick_geglu": False,
}


def read_arguments(found: dict[str, Any], positions: int | None, vocab_size: int) -> Tables:
    """`model`, `mixers` and `feedforwards` of the model that Megatron-LM's arguments describe.

    Args:
        found: the arguments by name, as in `args` of a checkpoint.
        positions: learned ones in the checkpoint, if there are.
        vocab_size: rows of the embedding that are tokens.

    Raises:
        ValueError: what Headway has no place for, all of it.
    """
    needed = ("num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size")
    refuse([f"the arguments do not say {key}." for key in needed if not found.get(key)])
    has = {key: found.get(key) or wanted for key, wanted in _PLAIN.items()}
    faults = unlike(has, _PLAIN)
    kind, norm = _position_kind(found), found.get("normalization") or "LayerNorm"
    if kind not in POSITIONS:
        faults.append(f"position_embedding_type = {kind!r}: expected one of {', '.join(POSITIONS)}.")
    if norm not in NORMS:
        faults.append(f"normalization = {norm!r}: expected one of {', '.join(NORMS)}.")
    qk_norm = bool(found.get("qk_layernorm"))
    if qk_norm and norm != "RMSNorm":
        faults.append(f"qk_layernorm with normalization = {norm!r}: Headway's qk_norm is an RMSNorm.")
    refuse(faults)
    bias = found.get("add_bias_linear", True)
    heads = found["num_attention_heads"]
    mixer: dict[str, Any] = {
        "num_heads": heads,
        "num_kv_heads": found.get("num_query_groups") if found.get("group_query_attention") else heads,
        "head_dim": found.get("kv_channels") or found["hidden_size"] // heads,
        "qk_norm": qk_norm,
        "rope_theta": float(found.get("rotary_base") or 10000),
        "qkv_bias": bool(bias or found.get("add_qkv_bias")),
    }
    feedforward: dict[str, Any] = {"d_ff": found["ffn_hidden_size"]}
    if not found.get("swiglu"):
        feedforward["tanh"] = _tanh(found)
    model = {
        "d_model": found["hidden_size"],
        "num_layers": found["num_layers"],
        "vocab_size": vocab_size,
        "positions": POSITIONS[kind],
        "max_positions": positions or found.get("max_position_embeddings") or 0,
        "norm": NORMS[norm],
        "norm_eps": found.get("norm_epsilon") or found.get("layernorm_epsilon") or 1e-5,
        "bias": bool(bias),
        "tie_embeddings": not found.get("untie_embeddings_and_output_weights"),
        "init_std": found.get("init_method_std") or 0.02,
    }
    name = "swiglu" if found.get("swiglu") else "gelu"
    return {"model": model, "mixers": {"softmax": mixer}, "feedforwards": {name: feedforward}}


def _position_kind(found: dict[str, Any]) -> str:
    if found.get("use_rotary_position_embeddings"):
        return "rope"  # as older arguments say it
    return found.get("position_embedding_type") or "learned_absolute"


def _tanh(found: dict[str, Any]) -> bool:
    """Whether the GELU is the tanh approximation. Megatron's fused bias and GELU is, which needs a bias."""
    fused = found.get("bias_gelu_fusion", True) and found.get("add_bias_linear", True)
    return bool(found.get("openai_gelu") or fused)


def arguments_of(architecture: Architecture, divisible_by: int) -> dict[str, Any]:
    """Megatron-LM's arguments for a model.

    Args:
        divisible_by: the embedding gets so many rows that this divides their number.

    Raises:
        ValueError: Megatron's GPT cannot say this model; every reason why.
    """
    m = architecture.model
    attention, feedforward = _alike(architecture)
    bias = m.bias
    heads, groups = attention.num_heads, attention.groups
    # With biases, Megatron's fused GELU is the approximation, and its plain one exact.
    gelu_is_fused = "tanh" in feedforward and feedforward["tanh"] and bias
    return {
        "num_layers": m.num_layers,
        "hidden_size": m.d_model,
        "ffn_hidden_size": feedforward["d_ff"],
        "num_attention_heads": heads,
        "group_query_attention": groups != heads,
        "num_query_groups": groups,
        "kv_channels": attention.head_dim or m.d_model // heads,
        "qk_layernorm": attention.qk_norm,
        "max_position_embeddings": m.max_positions or None,
        "position_embedding_type": {ours: theirs for theirs, ours in POSITIONS.items()}[m.positions],
        "add_position_embedding": m.positions == "learned",
        "rotary_base": attention.rope_theta,
        "rotary_percent": 1.0,
        "rotary_interleaved": False,
        "normalization": {ours: theirs for theirs, ours in NORMS.items()}[m.norm],
        "norm_epsilon": m.norm_eps,
        "apply_layernorm_1p": False,
        "add_bias_linear": bias,
        "add_qkv_bias": not bias and bool(attention.qkv_bias),
        "swiglu": "tanh" not in feedforward,
        "squared_relu": False,
        "bias_gelu_fusion": gelu_is_fused,
        "openai_gelu": bool(feedforward.get("tanh")) and not gelu_is_fused,
        "untie_embeddings_and_output_weights": not m.tie_embeddings,
        "vocab_size": m.vocab_size,
        "padded_vocab_size": -(-m.vocab_size // divisible_by) * divisible_by,
        "make_vocab_size_divisible_by": divisible_by,
        "init_method_std": m.init_std,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "num_experts": None,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "virtual_pipeline_model_parallel_size": None,
        "expert_model_parallel_size": 1,
        "no_save_optim": True,
        "no_save_rng": True,
        "consumed_train_samples": 0,
        "consumed_valid_samples": 0,
        "ckpt_format": "torch_dist",
    }


def _alike(architecture: Architecture) -> tuple[SoftmaxConfig, dict[str, Any]]:
    """The attention and the feed-forward that all layers have. Raises ValueError with every reason against it."""
    m = architecture.model
    wanted = {"norm_position": "pre", "residual": "sequential", "embedding_scale": 1.0}
    reasons = [f"model.{fault}" for fault in unlike({key: getattr(m, key) for key in wanted}, wanted)]
    if architecture.untied is not None:
        reasons.append("modalities have no weights of their own there.")
    if m.norm not in NORMS.values():
        reasons.append(f"model.norm = {m.norm!r}, expected one of {', '.join(NORMS.values())}.")
    used = {name: architecture.mixers[name] for name in architecture.mixer_names}
    if other := [name for name, (cls, _) in used.items() if cls is not Softmax]:
        reasons.append(f"mixers are softmax attention there, and {', '.join(other)} is not.")
    settings: list[SoftmaxConfig] = [settings for cls, settings in used.values() if cls is Softmax]
    if any(one != settings[0] for one in settings):
        reasons.append("all layers have the same attention there.")
    reasons += extra_weight_faults(settings)
    for one in settings[:1]:
        if one.window is not None:
            reasons.append(f"mixers.softmax.window = {one.window}: attention has no window there.")
        if one.qk_norm and m.norm != "rmsnorm":
            reasons.append(f"qk_norm with model.norm = {m.norm!r}: there it is of the same kind, and ours an RMSNorm.")
        if m.bias and one.qkv_bias is False:
            reasons.append("qkv_bias = false with model.bias = true: there q, k and v have biases where others have.")
    of_kind = {kind: single_feedforward(architecture, kind) for kind in ("swiglu", "gelu")}
    feedforward = next((found for found, _ in of_kind.values() if found is not None), None)
    if feedforward is None:
        reasons.append("feed-forwards are all swiglu, or all gelu, and alike there.")
    if reasons:
        raise Unfit(["Megatron's GPT cannot say this model:", *reasons])
    return settings[0], vars(feedforward)
