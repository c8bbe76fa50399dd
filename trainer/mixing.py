"""Several dense models, trained on from one seed, as one model of experts (BAM, arXiv 2408.08274, section 4).

Expert j of attention and of the feed-forward is that of model j; norms, embeddings, the head, and keys and values where
they are shared, are the average. Parameters are read one by one, and nothing gets its name before every expert has been
seen to compute what it did.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from model.config import Architecture
from model.files import new_folder
from model.hf.check import Agreement, check_tokens, compare, native_logits
from model.hf.export import write_folder
from model.hf.formats import choose_format
from model.hf.loading import load_source
from model.hf.names import parameter_shapes
from model.hf.source import HuggingFaceFolder, Source, Weights, open_model
from model.initialisation import Normal, draw
from model.mixers.attention import AttentionConfig
from model.mixers.bam import BAM
from model.mixers.softmax import Softmax
from model.registry import kind_of
from model.settings import build_architecture
from trainer.convert import (
    Say,
    all_of,
    complete_and_compare,
    described,
    facts_of,
    name_of,
    open_to_write,
    tokenizer_of,
)
from trainer.data.tokenizer import Tokenizer
from trainer.experts import in_place_of_feedforwards
from trainer.upcycle import in_place_of_softmax

FREE = {"pattern", "feedforward_pattern", "residual_factors", "init_std", "init_depth_scaled", "init_from"}
"""Settings of a model that may differ: how it began, and names; what is behind the names is compared."""
ROUNDED = 0.02
"""Where a map out cannot be made larger without rounding, logits are those of the seed but for this part."""


@dataclass(frozen=True)
class Mixture:
    """What `headway upcycle bam` is told beside its models."""

    with_seed: bool = True
    top_k: int = 1
    ffn_gate_norm: Literal["scale_n", "selected", "none"] = "scale_n"
    shared_kv: bool = False
    router_std: float = 0.02


def to_bam(
    seed: Path,
    out: Path,
    experts: list[Path],
    mixture: Mixture,
    *,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    say: Say = print,
) -> list[Agreement]:
    """Write models trained on from SEED as one model of experts, as a Hugging Face folder.

    Checked are: with all gates on one expert, for each of them, logits are those of its layers between the averages;
    where all models are alike, logits are those of the seed; and transformers computes from the folder what Headway
    does.

    Args:
        dtype: of the weights. Default: bfloat16 for a run in bf16, what a Hugging Face folder has, else float32.
        say: told how it goes, in lines.

    Returns:
        How far logits are, expert by expert.

    Raises:
        ValueError: what cannot be made, or computes something else: then `out` is untouched.
    """
    (limit, asked, source), *donors = all_of(
        lambda: open_to_write(seed, out, dtype, max_shard_size, overwrite),
        *(lambda path=path: open_model(path) for path in experts),
    )
    sources = [source, *donors]
    dense, *others = all_of(*(one.architecture for one in sources))
    mixed, words = checked(sources, [dense, *others], mixture)
    kept, layout = asked or source.dtype, choose_format(mixed, "headway")
    opened = all_of(*(lambda one=one: one.weights(dense) for one in sources))
    parts = Parts(opened if mixture.with_seed else opened[1:], dense, mixed, mixture)
    folders = [one.folder for one in (sources if mixture.with_seed else donors)]
    say(f"{source.folder}: {described(dense)} in {name_of(kept)}")
    far = [drift(opened[0], other, parts) for other in opened[1:]]
    for donor, (own, averaged) in zip(donors, far, strict=True):
        say(f"{donor.folder}: {own:.2%} from the seed in what becomes an expert, {averaged:.2%} in what is averaged")
    say(f"{out}: {described(mixed)}; {_told(mixture, len(folders))}")
    if dense.model.residual != "parallel":
        say(f"the paper's blocks are parallel; these are {dense.model.residual}, and stay so: each part has its gates")
    with new_folder(out) as partial:
        write_folder(partial, parts, mixed, layout, facts_of(source, words), dtype=kept, max_shard_bytes=limit)
        made, tokens = HuggingFaceFolder(partial), check_tokens(dense)
        found = []
        for expert, folder in enumerate(folders):
            alone = native_logits(OneExpert(folder, dense, parts, expert), tokens, kept)
            found.append(compare(logits_of_one(made, tokens, kept, expert), alone))
            say(f"logits with all gates on expert {expert}, and of {folder} between averages: {found[-1]}")
        if mixture.ffn_gate_norm != "none" and all(own == averaged == 0 for own, averaged in far):
            same = compare(native_logits(made, tokens, kept), native_logits(source, tokens, kept))
            found.append(same if parts.scales_exactly(kept) else replace(same, tolerance=ROUNDED))
            say(f"all models are alike: logits as it begins, and of the seed: {found[-1]}")
        if wrong := [str(agreement) for agreement in found if not agreement.holds]:
            raise ValueError(f"it computes something else than its models: {'; '.join(wrong)}. {out} is not written.")
        complete_and_compare(partial, out, made, mixed, words, kept, say=say)
    say(f"{out}: written")
    return found


# --------------------------------------------------------------------------------------------- what may be mixed


def checked(
    sources: list[Source], architectures: list[Architecture], mixture: Mixture
) -> tuple[Architecture, Tokenizer | None]:
    """The model of experts, and its tokenizer, from the seed and the others.

    Raises:
        ValueError: with every reason why these cannot be mixed so.
    """
    count = len(sources) - (not mixture.with_seed)
    _, words, mixed = all_of(
        lambda: _see_that_they_are_alike(sources, architectures),
        lambda: _common_tokenizer(sources),
        lambda: with_experts(architectures[0], mixture, count),
    )
    return mixed, words


def _see_that_they_are_alike(sources: list[Source], architectures: list[Architecture]) -> None:
    expected, *others = architectures
    if faults := [
        f"{source.folder}: {fault}"
        for source, architecture in zip(sources[1:], others, strict=True)
        for fault in differences(architecture, expected)
    ]:
        raise ValueError("\n".join(faults))


def _common_tokenizer(sources: list[Source]) -> Tokenizer | None:
    """That of all who have one."""
    found = all_of(*(lambda source=source: tokenizer_of(source, None) for source in sources))
    known = [(source, words) for source, words in zip(sources, found, strict=True) if words is not None]
    if faults := [
        f"{source.folder} has another tokenizer than {known[0][0].folder}: the same ids would be other texts."
        for source, words in known[1:]
        if words.fingerprint != known[0][1].fingerprint
    ]:
        raise ValueError("\n".join(faults))
    return known[0][1] if known else None


def differences(found: Architecture, expected: Architecture) -> Iterator[str]:
    """What is not as expected, in sentences; names and initial values may be others."""
    free = FREE if expected.model.positions == "learned" else FREE | {"max_positions"}
    ours, theirs = asdict(expected.model), asdict(found.model)
    for key in ours:
        if key not in free and ours[key] != theirs[key]:
            yield f"model.{key} = {theirs[key]!r}, expected {ours[key]!r}, as the seed has."
    if ours["num_layers"] == theirs["num_layers"]:
        for section in ("mixers", "feedforwards"):
            yield from dict.fromkeys(_layer_differences(section, found, expected))


def _layer_differences(section: str, found: Architecture, expected: Architecture) -> Iterator[str]:
    """Layer by layer: the same sentence for every layer of one name."""
    for (name, theirs), (_, ours) in zip(_layers(section, found), _layers(section, expected), strict=True):
        kinds = [kind_of(section, cls) for cls, _ in (theirs, ours)]
        if kinds[0] != kinds[1]:
            yield f"{section}.{name}.kind = {kinds[0]!r}, expected {kinds[1]!r}, as the seed has."
            continue
        there, here = _resolved(found, name, theirs[1]), _resolved(expected, name, ours[1])
        for key, value in here.items():
            if there[key] != value:
                yield f"{section}.{name}.{key} = {there[key]!r}, expected {value!r}, as the seed has."


def _layers(section: str, architecture: Architecture) -> list[tuple[str, Any]]:
    """Name, and class and settings, of each layer's mixer or feed-forward."""
    mixers = section == "mixers"
    names = architecture.mixer_names if mixers else architecture.feedforward_names
    known: dict[str, Any] = dict(architecture.mixers if mixers else architecture.feedforwards)
    return [(name, known[name]) for name in names]


def _resolved(architecture: Architecture, name: str, settings: Any) -> dict[str, Any]:
    """Settings with what stands for those that are left out."""
    found = asdict(settings) | {"residual_factors": architecture.model.factors(name)}
    if isinstance(settings, AttentionConfig):
        found["num_kv_heads"] = settings.groups
        found["head_dim"] = settings.head_dim or architecture.model.d_model // settings.num_heads
        found["qkv_bias"] = architecture.model.bias if settings.qkv_bias is None else settings.qkv_bias
    return found


def with_experts(dense: Architecture, mixture: Mixture, count: int) -> Architecture:
    """The same model with so many experts in each attention and feed-forward.

    Raises:
        ValueError: with every reason why it cannot be.
    """
    faults = []
    if count < 2:
        faults.append(f"{count} of 2 experts at least: name more with --experts, or let the seed be one (--with-seed).")
    for name, (mixer, _) in dense.mixers.items():
        if mixer is BAM:
            faults.append(f"mixers.{name} is a mixture of attentions already: begin with dense models.")
        elif mixer is not Softmax:
            faults.append(f"mixers.{name} is {mixer.__name__}: only softmax attention can be an expert.")
    tables, problems = in_place_of_softmax(
        dense,
        "bam",
        "a mixture of attentions",
        lambda _: {
            "num_experts": count,
            "shared_kv": mixture.shared_kv,
            "router_init_std": mixture.router_std,
        },
    )
    settings = {
        "num_experts": count,
        "top_k": mixture.top_k,
        "gate_norm": "selected" if mixture.ffn_gate_norm == "selected" else "none",
        "router_init_std": 0.0 if mixture.ffn_gate_norm == "scale_n" else mixture.router_std,
    }
    if faults := faults + problems + in_place_of_feedforwards(dense, tables, settings):
        raise ValueError("\n".join(faults))
    _, mixed = build_architecture(tables, faults)
    if mixed is None:
        raise ValueError("\n".join(faults))
    return mixed


# ------------------------------------------------------------------------------------------------- the weights


class Parts(Weights):
    """The parameters of a model of experts, from those of dense models.

    Attributes:
        factor: what feed-forwards' maps out are made larger by, so that gates of 1 / N over all N experts, for the K
            that run, add up to 1.
        experts: the dense models, in the order of experts.
    """

    def __init__(self, experts: list[Weights], dense: Architecture, mixed: Architecture, mixture: Mixture):
        self.experts, self._mixture = experts, mixture
        self.factor = len(experts) / mixture.top_k if mixture.ffn_gate_norm == "scale_n" else 1.0
        self.known, self._shapes = parameter_shapes(dense).keys(), parameter_shapes(mixed)
        projections = {cls.output_projection for cls, _ in dense.feedforwards.values()}
        self._maps_out = re.compile(rf"layers\.\d+\.feedforward\.({'|'.join(projections)})\.(weight|bias)")

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        return {name: self._one(name) for name in names}

    def _one(self, name: str) -> Tensor:
        if (match := re.fullmatch(r"(layers\.\d+\.\w+\.)experts\.(\d+)\.(.+)", name)) is not None:
            return self.of_expert(int(match[2]), match[1] + match[3])
        if name in self.known:
            return self.average(name)
        std = 0.0 if ".feedforward." in name and self._mixture.ffn_gate_norm == "scale_n" else self._mixture.router_std
        return draw(name, Normal(std), torch.Size(self._shapes[name]), seed=0)

    def of_expert(self, expert: int, name: str) -> Tensor:
        """What becomes a part of an expert, by its name in the dense model."""
        (found,) = self.experts[expert].read([name]).values()
        return found.float() * self.factor if self._maps_out.fullmatch(name) else found

    def average(self, name: str) -> Tensor:
        """Of all experts' models, fp32; that of equal numbers is that number."""
        mean = torch.zeros(())
        for count, weights in enumerate(self.experts, 1):
            (found,) = weights.read([name]).values()
            mean = mean + (found.float() - mean) / count
        return mean

    def scales_exactly(self, dtype: torch.dtype) -> bool:
        """Whether maps out are made larger without rounding them in this dtype to anything but what they were."""
        return dtype == torch.float32 or math.log2(self.factor).is_integer()

    def is_of_experts(self, name: str) -> bool:
        """Whether a dense model's parameter becomes a part of an expert; otherwise it is averaged."""
        part = name.split(".")
        shared = self._mixture.shared_kv and len(part) > 3 and part[3] in ("k", "v", "k_norm")
        return part[0] == "layers" and part[2] in ("mixer", "feedforward") and not (shared and part[2] == "mixer")


class OneExpert(Source):
    """The dense model that one expert's layers are, between averages."""

    tokenizer = None

    def __init__(self, folder: Path, dense: Architecture, parts: Parts, expert: int):
        self.folder, self._dense, self._parts, self._expert = folder, dense, parts, expert

    def architecture(self, *, allow_code: bool = False) -> Architecture:
        return self._dense

    def weights(self, architecture: Architecture) -> Weights:
        parts, expert = self._parts, self._expert

        class Chosen(Weights):
            def read(self, names: Iterable[str]) -> dict[str, Tensor]:
                return {
                    name: parts.of_expert(expert, name) if parts.is_of_experts(name) else parts.average(name)
                    for name in names
                }

        return Chosen()

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32


def drift(seed: Weights, other: Weights, parts: Parts) -> tuple[float, float]:
    """|other - seed| / |seed| of all that becomes an expert, and of all that is averaged."""
    sums = torch.zeros(2, 2, dtype=torch.float64)
    for name in parts.known:
        (began,), (became,) = seed.read([name]).values(), other.read([name]).values()
        began, became = began.double(), became.double()
        sums[int(not parts.is_of_experts(name))] += torch.stack(((became - began).square().sum(), began.square().sum()))
    far = (sums[:, 0] / sums[:, 1]).sqrt()
    return far[0].item(), far[1].item()


# --------------------------------------------------------------------------------------------------- the check


def logits_of_one(made: Source, tokens: Tensor, dtype: torch.dtype, expert: int) -> Tensor:
    """Logits, in fp32, of a model of experts in which every gate is on one of them."""
    model = load_source(made, dtype=dtype).to(torch.float32)
    with _all_gates_on(model, expert), torch.no_grad():
        logits: Tensor = model(tokens)
    return logits


@contextmanager
def _all_gates_on(model: nn.Module, expert: int) -> Iterator[None]:
    """Whatever routers find, they say one expert: others are so far below that their part is 0 exactly."""

    def one(scores: Tensor) -> Tensor:
        scores = torch.full_like(scores, -1e4)
        scores[..., expert] = 0.0
        return scores

    def say(_: nn.Module, args: Any, found: Any) -> Any:
        return tuple(map(one, found)) if isinstance(found, tuple) else one(found)

    routers = [module for name, module in model.named_modules() if name.endswith(".router")]
    hooks = [router.register_forward_hook(say) for router in routers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _told(mixture: Mixture, count: int) -> str:
    """What runs for a token, in words."""
    gates = {
        "scale_n": f"over all, with maps out {count} / {mixture.top_k} times as large and routers that begin as zeros "
        f"(every token with the first {mixture.top_k})",
        "selected": "over those that run",
        "none": "over all",
    }[mixture.ffn_gate_norm]
    keys = "keys and values shared" if mixture.shared_kv else "keys and values of each"
    return (
        f"{count} attentions for every token, {keys}, and {mixture.top_k} of {count} feed-forwards, "
        f"whose gates are {gates}"
    )
