"""Text to tokens, tokens to batches.

`tokenizer`, `prepare` and `inspect` make and look at data on disk (Megatron's `.bin` and `.idx`); `check`, `training`,
`evaluation` and `fingerprint` are what a run reads it with, and `sources` gathers those four under one name. Nothing
heavy is imported until it is used.
"""
