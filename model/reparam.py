"""sigmaReparam: linear maps whose spectral norm is one learned number (Zhai et al. 2023, arXiv 2303.06296).

A matrix W [out, in] is multiplied as (gain / sigma) W, where sigma = v^T W u is its largest singular value and v, u are
its singular vectors, held constant in the gradient. Here is what that means, on whole matrices and in plain autograd;
`parallel/reparam.py` does it on shards, at the cost of plain linear maps.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from model.initialisation import Constant, all_inits
from model.stack import Model, undecayed_names

SMALLEST_NORM = 1e-12
NEGLIGIBLE = 1e-12
"""A direction whose square is this part of the largest one's is rounding."""

Grouping = Literal["separate", "qk+v", "fused"]
GROUPS: dict[Grouping, tuple[str, ...]] = {"separate": (), "qk+v": ("qk",), "fused": ("qkv",)}


@dataclass
class ReparamConfig:
    """`[reparam]`"""

    kind: Literal["none", "sigma"] = "none"
    """sigma: each linear map W is multiplied as (gain / sigma) W, with sigma its spectral norm and one learned gain."""
    targets: list[str] = field(default_factory=lambda: ["layers.*.mixer.*", "layers.*.feedforward.*"])
    """Patterns of parameter names. Of what they match, matrices of linear maps are reparametrised, and nothing else."""
    qkv_grouping: Grouping = "separate"
    """Whether q, k and v of a mixer, or of an expert, are a matrix each, q and k one together, or all three one."""
    gain_init: Literal["sigma", "one"] | float = "sigma"
    """sigma: the model begins as the plain one; one, or a number above 0: every such map begins with that norm."""
    vectors: int = 32
    """How many directions of each matrix are followed from step to step. 1 is the released iteration, whose sigma lags
    behind while a matrix changes fast. Every process holds so many numbers for each input of each matrix."""
    decay: bool = True
    """Whether weight decay touches W: it changes how large steps are, not the function. Gains are never decayed."""
    through_sigma: bool = True
    """Gradients flow through sigma; false holds it constant, for comparison."""

    def faults(self) -> list[str]:
        """What is wrong with these settings alone, in sentences."""
        faults = []
        if not (isinstance(self.gain_init, str) or self.gain_init > 0):
            faults.append(
                f'reparam.gain_init = {self.gain_init} must be above 0, or "sigma" (begin as the plain model) or '
                '"one": a map of norm 0 gives nothing.'
            )
        if self.vectors < 1:
            faults.append(f"reparam.vectors = {self.vectors} must be at least 1; 32 is usual.")
        return faults


@dataclass(frozen=True)
class Matrix:
    """One logical matrix: a parameter, or several with the same columns, one below the other.

    Attributes:
        name: of the whole model's, `layers.0.mixer.q`.
        parts: names of its parameters; rows: how many each of them has.
    """

    name: str
    parts: tuple[str, ...]
    rows: tuple[int, ...]
    columns: int


def matrices(model: Model, config: ReparamConfig) -> list[Matrix]:
    """The logical matrices of a whole model that are reparametrised, in the order of its parameters."""
    if config.kind == "none":
        return []
    shapes = {f"{name}.weight": module.weight.shape for name, module in _linear_maps(model).items()}
    names = [name for name in shapes if _matches(name, config.targets)]
    joined = _joined(names, config.qkv_grouping)
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(joined.get(name, name.removesuffix(".weight")), []).append(name)
    return [
        Matrix(name, tuple(parts), tuple(shapes[part][0] for part in parts), shapes[parts[0]][1])
        for name, parts in found.items()
    ]


def _linear_maps(model: Model) -> dict[str, nn.Linear]:
    """What multiplies: not an embedding, whose rows are looked up, nor a head that is one."""
    undecayed = undecayed_names(model)
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and f"{name}.weight" not in undecayed
    }


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _joined(names: list[str], grouping: Grouping) -> dict[str, str]:
    """Parameter -> the matrix that it is a part of, where queries, keys and values are taken together."""
    found: dict[str, str] = {}
    pattern = re.compile(r"(.*\.mixer(?:\.experts\.\d+)?)\.[qkv](\.towers\.\d+)?\.weight")
    mixers = dict.fromkeys((match[1], match[2] or "") for name in names if (match := pattern.fullmatch(name)))
    for mixer, tower in mixers:
        for letters in GROUPS[grouping]:
            parts = [f"{mixer}.{letter}{tower}.weight" for letter in letters]
            if all(part in names for part in parts):
                found |= dict.fromkeys(parts, f"{mixer}.{letters}{tower}")
    return found


def reparam_faults(
    model: Model, config: ReparamConfig, *, has_weights: bool = False, frozen: Iterable[str] = ()
) -> list[str]:
    """Why this model's matrices cannot be reparametrised so, in sentences.

    Args:
        model: a whole one, on the meta device.
        has_weights: whether it begins with another model's weights (`model.init_from`).
        frozen: patterns of parameters that are not trained (`run.freeze`).
    """
    if config.kind == "none":
        return []
    faults = config.faults()
    linear = [f"{name}.weight" for name in _linear_maps(model)]
    names = [name for name, _ in model.named_parameters()]
    for pattern in config.targets:
        if _matches("embedding.weight", [pattern]):
            tied = " (and is the head, too)" if model.head is None else ""
            faults.append(
                f"reparam.targets has {pattern!r}, which matches embedding.weight: its rows are looked up{tied}, so it "
                'is no linear map. "layers.*" matches all that are in layers.'
            )
        elif not fnmatch.filter(linear, pattern):
            # A pattern is nearest to a pattern: of all layers, or without the layer.
            known = [*linear, *(re.sub(r"^layers\.\d+", "layers.*", name) for name in linear)]
            known += ["*." + name.rpartition(".weight")[0].rpartition(".")[2] + ".weight" for name in linear]
            near = difflib.get_close_matches(pattern, known, n=1, cutoff=0.0)
            what = "matches no linear map" if fnmatch.filter(names, pattern) else "matches no parameter"
            faults.append(f"reparam.targets has {pattern!r}, which {what}; the nearest is {near[0]!r}.")
    if has_weights and config.gain_init != "sigma":
        faults.append(
            f'reparam.gain_init = {config.gain_init!r} would change the model of model.init_from: take "sigma", with '
            "which it begins as it is."
        )
    if not has_weights and (zero := _zero(model, config)):
        faults.append(
            f"{', '.join(zero)}: initial values are all zero, and a matrix of zeros has no direction to keep: draw "
            "small normals (init_weights), or leave it out of reparam.targets."
        )
    for matrix in matrices(model, config):
        still = [part for part in matrix.parts if _matches(part, frozen)]
        if still and len(still) < len(matrix.parts):
            faults.append(
                f"run.freeze keeps {', '.join(still)} and not all of {', '.join(matrix.parts)}, which are one matrix "
                f'with reparam.qkv_grouping = "{config.qkv_grouping}": freeze all of them, or take "separate".'
            )
    return faults


def _zero(model: Model, config: ReparamConfig) -> list[str]:
    """Parameters to be reparametrised that begin as zeros."""
    inits = all_inits(model)
    return [part for matrix in matrices(model, config) for part in matrix.parts if inits[part] == Constant(0.0)]


def largest_singular(matrix: Tensor, count: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """sigma, v [out] and the first `count` right singular vectors u [in, count] of a matrix [out, in], exactly.

    By an eigendecomposition in fp64, which is what is returned. Of a matrix of zeros, sigma is 0; where there are fewer
    directions, columns are zero.
    """
    wide = matrix.double()
    tall = wide.shape[0] > wide.shape[1]
    short = wide.T if tall else wide
    # For the largest ones it is as exact as a decomposition of the matrix itself, and several times as fast.
    squares, vectors = torch.linalg.eigh(short @ short.T)
    kept = min(count, len(squares))
    near, squares = vectors.flip(1)[:, :kept], squares.flip(0)[:kept]
    far = short.T @ near
    norms = far.norm(dim=0)
    far = torch.where(squares > NEGLIGIBLE * squares[0], far / norms.clamp(min=SMALLEST_NORM), 0.0)
    v, u = (far, near) if tall else (near, far)
    return norms[0], v[:, 0], torch.nn.functional.pad(u, (0, count - kept))


def power_iteration(matrix: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One iteration from orthonormal columns u [in, k]: sigma, v [out], and the next u, whose first column goes with v.

    With one column it is that of the paper: v = W u / |W u|, u' = W^T v / |W^T v|, sigma = v^T W u' = |W^T v|. With
    several, their span is iterated, and sigma is the largest singular value of what is in it: V = orth(W u), and from
    W^T V = U S R^T come u' = U, v = V R_1, sigma = S_1. So a direction that overtakes the first has been followed
    before. With one column, sigma was found to lag behind by up to a quarter (docs/reparam.md).
    """
    basis = torch.linalg.qr(matrix @ u).Q
    left, norms, right = torch.linalg.svd(matrix.T @ basis, full_matrices=False)
    return norms[0], basis @ right[0], left


def effective_weights(
    raw: Mapping[str, Tensor],
    gains: Mapping[str, Tensor],
    vectors: Mapping[str, tuple[Tensor, Tensor]],
    reparametrised: Iterable[Matrix],
    *,
    through_sigma: bool = True,
) -> dict[str, Tensor]:
    """What is multiplied, in plain autograd: (gain / v^T W u) W of every part of these matrices.

    This is the reference. It costs two products with vectors and a copy of every matrix in each forward pass.

    Args:
        raw: parameter -> W. gains: matrix -> gain [1]. vectors: matrix -> (v, u), constants.
    """
    found: dict[str, Tensor] = {}
    for matrix in reparametrised:
        v, u = vectors[matrix.name]
        sigma = v @ torch.cat([raw[part] for part in matrix.parts]) @ u
        scale = gains[matrix.name] / (sigma if through_sigma else sigma.detach())
        found |= {part: scale * raw[part] for part in matrix.parts}
    return found
