"""Reparametrised matrices on shards, in a forward and backward that are those of plain linear maps.

Parameters hold what is multiplied, (gain / sigma) W, so that gathering, products, recomputation and compilation know of
nothing. Once in each step, gradients of these become gradients of W and of the gains, by the chain rule (the rank-1
correction of `model.reparam`); the optimizer is shown W, which is the parameter divided by one number; then comes the
power iteration, and the parameter is multiplied by the next one. The equations are in docs/reparam.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from model.reparam import NEGLIGIBLE, SMALLEST_NORM, Matrix, ReparamConfig, largest_singular, matrices
from parallel.data import held, local
from parallel.gradients import counts_here

if TYPE_CHECKING:
    from parallel.spread import Spread

SMALLEST_GAIN = 1e-20
"""Below, a gain counts as this: W is found again by dividing by it."""


@dataclass(frozen=True)
class _Piece:
    """What this process has of a parameter, and where that lies in the vectors of all matrices.

    Attributes:
        index: of its matrix. rows, columns: in the flat vectors v and u.
        counts: whether this process, of those that hold the same, is the one that adds it up.
    """

    name: str
    index: int
    rows: slice
    columns: slice
    counts: bool


class PlainWeights:
    """No matrix is reparametrised: there is nothing to do."""

    matrices: tuple[Matrix, ...] = ()
    undecayed: frozenset[str] = frozenset()
    """Parameters that weight decay must leave alone."""

    def allocate(self) -> None:
        """Memory for gains, vectors and norms."""

    def freeze(self, names: set[str]) -> None:
        """Leave matrices with any of these parameters, of the whole model's, as they are."""

    def begin(self, *, as_they_are: bool = False) -> None:
        """Find the norms of the matrices, and give them their first gains. Collective.

        Args:
            as_they_are: leave what is multiplied as it is, whatever the configuration says of first gains: the weights
                are those of a run that goes on.
        """

    def complete_gradients(self) -> None:
        """From gradients of what was multiplied to those of W and the gains; once a step. Collective."""

    @contextmanager
    def raw_weights(self) -> Iterator[None]:
        """While an optimizer makes its step, parameters are W; after it their norms are found anew. Collective."""
        yield

    def norms(self) -> dict[str, tuple[float, float]]:
        """Of every matrix of the whole model, by name: sigma of W, and the gain, the norm of what is multiplied."""
        return {}


class SigmaReparam(PlainWeights):
    """The reparametrised matrices of a spread model.

    Gains are in `model.beside`, and u, v and sigma in `model.kept`, of the whole model on every process: vectors are
    small, so that two reductions over all processes serve all matrices at once, and nothing has to be cut or joined
    where the layout changes.
    """

    def __init__(self, model: Spread, config: ReparamConfig):
        self.model, self.config = model, config
        self.matrices = tuple(matrices(model.uncut, config))
        if not config.decay:
            self.undecayed = frozenset(part for matrix in self.matrices for part in matrix.parts)
        self._v_slices = _consecutive([sum(matrix.rows) for matrix in self.matrices])
        self._u_slices = _consecutive([matrix.columns for matrix in self.matrices])

    def allocate(self) -> None:
        count = len(self.matrices)
        dtype = torch.float64 if self.model.dtype == torch.float64 else torch.float32

        def zeros(*size: int) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=self.model.device)

        self.u, self.v = zeros(self._u_slices[-1].stop, self.config.vectors), zeros(self._v_slices[-1].stop)
        self.sigma, self.gains = zeros(count), zeros(count)
        for index, matrix in enumerate(self.matrices):
            one = slice(index, index + 1)
            self.model.beside[f"{matrix.name}.spectral_gain"] = nn.Parameter(self.gains[one])
            self.model.kept |= {
                f"{matrix.name}.spectral_norm": self.sigma[one],
                f"{matrix.name}.spectral_u": self.u[self._u_slices[index]],
                f"{matrix.name}.spectral_v": self.v[self._v_slices[index]],
            }
        self._pieces = self._trained = list(self._find_pieces())

    def freeze(self, names: set[str]) -> None:
        frozen = {index for index, matrix in enumerate(self.matrices) if names & set(matrix.parts)}
        for index in frozen:
            self.model.beside[f"{self.matrices[index].name}.spectral_gain"].requires_grad_(False)
        self._trained = [piece for piece in self._pieces if piece.index not in frozen]

    def _find_pieces(self) -> Iterator[_Piece]:
        for index, matrix in enumerate(self.matrices):
            first_row, first_column = self._v_slices[index].start, self._u_slices[index].start
            for name, count in zip(matrix.parts, matrix.rows, strict=True):
                if (parameter := self.model.parameters.get(name)) is not None:
                    whole = self.model.whole(name, parameter)
                    _, rows, columns = held(whole)
                    (cut,) = columns or (slice(0, matrix.columns),)
                    yield _Piece(
                        name,
                        index,
                        slice(first_row + rows.start, first_row + rows.stop),
                        slice(first_column + cut.start, first_column + cut.stop),
                        counts_here(whole),
                    )
                first_row += count

    @torch.no_grad()
    def begin(self, *, as_they_are: bool = False) -> None:
        # One process of those that hold them between them finds the vectors of a matrix; they take turns.
        for tensor in (self.u, self.v, self.sigma):
            tensor.zero_()
        for index, matrix in enumerate(self.matrices):
            if matrix.parts[0] not in self.model.parameters:
                continue
            parts = [_full(self.model.whole(name, self.model.parameters[name])) for name in matrix.parts]
            holders = self.model.holders(matrix.parts[0]).mesh.flatten().tolist()
            if holders[index % len(holders)] == dist.get_rank():
                sigma, v, u = largest_singular(torch.cat(parts), self.config.vectors)
                self.sigma[index] = sigma
                self.v[self._v_slices[index]] = v
                self.u[self._u_slices[index]] = u
        for tensor in (self.u, self.v, self.sigma):
            dist.all_reduce(tensor)
        norms = self.sigma.tolist()
        if zero := [matrix.name for matrix, norm in zip(self.matrices, norms, strict=True) if norm == 0.0]:
            raise ValueError(
                f"reparam.targets has {', '.join(zero)}, whose weights are all zero: they have no direction to keep. "
                "Leave them out of reparam.targets."
            )
        if as_they_are or self.config.gain_init == "sigma":
            self.gains.copy_(self.sigma)
            return
        self.gains.fill_(1.0 if self.config.gain_init == "one" else float(self.config.gain_init))
        self._apply(torch._foreach_mul_, self._pieces)

    @torch.no_grad()
    def complete_gradients(self) -> None:
        gains = self._effective_gains().double()
        inner = torch.zeros_like(gains)
        found = [
            (piece, local(parameter), local(parameter.grad))
            for piece in self._trained
            if (parameter := self.model.parameters[piece.name]).grad is not None
        ]
        for piece, weight, gradient in found:
            if piece.counts:
                inner[piece.index] += torch.dot(gradient.flatten(), weight.flatten())
        # <G, W> / sigma = <G, (gain / sigma) W> / gain
        dist.all_reduce(inner)
        along = inner / gains
        scales, factors = (gains / self.sigma).tolist(), along.tolist()
        for piece, _, gradient in found:
            scale, factor = scales[piece.index], factors[piece.index]
            if self.config.through_sigma:
                gradient.addr_(self.v[piece.rows], self.u[piece.columns, 0], beta=scale, alpha=-scale * factor)
            else:
                gradient.mul_(scale)
        for index, matrix in enumerate(self.matrices):
            gain = self.model.beside[f"{matrix.name}.spectral_gain"]
            if gain.requires_grad:
                gain.grad = along[index : index + 1].to(gain.dtype)

    @contextmanager
    def raw_weights(self) -> Iterator[None]:
        with torch.no_grad():
            # By division with the same numbers: what is rounded then has no preferred direction from step to step.
            self._apply(torch._foreach_div_, self._trained)
        yield
        with torch.no_grad():
            self._iterate()
            self._apply(torch._foreach_mul_, self._trained)

    def norms(self) -> dict[str, tuple[float, float]]:
        pairs = zip(self.sigma.tolist(), self.gains.tolist(), strict=True)
        return {matrix.name: pair for matrix, pair in zip(self.matrices, pairs, strict=True)}

    def _iterate(self) -> None:
        """One power iteration of every matrix (`model.reparam.power_iteration`), in two reductions for all of them."""
        pieces = [(piece, local(self.model.parameters[piece.name])) for piece in self._trained if piece.counts]
        products = torch.zeros(len(self.v), self.config.vectors, dtype=self.v.dtype, device=self.v.device)
        for piece, weight in pieces:
            products[piece.rows] += weight @ self.u[piece.columns]
        dist.all_reduce(products)
        basis = _times(products, self._v_slices, _orthonormalising(_squares(products, self._v_slices))[1])
        products = torch.zeros_like(self.u)
        for piece, weight in pieces:
            products[piece.columns] += weight.T @ basis[piece.rows]
        dist.all_reduce(products)
        squares = _squares(products, self._u_slices)
        largest, turned = _orthonormalising(squares)
        # Frozen matrices have added nothing, and keep what they had.
        found = largest > 0
        sigma = largest.sqrt().clamp(min=SMALLEST_NORM).to(self.sigma.dtype)
        self.sigma.copy_(torch.where(found, sigma, self.sigma))
        first = turned[:, :, :1] * largest.sqrt()[:, None, None]
        v = _times(basis, self._v_slices, first)[:, 0]
        self.v.copy_(torch.where(_each(found, self._v_slices), v, self.v))
        u = _times(products, self._u_slices, turned)
        self.u.copy_(torch.where(_each(found, self._u_slices)[:, None], u, self.u))

    def _effective_gains(self) -> Tensor:
        return torch.where(self.gains.abs() < SMALLEST_GAIN, SMALLEST_GAIN, self.gains)

    def _scales(self) -> list[float]:
        """gain / sigma of every matrix."""
        return (self._effective_gains().double() / self.sigma).tolist()

    def _apply(self, operation: Callable[[list[Tensor], list[float]], None], pieces: list[_Piece]) -> None:
        """Multiply or divide these pieces by gain / sigma of their matrices."""
        if pieces:
            scales = self._scales()
            weights = [local(self.model.parameters[piece.name]) for piece in pieces]
            operation(weights, [scales[piece.index] for piece in pieces])


def _consecutive(sizes: list[int]) -> list[slice]:
    """Slices of these sizes, one behind the other."""
    return [slice(begin, end) for begin, end in pairwise(accumulate(sizes, initial=0))]


def _squares(flat: Tensor, slices: list[slice]) -> Tensor:
    """X^T X of every slice X [n, k], in fp64: [slices, k, k]."""
    return torch.stack([flat[part].double().T @ flat[part].double() for part in slices])


def _orthonormalising(squares: Tensor) -> tuple[Tensor, Tensor]:
    """From X^T X to the largest square, and to T [k, k] such that the columns of X T are orthonormal, those with the
    largest squares first; zero, where there are no more directions."""
    values, vectors = torch.linalg.eigh(squares)
    values, vectors = values.flip(-1), vectors.flip(-1)
    largest = values[:, :1]
    lengths = torch.where(values > NEGLIGIBLE * largest, values.clamp(min=SMALLEST_NORM**2).rsqrt(), 0.0)
    return largest[:, 0].clamp(min=0.0), vectors * lengths[:, None, :]


def _times(flat: Tensor, slices: list[slice], factors: Tensor) -> Tensor:
    """Every slice [n, k] times its factor [k, m]."""
    return torch.cat([flat[part] @ factor.to(flat.dtype) for part, factor in zip(slices, factors, strict=True)])


def _each(values: Tensor, slices: list[slice]) -> Tensor:
    """A value a slice -> for every row of the slices."""
    lengths = torch.tensor([part.stop - part.start for part in slices], device=values.device)
    return values.repeat_interleave(lengths, output_size=slices[-1].stop)


def _full(tensor: Tensor) -> Tensor:
    """All of it. Collective."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
