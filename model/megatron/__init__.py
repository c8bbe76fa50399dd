"""The ways of Megatron: GPT checkpoints of Megatron-LM and megatron-core, in and out.

`names.py` says what tensors are called and how they are packed, `arguments.py` what a checkpoint's arguments mean,
`folder.py` opens a checkpoint, whichever way it was written, and `check.py` asks megatron-core itself what it computes.
"""
