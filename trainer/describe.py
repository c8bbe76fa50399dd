"""Every section and key of a configuration in words: for `headway train --help` and for the documents."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import textwrap
import types
import typing
from collections.abc import Iterator
from typing import Any


def sections() -> dict[str, Any]:
    """Section -> its dataclass, as a reader meets them; layers with the same settings together."""
    from model.config import ModelConfig
    from model.feedforward import FEEDFORWARDS
    from model.mixers import MIXERS
    from model.registry import find_layer
    from model.untie import UntieConfig
    from trainer.config import SECTIONS
    from trainer.data.config import DataSource

    layers: dict[Any, list[str]] = {}
    for section, registry in (("mixers", MIXERS), ("feedforwards", FEEDFORWARDS)):
        for kind in registry:
            config = find_layer(section, kind, kind, allow_code=False).Config
            layers.setdefault(config, []).append(f"{section}.{kind}")
    named = {" ".join(names): config for config, names in layers.items()}
    rest = {name: cls for name, cls in SECTIONS.items() if name != "run"}
    return (
        {"run": SECTIONS["run"], "model": ModelConfig}
        | named
        | {"untie": UntieConfig}
        | rest
        | {"data source": DataSource}
    )


def keys(cls: Any) -> Iterator[tuple[str, str, str, str]]:
    """(key, type, default, meaning) of each field; the meaning is the docstring under it."""
    hints, meanings = typing.get_type_hints(cls), field_docstrings(cls)
    for field in dataclasses.fields(cls):
        yield field.name, type_name(hints[field.name]), default_of(field), meanings[field.name]


def default_of(field: Any) -> str:
    """A field's default as TOML would have it."""
    made = field.default_factory
    value = field.default if made is dataclasses.MISSING else made()
    if value is dataclasses.MISSING:
        return "required"
    return "not set" if value is None else json.dumps(value)


def type_name(hint: Any) -> str:
    """A type in words."""
    plain = {int: "integer", float: "number", str: "text", bool: "true or false"}
    if hint in plain:
        return plain[hint]
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return ", ".join(json.dumps(value) for value in arguments)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(type_name(part) for part in arguments if part is not type(None))
    if origin is list:
        return f"list of {type_name(arguments[0])}"
    if origin is dict:
        return f"for each name a {type_name(arguments[1])}"
    if origin is tuple:
        return f"list of {len(arguments)}: {', '.join(map(type_name, arguments))}"
    if dataclasses.is_dataclass(hint):
        return "table of " + ", ".join(field.name for field in dataclasses.fields(hint))
    raise TypeError(f"no word for the type {hint}")


def field_docstrings(cls: type) -> dict[str, str]:
    """Field -> the string that stands under it in the class, or in the class that it inherits the field from."""
    found: dict[str, str] = {}
    for base in reversed([base for base in cls.__mro__ if dataclasses.is_dataclass(base)]):
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, under in zip(body.body, body.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(under, ast.Expr):
                assert isinstance(field.target, ast.Name)
                assert isinstance(under.value, ast.Constant)
                found[field.target.id] = " ".join(str(under.value.value).split())
    return found
