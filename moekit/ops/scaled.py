"""Matrices in 8-bit floating point with a scale per block, as DeepSeek-V3 is released: kept so, used as numbers."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from moekit.ops.quantize import Quantized


class Scaled(NamedTuple):
    """A matrix as a file has it, for inference. Its numbers are made when they are asked for, and not kept."""

    codes: Float[Tensor, "rows columns"]
    """float8_e4m3fn."""
    scales: Float[Tensor, "row_blocks column_blocks"]
    block: tuple[int, int]
    """Rows and columns that share a scale, fewer at the edges."""
    dtype: torch.dtype
    """What its numbers are rounded to."""

    @property
    def shape(self) -> torch.Size:
        """Returns the shape of the matrix."""
        return self.codes.shape

    def to(self, device: torch.device) -> "Scaled":
        """Returns it on a device, still in 8 bits."""
        return self._replace(codes=self.codes.to(device), scales=self.scales.to(device))

    def numbers(self) -> Float[Tensor, "rows columns"]:
        """Returns each block's codes times its scale, formed in float32 (DeepSeek-V3, arXiv 2412.19437, Fig. 7)."""
        rows, columns = self.block
        w = torch.empty(self.shape, dtype=self.dtype, device=self.codes.device)
        for part, codes, scales in zip(w.split(rows), self.codes.split(rows), self.scales, strict=True):
            part.copy_(codes.float() * scales.float().repeat_interleave(columns)[: codes.shape[1]])
        return w


Matrix = Tensor | Quantized | Scaled
"""A matrix, (out, in), however it is kept."""


def unscaled(matrix: Matrix) -> Tensor | Quantized:
    """Returns a matrix in 8-bit floating point as numbers, any other as it is."""
    return matrix.numbers() if isinstance(matrix, Scaled) else matrix
