"""GPT-2: learned positions, LayerNorm, biases, GELU."""

from __future__ import annotations

from typing import Any

from model.config import Architecture
from model.hf.formats.format import (
    Format,
    Tables,
    Unfit,
    extra_weight_faults,
    read_with_transformers,
    refuse,
    single_feedforward,
    unlike,
    written_by_transformers,
)
from model.mixers.softmax import Softmax

ACTIVATIONS = {"gelu_new": True, "gelu_pytorch_tanh": True, "gelu": False}
"""Name there -> whether it is the tanh approximation."""


def read(raw: dict[str, Any]) -> Tables:
    config = read_with_transformers(raw)
    plain = {
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    }
    faults = unlike({key: getattr(config, key) for key in plain}, plain)
    if config.activation_function not in ACTIVATIONS:
        faults.append(
            f"activation_function = {config.activation_function!r}: expected one of {', '.join(ACTIVATIONS)}."
        )
    refuse(faults)
    model = {
        "d_model": config.n_embd,
        "num_layers": config.n_layer,
        "vocab_size": config.vocab_size,
        "positions": "learned",
        "max_positions": config.n_positions,
        "norm": "layernorm",
        "norm_eps": config.layer_norm_epsilon,
        "bias": True,
        "tie_embeddings": config.tie_word_embeddings,
        "init_std": config.initializer_range,
    }
    feedforward = {"d_ff": config.n_inner or 4 * config.n_embd, "tanh": ACTIVATIONS[config.activation_function]}
    return {
        "model": model,
        "mixers": {"softmax": {"num_heads": config.n_head}},
        "feedforwards": {"gelu": feedforward},
    }


def write(architecture: Architecture) -> dict[str, Any]:
    m = architecture.model
    wanted = {
        "norm": "layernorm",
        "positions": "learned",
        "embedding_scale": 1.0,
        "bias": True,
        "residual": "sequential",
    }
    reasons = [f"model.{fault}" for fault in unlike({key: getattr(m, key) for key in wanted}, wanted)]
    feedforward, faults = single_feedforward(architecture, "gelu")
    reasons += faults
    used = [architecture.mixers[name] for name in architecture.mixer_names]
    cls, first = used[0]
    if cls is not Softmax or any(settings != first for _, settings in used):
        raise Unfit([*reasons, "mixers are all the same softmax attention there."])
    if first.num_kv_heads not in (None, first.num_heads) or first.head_dim not in (None, m.d_model // first.num_heads):
        reasons.append("as many key and value heads as query heads, together as wide as the model, are there.")
    if first.qk_norm or first.window is not None or first.qkv_bias is False:
        reasons.append("no qk_norm, no window, and biases on q, k and v are there.")
    reasons += extra_weight_faults([first])
    if reasons:
        raise Unfit(reasons)
    return written_by_transformers(
        "gpt2",
        vocab_size=m.vocab_size,
        n_positions=m.max_positions,
        n_embd=m.d_model,
        n_layer=m.num_layers,
        n_head=first.num_heads,
        n_inner=feedforward.d_ff,
        activation_function="gelu_new" if feedforward.tanh else "gelu",
        layer_norm_epsilon=m.norm_eps,
        initializer_range=m.init_std,
        tie_word_embeddings=m.tie_embeddings,
        # Headway trains without dropout, and so would whoever trains this on.
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )


GPT2 = Format("gpt2", "gpt2", "GPT2LMHeadModel", read, write)
