"""The feed-forwards. Each enters the project by its line here."""

FEEDFORWARDS = {
    "swiglu": "model.feedforward.gated:SwiGLU",
    "sglu": "model.feedforward.gated:SGLU",
    "gelu": "model.feedforward.mlp:GeluMLP",
    "moe": "model.feedforward.moe:MoE",
}
