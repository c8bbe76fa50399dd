"""From TOML tables to typed settings: every fault is collected and said in a sentence."""

from __future__ import annotations

import dataclasses
import difflib
from functools import cache
from typing import Any, TypeVar

from model.config import Architecture, ModelConfig
from model.registry import find_layer, kind_of
from model.untie import UntieConfig

Settings = TypeVar("Settings")


@cache
def _adapter(cls: type) -> Any:
    from pydantic import ConfigDict, TypeAdapter

    cls.__pydantic_config__ = ConfigDict(extra="forbid", coerce_numbers_to_str=True)  # type: ignore[attr-defined]
    return TypeAdapter(cls)


def build(cls: type[Settings], section: str, values: dict[str, Any], faults: list[str]) -> Settings | None:
    """The dataclass `cls` from the table `[section]`; what is wrong with it is appended to `faults` in sentences.

    A wrong value does not hide others: the key is left at its default and the rest is read, so that values can be
    checked against each other all the same. None where a key without a default is missing or wrong.
    """
    from pydantic import ValidationError

    known = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
            others = "" if difflib.get_close_matches(key, known, n=1) else f" (it has {', '.join(known)})"
            faults.append(
                f"{section}.{key} is no key of [{section}]; the nearest known key is {section}.{near[0]}{others}."
            )
    adapter: Any = _adapter(cls)  # type: ignore[arg-type]
    values = {key: value for key, value in values.items() if key in known}
    try:
        return adapter.validate_python(values)
    except ValidationError as error:
        faults += [_sentence(section, fault) for fault in error.errors()]
        wrong = {fault["loc"][0] for fault in error.errors()}
    try:
        return adapter.validate_python({key: value for key, value in values.items() if key not in wrong})
    except ValidationError:
        return None


def _sentence(section: str, fault: Any) -> str:
    # The location of a union's branch ends with the branch's type, which says nothing to a reader.
    where = ".".join(str(part) for part in fault["loc"] if str(part).isidentifier() or isinstance(part, int))
    if fault["type"] == "missing":
        return f"{section}.{where} is missing."
    if fault["type"] == "unexpected_keyword_argument":
        return f"{section}.{where} is no known key."
    expected = fault["msg"].removeprefix("Input should be ").rstrip(".")
    return f"{section}.{where} = {fault['input']!r}: expected {expected}."


def build_architecture(
    tables: dict[str, Any], faults: list[str], *, allow_code: bool = False
) -> tuple[ModelConfig | None, Architecture | None]:
    """The model that `[model]`, `[mixers.NAME]`, `[feedforwards.NAME]` and, where there is one, `[untie]` describe.

    Returns None for what has faults of its own, which are appended to `faults`.
    """
    count = len(faults)
    model = build(ModelConfig, "model", tables.get("model", {}), faults)
    layers: dict[str, dict[str, Any]] = {"mixers": {}, "feedforwards": {}}
    for section, found in layers.items():
        for name, values in tables.get(section, {}).items():
            if not isinstance(values, dict):
                faults.append(f"{section}.{name} = {values!r} stands outside a [{section}.NAME] table.")
                continue
            settings = {key: value for key, value in values.items() if key != "kind"}
            try:
                cls = find_layer(section, name, str(values.get("kind", name)), allow_code=allow_code)
            except ValueError as error:
                faults.append(f"{section}.{name}.{error}")
                continue
            config = build(cls.Config, f"{section}.{name}", settings, faults)
            if config is not None:
                found[name] = (cls, config)
    untie = build(UntieConfig, "untie", tables["untie"], faults) if "untie" in tables else None
    if len(faults) > count or model is None:
        return model, None
    architecture = Architecture(model, layers["mixers"], layers["feedforwards"], untie)
    faults += architecture.resolve()
    return model, architecture if len(faults) == count else None


def architecture_tables(architecture: Architecture) -> dict[str, Any]:
    """`[model]`, `[mixers.NAME]`, `[feedforwards.NAME]` and `[untie]`, if any, as tables, kinds included."""
    tables: dict[str, Any] = {"model": without_none(architecture.model)}
    if architecture.untie is not None:
        tables["untie"] = without_none(architecture.untie)
    for section, parts in (("mixers", architecture.mixers), ("feedforwards", architecture.feedforwards)):
        tables[section] = {
            name: {"kind": kind_of(section, cls)} | without_none(settings) for name, (cls, settings) in parts.items()
        }
    return tables


def without_none(value: Any) -> Any:
    """A dataclass as nested plain tables; keys that are None are left out, since TOML has no null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [without_none(item) for item in value]
    return value
