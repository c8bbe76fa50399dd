"""Real pictures with captions, as documents of text and of image codes: what a model with weights per modality reads.

    OMP_NUM_THREADS=1 python benchmarks/image_captions.py --work data/image-captions

`fashion`: Fashion-MNIST, 70,000 grey pictures of clothes of 28 x 28. It has ten classes and no captions: these are
MADE, from the name of the class and one of a few templates, so that what a caption can tell of its picture, and a
picture of its caption, is the class and nothing else.

`stamps`: Tux Paint's stamps, nearly 800 drawings and photographs, fitted into 32 x 32 in colour on white. Their
captions are real: the first, English line of the text beside each file. It is little data, and good for little more
than seeing that nothing hinges on the other set.

Of each, patches of 4 x 4 become codes of a codebook that is learned from the pictures to train on, and a document is a
picture and its caption, in an order drawn by the seed. The test set of Fashion-MNIST, and every tenth stamp, are held
out. A small tokenizer is trained on the captions. What comes out, in a folder for each set: `train` and `validation`,
prefixes for `data.train` and `data.validation`; `train.jsonl` and `validation.jsonl`, from which they were made;
`codebook` and `tokenizer`; `pictures.png`, in pairs of a held-out picture and what its codes decode to.

Both come from Debian packages, which are fetched and unpacked into `--work`, and not installed. What an earlier run
with the same settings left there is used again. A benchmark takes `build` from here.
"""

from __future__ import annotations

import argparse
import gzip
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from smollm2 import unpacked

from trainer.data.documents import ReadingOptions
from trainer.data.parts import configuration
from trainer.data.patches import Codebook, read_image
from trainer.data.prepare import prepare_dataset
from trainer.data.train_tokenizer import train_tokenizer

PACKAGES = {"fashion": "dataset-fashion-mnist", "stamps": "tuxpaint-stamps-default"}
PATCH = 4
LEARNED_FROM = 10_000
"""Pictures of which a codebook is learned."""
STAMP_SIZE = 32
THINGS = (
    *(
        "a T-shirt",
        "a pair of trousers",
        "a pullover",
        "a dress",
        "a coat",
        "a sandal",
        "a shirt",
        "a sneaker",
        "a bag",
    ),
    "an ankle boot",
)
"""Fashion-MNIST's classes, by their numbers."""
TEMPLATES = (
    "{thing}",
    "A picture of {thing}.",
    "This is {thing}.",
    "Here you see {thing}, in grey.",
    "{thing}, on black.",
    "A small photo shows {thing}.",
)
SHOWN = 32


@dataclass(frozen=True)
class Pictures:
    """`images_NSSC` uint8 [N, S, S, C], and a caption of each."""

    images_NSSC: np.ndarray
    captions: list[str]

    def some(self, picked: slice | np.ndarray) -> Pictures:
        """Some of them."""
        places = np.arange(len(self.captions))[picked]
        return Pictures(self.images_NSSC[places], [self.captions[place] for place in places])


@dataclass(frozen=True)
class Captioned:
    """What was made of one set: prefixes, and the sidecar of what is trained on."""

    train: str
    validation: str
    folder: Path
    sidecar: dict[str, Any]

    @property
    def settings(self) -> str:
        """The lines of a configuration that this data needs."""
        return configuration(self.sidecar)


def build(
    name: str, work: Path, *, codes: int = 256, vocabulary: int = 384, pictures: int = 60_000, seed: int = 0
) -> Captioned:
    """Make `fashion` or `stamps` in `work`, or find it there: a Captioned.

    Raises:
        ValueError: the package cannot be fetched, or the captions cannot carry such a vocabulary.
    """
    folder = work / name
    settings = {"codes": codes, "vocabulary": vocabulary, "pictures": pictures, "seed": seed}
    if not _made_with(folder, settings):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        train, validation = SETS[name](_fetched(PACKAGES[name], work), np.random.default_rng(seed))
        _write(folder, train.some(slice(pictures)), validation, codes, vocabulary, seed)
        (folder / "settings.json").write_text(json.dumps(settings))
    sidecar = json.loads((folder / "train.json").read_text())
    return Captioned(str(folder / "train"), str(folder / "validation"), folder, sidecar)


def _made_with(folder: Path, settings: dict[str, int]) -> bool:
    path = folder / "settings.json"
    return path.exists() and json.loads(path.read_text()) == settings


def _fetched(package: str, work: Path) -> Path:
    try:
        return unpacked((package,), work)
    except (OSError, subprocess.CalledProcessError) as fault:
        raise ValueError(
            f"the Debian package {package} cannot be fetched or unpacked ({fault}): run it where apt-get reaches a "
            f"mirror, or put {package}_*.deb into {work / 'packages'}."
        ) from fault


def fashion(root: Path, random: np.random.Generator) -> tuple[Pictures, Pictures]:
    """Fashion-MNIST with captions that are made: (to train on, held out)."""

    def read(part: str) -> Pictures:
        images, labels = (_idx(root / f"usr/share/datasets/fashion-mnist/{part}-{kind}") for kind in IDX)
        templates = random.integers(len(TEMPLATES), size=len(labels))
        captions = [TEMPLATES[t].format(thing=THINGS[n]) for t, n in zip(templates, labels, strict=True)]
        return Pictures(images[..., None], [caption[0].upper() + caption[1:] for caption in captions])

    return read("train"), read("t10k")


IDX = ("images-idx3-ubyte.gz", "labels-idx1-ubyte.gz")


def _idx(path: Path) -> np.ndarray:
    """An array of uint8 in the format of MNIST: two zeros, 8, the number of axes, their lengths (>u4), values."""
    content = gzip.decompress(path.read_bytes())
    axes = content[3]
    shape = np.frombuffer(content, ">u4", axes, 4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape.tolist())


def stamps(root: Path, random: np.random.Generator) -> tuple[Pictures, Pictures]:
    """Tux Paint's stamps with their own captions, in an order drawn by the seed: (to train on, held out)."""
    found = []
    for path in sorted((root / "usr/share/tuxpaint/stamps").rglob("*.png")):
        caption = path.with_suffix(".txt")
        if caption.is_file() and (first := caption.read_text(encoding="utf-8").splitlines()[0].strip()):
            found.append((read_image(path, STAMP_SIZE, 3), first))
    whole = Pictures(np.array([image for image, _ in found]), [caption for _, caption in found])
    held_out = np.arange(len(found)) % 10 == 5
    return whole.some(random.permutation(np.flatnonzero(~held_out))), whole.some(held_out)


SETS = {"fashion": fashion, "stamps": stamps}


def _write(folder: Path, train: Pictures, validation: Pictures, codes: int, vocabulary: int, seed: int) -> None:
    """Learn, encode, tokenise: all that a set consists of."""
    book = Codebook.learn(train.images_NSSC[:LEARNED_FROM], codes=codes, patch=PATCH, seed=seed)
    book.save(folder / "codebook")
    random = np.random.default_rng(seed)
    for name, pictures in (("train", train), ("validation", validation)):
        with open(folder / f"{name}.jsonl", "w", encoding="utf-8") as stream:
            stream.writelines(
                json.dumps({"parts": parts}, ensure_ascii=False) + "\n" for parts in documents(pictures, book, random)
            )
    tokenizer = str(folder / "tokenizer")
    train_tokenizer([str(folder / "train.jsonl")], tokenizer, vocabulary, parts="parts")
    for name in ("train", "validation"):
        reading = ReadingOptions(parts="parts", image_codes=codes)
        prepare_dataset([str(folder / f"{name}.jsonl")], tokenizer, str(folder / name), reading=reading)
    write_pictures(validation.images_NSSC[:SHOWN], book, folder / "pictures.png")


def documents(pictures: Pictures, book: Codebook, random: np.random.Generator) -> Iterator[list[dict[str, Any]]]:
    """The parts of each document: the picture's codes, then the caption, or the other way about."""
    codes_NL = book.encode(pictures.images_NSSC).tolist()
    caption_first = random.random(len(codes_NL)) < 0.5
    for codes, caption, is_first in zip(codes_NL, pictures.captions, caption_first, strict=True):
        parts: list[dict[str, Any]] = [{"image": codes}, {"text": caption}]
        yield parts[::-1] if is_first else parts


def write_pictures(images_NSSC: np.ndarray, book: Codebook, path: Path, scale: int = 3) -> None:
    """A grid in pairs: each picture, and to its right what its codes decode to."""
    from PIL import Image

    decoded_NSSC = book.decode(book.encode(images_NSSC)).numpy()
    pairs = np.concatenate([images_NSSC, decoded_NSSC], axis=2)
    pairs = np.pad(pairs, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=128)
    rows = [np.concatenate(list(row), axis=1) for row in np.array_split(pairs, len(pairs) // 8)]
    grid = np.concatenate(rows).repeat(scale, axis=0).repeat(scale, axis=1)
    Image.fromarray(grid.squeeze(-1) if grid.shape[-1] == 1 else grid).save(path)


def report(name: str, made: Captioned) -> None:
    """Counts by modality, and an example."""
    for prefix in (made.train, made.validation):
        told = json.loads(Path(f"{prefix}.json").read_text())
        counts = ", ".join(
            f"{count:,} {kind}"
            for kind, count in zip(told["modalities"]["names"], told["modalities"]["tokens"], strict=True)
        )
        print(f"{prefix}: {told['documents']:,} documents, {told['tokens']:,} tokens: {counts}", flush=True)
    print(f"\n{made.settings}\n", flush=True)


def main() -> int:
    """Build and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--codes", type=int, default=256, help="patches of a codebook")
    parser.add_argument("--vocabulary", type=int, default=384, help="pieces of a tokenizer")
    parser.add_argument("--pictures", type=int, default=60_000, help="at most, to train on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("data/image-captions"), help="what is fetched and made")
    options = parser.parse_args()
    for name in options.sets:
        began = time.monotonic()
        settings = {key: getattr(options, key) for key in ("codes", "vocabulary", "pictures", "seed")}
        report(name, build(name, options.work, **settings))
        print(f"{name}: {time.monotonic() - began:.0f} s\n", flush=True)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        sys.exit(str(error))
