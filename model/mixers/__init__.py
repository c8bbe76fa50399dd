"""The mixers. Each is one file; it enters the project by its line here."""

MIXERS = {
    "softmax": "model.mixers.softmax:Softmax",
    "sigmoid": "model.mixers.sigmoid:Sigmoid",
    "moh": "model.mixers.moh:MoH",
    "bam": "model.mixers.bam:BAM",
    "lightning": "model.mixers.lightning:Lightning",
    "minimax": "model.mixers.minimax:MiniMax",
    "norm_linear": "model.mixers.norm_linear:NormLinear",
    "diag_block": "model.mixers.diag_block:DiagBlock",
}
