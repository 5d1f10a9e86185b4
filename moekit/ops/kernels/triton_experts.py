"""The SwiGLU experts of one layer on a GPU: gather, products, activation and combine in Triton, with their gradients.

What SonicMoE (arXiv 2512.14080) proposes: between forward and backward only x and the experts' pre-activations are
kept. Those are rows * 2 ff values, the same for any granularity at equal active size; nothing of rows * dim is kept:
the backward reads tokens where they lie, and the gradient of a routing weight needs no output row.
`TRITON_INTERPRET=1`, set before the import, runs the same kernels on a CPU, slowly.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from moekit.ops.autograd import once_differentiable
from moekit.ops.dispatch import Plan

_MISSING = None
try:
    import triton

    from moekit.ops.kernels import triton_products as kernels
except ImportError:
    _MISSING = "triton is not installed"
except AttributeError:  # has no knobs; torch of ours comes with 3.6 or newer, but any may have been installed after it
    _MISSING = f"triton {triton.__version__} is too old: 3.6 is needed"

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def unavailable(x: Tensor, gate_up: Tensor, down: Tensor) -> str | None:
    """Returns one clause that says why these kernels cannot run on such tensors, or None when they can."""
    if _MISSING:
        return _MISSING
    if not (x.is_cuda or (kernels.INTERPRETED and x.device.type == "cpu")):
        return f"triton needs tensors on CUDA and these are on {x.device.type}"
    if any(type(t) not in (Tensor, nn.Parameter) for t in (x, gate_up, down)):
        return "it reads plain tensors"
    if not gate_up.device == down.device == x.device:
        return f"x is on {x.device} and the experts are on {gate_up.device} and {down.device}"
    if x.dtype not in _DTYPES or not gate_up.dtype == down.dtype == x.dtype:
        return f"x and experts must all be bfloat16, float16 or float32, not {x.dtype}, {gate_up.dtype}, {down.dtype}"
    if x.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(x.device) < (8, 0):
        return "the device is older than compute capability 8.0"
    return None


def mixed_experts(
    x: Float[Tensor, "tokens dim"],
    weights: Float[Tensor, "tokens k"],
    plan: Plan,
    gate_up: Float[Tensor, "experts ff2 dim"],
    down: Float[Tensor, "experts dim ff"],
) -> Float[Tensor, "tokens dim"]:
    """Returns sum over a token's choices of weight * down_e (silu(gate_e x) * up_e x); dropped choices add nothing."""
    y: Tensor = _run(x, weights, plan.order, plan.inverse, gate_up, down, plan.tokens_per_expert)
    return y


def swiglu_experts(
    rows: Float[Tensor, "rows dim"],
    gate_up: Float[Tensor, "experts ff2 dim"],
    down: Float[Tensor, "experts dim ff"],
    tokens_per_expert: Int[Tensor, " experts"],
) -> Float[Tensor, "rows dim"]:
    """Returns down_e (silu(gate_e x) * up_e x) for rows sorted by expert; rows behind the last expert's become zero."""
    y: Tensor = _run(rows, None, None, None, gate_up, down, tokens_per_expert)
    return y


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _run(
    x: Tensor,
    weights: Tensor | None,
    order: Tensor | None,
    inverse: Tensor | None,
    gate_up: Tensor,
    down: Tensor,
    tokens_per_expert: Tensor,
) -> Tensor:
    tensors = x.contiguous(), None if weights is None else weights.contiguous(), gate_up.contiguous(), down.contiguous()
    with torch.cuda.device_of(x):
        layout = _layout(order, inverse, tokens_per_expert, len(x) if order is None else len(order), len(x))
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
            y: Tensor = _SwiGLUExperts.apply(layout, *tensors)
            return y
        return _forward(layout, *tensors, save=False)[0]


class _Layout(NamedTuple):
    """Where rows lie: which token each is read from, which expert it visits, and the tiles that cover them."""

    order: Tensor | None
    """Row -> pair; None where the rows themselves are given and returned."""
    inverse: Tensor | None
    """Pair -> row."""
    starts: Tensor
    """The first row of each expert, the first dropped row, the number of rows."""
    rows: int
    experts: int
    k: int
    tiles: int
    common: dict[str, Any]
    """What the kernels that go by tiles of rows share."""

    def grid(self, columns: int) -> Callable[[dict[str, Any]], tuple[int]]:
        return lambda meta: (self.tiles * triton.cdiv(columns, meta["BLOCK_N"]),)


def _layout(order: Tensor | None, inverse: Tensor | None, counts: Tensor, rows: int, tokens: int) -> _Layout:
    experts = len(counts)
    starts = counts.new_full((experts + 2,), rows, dtype=torch.int32)
    starts[:1].zero_()  # starts[0] = 0 would copy a number from the host, wait for it, and end a graph's capture
    starts[1:-1] = counts.cumsum(0)
    # as high as an expert has rows on average: low tiles waste little on small groups, high ones reread weights less
    height = min(max(triton.next_power_of_2(rows // max(experts, 1)), kernels.LOWEST), kernels.HIGHEST)
    common = {"PRECISION": _precision(), "EXPERTS": triton.next_power_of_2(experts + 1), "BLOCK_M": height}
    return _Layout(order, inverse, starts, rows, experts, rows // max(tokens, 1), rows // height + experts + 1, common)


def _precision() -> str:
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def _forward(
    layout: _Layout, x: Tensor, weights: Tensor | None, gate_up: Tensor, down: Tensor, save: bool
) -> tuple[Tensor, Tensor | None]:
    """Returns the output and, if `save`, the pre-activations."""
    dim, ff = down.shape[1:]
    act = x.new_empty(layout.rows, ff)
    hidden = x.new_empty(layout.rows, 2 * ff) if save else None
    kernels.gate_up_swiglu[layout.grid(ff)](
        x, layout.order, gate_up, hidden, act, layout.starts, layout.experts, layout.k, dim, ff,
        GATHER=layout.order is not None, SAVE=save, **layout.common,
    )  # fmt: skip
    y = _product(layout, act, down, dim, (ff, 1))
    return (y if weights is None else _combine(layout, y, weights, len(x))), hidden


class _SwiGLUExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, layout: _Layout, x: Tensor, weights: Tensor | None, gate_up: Tensor, down: Tensor) -> Tensor:
        y, hidden = _forward(layout, x, weights, gate_up, down, save=True)
        ctx.save_for_backward(x, weights, gate_up, down, hidden)
        ctx.layout = layout
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        layout: _Layout = ctx.layout
        x, weights, gate_up, down, hidden = ctx.saved_tensors
        _, needs_x, needs_weights, needs_gate_up, needs_down = ctx.needs_input_grad
        d_y, mixed = d_y.contiguous(), weights is not None
        dim, ff = down.shape[1:]
        tile = min(max(triton.next_power_of_2(ff), kernels.LOWEST), kernels.FF_TILE)
        act, d_hidden = hidden.new_empty(layout.rows, ff), torch.empty_like(hidden)
        # dropped rows are not visited: zero is what they contribute
        parts = x.new_zeros(layout.rows, triton.cdiv(ff, tile), dtype=torch.float32) if mixed else None
        kernels.act_backward[layout.grid(ff)](
            d_y, layout.order, weights, down, hidden, d_hidden, act, parts, layout.starts, layout.experts, layout.k,
            dim, ff, MIXED=mixed, BLOCK_N=tile, **layout.common,
        )  # fmt: skip
        d_x = d_weights = d_gate_up = d_down = None
        if needs_down:
            d_down = _weight_gradient(layout, d_y, act, down, gathered=1 if mixed else 0)
        del act  # before the widest rows are made
        if needs_x:
            d_x = _product(layout, d_hidden, gate_up, dim, (1, dim))
            d_x = _combine(layout, d_x, None, len(x)) if mixed else d_x
        if needs_weights and parts is not None:
            d_weights = parts.sum(1).index_select(0, layout.inverse).view_as(weights).to(weights.dtype)
        if needs_gate_up:
            d_gate_up = _weight_gradient(layout, d_hidden, x, gate_up, gathered=2 if mixed else 0)
        return None, d_x, d_weights, d_gate_up, d_down


def _product(layout: _Layout, rows: Tensor, weight: Tensor, width: int, strides: tuple[int, int]) -> Tensor:
    """Returns rows times their experts' weights, which are read as (width, length) by `strides`; zero if dropped."""
    out = rows.new_empty(layout.rows, width)
    kernels.rows_product[layout.grid(width)](
        rows, weight, out, layout.starts, layout.experts, rows.shape[1], width, *strides, **layout.common
    )
    return out


def _combine(layout: _Layout, rows: Tensor, weights: Tensor | None, tokens: int) -> Tensor:
    """Returns the sum of each token's rows, times the routing weights where given."""
    out = rows.new_empty(tokens, rows.shape[1])
    block = min(triton.next_power_of_2(rows.shape[1]), 1024)
    kernels.combine[tokens, triton.cdiv(rows.shape[1], block)](
        rows, weights, layout.inverse, out, layout.k, rows.shape[1], WEIGHTED=weights is not None, BLOCK=block
    )
    return out


def _weight_gradient(layout: _Layout, left: Tensor, right: Tensor, weight: Tensor, gathered: int) -> Tensor:
    """Returns sum over each expert's rows of left times right; `gathered`: 1 left or 2 right is read by token."""
    out = torch.empty_like(weight)
    height, width = weight.shape[1:]
    kernels.weight_gradient[
        lambda meta: (layout.experts * triton.cdiv(height, meta["BLOCK_M"]) * triton.cdiv(width, meta["BLOCK_N"]),)
    ](left, right, layout.order, out, layout.starts, layout.k, height, width, GATHER=gathered, PRECISION=_precision())
    return out
