"""From our checkpoints to Hugging Face folders and back; nothing gets its name before the two have been compared."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import tomli_w
import torch
from safetensors.torch import save_file

from model.config import Architecture
from model.files import new_folder, write_json
from model.folders import MANIFEST, describe_files
from model.hf.bundle import FLOORS
from model.hf.check import TEXTS, Agreement, ask_transformers, check_modalities, check_tokens, judge, native_logits
from model.hf.export import DTYPES, Facts, parse_size, read_tokens, write_configuration, write_folder
from model.hf.folder import CONFIG, is_hugging_face_folder
from model.hf.formats import choose_format
from model.hf.released import ReleasedFiles
from model.hf.source import HuggingFaceFolder, Source, StepFolder, open_model
from model.settings import architecture_tables
from model.shards import write_tensors
from model.stack import Model
from trainer.data.tokenizer import Tokenizer, load_tokenizer
from trainer.data.train_tokenizer import write_hugging_face_files

Say = Callable[[str], None]


def to_hf(
    model: Path,
    out: Path,
    *,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    form: str | None = None,
    tokenizer: str | None = None,
    allow_code: bool = False,
    overwrite: bool = False,
    say: Say = print,
) -> Agreement:
    """Write MODEL as a Hugging Face folder, and see that transformers computes the same from it.

    Args:
        dtype: of the weights. Default: bfloat16 for a run in bf16, what a Hugging Face folder has, else float32.
        form: the kind of checkpoint (`llama`, `headway`); default: the first that can say all of this model.
        tokenizer: a folder or a `.model`, or "none". Default: the model's own.
        say: told how it goes, in lines.

    Raises:
        ValueError: what cannot be written, or computes or tokenizes otherwise than the model: then `out` is untouched.
    """
    limit, asked, source = open_to_write(model, out, dtype, max_shard_size, overwrite)
    architecture = source.architecture(allow_code=allow_code)
    weights = source.weights(architecture)
    layout = choose_format(architecture, form)
    kept = asked or source.dtype
    say(f"{source.folder}: {described(architecture)}, as {layout.model_type} ({layout.class_name}) in {name_of(kept)}")
    words = tokenizer_of(source, tokenizer)
    facts = facts_of(source, words)
    with new_folder(out) as partial:
        write_folder(partial, weights, architecture, layout, facts, dtype=kept, max_shard_bytes=limit)
        agreement = complete_and_compare(
            partial, out, source, architecture, words, kept, allow_code=allow_code, say=say
        )
    say(f"{out}: written")
    return agreement


def open_to_write(
    model: Path, out: Path, dtype: str | None, max_shard_size: str, overwrite: bool
) -> tuple[int, torch.dtype | None, Source]:
    """Bytes of a file of weights, the dtype asked for, and MODEL, for a Hugging Face folder that is to be written.

    Raises:
        ValueError: with all that is wrong with these.
    """
    limit, asked, source, _ = all_of(
        lambda: parse_size(max_shard_size),
        lambda: dtype_named(dtype),
        lambda: open_model(model),
        lambda: check_free(out, is_hugging_face_folder, "Hugging Face", overwrite),
    )
    return limit, asked, source


def complete_and_compare(
    folder: Path,
    out: Path,
    source: Source,
    architecture: Architecture,
    words: Tokenizer | None,
    dtype: torch.dtype,
    *,
    allow_code: bool = False,
    say: Say = print,
) -> Agreement:
    """Put the tokenizer into a folder of weights, and see that transformers computes and tokenizes from it as we do.

    Args:
        folder: that we have written; what it has of code is ours, and may run.
        out: its name in the end.
        source: what we compute from.
        dtype: of the weights in the folder.

    Raises:
        ValueError: it does not.
    """
    if words is not None:
        write_hugging_face_files(words, folder)
    tokens = check_tokens(architecture)
    wanted = native_logits(source, tokens, dtype, allow_code=allow_code)
    texts = None if words is None else TEXTS
    trust = HuggingFaceFolder(folder).format.code is not None
    of = check_modalities(architecture, tokens)
    answer = ask_transformers(folder, tokens, trust=trust, modalities=of, texts=texts, packages=_packages(architecture))
    agreement = judge(answer.logits, wanted, source, tokens, dtype, allow_code=allow_code)
    say(f"logits of transformers and Headway: {agreement}")
    if not agreement.holds:
        raise ValueError(f"transformers computes something else from the export: {agreement}. {out} is not written.")
    if words is not None:
        _compare_tokenizers(words, answer.ids, out)
        say(f"tokenizer: the same ids for {len(TEXTS)} texts of odd spaces, digits, scripts and emoji")
    return agreement


def from_hf(
    folder: Path,
    out: Path,
    *,
    dtype: str | None = None,
    allow_code: bool = False,
    overwrite: bool = False,
    say: Say = print,
) -> Agreement:
    """Write a Hugging Face folder as a step folder, and see that it computes what transformers computes.

    Code in the folder is never run: where transformers has no class, ours stands in for it.

    Args:
        dtype: of the weights; default: float32, which holds the others exactly.
        allow_code: whether layer classes that the folder's configuration names by import path may be imported.

    Raises:
        ValueError: what cannot be read, or computes something else: then `out` is untouched.
    """
    asked, source = all_of(
        lambda: dtype_named(dtype),
        lambda: open_model(folder),
        lambda: check_free(out, lambda path: (path / MANIFEST).is_file(), "step", overwrite),
    )[:2]
    if not isinstance(source, HuggingFaceFolder):
        raise ValueError(f"{folder} is a checkpoint of Headway already; from-hf takes a Hugging Face folder.")
    architecture = source.architecture(allow_code=allow_code)
    kept = asked or torch.float32
    say(f"{folder}: {source.format.class_name}, {described(architecture)}, stored in {name_of(source.dtype)}")
    with new_folder(out) as partial:
        write_step_folder(partial, source, architecture, kept)
        tokens = check_tokens(architecture)
        found = native_logits(StepFolder(partial), tokens, kept, allow_code=allow_code)
        with _readable_by_transformers(source, architecture) as (readable, trust):
            packages = _packages(architecture)
            wide = source.format.wide
            of = check_modalities(architecture, tokens)
            answer = ask_transformers(
                readable, tokens, trust=trust, modalities=of, round_to=kept, wide=wide, packages=packages
            )
        agreement = judge(answer.logits, found, StepFolder(partial), tokens, kept, allow_code=allow_code)
        say(f"logits of Headway and transformers: {agreement}")
        if not agreement.holds:
            raise ValueError(f"Headway computes something else from the import: {agreement}. {out} is not written.")
    say(f"{out}: written")
    return agreement


def write_step_folder(out: Path, source: Source, architecture: Architecture, dtype: torch.dtype) -> None:
    """Fill a folder with a checkpoint of step 0: weights alone, read one by one."""
    weights = source.weights(architecture)
    with torch.device("meta"):
        model = Model(architecture).to(dtype)
    tensors = {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}

    def read(key: str) -> torch.Tensor:
        name = key.removeprefix("model.")
        return weights.read([name])[name].to(tensors[key].dtype)

    write_tensors(out, tensors, read)
    (out / "config.toml").write_text(tomli_w.dumps(architecture_tables(architecture)), encoding="utf-8")
    if source.tokenizer is not None:
        (out / "tokenizer").mkdir()
        load_tokenizer(source.tokenizer).copy_to(out / "tokenizer")
    files = [path for path in sorted(out.rglob("*")) if path.is_file()]
    precision = "bf16" if source.dtype == torch.bfloat16 else "fp32"
    write_json(out / MANIFEST, {"step": 0, "precision": precision, "files": describe_files(out, files)})


@contextmanager
def _readable_by_transformers(source: HuggingFaceFolder, architecture: Architecture) -> Any:
    """(folder, whether its code is ours and may run): where transformers has no class, the weights beside our own, and
    where it does not know what is multiplied, that."""
    if isinstance(source.files, ReleasedFiles):
        with TemporaryDirectory() as temporary:
            tensors = {name: source.files.read(name).contiguous() for name in source.files.shapes}
            save_file(tensors, Path(temporary) / "model.safetensors", metadata={"format": "pt"})
            shutil.copy(source.folder / CONFIG, temporary)
            yield Path(temporary), False
        return
    if source.format.code is None:
        yield source.folder, False
        return
    with TemporaryDirectory() as temporary:
        staged = Path(temporary)
        write_configuration(staged, architecture, source.format, Facts(), source.dtype)
        for pattern in ("*.safetensors", "*.bin", "*.index.json"):
            for path in source.folder.glob(pattern):
                os.symlink(path.resolve(), staged / path.name)
        yield staged, True


def all_of(*looks: Callable[[], Any]) -> list[Any]:
    """What each of them finds. Raises ValueError with the faults of all of them at once."""
    found, faults = [], []
    for look in looks:
        try:
            found.append(look())
        except ValueError as fault:
            faults.append(str(fault))
    if faults:
        raise ValueError("\n".join(faults))
    return found


def check_free(out: Path, replaceable: Callable[[Path], bool], what: str, overwrite: bool) -> None:
    """Raise ValueError where something stands at `out` that is not to be replaced."""
    if not out.exists():
        return
    if not replaceable(out):
        raise ValueError(f"{out} exists and is no {what} folder, so it is not replaced: give another name.")
    if not overwrite:
        raise ValueError(f"{out} exists: give another name, or --overwrite to replace it.")


def dtype_named(name: str | None) -> torch.dtype | None:
    """What --dtype names. Raises ValueError."""
    if name is None:
        return None
    if name not in DTYPES:
        raise ValueError(f"--dtype {name!r}: expected one of {', '.join(DTYPES)}.")
    return DTYPES[name]


def name_of(dtype: torch.dtype) -> str:
    """As --dtype has it."""
    return str(dtype).removeprefix("torch.")


def described(architecture: Architecture) -> str:
    """How large a model is."""
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in Model(architecture).parameters())
    return f"{count:,} parameters"


def _packages(architecture: Architecture) -> frozenset[str]:
    """Top-level packages of the user's own layers: their source goes with the export, so it must do without them."""
    layers = [*architecture.mixers.values(), *architecture.feedforwards.values()]
    return frozenset(cls.__module__.partition(".")[0] for cls, _ in layers) - FLOORS


def tokenizer_of(source: Source, wanted: str | None) -> Tokenizer | None:
    """What --tokenizer names; the model's own by default, if it has one."""
    if wanted == "none" or (wanted is None and source.tokenizer is None):
        return None
    assert wanted is not None or source.tokenizer is not None
    return load_tokenizer(wanted or str(source.tokenizer))


def facts_of(source: Source, words: Tokenizer | None) -> Facts:
    """What a model's folder says beside its weights: the length it was trained on, and its special tokens."""
    longest = source.tables.get("data", {}).get("seq_len")
    if longest is None and isinstance(source, HuggingFaceFolder):
        longest = source.config.get("max_position_embeddings")
    tokens = read_tokens(source.folder) | ({} if words is None else words.token_ids)
    return Facts(int(longest or Facts().max_positions), tokens)


def _compare_tokenizers(words: Tokenizer, ids: list[list[int]] | None, out: Path) -> None:
    """Raise ValueError where transformers gives the texts other ids than the model's tokenizer."""
    wanted = words.encode_batch(TEXTS, workers=1)
    assert ids is not None
    wrong = [text for text, found, own in zip(TEXTS, ids, wanted, strict=True) if found != own]
    if wrong:
        raise ValueError(
            f"AutoTokenizer gives other ids than the model's tokenizer for {json.dumps(wrong[0], ensure_ascii=False)}: "
            f"{out} is not written. Give --tokenizer a Hugging Face folder whose tokenizer fits, or none for none."
        )
