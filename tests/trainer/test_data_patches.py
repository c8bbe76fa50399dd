"""Images to codes and back: what k-means learns, what is exact, and what is refused."""

from __future__ import annotations

import itertools
import json
import os
import re
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch

from model.untie import UntieConfig
from trainer.cli import main
from trainer.commands import data as commands
from trainer.data.evaluation import EvaluationData
from trainer.data.patches import CODES, SETTINGS, Codebook, _plus_plus, read_image
from trainer.data.quantise import quantise_images


def pictures(count: int, size: int = 12, channels: int = 1, seed: int = 0) -> np.ndarray:
    """Soft blobs, each elsewhere: neighbouring pixels are alike, as in pictures of things."""
    random = np.random.default_rng(seed)
    at_y, at_x = np.mgrid[:size, :size]
    seen = np.zeros((count, size, size, channels))
    for image in seen:
        for channel in range(channels):
            y, x, width = random.uniform(0, size), random.uniform(0, size), random.uniform(2, 5)
            image[..., channel] = 255 * np.exp(-((at_y - y) ** 2 + (at_x - x) ** 2) / width**2)
    return seen.astype(np.uint8)


def error(book: Codebook, images: np.ndarray) -> float:
    decoded = book.decode(book.encode(images))
    return float((decoded.double() - torch.from_numpy(images).double()).square().mean())


@pytest.mark.parametrize("channels", [1, 3])
def test_patches_are_cut_row_by_row_and_put_back_where_they_were(channels: int):
    """With a code for every patch there is, an image comes back as it was."""
    image = np.arange(6 * 6 * channels, dtype=np.uint8).reshape(1, 6, 6, channels)
    patches = [image[0, y : y + 3, x : x + 3] for y in (0, 3) for x in (0, 3)]
    book = Codebook(torch.from_numpy(np.array(patches[::-1])), 6)
    assert book.encode(image).tolist() == [[3, 2, 1, 0]]
    assert torch.equal(book.decode([[3, 2, 1, 0]]), torch.from_numpy(image))
    assert torch.equal(book.decode([[3, 3, 3, 0]])[0, :3, 3:], torch.from_numpy(patches[0]))


def test_images_made_of_the_codebook_come_back_exactly():
    book = Codebook.learn(pictures(60), codes=24, patch=4)
    codes = torch.randint(24, (20, book.length), generator=torch.Generator().manual_seed(1))
    images = book.decode(codes)
    assert images.shape == (20, 12, 12, 1) and images.dtype == torch.uint8
    assert torch.equal(book.decode(book.encode(images)), images)


def test_more_codes_err_less_and_as_many_as_patches_not_at_all():
    images, others = pictures(80, channels=3), pictures(40, channels=3, seed=1)
    books = [Codebook.learn(images, codes=codes, patch=3) for codes in (2, 8, 32, 128)]
    for seen in (images, others):
        errors = [error(book, seen) for book in books]
        assert all(one > 1.2 * other for one, other in itertools.pairwise(errors)), errors
    few = images[:3]
    patches = few.reshape(3, 4, 3, 4, 3, 3).swapaxes(2, 3).reshape(-1, 27)
    assert error(Codebook.learn(few, codes=len(np.unique(patches, axis=0)), patch=3), few) == 0


def test_a_code_is_the_nearest_patch():
    images = pictures(10)
    book = Codebook.learn(images, codes=7, patch=4)
    patches = images.reshape(10, 3, 4, 3, 4).swapaxes(2, 3).reshape(10, 9, 1, 16).astype(int)
    squares = ((patches - book.patches_KPPC.reshape(7, 16).numpy().astype(int)) ** 2).sum(-1)
    assert np.array_equal(book.encode(images).numpy(), squares.argmin(-1))


def test_wide_patches_are_compared_exactly_too():
    """A patch of 12 x 12 in colour has sums beyond what fp32 holds."""
    images = np.full((2, 12, 12, 3), 254, dtype=np.uint8)
    images[1, 0, 0, 0] = 255
    book = Codebook(torch.from_numpy(images), 12)
    assert book.encode(images).flatten().tolist() == [0, 1]


def test_learning_does_not_depend_on_threads_but_on_the_seed():
    images, threads = pictures(50), torch.get_num_threads()
    one = Codebook.learn(images, codes=16, patch=4, seed=3)
    try:
        torch.set_num_threads(threads + 1)
        again = Codebook.learn(images, codes=16, patch=4, seed=3)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one.patches_KPPC, again.patches_KPPC)
    other = Codebook.learn(images, codes=16, patch=4, seed=4)
    assert not torch.equal(one.patches_KPPC, other.patches_KPPC)


def test_no_code_is_left_without_a_patch(monkeypatch: pytest.MonkeyPatch):
    """Begun from centres to which nothing is near, they move to where patches are."""
    images = pictures(30) // 4 + 100
    away = torch.zeros((6, 16), dtype=torch.uint8)
    monkeypatch.setattr("trainer.data.patches._plus_plus", lambda *_: away)
    book = Codebook.learn(images, codes=6, patch=4)
    assert len(torch.unique(book.encode(images))) == 6


def test_what_is_rare_is_begun_from_too():
    """Points that are alike are not drawn twice, however many they are."""
    images = np.zeros((200, 4, 4, 1), dtype=np.uint8)
    images[:3, 1] = np.array([50, 120, 255])[:, None, None]
    begun = _plus_plus(torch.from_numpy(images).flatten(1), 4, np.random.default_rng(0))
    assert sorted(begun.amax(1).tolist()) == [0, 50, 120, 255]


def test_only_some_patches_are_learned_from_when_there_are_many(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("trainer.data.patches.LEARNED_FROM", 40)
    book = Codebook.learn(pictures(50), codes=8, patch=4)
    assert torch.equal(book.patches_KPPC, Codebook.learn(pictures(50), codes=8, patch=4).patches_KPPC)
    with pytest.raises(ValueError, match=r"--codes 41: only \d+ patches .* differ; --codes \d+ works"):
        Codebook.learn(pictures(50), codes=41, patch=4)


def test_what_is_saved_is_loaded(tmp_path: Path):
    book = Codebook.learn(pictures(20, channels=3), codes=9, patch=4)
    book.save(tmp_path / "book")
    loaded = Codebook.load(tmp_path / "book")
    assert torch.equal(loaded.patches_KPPC, book.patches_KPPC) and loaded.size == 12
    settings = {"format": 1, "size": 12, "codes": 9, "patch": 4, "channels": 3}
    assert json.loads((tmp_path / "book" / SETTINGS).read_text()) == settings
    (tmp_path / "book" / SETTINGS).write_text('{"format": 1, "size": 12, "codes": 8, "patch": 4, "channels": 3}')
    with pytest.raises(ValueError, match="do not belong together"):
        Codebook.load(tmp_path / "book")
    (tmp_path / "book" / CODES).write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="book: the codebook cannot be read"):
        Codebook.load(tmp_path / "book")
    os.remove(tmp_path / "book" / CODES)
    with pytest.raises(ValueError, match=f"is no codebook: {CODES} cannot be found"):
        Codebook.load(tmp_path / "book")


def test_what_no_codebook_can_be_of():
    images = pictures(5)
    book = Codebook.learn(images, codes=4, patch=4)
    for call, pattern in [
        (lambda: Codebook.learn(images, codes=4, patch=5), r"--size 12: patches of 5 do not tile it; --size 10 works"),
        (lambda: Codebook.learn(images, codes=0, patch=0), r"--codes 0: must be positive\.\n--patch 0: must be"),
        (
            lambda: Codebook.learn(images[:, :8], codes=4, patch=4),
            r"images of \[5, 8, 12, 1\] and torch.uint8: squares",
        ),
        (lambda: Codebook.learn(images / 255, codes=4, patch=4), "torch.float64: squares of uint8"),
        (
            lambda: book.encode(pictures(2, size=8)),
            r"images of \[8, 8, 1\]: this codebook is of images of \[12, 12, 1\]",
        ),
        (lambda: book.decode([[0] * 8]), r"codes of shape \[1, 8\]: an image of this codebook has 9 codes"),
        (lambda: book.decode([[0] * 8 + [4]]), "code 4: this codebook has 0 to 3"),
        (lambda: book.decode([[0] * 8 + [-1]]), "code -1: this codebook has 0 to 3"),
    ]:
        with pytest.raises(ValueError, match=pattern):
            call()


def write_images(folder: Path, images: np.ndarray) -> list[str]:
    from PIL import Image

    (folder / "images").mkdir(parents=True, exist_ok=True)
    names = [f"images/{number}.png" for number in range(len(images))]
    for name, image in zip(names, images, strict=True):
        Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(folder / name)
    return names


def write_lines(path: Path, documents: list) -> str:
    path.write_text("".join(json.dumps(document) + "\n" for document in documents))
    return str(path)


def test_files_are_read_as_they_are_and_fitted_on_white(tmp_path: Path):
    from PIL import Image

    images = pictures(1, channels=3)
    name = write_images(tmp_path, images)[0]
    assert np.array_equal(read_image(tmp_path / name, 12, 3), images[0])
    assert read_image(tmp_path / name, 12, 1).shape == (12, 12, 1)
    seen = np.zeros((4, 8, 4), dtype=np.uint8)
    seen[:, :4, 3] = 255
    Image.fromarray(seen).save(tmp_path / "wide.png")
    read = read_image(tmp_path / "wide.png", 8, 3)
    assert read.shape == (8, 8, 3)
    assert (read[:2] == 255).all() and (read[6:] == 255).all(), "what is left over is white"
    assert (read[2:6, :4] == 0).all() and (read[2:6, 4:] == 255).all(), "what is transparent is white"
    (tmp_path / "not.png").write_bytes(b"text")
    with pytest.raises(ValueError, match=r"not\.png is no image that can be read"):
        read_image(tmp_path / "not.png", 8, 3)


def test_the_command_replaces_paths_by_codes_and_keeps_all_else(tmp_path: Path, capsys):
    images = pictures(12, channels=3)
    names = write_images(tmp_path, images)
    documents = [{"id": n, "parts": [{"text": f"number {n} é"}, {"image": name}]} for n, name in enumerate(names)]
    documents.append({"parts": [{"image": names[0]}, {"text": "two"}, {"image": names[1]}]})
    documents.append({"parts": [{"text": "alone"}]})
    source = write_lines(tmp_path / "in.jsonl", documents)
    out = tmp_path / "made" / "out.jsonl"
    command = [source, "--out", str(out), "--codes", "16", "--patch", "4", "--size", "12"]
    assert commands.patches(command) == 0
    book = Codebook.load(tmp_path / "made" / "out.codebook")
    codes = book.encode(images).tolist()
    written = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert written[:12] == [
        {"id": n, "parts": [{"text": f"number {n} é"}, {"image": codes[n]}]} for n in range(len(names))
    ]
    assert written[12]["parts"] == [{"image": codes[0]}, {"text": "two"}, {"image": codes[1]}]
    assert written[13] == documents[13]
    assert sorted(os.listdir(tmp_path / "made")) == ["out.codebook", "out.jsonl"]
    printed = capsys.readouterr().out
    assert "14 documents, 14 images of 9 codes" in printed and "--parts parts --image-codes 16" in printed
    before = out.read_text()
    with pytest.raises(ValueError, match=r"out\.jsonl, .*out\.codebook already there"):
        commands.patches(command)
    assert commands.patches([*command, "--overwrite"]) == 0 and out.read_text() == before
    # The same codebook, for other files.
    other = str(tmp_path / "other.jsonl")
    assert commands.patches([source, "--out", other, "--codebook", str(tmp_path / "made" / "out.codebook")]) == 0
    assert Path(other).read_text() == before and not (tmp_path / "other.codebook").exists()
    with pytest.raises(ValueError, match=r"--codes 8: .* has 16; leave it out\.\n--size 16: .* has 12.*\n--gray: "):
        quantise_images(
            source, str(tmp_path / "x.jsonl"), codes=8, size=16, grey=True, codebook=str(tmp_path / "made/out.codebook")
        )


def test_options_that_do_not_go_together(tmp_path: Path):
    source = write_lines(tmp_path / "in.jsonl", [{"parts": [{"text": "no image"}]}])
    (tmp_path / "mine.codebook").mkdir()
    with pytest.raises(ValueError) as refusal:
        quantise_images(str(tmp_path / "in.txt"), str(tmp_path / "out.txt"), codes=4)
    faults = str(refusal.value).splitlines()
    assert len(faults) == 3 and "in JSON lines alone" in faults[0] and "end the name with .jsonl" in faults[1]
    assert "--patch, --size not given" in faults[2]
    with pytest.raises(ValueError, match=r"mine\.codebook exists and is no codebook, so it is not replaced"):
        quantise_images(source, str(tmp_path / "mine.jsonl"), codes=4, patch=4, size=8, overwrite=True)
    with pytest.raises(ValueError, match=r"in\.jsonl: not one image is named under 'parts'"):
        quantise_images(source, str(tmp_path / "out.jsonl"), codes=4, patch=4, size=8)


def test_broken_lines_and_images_are_named_or_counted(tmp_path: Path):
    names = write_images(tmp_path, pictures(6))
    (tmp_path / "images" / "bad.png").write_bytes(b"no image")
    lines = [{"parts": [{"image": name}]} for name in names]
    lines += [{"parts": [{"image": "images/gone.png"}, {"image": [1, 2]}]}, {"parts": "x"}, {"text": "x"}]
    source = write_lines(tmp_path / "in.jsonl", lines)
    out, settings = str(tmp_path / "out.jsonl"), {"codes": 4, "patch": 4, "size": 12, "grey": True}
    with pytest.raises(ValueError) as refusal:
        quantise_images(source, out, **settings)
    for fault, pattern in zip(
        str(refusal.value).splitlines(),
        [
            r"line 7: part 1: .*gone\.png cannot be found; part 2: the image is no path but list\.",
            r"line 8: the value is no list of parts but str\.",
            r"line 9: no key 'parts'; its keys are text \(choose with --parts\)",
            "Mend them",
        ],
        strict=True,
    ):
        assert re.search(pattern, fault), fault
    write_lines(tmp_path / "in.jsonl", [*lines, {"parts": [{"image": "images/bad.png"}]}])
    written = quantise_images(source, out, **settings, skip_broken=True)
    assert written["documents"] == 6 and len(Path(out).read_text().splitlines()) == 6
    assert written["skipped"] == {"broken_parts": 2, "missing_key": 1, "broken_image": 1}
    os.remove(out)
    write_lines(tmp_path / "in.jsonl", [*lines[:6], {"parts": [{"image": "images/bad.png"}]}])
    before = (tmp_path / "out.codebook" / CODES).read_bytes()
    with pytest.raises(ValueError, match=r"in\.jsonl, line 7: .*bad\.png is no image that can be read"):
        quantise_images(source, out, **{**settings, "codes": 5}, overwrite=True)
    assert not os.path.exists(out) and (tmp_path / "out.codebook" / CODES).read_bytes() == before
    assert not list(tmp_path.glob("*partial*"))


def test_from_files_to_batches(tmp_path: Path, capsys):
    """Each command in its turn; what a batch holds decodes to the pictures that were there."""
    images = pictures(30)
    names = write_images(tmp_path, images)
    documents = [{"parts": [{"text": f"picture {n}"}, {"image": name}]} for n, name in enumerate(names)]
    source, codes, tokenizer, prefix = (str(tmp_path / name) for name in ("in.jsonl", "codes.jsonl", "TOK", "set"))
    write_lines(tmp_path / "in.jsonl", documents)
    for command in [
        ["patches", source, "--out", codes, "--codes", "20", "--patch", "4", "--size", "12", "--gray"],
        ["tokenizer", codes, "--out", tokenizer, "--vocab-size", "280", "--parts", "parts"],
        ["prepare", codes, "--tokenizer", tokenizer, "--out", prefix, "--parts", "parts", "--image-codes", "20"],
    ]:
        assert main(["data", *command]) == 0, capsys.readouterr().err
    tables = tomllib.loads(capsys.readouterr().out.partition("For the configuration:")[2])
    untie, book = UntieConfig(**tables["untie"]), Codebook.load(tmp_path / "codes.codebook")
    data = EvaluationData(prefix, seq_len=1000, untie=untie)
    batch = data.batch(0, range(1), 1)
    found = batch.tokens[batch.modalities == 1] - 280
    assert torch.equal(book.decode(found.unflatten(0, (30, 9))), book.decode(book.encode(images)))
    assert error(book, images) < images.var() / 4
