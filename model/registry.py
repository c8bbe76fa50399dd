"""Finding a layer's class by the `kind` that a configuration names."""

from __future__ import annotations

import difflib
import importlib
import os
import sys

from model.feedforward import FEEDFORWARDS
from model.layer import FeedForward, Layer, Mixer
from model.mixers import MIXERS


def find_layer(section: str, name: str, kind: str, *, allow_code: bool) -> type[Layer]:
    """The class of `[section.name]` (section `mixers` or `feedforwards`). Raises ValueError for an unknown kind."""
    registry, what = (MIXERS, "mixer") if section == "mixers" else (FEEDFORWARDS, "feed-forward")
    return find(kind, registry, what, allow_code=allow_code)


def kind_of(section: str, cls: type[Layer]) -> str:
    """The `kind` that a configuration names this class by: `find_layer` undone."""
    path = f"{cls.__module__}:{cls.__qualname__}"
    kinds = {path: kind for kind, path in (MIXERS if section == "mixers" else FEEDFORWARDS).items()}
    return kinds.get(path, path)


def find(kind: str, registry: dict[str, str], what: str, *, allow_code: bool) -> type[Layer]:
    """The class registered as `kind`, or a user's own where `kind` is `package.module:Class`.

    Raises:
        ValueError: an unknown kind (naming the nearest), or a user's own where code is not allowed.
    """
    if kind in registry:
        return _load(registry[kind])
    if ":" not in kind:
        near = difflib.get_close_matches(kind, registry, n=1, cutoff=0.4)
        hint = f"the nearest is {near[0]!r}" if near else f"one of {', '.join(sorted(registry))}"
        raise ValueError(f"kind = {kind!r} is no {what} here: {hint}, or package.module:Class for your own.")
    if not allow_code:
        raise ValueError(
            f"kind = {kind!r} would import code that a configuration beside a checkpoint names: "
            "pass --allow-code if you trust it."
        )
    base = Mixer if what == "mixer" else FeedForward
    if os.getcwd() not in sys.path:
        # `python -m trainer` looks in the current folder, and so must `headway`; last, so that it hides nothing.
        sys.path.append(os.getcwd())
    try:
        found = _load(kind)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"kind = {kind!r} cannot be imported: {error}.") from error
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ValueError(f"kind = {kind!r} is no subclass of model.layer.{base.__name__}.")
    return found


def _load(path: str) -> type[Layer]:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)
