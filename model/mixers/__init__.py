"""The mixers. Each is one file; it enters the project by its line here."""

MIXERS = {
    "softmax": "model.mixers.softmax:Softmax",
    "lightning": "model.mixers.lightning:Lightning",
}
