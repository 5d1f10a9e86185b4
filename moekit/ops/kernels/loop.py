"""The experts with torch alone: one product per expert with tokens, or torch's grouped product.

The loop has a hand-written backward: indexing a stacked weight inside autograd would cost a full-size gradient per
expert.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moekit.ops.autograd import once_differentiable


def swiglu_experts(
    rows: Float[Tensor, "rows dim"],
    gate_up: Float[Tensor, "experts ff2 dim"],
    down: Float[Tensor, "experts dim ff"],
    tokens_per_expert: Int[Tensor, " experts"],
) -> Float[Tensor, "rows dim"]:
    """Returns each row through its expert, one expert after another."""
    y: Tensor = _loop(rows, gate_up, down, tokens_per_expert)
    return y


def linear_experts(
    rows: Float[Tensor, "rows dim"],
    weight: Float[Tensor, "experts out dim"],
    bias: Float[Tensor, "experts out"],
    tokens_per_expert: Int[Tensor, " experts"],
) -> Float[Tensor, "rows out"]:
    """Returns W_e x + b_e for rows sorted by expert; rows behind the last expert's come back as zero."""
    y: Tensor = _linear(rows, weight, bias, tokens_per_expert)
    return y


def grouped_experts(
    rows: Float[Tensor, "rows dim"],
    gate_up: Float[Tensor, "experts ff2 dim"],
    down: Float[Tensor, "experts dim ff"],
    tokens_per_expert: Int[Tensor, " experts"],
) -> Float[Tensor, "rows dim"]:
    """Returns each row through its expert by `F.grouped_mm`."""
    ends = tokens_per_expert.cumsum(0, dtype=torch.int32)
    # rows behind the last offset are left unwritten by the grouped product, forward and backward
    computed = (torch.arange(len(rows), device=rows.device) < ends[-1]).unsqueeze(-1)
    gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
    if rows.is_cuda and torch.cuda.get_device_capability(rows.device)[0] == 10:
        gate_up, down = (without_gradient(weight, tokens_per_expert == 0) for weight in (gate_up, down))
    hidden = F.grouped_mm(torch.where(computed, rows, 0), gate_up, offs=ends)
    gate, up = hidden.chunk(2, dim=-1)
    y = F.grouped_mm(F.silu(gate) * up, down, offs=ends)
    kept: Tensor = torch.where(computed, y, 0)
    return kept


def without_gradient(
    weight: Float[Tensor, "experts width other"], unused: Bool[Tensor, " experts"]
) -> Float[Tensor, "experts width other"]:
    """Returns the weight, whose gradient becomes zero for the unused experts whatever it holds there.

    On capability 10 torch's grouped product leaves the gradients of experts without rows unwritten (its issue 172439).
    """
    weight = weight.view_as(weight)  # a hook on a leaf would stay there
    if weight.requires_grad:
        weight.register_hook(lambda gradient: torch.where(unused[:, None, None], 0, gradient))
    return weight


def grouped_unavailable(x: Tensor, gate_up: Tensor, down: Tensor) -> str | None:
    """Returns why the grouped product cannot run on these tensors, or None."""
    if not hasattr(F, "grouped_mm"):
        return f"torch {torch.__version__} has no grouped_mm"
    if x.is_cuda and torch.cuda.get_device_capability(x.device)[0] not in (9, 10):
        return "it needs a CUDA device of capability 9 or 10; on others torch loops, and waits for the experts' rows"
    if x.dtype != torch.bfloat16 or down.shape[1] % 8 or down.shape[2] % 8:
        return "it takes bfloat16, in widths that 8 divides"
    return None if len(x) else "there are no rows"


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _loop(rows: Tensor, gate_up: Tensor, down: Tensor, tokens_per_expert: Tensor) -> Tensor:
    y: Tensor = _SwiGLUExperts.apply(rows, gate_up, down, tokens_per_expert.tolist())
    return y


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _linear(rows: Tensor, weight: Tensor, bias: Tensor, tokens_per_expert: Tensor) -> Tensor:
    y: Tensor = _LinearExperts.apply(rows, weight, bias, tokens_per_expert.tolist())
    return y


class _LinearExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor, counts: list[int]) -> Tensor:
        blocks = _blocks(counts, _block_sizes(rows, counts))
        x = _spread(rows, blocks)
        y = x.new_empty(len(x), weight.shape[1])
        for expert, _, block in blocks:
            torch.addmm(bias[expert], x[block], weight[expert].T, out=y[block])
        ctx.save_for_backward(x, weight, bias)
        ctx.blocks, ctx.counts, ctx.rows = blocks, counts, len(rows)
        return _pack(y, blocks, len(rows))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_rows: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        x, weight, bias = ctx.saved_tensors
        d_y = _spread(d_rows, ctx.blocks)
        d_weight = _weight_gradient(weight, ctx.counts) if ctx.needs_input_grad[1] else None
        d_bias = torch.zeros_like(bias) if ctx.needs_input_grad[2] else None
        d_x = torch.empty_like(x)
        for expert, _, block in ctx.blocks:
            torch.mm(d_y[block], weight[expert], out=d_x[block])
            if d_weight is not None:
                torch.mm(d_y[block].T, x[block], out=d_weight[expert])
            if d_bias is not None:
                torch.sum(d_y[block], 0, out=d_bias[expert])
        return _pack(d_x, ctx.blocks, ctx.rows), d_weight, d_bias, None


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
