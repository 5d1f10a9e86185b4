"""The experts' matrix products: one function, several back ends, all equal to the loop of `reference.py`.

`torch` runs one product per expert with tokens, with a hand-written backward: indexing a stacked weight inside autograd
would cost a full-size gradient per expert. `grouped` is torch's grouped product, used on CUDA in bf16.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

Backend = Literal["torch", "grouped"]


def swiglu_experts(
    rows: Float[Tensor, "rows dim"],
    gate_up: Float[Tensor, "experts ff2 dim"],
    down: Float[Tensor, "experts dim ff"],
    tokens_per_expert: Int[Tensor, " experts"],
    backend: Backend | None = None,
) -> Float[Tensor, "rows dim"]:
    """Returns down_e (silu(gate_e x) * up_e x) for rows sorted by expert; gate rows come first in `gate_up`.

    Rows behind the last expert's (dropped pairs) come back as zero. Zero rows and experts without rows are fine.
    """
    if backend is None:
        backend = _choose(rows, down)
    if backend == "grouped":
        ends = tokens_per_expert.cumsum(0, dtype=torch.int32)
        # rows behind the last offset are left unwritten by the grouped product, forward and backward
        computed = (torch.arange(len(rows), device=rows.device) < ends[-1]).unsqueeze(-1)
        hidden = F.grouped_mm(torch.where(computed, rows, 0), gate_up.transpose(1, 2), offs=ends)
        gate, up = hidden.chunk(2, dim=-1)
        y = F.grouped_mm(F.silu(gate) * up, down.transpose(1, 2), offs=ends)
        kept: Tensor = torch.where(computed, y, 0)
        return kept
    loop: Tensor = _loop(rows, gate_up, down, tokens_per_expert)
    return loop


def _choose(rows: Tensor, down: Tensor) -> Backend:
    # the grouped CUDA kernel takes bf16 with 16-byte strides; on a CPU it is a loop, slower than ours in bf16
    aligned = down.shape[1] % 8 == 0 and down.shape[2] % 8 == 0
    if not (rows.is_cuda and rows.dtype == torch.bfloat16 and aligned and len(rows) and hasattr(F, "grouped_mm")):
        return "torch"
    return "grouped" if torch.cuda.get_device_capability(rows.device) >= (8, 0) else "torch"


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _loop(rows: Tensor, gate_up: Tensor, down: Tensor, tokens_per_expert: Tensor) -> Tensor:
    y: Tensor = _SwiGLUExperts.apply(rows, gate_up, down, tokens_per_expert.tolist())
    return y


class _SwiGLUExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, gate_up: Tensor, down: Tensor, counts: list[int]) -> Tensor:
        blocks = _blocks(counts, _block_sizes(rows, counts))
        x = _spread(rows, blocks)
        hidden = x.new_empty(len(x), gate_up.shape[1])
        for expert, _, block in blocks:
            torch.mm(x[block], gate_up[expert].T, out=hidden[block])
        act = _swiglu(hidden)
        y = torch.empty_like(x)
        for expert, _, block in blocks:
            torch.mm(act[block], down[expert].T, out=y[block])
        ctx.save_for_backward(x, gate_up, down, hidden)
        ctx.blocks, ctx.counts, ctx.rows = blocks, counts, len(rows)
        return _pack(y, blocks, len(rows))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_rows: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        x, gate_up, down, hidden = ctx.saved_tensors
        d_y = _spread(d_rows, ctx.blocks)
        d_gate_up = _weight_gradient(gate_up, ctx.counts) if ctx.needs_input_grad[1] else None  # None: frozen
        d_down = _weight_gradient(down, ctx.counts) if ctx.needs_input_grad[2] else None
        act = _swiglu(hidden)
        d_act = torch.empty_like(act)
        for expert, _, block in ctx.blocks:
            torch.mm(d_y[block], down[expert], out=d_act[block])
            if d_down is not None:
                torch.mm(d_y[block].T, act[block], out=d_down[expert])
        d_hidden = _swiglu_backward(hidden, d_act)
        d_x = torch.empty_like(x)
        for expert, _, block in ctx.blocks:
            torch.mm(d_hidden[block], gate_up[expert], out=d_x[block])
            if d_gate_up is not None:
                torch.mm(d_hidden[block].T, x[block], out=d_gate_up[expert])
        return _pack(d_x, ctx.blocks, ctx.rows), d_gate_up, d_down, None


def _weight_gradient(weight: Tensor, counts: list[int]) -> Tensor:
    """Returns room for a gradient, zero for the experts without rows; the others are written whole."""
    gradient = torch.empty_like(weight)
    for expert, count in enumerate(counts):
        if not count:
            gradient[expert] = 0
    return gradient


Block = tuple[int, slice, slice]
"""An expert that has rows, its rows, and its place in the spread layout."""


def _block_sizes(rows: Tensor, counts: list[int]) -> list[int]:
    """Returns the rows to compute for each expert.

    oneDNN builds a kernel for every new bf16 shape, which costs more than the product itself: few sizes, then. Powers
    of two up to 64, multiples of 64 above; the added rows are zero. Every other product takes any size.
    """
    if rows.dtype != torch.bfloat16 or rows.is_cuda:
        return counts
    return [1 << (count - 1).bit_length() if 0 < count <= 64 else -(-count // 64) * 64 for count in counts]


def _blocks(counts: list[int], sizes: list[int]) -> list[Block]:
    blocks, row, place = [], 0, 0
    for expert, (count, size) in enumerate(zip(counts, sizes, strict=True)):
        if count:
            blocks.append((expert, slice(row, row + count), slice(place, place + size)))
        row, place = row + count, place + size
    return blocks


def _spread(rows: Tensor, blocks: list[Block]) -> Tensor:
    """Returns the rows moved to their blocks, zero between; the rows themselves where blocks and rows coincide."""
    if all(rows_of == block for _, rows_of, block in blocks):
        return rows[: blocks[-1][2].stop if blocks else 0].contiguous()
    spread = rows.new_zeros(blocks[-1][2].stop, rows.shape[1])
    for _, rows_of, block in blocks:
        spread[block.start : block.start + rows_of.stop - rows_of.start] = rows[rows_of]
    return spread


def _pack(spread: Tensor, blocks: list[Block], rows: int) -> Tensor:
    """Returns the inverse of `_spread`, zero in rows that belong to no expert."""
    if len(spread) == rows and all(rows_of == block for _, rows_of, block in blocks):
        return spread
    packed = spread.new_zeros(rows, spread.shape[1])
    for _, rows_of, block in blocks:
        packed[rows_of] = spread[block.start : block.start + rows_of.stop - rows_of.start]
    return packed


def _swiglu(hidden: Tensor) -> Tensor:
    gate, up = hidden.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def _swiglu_backward(hidden: Tensor, d_act: Tensor) -> Tensor:
    """Returns the gradient of `hidden` = [gate, up] for act = silu(gate) * up."""
    gate, up = hidden.chunk(2, dim=-1)
    d_hidden = torch.empty_like(hidden)
    d_gate, d_up = d_hidden.chunk(2, dim=-1)
    torch.mul(d_act, F.silu(gate), out=d_up)
    d_gate.copy_(torch.ops.aten.silu_backward(d_act * up, gate))
    return d_hidden
