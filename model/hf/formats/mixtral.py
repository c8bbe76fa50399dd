"""Mixtral in transformers: Mistral whose feed-forwards are mixtures of SwiGLU, gates divided by their sum."""

from __future__ import annotations

from functools import partial
from typing import Any

from model.config import Architecture
from model.feedforward.gated import SwiGLU
from model.hf.formats.format import Format, Tables, single_feedforward, unlike
from model.hf.formats.llama import read, write

ROUTERS = ("mlp.gate.weight",)
"""As the classes of transformers call what is in fp32 here whatever the model is in."""


def read_mixture(config: Any, faults: list[str]) -> Tables:
    """The mixture and its expert, as `[feedforwards.NAME]` tables.

    Its one auxiliary loss is over all tokens of a batch; noise on the router's input, which is there in training alone,
    is passed over as dropout is.
    """
    experts, top_k = config.num_local_experts, config.num_experts_per_tok
    if top_k == 1 < experts:
        faults.append(
            f"num_experts_per_tok = 1 of num_local_experts = {experts}: the gate, which is divided by itself there, is "
            "always 1, and such a router learns nothing; num_experts_per_tok = 2 can be read."
        )
    mixture = {
        "num_experts": experts,
        "top_k": top_k,
        "expert": "swiglu",
        "score": "softmax",
        "gate_norm": "selected",
        "balance_weight": config.router_aux_loss_coef,
        "balance_over": "global_batch",
        "z_loss_weight": 0.0,
        "router_init_std": config.initializer_range,
    }
    return {"moe": mixture, "swiglu": {"d_ff": config.intermediate_size}}


def write_mixture(architecture: Architecture, reasons: list[str]) -> dict[str, Any]:
    """What `config.json` says of mixtures; nothing where there are reasons against them."""
    mixture, faults = single_feedforward(architecture, "moe")
    if mixture is None:
        reasons += faults
        return {}
    wanted = {"score": "softmax", "gate_norm": "selected", "gate_scale": 1.0, "shared": None, "bias_rate": 0.0}
    reasons += unlike({key: getattr(mixture, key) for key in wanted}, wanted)
    if mixture.top_k == 1 < mixture.num_experts:
        reasons.append(
            "top_k = 1 would be a gate of 1 there, since gates are divided by their sum: from 2 on they fit."
        )
    expert, settings = architecture.feedforwards[mixture.expert]
    if expert is not SwiGLU:
        reasons.append(f"experts are of the kind swiglu there, and {mixture.expert} is not.")
    return {
        "intermediate_size": settings.d_ff,
        "num_local_experts": mixture.num_experts,
        "num_experts_per_tok": mixture.top_k,
        "router_aux_loss_coef": mixture.balance_weight,
    }


MIXTRAL = Format(
    "mixtral",
    "mixtral",
    "MixtralForCausalLM",
    partial(read, feedforwards=read_mixture),
    partial(write, model_type="mixtral", feedforwards=write_mixture),
    wide=ROUTERS,
)
