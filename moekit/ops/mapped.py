"""Stacked matrices that are not stacked: each expert's lie where a file has them, and are read as they are chosen.

The file is mapped: the system reads a page when it is first touched, keeps the pages that are in use for as long as
there is memory, and drops the others without writing anything, so a model may be larger than memory.
"""

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from moekit.ops.quantize import Quantized


class Mapped:
    """Experts' matrices in mapped files, for inference.

    `parts` has, for each expert, the matrices whose rows follow each other in the stacked form: gate and up, or down.
    All are of one shape and kind, each contiguous.
    """

    def __init__(self, parts: Sequence[Sequence[Tensor | Quantized]]) -> None:
        self.parts = parts
        self.one = parts[0][0]
        """The first of them; all are like it."""
        self.shape = (len(parts), len(parts[0]) * self.one.shape[0], self.one.shape[1])

    @cached_property
    def addresses(self) -> np.ndarray:
        """Where each matrix lies, and its scales or 0: (experts, parts, 2)."""
        return np.array([[_addresses(matrix) for matrix in part] for part in self.parts], dtype=np.int64)

    def of(self, experts: Int[Tensor, " experts"], device: torch.device) -> Tensor | Quantized:
        """Returns a stacked copy of some of them."""
        chosen = [self.parts[e] for e in experts.tolist()]
        if isinstance(self.one, Quantized):
            codes, scales = ([[getattr(m, name) for m in part] for part in chosen] for name in ("codes", "scales"))
            return Quantized(
                _stacked(codes, self.one.codes, device), _stacked(scales, self.one.scales, device), self.shape[2]
            )
        return _stacked(chosen, self.one, device)


Weights = Tensor | Quantized | Mapped
"""A matrix, (out, in), or stacked ones, however they are kept."""


def _addresses(matrix: Tensor | Quantized) -> tuple[int, int]:
    if isinstance(matrix, Quantized):
        return matrix.codes.data_ptr(), matrix.scales.data_ptr()
    return matrix.data_ptr(), 0


def _stacked(chosen: Sequence[Sequence[Tensor]], like: Tensor, device: torch.device) -> Tensor:
    parts = [torch.cat(tuple(part)) for part in chosen]
    return (torch.stack(parts) if parts else like.new_empty(0, 0, 0)).to(device)
