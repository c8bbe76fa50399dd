"""Checkpoints with the released layers of sigmaReparam, read as the plain model that they compute.

apple/ml-sigma-reparam, `vision/layers.py`, `SNLinear`. Beside a matrix `P.weight` stand

    P.sigma                                   the gain, learned
    P.spectral_normed_weight.u                the vector of the power iteration
    P.spectral_normed_weight.weight           the matrix again, in one memory with P.weight: either may be left out
    P.spectral_normed_weight.spectral_norm    sigma, or, since it shares its memory, the gain: not to be relied on
    P.effective_spectral_norm                 the gain again

A layer without a gain only watched its norm, and multiplies by the matrix as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.hf.folder import TensorFiles
from model.reparam import power_iteration

VECTOR = ".spectral_normed_weight.u"
BESIDE = (VECTOR, ".spectral_normed_weight.weight", ".spectral_normed_weight.spectral_norm", ".effective_spectral_norm")


class ReleasedFiles:
    """The tensors of a folder with such layers: matrices as they are multiplied, and what is no part of any such layer.

    Raises:
        ValueError: a gain or a vector that is not the layer's, all of them named.
    """

    def __init__(self, files: TensorFiles):
        self._files = files
        self._layers = {name.removesuffix(VECTOR) for name in files.shapes if name.endswith(VECTOR)}
        again = ".spectral_normed_weight.weight"
        self._matrices = {
            f"{layer}.weight": f"{layer}.weight" if f"{layer}.weight" in files.shapes else layer + again
            for layer in self._layers
        }
        beside = {layer + suffix for layer in self._layers for suffix in (*BESIDE, ".sigma")}
        self.shapes = {name: shape for name, shape in files.shapes.items() if name not in beside}
        faults = []
        for name, key in self._matrices.items():
            layer, shape = name.removesuffix(".weight"), files.shapes.get(key)
            if shape is None or len(shape) != 2:
                faults.append(f"{layer}{VECTOR} stands beside no matrix {name}.")
                continue
            self.shapes[name] = shape
            for other, wanted in ((layer + VECTOR, (shape[1],)), (layer + ".sigma", (1,))):
                if (found := files.shapes.get(other, wanted)) != wanted:
                    faults.append(f"{other} is {list(found)}, expected {list(wanted)} beside {name} {list(shape)}.")
        if faults:
            raise ValueError(" ".join(faults))

    def read(self, name: str) -> Tensor:
        """One tensor; of a reparametrised layer (gain / sigma) W, as the released layer does when it is evaluated: with
        one iteration from its vector, in fp64, rounded once to the dtype that is stored."""
        if name not in self._matrices:
            return self._files.read(name)
        weight, layer = self._files.read(self._matrices[name]), name.removesuffix(".weight")
        if f"{layer}.sigma" not in self._files.shapes:
            return weight
        u = self._files.read(layer + VECTOR).double()
        sigma, _, _ = power_iteration(weight.double(), torch.nn.functional.normalize(u, dim=0)[:, None])
        return (self._files.read(f"{layer}.sigma").double() / sigma * weight.double()).to(weight.dtype)

    @property
    def dtype(self) -> torch.dtype:
        return self._files.dtype


def open_tensors(files: TensorFiles) -> TensorFiles | ReleasedFiles:
    """The same, unless layers of that kind are among them."""
    return ReleasedFiles(files) if any(name.endswith(VECTOR) for name in files.shapes) else files
