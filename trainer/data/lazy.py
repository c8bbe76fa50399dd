"""The slow import, put off and kept quiet."""

from __future__ import annotations

import importlib
import warnings
from typing import Any


def megatron(module: str) -> Any:
    """megatron-core's dataset module of that name.

    The first import takes seconds; what it then warns of, fused optimizers that are not installed, is not used here.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(f"megatron.core.datasets.{module}")
