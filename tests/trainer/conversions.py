"""Small models of every kind of checkpoint, and the commands that convert them."""

from __future__ import annotations

from typing import Any

from tests.trainer.runs import headway


def done(*argv: str) -> None:
    code, said = headway(*argv)
    assert code == 0, said


def decoder(mixers: dict[str, Any], feedforwards: dict[str, Any], **model: Any) -> dict[str, Any]:
    settings = {"d_model": 32, "num_layers": 3, "vocab_size": 61, "pattern": [*mixers]} | model
    return {"model": settings, "mixers": mixers, "feedforwards": feedforwards}


SWIGLU = {"swiglu": {"d_ff": 48}}
GROUPED = {"num_heads": 4, "num_kv_heads": 2}
# As a checkpoint of transformers can say them.
EXPERTS = {"num_experts": 5, "top_k": 2, "expert": "swiglu", "balance_weight": 0.02}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", decoder({"softmax": GROUPED}, SWIGLU)),
    "llama tied, with biases": ("llama", decoder({"softmax": GROUPED}, SWIGLU, bias=True, tie_embeddings=True)),
    "llama, wide heads": ("llama", decoder({"softmax": {"num_heads": 2, "head_dim": 10}}, SWIGLU, norm_eps=1e-5)),
    "mistral with a window": ("mistral", decoder({"softmax": GROUPED | {"window": 7}}, SWIGLU, max_positions=80)),
    "mistral, heads that do not divide": ("mistral", decoder({"softmax": {"num_heads": 3, "head_dim": 6}}, SWIGLU)),
    "qwen2 with windows in some layers": (
        "qwen2",
        decoder(
            {"full": GROUPED | {"kind": "softmax", "qkv_bias": True}}
            | {"near": GROUPED | {"kind": "softmax", "qkv_bias": True, "window": 9}},
            SWIGLU,
            pattern=["full", "near", "near"],
        ),
    ),
    "qwen3": (
        "qwen3",
        decoder({"softmax": GROUPED | {"qk_norm": True, "head_dim": 10, "rope_theta": 500.0}}, SWIGLU),
    ),
    "gpt2": (
        "gpt2",
        decoder(
            {"softmax": {"num_heads": 4}},
            {"gelu": {"d_ff": 48}},
            positions="learned",
            max_positions=70,
            norm="layernorm",
            bias=True,
            tie_embeddings=True,
        ),
    ),
    "gpt2, exact gelu, untied": (
        "gpt2",
        decoder(
            {"softmax": {"num_heads": 4}},
            {"gelu": {"d_ff": 48, "tanh": False}},
            positions="learned",
            max_positions=70,
            norm="layernorm",
            bias=True,
        ),
    ),
    "minimax": (
        "minimax",
        decoder(
            {"minimax": {"num_heads": 4, "head_dim": 6}, "softmax": GROUPED | {"head_dim": 6}},
            SWIGLU,
            num_layers=4,
            pattern=["minimax*3", "softmax"],
            residual="normalised",
            residual_factors={"minimax": [3.5, 1.0], "softmax": [2.5, 0.5], "swiglu": [1.5, 2.0]},
        ),
    ),
    "mixtral": ("mixtral", decoder({"softmax": GROUPED}, {"moe": EXPERTS} | SWIGLU)),
    "mixtral, tied, with a window": (
        "mixtral",
        decoder(
            {"softmax": GROUPED | {"window": 7, "head_dim": 10, "rope_theta": 1e6}},
            {"many": EXPERTS | {"kind": "moe", "num_experts": 3, "top_k": 3}} | SWIGLU,
            tie_embeddings=True,
            norm_eps=1e-5,
        ),
    ),
    "mixtral, one expert": (
        "mixtral",
        decoder({"softmax": GROUPED}, {"moe": EXPERTS | {"num_experts": 1, "top_k": 1}} | SWIGLU),
    ),
    "minimax with experts": (
        "minimax",
        decoder(
            {"minimax": {"num_heads": 4, "head_dim": 6}, "softmax": GROUPED | {"head_dim": 6}},
            {"moe": EXPERTS} | SWIGLU,
            num_layers=4,
            pattern=["minimax*3", "softmax"],
            residual="normalised",
            residual_factors={"minimax": [3.5, 1.0], "softmax": [2.5, 0.5], "moe": [1.5, 2.0]},
        ),
    ),
    "experts beside a shared one, chosen by other numbers": (
        "headway",
        decoder(
            {"softmax": GROUPED},
            {
                "moe": EXPERTS
                | {"top_k": 1, "score": "sigmoid", "gate_norm": "none", "bias_rate": 0.01}
                | {"shared": "gelu"},
                "gelu": {"d_ff": 16},
            }
            | SWIGLU,
            bias=True,
        ),
    ),
    "transnormer, tied": (
        "transnormer",
        decoder(
            {"lightning": {"num_heads": 5, "head_dim": 6, "lrpe_layers": [0, 2]}},
            {"sglu": {"d_ff": 48}},
            norm="srmsnorm",
            positions="none",
            tie_embeddings=True,
            embedding_scale="sqrt",
        ),
    ),
    "transnormer, untied": (
        "transnormer",
        decoder(
            {"lightning": {"num_heads": 4, "activation": "1+elu"}},
            {"sglu": {"d_ff": 48}},
            norm="srmsnorm",
            positions="none",
        ),
    ),
    "heads that are chosen, kept in another order": (
        "headway",
        decoder(
            {
                "moh": {"num_heads": 8, "shared_heads": 2, "active_heads": 2},
                "norm": {"kind": "moh", "num_heads": 4, "shared_heads": 2, "active_heads": 1, "router": "norm"},
            },
            SWIGLU,
            num_layers=4,
            bias=True,
        ),
    ),
    "a hybrid, parallel": (
        "headway",
        decoder({"lightning": {"num_heads": 4}, "softmax": GROUPED}, SWIGLU, num_layers=4, residual="parallel"),
    ),
}
