"""Stacked matrices that are not stacked: each expert's lie where a file has them, and are read as they are chosen.

The file is mapped: the system reads a page when it is first touched, keeps the pages that are in use for as long as
there is memory, and drops the others without writing anything, so a model may be larger than memory.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from moekit.ops.quantize import Quantized, dequantize
from moekit.ops.scaled import Matrix, Scaled


class Mapped:
    """Experts' matrices in mapped files, for inference.

    `parts` has, for each expert, the matrices whose rows follow each other in the stacked form: gate and up, or down.
    All are of one shape and kind, each contiguous; but 8-bit floating point may stand beside numbers.
    """

    def __init__(self, parts: Sequence[Sequence[Matrix]]) -> None:
        self.parts = parts
        scaled = (matrix for part in parts for matrix in part if isinstance(matrix, Scaled))
        self.one = next(scaled, parts[0][0])
        """One of them; who can read it can read all."""
        self.shape = (len(parts), len(parts[0]) * self.one.shape[0], self.one.shape[1])

    @cached_property
    def addresses(self) -> np.ndarray:
        """Where each matrix lies, and its scales or 0: (experts, parts, 2)."""
        return np.array([[_addresses(matrix) for matrix in part] for part in self.parts], dtype=np.int64)

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out where the matrices lie: a copy's lie elsewhere, and torch moves what it hands to others."""
        self.__dict__.pop("addresses", None)
        return self.__dict__.copy()

    def of(self, expert: int, like: Tensor) -> Float[Tensor, "1 out dim"]:
        """Returns a copy of one expert's as numbers, a stack of one, with the dtype and device of `like`."""
        return torch.cat([_numbers(matrix, like) for matrix in self.parts[expert]]).unsqueeze(0)


Weights = Tensor | Quantized | Mapped
"""Experts' stacked matrices, (experts, out, in), however they are kept."""


def _addresses(matrix: Matrix) -> tuple[int, int]:
    if isinstance(matrix, Quantized):
        return matrix.codes.data_ptr(), matrix.scales.data_ptr()
    assert isinstance(matrix, Tensor)
    return matrix.data_ptr(), 0


def _numbers(matrix: Matrix, like: Tensor) -> Tensor:
    if isinstance(matrix, Quantized):  # to the device first: it is less
        codes, scales = matrix.codes.to(like.device), matrix.scales.to(like.device)
        return dequantize(Quantized(codes, scales, matrix.width), like.dtype)
    return (matrix.to(like.device).numbers() if isinstance(matrix, Scaled) else matrix).to(like)
