"""What the formats have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from model.config import Architecture

Tables = dict[str, Any]
"""`model`, `mixers`, `feedforwards`, as a configuration file has them."""


class Unfit(ValueError):
    """A model that a format cannot describe; the message gives every reason."""

    def __init__(self, reasons: list[str]):
        super().__init__(" ".join(reasons))


@dataclass(frozen=True)
class Format:
    """A kind of checkpoint.

    Attributes:
        model_type: its name in `config.json`.
        names: the family of `model/hf/names.py` that its weights follow.
        class_name: the class that computes it.
        read: `config.json` -> tables. Raises ValueError with every reason why it cannot be.
        write: an architecture -> entries of `config.json`. Raises Unfit.
        code: the module that an export carries, where transformers has no class.
        wide: endings of the names, in that class, of what is in fp32 here whatever the model is in.
        tied_unless_given: the head is tied unless the checkpoint holds another one, whatever its configuration says.
    """

    model_type: str
    names: str
    class_name: str
    read: Callable[[dict[str, Any]], Tables]
    write: Callable[[Architecture], dict[str, Any]]
    code: str | None = None
    wide: tuple[str, ...] = ()
    tied_unless_given: bool = False


def read_with_transformers(config: dict[str, Any]) -> Any:
    """`config.json` as the configuration class of transformers understands it: defaults filled in, old keys renamed.

    Raises:
        ValueError: what that class refuses.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        return CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
    except Exception as error:
        said = " ".join(str(error.__cause__ or error).split()) or type(error).__name__
        raise ValueError(f"transformers cannot read this configuration: {said}") from error


def written_by_transformers(model_type: str, **settings: Any) -> dict[str, Any]:
    """Entries of `config.json` as the configuration class of transformers writes them.

    Raises:
        Unfit: what that class refuses.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        return CONFIG_MAPPING[model_type](**settings).to_dict()
    except Exception as error:
        # It checks its values with a class of errors of its own, which names the cause last.
        raise Unfit([str(error.__cause__ or error)]) from error


def refuse(faults: list[str]) -> None:
    """Raise ValueError with all of them, if there are any."""
    if faults:
        raise ValueError(" ".join(faults))


def unlike(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """A sentence for each setting that is not what it has to be."""
    return [
        f"{key} = {found[key]!r}, expected {value!r}."
        for key, value in wanted.items()
        if found[key] != value or isinstance(found[key], bool) is not isinstance(value, bool)
    ]


def extra_weight_faults(softmax: Iterable[Any]) -> list[str]:
    """Why a class whose softmax is over tokens alone cannot say these settings of softmax layers."""
    if any(settings.takes_weight for settings in softmax):
        return ["softmax is over tokens alone there, without key_bias and sink."]
    return []


def rope_theta(config: Any, faults: list[str]) -> float:
    """The base of the rotary frequencies; a scaled or partial rotation is a fault."""
    rope = dict(config.rope_parameters)
    kind = rope.get("rope_type", "default")
    if kind != "default":
        faults.append(f'rope_type = {kind!r} scales the rotary frequencies; Headway has the plain ones ("default").')
    if (part := rope.get("partial_rotary_factor") or 1.0) != 1.0:
        faults.append(f"partial_rotary_factor = {part} turns a part of each head; Headway turns all of it (1.0).")
    return float(rope["rope_theta"])


def single_feedforward(architecture: Architecture, kind: str) -> tuple[Any, list[str]]:
    """The settings that the feed-forwards of all layers share, and why there are none."""
    from model.registry import find_layer

    wanted = find_layer("feedforwards", kind, kind, allow_code=False)
    used = {name: architecture.feedforwards[name] for name in architecture.feedforward_names}
    other = [name for name, (cls, _) in used.items() if cls is not wanted]
    if other:
        return None, [f"feed-forwards are of the kind {kind} there, and {', '.join(other)} is not."]
    settings = [settings for _, settings in used.values()]
    if any(one != settings[0] for one in settings):
        return None, [f"feed-forwards are all alike there, and {', '.join(used)} differ."]
    return settings[0], []
