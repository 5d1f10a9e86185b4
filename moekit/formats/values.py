"""What the numbers of a model's tensors give away: damage, copies, and what was never loaded."""

from collections import defaultdict

import torch
from torch import Tensor

from moekit.config import ModelConfig, Variant
from moekit.formats.compare import blocks, numbers
from moekit.formats.drawn import ROWS, drawn, reach
from moekit.formats.weights import Stored, finite
from moekit.ops.quantize import GROUP, Quantized
from moekit.ops.scaled import unscaled

LEAST = 16
"""Numbers below which a matrix may be constant by chance."""
TINY = 2.0**-100
"""Scales below which rounding, and no damage, may move the largest code of a group."""


class Values:
    """Looks at one tensor after the other; holds no more of them than a row each."""

    def __init__(self) -> None:
        self._faults: dict[str, list[str]] = {
            "tensors with a value that is not finite": [],
            "matrices of one value": [],
            "experts' matrices that are another one's copy": [],
            "router rows of zeros": [],
            "hash tables with an expert that does not exist": [],
            "matrices in codes whose scales do not fit": [],
        }
        self._names: dict[str, str] = {}
        self._alike: dict[tuple[str, bytes], list[tuple[str, Stored]]] = defaultdict(list)
        self.reach: dict[str, float] = {}
        """By matrix, with its shape: what `drawn` judges by."""
        self.shape: dict[str, tuple[int, int]] = {}

    def look(self, key: str, stored: Stored, config: ModelConfig, shown: str | None = None) -> None:
        """Takes in one tensor, by its key in a moekit directory, and what it is called in this one."""
        self._names[key] = shown = shown or key
        infinite, constant, copies, rows, tables, scales = self._faults.values()
        piece = unscaled(stored)
        parts = _parts(piece)
        if not all(map(finite, parts)):
            infinite.append(shown)
            return
        if key.endswith(".hash_table"):
            low, high = parts[0].aminmax()
            if config.ffn.kind == "moe" and not 0 <= int(low) <= int(high) < config.ffn.n_routed_experts:
                tables.append(shown)
            return
        of_variant = isinstance(config.ffn, Variant) and ".mlp." in key
        if (of_variant and not key.endswith("_proj.weight")) or len(piece.shape) < 2 or min(piece.shape) < 2:
            return  # a variant's gates, biases and factors may begin as one value
        if isinstance(piece, Tensor):
            stored = piece = piece.flatten(0, -2)  # a stack is looked at as one matrix
        if parts[0].numel() >= LEAST and all(bool(torch.eq(*part.aminmax())) for part in parts):
            constant.append(shown)
        elif ".mlp.experts." in key and config.ffn.kind == "moe" and (twin := self._twin(key, stored)):
            copies.append(f"{shown} of {self._names[twin]}")
        if key.endswith(".mlp.gate.weight"):
            rows += [f"{shown}[{row}]" for row in (numbers(piece) == 0).all(-1).nonzero().flatten().tolist()]
            return  # a router may stay where it began for long, and a layer learn all the same
        if isinstance(piece, Quantized) and not all(_fits(block) for block in blocks(piece)):
            scales.append(shown)
        first = numbers(_rows(piece))
        if (found := reach(first)) is not None:
            self.reach[key], self.shape[key] = found, (first.shape[0], first.shape[1])

    def _twin(self, key: str, piece: Stored) -> str | None:
        """Returns the earlier matrix of the same layer and place that is equal to the bit."""
        layer, _, rest = key.partition(".experts.")
        begin = _bits(piece)[0][:1].cpu().numpy().tobytes()
        earlier = self._alike[f"{layer} {rest.partition('.')[2]}", begin]
        earlier.append((key, piece))
        return next((name for name, other in earlier[:-1] if all(map(torch.equal, _bits(piece), _bits(other)))), None)

    def faults(self) -> dict[str, list[str]]:
        """Returns, for each thing that must not be, the tensors in which it is."""
        unlearnt = [self._names[key] for key in drawn(self.reach, self.shape)]
        return {**self._faults, "matrices that look drawn, not learnt": unlearnt}


def _rows(piece: Tensor | Quantized) -> Tensor | Quantized:
    return piece.of(slice(ROWS)) if isinstance(piece, Quantized) else piece[:ROWS]


def _parts(piece: Stored) -> list[Tensor]:
    return [piece] if isinstance(piece, Tensor) else [piece.codes, piece.scales]


def _bits(piece: Stored) -> list[Tensor]:
    return [part.contiguous().view(torch.uint8) for part in _parts(piece)]


def _fits(piece: Tensor | Quantized) -> bool:
    """Returns whether each group has the code that quantising gives its largest weight, and none without a scale."""
    assert isinstance(piece, Quantized)
    scales, codes = piece.scales.float(), piece.codes.unflatten(-1, (piece.scales.shape[-1], -1))
    if piece.kind == "int8":
        low, high = codes.amin(-1).int(), codes.amax(-1).int()
        largest, none = (high == 127) | (low == -127), (low == 0) & (high == 0)
        sane = low >= -127
    else:
        halves = torch.stack((codes & 15, codes >> 4))
        low, high = halves.amin((0, -1)), halves.amax((0, -1))
        largest, none, sane = low == 0, (low == 8) & (high == 8), torch.ones_like(low, dtype=torch.bool)
    fits = torch.where(scales == 0, none, largest | (scales.abs() < TINY)) & sane
    return codes.shape[-1] in (GROUP, GROUP // 2) and bool(fits.all())
