"""What GGUF keeps numbers in: plain ones, and blocks of 32 codes with one float16 scale each."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from moekit.errors import CheckpointError, UnsupportedError
from moekit.ops.quantize import GROUP, Codes, Quantized, dequantize, quantize

ROWS = 2**22
"""Numbers that are converted at a time."""


class Kind(NamedTuple):
    """A type of numbers: `block` of them take `bytes`. Either plain (`dtype`) or in our codes (`codes`)."""

    id: int
    name: str
    block: int
    bytes: int
    dtype: torch.dtype | None
    codes: Codes | None
    file_type: int
    """What general.file_type says where most matrices are of it."""
    error: float
    """Bound of the relative RMS error of a tensor: rounding, or that of a group of one large weight and little else."""


F32 = Kind(0, "F32", 1, 4, torch.float32, None, 0, 2**-24)
F16 = Kind(1, "F16", 1, 2, torch.float16, None, 1, 2**-11)
BF16 = Kind(30, "BF16", 1, 2, torch.bfloat16, None, 32, 2**-8)
Q8_0 = Kind(8, "Q8_0", GROUP, GROUP + 2, None, "int8", 7, 0.013)
Q4_0 = Kind(2, "Q4_0", GROUP, GROUP // 2 + 2, None, "int4", 2, 0.21)
TYPES = {kind.id: kind for kind in (F32, F16, Q4_0, Q8_0, BF16)}


class Encoded(NamedTuple):
    """Some rows, as GGUF keeps them, with what they lost."""

    bytes: Tensor
    wrong: float
    """Sum of the squared differences to what was asked for."""
    whole: float
    """Sum of its squares."""


def of(weight: Tensor | Quantized, numbers: bool = False) -> Kind:
    """Returns the type that keeps a weight as it is; with `numbers` that of the numbers which codes stand for."""
    if isinstance(weight, Quantized):
        return F32 if numbers else Q8_0 if weight.kind == "int8" else Q4_0
    return next((kind for kind in TYPES.values() if kind.dtype == weight.dtype), F32)


def numbers(weight: Tensor | Quantized) -> Tensor:
    return dequantize(weight) if isinstance(weight, Quantized) else weight


def encode(weight: Tensor | Quantized, kind: Kind, name: str) -> Iterator[Encoded]:
    """Yields a weight in another type, some rows at a time.

    Codes stay the same where the type has them: int8 and int4 have q8_0's and q4_0's groups and codes, and a bfloat16
    scale is a float16 one, exactly, from 2^-17 to 65504. Raises UnsupportedError beyond float16's range.
    """
    step = max(1, ROWS // max(1, math.prod(weight.shape[1:])))
    for begin in range(0, weight.shape[0], step):
        part = weight.of(slice(begin, begin + step)) if isinstance(weight, Quantized) else weight[begin : begin + step]
        exact = numbers(part)
        if not bool(torch.isfinite(exact).all()):
            raise CheckpointError(f"{name} has a value that is not finite, which nothing can stand for")
        if kind.codes is not None:
            same = part if isinstance(part, Quantized) and part.kind == kind.codes else None
            content = _blocks(same or quantize(exact, kind.codes))
        else:
            content = exact.to(kind.dtype).contiguous()
        content = content.view(torch.uint8).reshape(-1, weight.shape[-1] // kind.block * kind.bytes)
        if kind.dtype is not None and torch.promote_types(exact.dtype, kind.dtype) == kind.dtype:
            yield Encoded(content, 0.0, 0.0)
            continue
        after = decode(content, kind)
        if not bool(torch.isfinite(after).all()):
            raise UnsupportedError(f"{name} has a value or a scale beyond float16's range, which {kind.name} has")
        target = exact.double().view(after.shape)
        yield Encoded(content, float((after - target).square().sum()), float(target.square().sum()))


def _blocks(weight: Quantized) -> Tensor:
    """Returns (rows, groups, bytes of a block): the scale as float16, then the codes."""
    codes = weight.codes.unflatten(-1, (weight.scales.shape[-1], -1)).view(torch.uint8)
    return torch.cat((weight.scales.half().unsqueeze(-1).view(torch.uint8), codes), dim=-1)


def decode(rows: Tensor, kind: Kind) -> Tensor:
    """Returns the numbers of rows of bytes; those of codes as float32."""
    if kind.dtype is not None:
        return rows.contiguous().view(kind.dtype)
    blocks = rows.unflatten(-1, (-1, kind.bytes))
    scales, codes = blocks[..., :2].contiguous().view(torch.float16).float(), blocks[..., 2:]
    if kind.codes == "int4":
        values = torch.cat((codes & 15, codes >> 4), dim=-1).to(torch.int8) - 8
    else:
        values = codes.contiguous().view(torch.int8)
    result: Tensor = (values.float() * scales).flatten(-2)
    return result
