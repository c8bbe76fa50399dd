"""A trained model as a Python object, and its names in Hugging Face checkpoints."""

from model.hf.loading import load

__all__ = ["load"]
