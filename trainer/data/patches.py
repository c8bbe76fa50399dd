"""Images as lists of codes: patches, each replaced by the nearest of K that k-means has learned.

Everything is counted in whole grey levels, centres too, so every sum is exact: the same images and seed give the same
codebook on any machine, with any number of threads.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from model.files import new_folder, write_json

SETTINGS, CODES = "codebook.json", "codebook.safetensors"
LEARNED_FROM = 1 << 16
"""Patches. Of more, so many are drawn by the seed."""
MOST_ROUNDS = 50
CHUNK_PATCHES = 1 << 13
LARGEST_EXACT = 1 << 24
"""Up to here fp32 holds every whole number."""


@dataclass(frozen=True)
class Codebook:
    """K patches that stand for all others.

    `patches_KPPC` uint8 [K, P, P, C], with C = 1 for grey and 3 for colour; `size`: images are `size` x `size`.
    """

    patches_KPPC: Tensor
    size: int

    @property
    def codes(self) -> int:
        """How many codes there are."""
        return self.patches_KPPC.shape[0]

    @property
    def patch(self) -> int:
        """The side of a patch, in pixels."""
        return self.patches_KPPC.shape[1]

    @property
    def channels(self) -> int:
        """1 for grey, 3 for colour."""
        return self.patches_KPPC.shape[3]

    @property
    def length(self) -> int:
        """How many codes an image has."""
        return (self.size // self.patch) ** 2

    @staticmethod
    def learn(images_NSSC: Tensor | np.ndarray, *, codes: int, patch: int, seed: int = 0) -> Codebook:
        """k-means over the patches of images uint8 [N, S, S, C], begun as k-means++ begins.

        Raises ValueError when patches do not tile the images, or fewer than `codes` of them differ.
        """
        images = _checked(images_NSSC)
        if faults := settings_faults(codes, patch, images.shape[1]):
            raise ValueError("\n".join(faults))
        points_MD = _cut(images, patch).flatten(0, 1)
        random = np.random.default_rng(seed)
        if len(points_MD) > LEARNED_FROM:
            drawn = np.sort(random.choice(len(points_MD), LEARNED_FROM, replace=False))
            points_MD = points_MD[torch.from_numpy(drawn)]
        differ = len(torch.unique(points_MD, dim=0))
        if differ < codes:
            raise ValueError(
                f"--codes {codes}: only {differ} patches of these images differ; --codes {differ} works, or give more "
                "images."
            )
        centres_KD = _k_means(points_MD, codes, random)
        return Codebook(centres_KD.unflatten(1, (patch, patch, images.shape[3])), images.shape[1])

    def encode(self, images_NSSC: Tensor | np.ndarray) -> Tensor:
        """The codes int64 [N, L] of images uint8 [N, S, S, C], row by row of patches: of equally near ones the first.

        Raises ValueError for images of another size or other channels.
        """
        images = _checked(images_NSSC)
        expected = (self.size, self.size, self.channels)
        if tuple(images.shape[1:]) != expected:
            raise ValueError(f"images of {list(images.shape[1:])}: this codebook is of images of {list(expected)}.")
        patches_NLD = _cut(images, self.patch)
        nearest, _ = _nearest(patches_NLD.flatten(0, 1), self.patches_KPPC.flatten(1))
        return nearest.unflatten(0, patches_NLD.shape[:2])

    def decode(self, codes_NL: Tensor | np.ndarray | list[list[int]]) -> Tensor:
        """Images uint8 [N, S, S, C] of codes [N, L].

        Raises ValueError when there are not L codes for each image, or one is outside 0 to K - 1.
        """
        codes = torch.as_tensor(codes_NL, dtype=torch.int64)
        if codes.ndim != 2 or codes.shape[1] != self.length:
            raise ValueError(f"codes of shape {list(codes.shape)}: an image of this codebook has {self.length} codes.")
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < self.codes:
            outside = int(codes.max() if codes.max() >= self.codes else codes.min())
            raise ValueError(f"code {outside}: this codebook has 0 to {self.codes - 1}.")
        side = self.size // self.patch
        found_NRLPPC = self.patches_KPPC[codes].unflatten(1, (side, side))
        return found_NRLPPC.transpose(2, 3).reshape(len(codes), self.size, self.size, self.channels)

    def save(self, folder: str | Path) -> None:
        """Write the folder, whole or not at all, in place of what was there."""
        from safetensors.torch import save_file

        with new_folder(Path(folder)) as partial:
            save_file({"patches": self.patches_KPPC.contiguous()}, partial / CODES)
            write_json(partial / SETTINGS, {"format": 1, "size": self.size, **self.settings()})

    def settings(self) -> dict[str, int]:
        """codes, patch and channels, as the folder has them beside the patches."""
        return {"codes": self.codes, "patch": self.patch, "channels": self.channels}

    @staticmethod
    def load(folder: str | Path) -> Codebook:
        """Read what `save` wrote. Raises ValueError when it is not there, or cannot be read."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        place = Path(folder)
        if missing := [name for name in (SETTINGS, CODES) if not (place / name).is_file()]:
            raise ValueError(f"{place} is no codebook: {' and '.join(missing)} cannot be found in it.")
        try:
            told = json.loads((place / SETTINGS).read_text(encoding="utf-8"))
            found = Codebook(load_file(place / CODES)["patches"], int(told["size"]))
            whole = found.patches_KPPC.dtype == torch.uint8 and found.settings().items() <= told.items()
        except (SafetensorError, ValueError, KeyError, TypeError, IndexError) as fault:
            raise ValueError(f"{place}: the codebook cannot be read ({fault}); learn it again.") from fault
        if not whole:
            raise ValueError(f"{place}: {SETTINGS} and {CODES} do not belong together; learn the codebook again.")
        return found


def settings_faults(codes: int, patch: int, size: int) -> list[str]:
    """Why images cannot be cut so, one sentence each."""
    faults = [
        f"--{name} {value}: must be positive."
        for name, value in (("codes", codes), ("patch", patch), ("size", size))
        if value < 1
    ]
    if not faults and size % patch:
        near = max(size // patch, 1) * patch
        faults.append(f"--size {size}: patches of {patch} do not tile it; --size {near} works.")
    return faults


def read_image(path: str | Path, size: int, channels: int) -> np.ndarray:
    """An image file as uint8 [size, size, channels]: fitted into the square, what is left over or transparent is white.

    Raises ValueError when Pillow cannot read it.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as opened:
            seen = opened.convert("RGBA")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as fault:
        raise ValueError(f"{path} is no image that can be read ({fault})") from fault
    white = Image.new("RGBA", seen.size, "white")
    white.alpha_composite(seen)
    mode, colour = ("L", 255) if channels == 1 else ("RGB", (255, 255, 255))
    fitted = ImageOps.pad(white.convert(mode), (size, size), Image.Resampling.LANCZOS, color=colour)
    return np.array(fitted, dtype=np.uint8).reshape(size, size, channels)


def _checked(images_NSSC: Tensor | np.ndarray) -> Tensor:
    # An array may not be writable, which torch does not take.
    images = torch.from_numpy(np.array(images_NSSC)) if isinstance(images_NSSC, np.ndarray) else images_NSSC
    square = images.ndim == 4 and images.shape[1] == images.shape[2] and images.shape[3] in (1, 3)
    if not square or images.dtype != torch.uint8:
        raise ValueError(
            f"images of {list(images.shape)} and {images.dtype}: squares of uint8 are needed, [N, S, S, 1] or "
            "[N, S, S, 3]."
        )
    return images


def _cut(images_NSSC: Tensor, patch: int) -> Tensor:
    """The patches uint8 [N, L, P * P * C], row by row."""
    rows_NRPLPC = images_NSSC.unflatten(2, (-1, patch)).unflatten(1, (-1, patch))
    return rows_NRPLPC.transpose(2, 3).flatten(1, 2).flatten(2)


def _k_means(points_MD: Tensor, codes: int, random: np.random.Generator) -> Tensor:
    """Centres uint8 [K, D]: Lloyd's rounds, each centre rounded, until nothing changes or `MOST_ROUNDS` are over. One
    to which nothing is near moves to the point that is farthest from its own."""
    centres_KD = _plus_plus(points_MD, codes, random)
    for _ in range(MOST_ROUNDS):
        nearest_M, squares_M = _nearest(points_MD, centres_KD)
        counts_K = torch.bincount(nearest_M, minlength=codes)
        sums_KD = torch.zeros(codes, points_MD.shape[1], dtype=torch.int64)
        sums_KD.index_add_(0, nearest_M, points_MD.long())
        divisor_K1 = counts_K.clamp(min=1)[:, None]
        moved_KD = ((sums_KD + divisor_K1 // 2) // divisor_K1).to(torch.uint8)
        for empty in (counts_K == 0).nonzero().flatten().tolist():
            farthest = int(squares_M.argmax())
            moved_KD[empty], squares_M[farthest] = points_MD[farthest], 0
        if torch.equal(moved_KD, centres_KD):
            break
        centres_KD = moved_KD
    return centres_KD


def _plus_plus(points_MD: Tensor, codes: int, random: np.random.Generator) -> Tensor:
    """First centres: each a point drawn with the square of its distance from those before it (k-means++)."""
    chosen = [int(random.integers(len(points_MD)))]
    squares_M = _nearest(points_MD, points_MD[chosen])[1]
    while len(chosen) < codes:
        sums_M = squares_M.cumsum(0)
        drawn = int(random.integers(int(sums_M[-1])))
        chosen.append(int(torch.searchsorted(sums_M, drawn, right=True)))
        squares_M = torch.minimum(squares_M, _nearest(points_MD, points_MD[chosen[-1:]])[1])
    return points_MD[chosen]


def _nearest(points_MD: Tensor, centres_KD: Tensor) -> tuple[Tensor, Tensor]:
    """(the first of the nearest centres, the square of the distance to it), both int64 [M]."""
    exact = torch.float32 if points_MD.shape[1] * 255**2 <= LARGEST_EXACT else torch.float64
    centres_KD = centres_KD.to(exact)
    lengths_K = centres_KD.square().sum(1)
    found: list[tuple[Tensor, Tensor]] = []
    for chunk_MD in points_MD.split(CHUNK_PATCHES):
        part_MD = chunk_MD.to(exact)
        away_MK = lengths_K - 2 * (part_MD @ centres_KD.T)
        least_M, nearest_M = away_MK.min(1)
        found.append((nearest_M, (least_M + part_MD.square().sum(1)).long()))
    if not found:
        return torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    nearest, squares = zip(*found, strict=True)
    return torch.cat(nearest), torch.cat(squares)
