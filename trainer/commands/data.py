"""`headway data tokenizer | patches | prepare | inspect`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro

Inputs = Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="INPUT...", name="input")]


@dataclass
class TokenizerArguments:
    """Train a SentencePiece tokenizer on text."""

    input: Inputs
    """Text, JSON lines or Parquet files, or folders of them."""
    out: str
    """The folder to write: tokenizer.model and the Hugging Face files."""
    vocab_size: int
    """How many pieces it gets, exactly."""
    key: str = "text"
    """Where the text is in JSON lines and Parquet."""
    parts: str | None = None
    """Where documents of parts are in JSON lines: their texts are used."""
    sample_mb: int = 200
    """Of more text than this, evenly spaced lines are used."""
    skip_broken: bool = False
    """Pass over what cannot be read instead of refusing."""
    overwrite: bool = False
    """Replace a tokenizer that is there."""


@dataclass
class PatchesArguments:
    """Turn the images in documents of parts into codes: patches, each replaced by the nearest of those learned."""

    input: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="INPUT", name="input")]
    """JSON lines, or a folder of them; an image is a path to a file, relative to them."""
    out: str
    """The JSON lines to write. What is learned goes beside them, into a folder that ends in .codebook."""
    codes: int | None = None
    """How many patches are learned."""
    patch: int | None = None
    """The side of a patch, in pixels."""
    size: int | None = None
    """Images are fitted into a square of this side; what is left over or transparent becomes white."""
    gray: bool = False
    """Without colour."""
    codebook: str | None = None
    """The folder of a codebook to use instead of learning one."""
    parts: str = "parts"
    """Where documents of parts are in JSON lines."""
    seed: int = 0
    """Of what learning begins with."""
    skip_broken: bool = False
    """Pass over what cannot be read, and count it, instead of refusing."""
    overwrite: bool = False
    """Replace what is there."""


@dataclass
class PrepareArguments:
    """Tokenise text into a Megatron dataset: PREFIX.bin and PREFIX.idx."""

    input: Inputs
    """Text, JSON lines or Parquet files, or folders of them; text and JSON lines may be gzipped."""
    tokenizer: str
    """A tokenizer folder, a .model file, or any Hugging Face tokenizer folder."""
    out: str
    """The prefix to write."""
    documents: Literal["file", "paragraph", "line"] = "file"
    """What a document is in a text file."""
    key: str = "text"
    """Where the text is in JSON lines and Parquet."""
    parts: str | None = None
    """Instead of --key: where documents of parts, text and images, are in JSON lines."""
    image_codes: int | None = None
    """How many codes the images in them are made of."""
    workers: int | None = None
    """Threads. Default: one per core. Their number does not change what is written."""
    skip_broken: bool = False
    """Pass over what cannot be read, and count it, instead of refusing."""
    overwrite: bool = False
    """Replace a dataset that is there."""


@dataclass
class InspectArguments:
    """Say what a dataset holds."""

    prefix: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PREFIX")]
    """The dataset: PREFIX.bin and PREFIX.idx."""
    tokenizer: str | None = None
    """Decode with this one. Default: the one kept beside the data."""
    end_token: int | None = None
    """The id that ends a document. Default: the sidecar's, or the tokenizer's."""
    show: int = 3
    """How many documents to show the first line of."""
    json: bool = False
    """Print JSON."""


def _parse(kind: Any, argv: list[str], name: str) -> Any:
    return tyro.cli(kind, args=argv, prog=f"headway data {name}", config=(tyro.conf.FlagCreatePairsOff,))


def tokenizer(argv: list[str]) -> int:
    """`headway data tokenizer INPUT... --out TOK --vocab-size N`. Raises ValueError when it refuses."""
    arguments = _parse(TokenizerArguments, argv, "tokenizer")
    from trainer.data.train_tokenizer import train_tokenizer

    characters = train_tokenizer(
        list(arguments.input),
        arguments.out,
        arguments.vocab_size,
        key=arguments.key,
        parts=arguments.parts,
        sample_mb=arguments.sample_mb,
        skip_broken=arguments.skip_broken,
        overwrite=arguments.overwrite,
    )
    print(f"{arguments.out}: {arguments.vocab_size:,} pieces from {characters:,} characters.")
    return 0


def patches(argv: list[str]) -> int:
    """`headway data patches INPUT --out OUT.jsonl --codes K --patch P --size S`. Raises ValueError when it refuses."""
    arguments = _parse(PatchesArguments, argv, "patches")
    from trainer.data.quantise import quantise_images

    written = quantise_images(
        arguments.input,
        arguments.out,
        codes=arguments.codes,
        patch=arguments.patch,
        size=arguments.size,
        grey=arguments.gray,
        codebook=arguments.codebook,
        key=arguments.parts,
        seed=arguments.seed,
        skip_broken=arguments.skip_broken,
        overwrite=arguments.overwrite,
    )
    print(
        f"{arguments.out}: {written['documents']:,} documents, {written['images']:,} images of {written['length']} "
        f"codes, which decode to within {written['squared_error'] ** 0.5:.1f} of 255 levels (root of the mean square)."
    )
    print(f"The codebook is {written['codebook']}. `headway data prepare` takes them with:")
    print(f"  --parts {arguments.parts} --image-codes {written['codes']}")
    _print_skipped(written)
    return 0


def _print_skipped(written: dict[str, Any]) -> None:
    for kind, count in sorted(written["skipped"].items()):
        print(f"skipped {kind}: {count:,}")


def prepare(argv: list[str]) -> int:
    """`headway data prepare INPUT... --tokenizer TOK --out PREFIX`. Raises ValueError when it refuses."""
    arguments = _parse(PrepareArguments, argv, "prepare")
    from trainer.data.documents import ReadingOptions
    from trainer.data.parts import configuration
    from trainer.data.prepare import prepare_dataset

    written = prepare_dataset(
        list(arguments.input),
        arguments.tokenizer,
        arguments.out,
        reading=ReadingOptions(
            documents=arguments.documents,
            key=arguments.key,
            parts=arguments.parts,
            image_codes=arguments.image_codes,
        ),
        workers=arguments.workers,
        skip_broken=arguments.skip_broken,
        overwrite=arguments.overwrite,
    )
    column = written.get("modalities")
    made_of = f"{written['bytes'] / written['tokens']:.2f} bytes per token"
    if column:
        made_of = ", ".join(f"{count:,} {name}" for name, count in zip(column["names"], column["tokens"], strict=True))
    print(
        f"{arguments.out}: {written['documents']:,} documents, {written['tokens']:,} tokens of {written['dtype']}, "
        f"{made_of}."
    )
    if column:
        print(f"For the configuration:\n\n{configuration(written)}\n")
    _print_skipped(written)
    return 0


def inspect(argv: list[str]) -> int:
    """`headway data inspect PREFIX`. Raises ValueError when the dataset cannot be read."""
    arguments = _parse(InspectArguments, argv, "inspect")
    from trainer.data.inspect import as_text, inspect_dataset

    found = inspect_dataset(
        arguments.prefix, tokenizer=arguments.tokenizer, end_token=arguments.end_token, show=arguments.show
    )
    print(json.dumps(found, indent=1, ensure_ascii=False) if arguments.json else as_text(found))
    return 0
