"""JSON lines whose images are files, to JSON lines whose images are codes."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from trainer.data.documents import JSON_LINES, Problems, find_inputs, under_key
from trainer.data.parts import split_parts
from trainer.data.patches import Codebook, read_image, settings_faults

IMAGES_LEARNED_FROM = 10_000
"""Of more, evenly spaced ones."""


def quantise_images(
    source: str,
    out: str,
    *,
    codes: int | None = None,
    patch: int | None = None,
    size: int | None = None,
    grey: bool = False,
    codebook: str | None = None,
    key: str = "parts",
    seed: int = 0,
    skip_broken: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Replace each image of documents of parts, a path relative to its JSON lines, by its codes, and write `out`.

    The codebook is learned from the images and written beside `out`, as `codebook_beside` names it, or is the one in
    the folder `codebook`. `out` gets its name last.

    Returns documents, images, codes, length (codes of an image), squared_error (mean over pixels), codebook, skipped.
    Raises ValueError with every fault found: options that do not go together, broken lines and images by file and line.
    """
    asked = {"codes": codes, "patch": patch, "size": size}
    if faults := _option_faults(source, out, asked, codebook, overwrite):
        raise ValueError("\n".join(faults))
    book = None if codebook is None else _load(codebook, asked, grey)
    problems = Problems(skip=skip_broken)
    lines = list(_lines(find_inputs([source]), key, problems))
    problems.refuse_if_any()
    if not any(images for _, _, images in lines):
        raise ValueError(f"{source}: not one image is named under {key!r}.")
    folder = codebook or codebook_beside(out)
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    if book is None:
        assert codes is not None and patch is not None and size is not None
        seen = _to_learn_from(lines, size, 1 if grey else 3, problems)
        book = Codebook.learn(seen, codes=codes, patch=patch, seed=seed)
    written = _write(lines, key, book, Path(out), problems, None if codebook else folder)
    return {
        "codes": book.codes,
        "length": book.length,
        "codebook": folder,
        "skipped": dict(problems.skipped),
        **written,
    }


def codebook_beside(out: str) -> str:
    """The folder of the codebook that was learned for `out`: its name with `.codebook` for its ending."""
    return str(Path(out).with_suffix(".codebook"))


def _option_faults(
    source: str, out: str, asked: dict[str, int | None], codebook: str | None, overwrite: bool
) -> list[str]:
    faults = []
    if not os.path.isdir(source) and not source.lower().removesuffix(".gz").endswith(JSON_LINES):
        faults.append(f"{source}: images are named in JSON lines alone; the known endings are {', '.join(JSON_LINES)}.")
    if not out.endswith(JSON_LINES):
        faults.append(f"--out {out}: JSON lines are written; end the name with .jsonl.")
    written = [out] if codebook else [out, codebook_beside(out)]
    if existing := [path for path in written if os.path.exists(path)]:
        if not overwrite:
            faults.append(
                f"--out {out}: {', '.join(existing)} already there; give another name, or --overwrite to replace them."
            )
        faults += [
            f"--out {out}: {path} exists and is no codebook, so it is not replaced; give another name."
            for path in existing
            if path != out and not os.path.isfile(os.path.join(path, "codebook.json"))
        ]
    if codebook is None:
        missing = [f"--{name}" for name, value in asked.items() if value is None]
        if missing:
            faults.append(
                f"{', '.join(missing)} not given: they say what is learned, for example --codes 256 --patch 4 "
                "--size 32; or name what was learned with --codebook."
            )
        else:
            faults += settings_faults(**{name: value or 0 for name, value in asked.items()})
    return faults


def _load(folder: str, asked: dict[str, int | None], grey: bool) -> Codebook:
    """The codebook of a folder. Raises ValueError when it is not as the other options say."""
    book = Codebook.load(folder)
    has = {"codes": book.codes, "patch": book.patch, "size": book.size}
    faults = [
        f"--{name} {value}: {folder} has {has[name]}; leave it out."
        for name, value in asked.items()
        if value not in (None, has[name])
    ]
    if grey and book.channels != 1:
        faults.append(f"--gray: {folder} is of colour; leave it out.")
    if faults:
        raise ValueError("\n".join(faults))
    return book


Line = tuple[str, dict[str, Any], list[Path]]
"""Place, the object, and the images among its parts."""


def _lines(files: list[str], key: str, problems: Problems) -> Iterator[Line]:
    """The lines in which every image is a file that is there."""
    for file in files:
        for place, entry in under_key(file, key, "--parts", problems):
            parts, faults = split_parts(entry[key])
            images = []
            for number, (kind, content) in enumerate(parts, 1):
                if kind == "image" and not isinstance(content, str):
                    faults.append(f"part {number}: the image is no path but {type(content).__name__}")
                elif kind == "image":
                    images.append(Path(file).parent / content)
                    if not images[-1].is_file():
                        faults.append(f"part {number}: {images[-1]} cannot be found")
            if faults:
                problems.add("broken_parts", f"{place}: {'; '.join(faults)}.")
            else:
                yield place, entry, images


def _to_learn_from(lines: list[Line], size: int, channels: int, problems: Problems) -> np.ndarray:
    """Images uint8 [N, S, S, C] to learn from. Those that cannot be read are counted when they are encoded."""
    named = [(place, path) for place, _, images in lines for path in images]
    count = min(len(named), IMAGES_LEARNED_FROM)
    seen = []
    for number in range(count):
        place, path = named[number * len(named) // count]
        try:
            seen.append(read_image(path, size, channels))
        except ValueError as fault:
            if not problems.skip:
                problems.add("broken_image", f"{place}: {fault}.")
    problems.refuse_if_any()
    if not seen:
        raise ValueError(f"none of {count} images can be read, the first of which is {named[0][1]}.")
    return np.array(seen, dtype=np.uint8).reshape(-1, size, size, channels)


def _write(
    lines: list[Line], key: str, book: Codebook, out: Path, problems: Problems, learned: str | None
) -> dict[str, Any]:
    """Encode, write and publish; the codebook first, if it was learned. Returns what was counted."""
    partial = out.with_name(out.name + ".partial")
    documents, images, squares = 0, 0, 0.0
    try:
        with open(partial, "w", encoding="utf-8") as stream:
            for place, entry, paths in lines:
                try:
                    seen = [read_image(path, book.size, book.channels) for path in paths]
                except ValueError as fault:
                    problems.add("broken_image", f"{place}: {fault}.")
                    continue
                encoded, square = _encode(seen, book)
                codes = iter(encoded)
                parts = [{"image": next(codes)} if "image" in part else part for part in entry[key]]
                stream.write(json.dumps({**entry, key: parts}, ensure_ascii=False) + "\n")
                documents, images, squares = documents + 1, images + len(seen), squares + square
        problems.refuse_if_any()
        if documents == 0:
            raise ValueError(f"--out {out}: not one document is left to write.")
        if learned is not None:
            book.save(learned)
        os.replace(partial, out)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(partial)
    return {"documents": documents, "images": images, "squared_error": squares / max(images, 1)}


def _encode(images: list[np.ndarray], book: Codebook) -> tuple[list[list[int]], float]:
    """(codes of each image, the sum over images of the mean squared error of what they decode to)."""
    if not images:
        return [], 0.0
    codes_NL = book.encode(np.array(images))
    away = book.decode(codes_NL).numpy().astype(np.float64) - np.array(images)
    return codes_NL.tolist(), float((away**2).mean(axis=(1, 2, 3)).sum())
