"""Llama and its relatives in transformers: Mistral, Qwen2, Qwen3. Softmax attention throughout, and SwiGLU.

Another relative may have other feed-forwards: it says how these are read and written.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from model.config import Architecture
from model.hf.formats.format import (
    Format,
    Tables,
    Unfit,
    extra_weight_faults,
    read_with_transformers,
    refuse,
    rope_theta,
    single_feedforward,
    unlike,
    written_by_transformers,
)
from model.mixers.softmax import Softmax, SoftmaxConfig

FULL, SLIDING = "full_attention", "sliding_attention"


def read_dense(config: Any, faults: list[str]) -> Tables:
    """The one feed-forward, as `[feedforwards.NAME]` tables."""
    return {"swiglu": {"d_ff": config.intermediate_size}}


def write_dense(architecture: Architecture, reasons: list[str]) -> dict[str, Any]:
    """What `config.json` says of it; nothing where there are reasons against it."""
    feedforward, faults = single_feedforward(architecture, "swiglu")
    reasons += faults
    return {} if feedforward is None else {"intermediate_size": feedforward.d_ff}


def read(raw: dict[str, Any], feedforwards: Callable[[Any, list[str]], Tables] = read_dense) -> Tables:
    config = read_with_transformers(raw)
    kind = config.model_type
    faults = unlike({"hidden_act": config.hidden_act}, {"hidden_act": "silu"})
    attention_bias, mlp_bias = getattr(config, "attention_bias", False), getattr(config, "mlp_bias", False)
    if attention_bias != mlp_bias:
        faults.append(
            f"attention_bias = {attention_bias} and mlp_bias = {mlp_bias}: Headway has biases in both or in none "
            "(in q, k and v alone as Qwen2 has them)."
        )
    mixer = {
        "num_heads": config.num_attention_heads,
        "num_kv_heads": config.num_key_value_heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        "rope_theta": rope_theta(config, faults),
    }
    if kind == "qwen2":
        mixer["qkv_bias"] = True
    if kind == "qwen3":
        mixer["qk_norm"] = True
    pattern, mixers = _layers(config, {"kind": "softmax"} | mixer)
    feedforward_tables = feedforwards(config, faults)
    refuse(faults)
    model = {
        "d_model": config.hidden_size,
        "num_layers": config.num_hidden_layers,
        "vocab_size": config.vocab_size,
        "max_positions": config.max_position_embeddings,
        "pattern": pattern,
        "norm": "rmsnorm",
        "norm_eps": config.rms_norm_eps,
        "bias": attention_bias,
        "tie_embeddings": config.tie_word_embeddings,
        "init_std": config.initializer_range,
    }
    return {"model": model, "mixers": mixers, "feedforwards": feedforward_tables}


def _layers(config: Any, mixer: dict[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """The pattern and its mixers: one, or a full and a windowed one."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or [FULL if window is None else SLIDING] * config.num_hidden_layers
    if set(kinds) == {FULL}:
        return ["softmax"], {"softmax": mixer}
    windowed = mixer | {"window": window}
    if set(kinds) == {SLIDING}:
        return ["softmax"], {"softmax": windowed}
    names = {FULL: "softmax", SLIDING: "windowed"}
    return [names[kind] for kind in kinds], {"softmax": mixer, "windowed": windowed}


def write(
    architecture: Architecture,
    model_type: str,
    feedforwards: Callable[[Architecture, list[str]], dict[str, Any]] = write_dense,
) -> dict[str, Any]:
    m = architecture.model
    reasons = decoder_faults(architecture)
    feedforward_settings = feedforwards(architecture, reasons)
    used = [architecture.mixers[name] for name in architecture.mixer_names]
    if any(cls is not Softmax for cls, _ in used):
        reasons.append("mixers are softmax attention there.")
        raise Unfit(reasons)
    settings: list[SoftmaxConfig] = [settings for _, settings in used]
    shapes = {
        (s.num_heads, s.num_kv_heads, s.head_dim, s.qk_norm, s.rope_theta, _qkv_bias(s, m.bias)) for s in settings
    }
    if len(shapes) > 1:
        reasons.append("all layers have the same heads there.")
    if m.residual != "sequential":
        reasons.append(f'model.residual = {m.residual!r}, expected "sequential".')
    windows = [s.window for s in settings]
    first = settings[0]
    have = {"model.bias": m.bias, "qkv_bias": _qkv_bias(first, m.bias), "qk_norm": first.qk_norm}
    reasons += _differences(model_type, have, windows) + extra_weight_faults(settings)
    if reasons:
        raise Unfit(reasons)
    head_dim = first.head_dim or m.d_model // first.num_heads
    return written_by_transformers(
        model_type,
        vocab_size=m.vocab_size,
        hidden_size=m.d_model,
        num_hidden_layers=m.num_layers,
        num_attention_heads=first.num_heads,
        num_key_value_heads=first.num_kv_heads or first.num_heads,
        head_dim=head_dim,
        rms_norm_eps=m.norm_eps,
        initializer_range=m.init_std,
        tie_word_embeddings=m.tie_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": first.rope_theta},
        **feedforward_settings,
        **_particular(model_type, m.bias, windows),
    )


def decoder_faults(architecture: Architecture) -> list[str]:
    """Why a model is no decoder with RMSNorm, rotary positions and nothing else."""
    m = architecture.model
    found = {"model.norm": m.norm, "model.positions": m.positions, "model.embedding_scale": m.embedding_scale}
    wanted = {"model.norm": "rmsnorm", "model.positions": "rope", "model.embedding_scale": 1.0}
    return unlike(found, wanted)


def _differences(model_type: str, have: dict[str, bool], windows: list[int | None]) -> list[str]:
    """What the class cannot say."""
    bias = have["model.bias"]
    wanted = {
        "llama": {"qkv_bias": bias, "qk_norm": False},
        "mistral": {"model.bias": False, "qkv_bias": False, "qk_norm": False},
        "qwen2": {"model.bias": False, "qkv_bias": True, "qk_norm": False},
        "qwen3": {"model.bias": False, "qkv_bias": False, "qk_norm": True},
        "mixtral": {"model.bias": False, "qkv_bias": False, "qk_norm": False},
    }[model_type]
    reasons = unlike(have, wanted)
    kinds = set(windows)
    if model_type == "llama" and kinds != {None}:
        reasons.append("attention has no window there.")
    if model_type in ("mistral", "mixtral") and len(kinds) > 1:
        reasons.append("all layers have the same window there.")
    if len(kinds - {None}) > 1:
        reasons.append("windowed layers all have the same window there.")
    return reasons


def _particular(model_type: str, bias: bool, windows: list[int | None]) -> dict[str, Any]:
    """What one class says in its own way."""
    window = next((one for one in windows if one is not None), None)
    if model_type == "llama":
        return {"attention_bias": bias, "mlp_bias": bias}
    if model_type in ("mistral", "mixtral"):
        return {"sliding_window": window}
    kinds = [FULL if one is None else SLIDING for one in windows]
    return {"use_sliding_window": window is not None, "sliding_window": window, "layer_types": kinds}


def _qkv_bias(settings: SoftmaxConfig, bias: bool) -> bool:
    return bias if settings.qkv_bias is None else settings.qkv_bias


def _format(model_type: str, class_name: str) -> Format:
    return Format(model_type, "llama", class_name, read, partial(write, model_type=model_type))


LLAMA = _format("llama", "LlamaForCausalLM")
MISTRAL = _format("mistral", "MistralForCausalLM")
QWEN2 = _format("qwen2", "Qwen2ForCausalLM")
QWEN3 = _format("qwen3", "Qwen3ForCausalLM")
