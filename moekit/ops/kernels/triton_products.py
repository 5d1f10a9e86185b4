"""Triton kernels for rows sorted by expert: grouped products that read each token's row where it lies.

`starts` (experts + 2) holds the first row of each expert, then the first dropped row, then the number of rows: dropped
rows are one more expert, whose products are zero. A row is read from token `order[row] // k`, without `order` from row.
Sums are float32 and nothing is added atomically: with the same tiles, two runs are equal to the bit.
"""

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl

INTERPRETED: bool = triton.knobs.runtime.interpret  # the kernels run in Python, on the CPU's tensors
_WIDEN = tl.constexpr(INTERPRETED)
_LEFT, _RIGHT = tl.constexpr(1), tl.constexpr(2)

LOWEST, HIGHEST = (8, 8) if INTERPRETED else (16, 128)
"""Rows of a tile, least and most; 16 is the least that a device multiplies."""
FF_TILE = 32 if INTERPRETED else 128
"""Columns of a tile of `act_backward`: fixed, because each tile owns a column of the routing weights' partial sums."""


def _configs(names: str, *tiles: tuple[int, ...]) -> list[triton.Config]:
    """Returns the tiles to choose from, each the sizes of `names`, then warps, then stages.

    Chosen by what compiles for capabilities 8.0 and 9.0 with few registers spilled; none was timed. Of each list the
    second is small enough for TF32 on every device of capability 8.0, and those 16 deep, at its end, are for float32
    without TF32: see `_placed`.
    """
    if INTERPRETED:
        small = {"BLOCK_M": 8, "BLOCK_N": 32, "BLOCK_K": 16}  # all different, so that taking one for another shows
        return [triton.Config({name: small[name] for name in names.split()})]
    return [
        triton.Config(dict(zip(names.split(), sizes, strict=True)), num_warps=warps, num_stages=stages)
        for *sizes, warps, stages in tiles
    ]


def _placed(configs: list[triton.Config], arguments: dict[str, Any], **meta: Any) -> list[triton.Config]:
    """Returns the tiles to try: 16 deep for float32 without TF32, the others for all else.

    Such products are single multiply-adds, all written out: 32 or 64 deep, most tiles spill 5 to 47 kilobytes a thread
    for capability 8.0, and the large ones take ptxas up to 20 seconds each; 16 deep they spill nothing.
    """
    rows = next(iter(arguments.values()))
    full = rows.dtype == torch.float32 and meta["PRECISION"] == "ieee"
    return [config for config in configs if (config.kwargs["BLOCK_K"] == 16) == full]


@triton.jit
@no_type_check
def _tile(starts, experts, tile, BLOCK_M: tl.constexpr, EXPERTS: tl.constexpr):
    """Returns the expert of a tile of rows, the tile's first row and the expert's end, which may lie before it.

    Expert e begins at tile starts[e] // BLOCK_M + e: always enough tiles for the experts before it, and at most one
    too many for each. So the grid needs the number of rows only, and no count leaves the device.
    """
    index = tl.arange(0, EXPERTS)
    start = tl.load(starts + index, mask=index <= experts, other=2147483647)
    expert = tl.sum((start // BLOCK_M + index <= tile).to(tl.int32), 0) - 1
    start = tl.load(starts + expert)
    return expert, start + (tile - start // BLOCK_M - expert) * BLOCK_M, tl.load(starts + expert + 1)


@triton.jit
@no_type_check
def _source(order, row, kept, k, GATHER: tl.constexpr):
    """Returns where the rows are read from. In int64, as all that counts rows times columns over more than a tile."""
    if GATHER:
        row = tl.load(order + row, mask=kept, other=0) // k
    return row.to(tl.int64)


@triton.jit
@no_type_check
def _dot(a, b, sums, PRECISION: tl.constexpr):
    if _WIDEN:  # the interpreter multiplies bfloat16 as integers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, sums, input_precision=PRECISION)


@triton.autotune(
    _configs(
        "BLOCK_N BLOCK_K",
        *((64, 64, 8, 3), (64, 32, 4, 2), (128, 32, 8, 4), (128, 64, 8, 3), (128, 64, 16, 3)),
        *((64, 16, 8, 3), (32, 16, 4, 3)),
    ),
    key=["dim", "ff", "BLOCK_M", "PRECISION"],
    prune_configs_by={"early_config_prune": _placed},
    cache_results=True,
)
@triton.jit
@no_type_check
def gate_up_swiglu(
    x, order, gate_up, hidden, act, starts, experts, k, dim, ff,
    GATHER: tl.constexpr, SAVE: tl.constexpr, PRECISION: tl.constexpr, EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """act = silu(gate) * up with [gate, up] = gate_up_e x, which `hidden` keeps if SAVE."""
    columns = tl.cdiv(ff, BLOCK_N)
    expert, first, end = _tile(starts, experts, tl.program_id(0) // columns, BLOCK_M, EXPERTS)
    if (first >= end) | (expert == experts):
        return
    row = first + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) % columns * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    kept, inside = row < end, n < ff
    a = x + _source(order, row, kept, k, GATHER)[:, None] * dim + inner[None, :]
    b = gate_up + expert.to(tl.int64) * 2 * ff * dim + (n[None, :] * dim + inner[:, None])
    gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for at in range(0, dim, BLOCK_K):
        left = inner < dim - at
        rows = tl.load(a + at, mask=kept[:, None] & left[None, :], other=0)
        weights = left[:, None] & inside[None, :]
        gate = _dot(rows, tl.load(b + at, mask=weights, other=0), gate, PRECISION)
        up = _dot(rows, tl.load(b + at + ff * dim, mask=weights, other=0), up, PRECISION)
    written = kept[:, None] & inside[None, :]
    if SAVE:
        to = hidden + first.to(tl.int64) * 2 * ff + (tl.arange(0, BLOCK_M)[:, None] * 2 * ff + n[None, :])
        tl.store(to, gate.to(hidden.dtype.element_ty), mask=written)
        tl.store(to + ff, up.to(hidden.dtype.element_ty), mask=written)
    to = act + first.to(tl.int64) * ff + (tl.arange(0, BLOCK_M)[:, None] * ff + n[None, :])
    tl.store(to, (gate * tl.sigmoid(gate) * up).to(act.dtype.element_ty), mask=written)


@triton.autotune(
    _configs(
        "BLOCK_N BLOCK_K",
        *((64, 64, 4, 4), (64, 32, 4, 2), (128, 64, 4, 3), (128, 64, 8, 3), (256, 64, 8, 3)),
        *((64, 16, 4, 3), (128, 16, 8, 3)),
    ),
    key=["length", "width", "stride_n", "BLOCK_M", "PRECISION"],
    prune_configs_by={"early_config_prune": _placed},
    cache_results=True,
)
@triton.jit
@no_type_check
def rows_product(
    rows, weight, out, starts, experts, length, width, stride_n, stride_k,
    PRECISION: tl.constexpr, EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out (rows, width) = rows (rows, length) times the expert's weight, read as (width, length) by its strides."""
    columns = tl.cdiv(width, BLOCK_N)
    expert, first, end = _tile(starts, experts, tl.program_id(0) // columns, BLOCK_M, EXPERTS)
    if first >= end:
        return
    row = first + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) % columns * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    kept, inside = row < end, n < width
    a = rows + first.to(tl.int64) * length + (tl.arange(0, BLOCK_M)[:, None] * length + inner[None, :])
    b = weight + expert.to(tl.int64) * length * width + (n[None, :] * stride_n + inner[:, None] * stride_k)
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for at in range(0, tl.where(expert < experts, length, 0), BLOCK_K):
        left = inner < length - at
        part = tl.load(a + at, mask=kept[:, None] & left[None, :], other=0)
        sums = _dot(part, tl.load(b + at * stride_k, mask=left[:, None] & inside[None, :], other=0), sums, PRECISION)
    to = out + first.to(tl.int64) * width + (tl.arange(0, BLOCK_M)[:, None] * width + n[None, :])
    tl.store(to, sums.to(out.dtype.element_ty), mask=kept[:, None] & inside[None, :])


@triton.autotune(
    _configs("BLOCK_K", (64, 8, 3), (32, 8, 2), (32, 8, 4), (16, 8, 3)),
    key=["dim", "ff", "BLOCK_M", "PRECISION"],
    prune_configs_by={"early_config_prune": _placed},
    cache_results=True,
)
@triton.jit
@no_type_check
def act_backward(
    d_y, order, weights, down, hidden, d_hidden, act, d_weights, starts, experts, k, dim, ff,
    MIXED: tl.constexpr, PRECISION: tl.constexpr, EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The gradient of `hidden` from the tokens' d_y; `act` again, times the routing weight, for the gradient of `down`.

    y = w down act, so the gradient of w is <d_y, down act> = <down^T d_y, act>: the rows that `down` made are not
    needed. Each tile of columns writes its part of that sum to its own column of `d_weights`.
    """
    columns = tl.cdiv(ff, BLOCK_N)
    column = tl.program_id(0) % columns
    expert, first, end = _tile(starts, experts, tl.program_id(0) // columns, BLOCK_M, EXPERTS)
    if (first >= end) | (expert == experts):
        return
    row = first + tl.arange(0, BLOCK_M)
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    kept, inside = row < end, n < ff
    a = d_y + _source(order, row, kept, k, MIXED)[:, None] * dim + inner[None, :]
    b = down + expert.to(tl.int64) * dim * ff + (inner[:, None] * ff + n[None, :])
    d_act = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for at in range(0, dim, BLOCK_K):
        left = inner < dim - at
        rows = tl.load(a + at, mask=kept[:, None] & left[None, :], other=0)
        d_act = _dot(rows, tl.load(b + at * ff, mask=left[:, None] & inside[None, :], other=0), d_act, PRECISION)
    scale = tl.full((BLOCK_M,), 1.0, tl.float32)
    if MIXED:
        scale = tl.load(weights + tl.load(order + row, mask=kept, other=0), mask=kept, other=0).to(tl.float32)
    HALF: tl.constexpr = BLOCK_N // 2
    halves = d_act.reshape(BLOCK_M, 2, HALF).permute(0, 2, 1).split()  # whole, the epilogue needs too many registers
    total = tl.zeros((BLOCK_M,), tl.float32)
    for half in tl.static_range(2):
        n = column * BLOCK_N + half * HALF + tl.arange(0, HALF)
        written = kept[:, None] & (n < ff)[None, :]
        at_gate = first.to(tl.int64) * 2 * ff + (tl.arange(0, BLOCK_M)[:, None] * 2 * ff + n[None, :])
        gate = tl.load(hidden + at_gate, mask=written, other=0).to(tl.float32)
        up = tl.load(hidden + at_gate + ff, mask=written, other=0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        total += tl.sum(silu * up * halves[half], 1)
        d_part = halves[half] * scale[:, None]
        d_gate = d_part * up * (sigmoid + silu * (1 - sigmoid))
        tl.store(d_hidden + at_gate, d_gate.to(d_hidden.dtype.element_ty), mask=written)
        tl.store(d_hidden + at_gate + ff, (d_part * silu).to(d_hidden.dtype.element_ty), mask=written)
        at_act = first.to(tl.int64) * ff + (tl.arange(0, BLOCK_M)[:, None] * ff + n[None, :])
        tl.store(act + at_act, (silu * up * scale[:, None]).to(act.dtype.element_ty), mask=written)
    if MIXED:
        tl.store(d_weights + row.to(tl.int64) * columns + column, total, mask=kept)


@triton.autotune(
    _configs(
        "BLOCK_M BLOCK_N BLOCK_K",
        *((64, 64, 64, 4, 4), (64, 64, 32, 4, 2), (128, 128, 32, 8, 5), (128, 128, 64, 8, 5), (128, 256, 64, 8, 5)),
        *((64, 64, 16, 4, 3), (128, 128, 16, 8, 3)),
    ),
    key=["height", "width", "GATHER", "PRECISION"],
    prune_configs_by={"early_config_prune": _placed},
    cache_results=True,
)
@triton.jit
@no_type_check
def weight_gradient(
    left, right, order, out, starts, k, height, width,
    GATHER: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out_e (height, width) = sum over the expert's rows of left (row, height) times right (row, width).

    GATHER says which of the two is read by token: 0 neither, 1 `left`, 2 `right`. An expert without rows gets zero.
    """
    columns, tiles = tl.cdiv(width, BLOCK_N), tl.cdiv(height, BLOCK_M)
    tile = tl.program_id(0) % (columns * tiles)
    expert = tl.program_id(0) // (columns * tiles)
    m = (tile // columns * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    n = (tile % columns * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    inner = tl.arange(0, BLOCK_K)
    end = tl.load(starts + expert + 1)
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for at in range(tl.load(starts + expert), end, BLOCK_K):
        row = at + inner
        kept = row < end
        # rows behind the end are masked on both sides: they may hold anything, and zero times NaN is not zero
        a = left + _source(order, row, kept, k, GATHER == _LEFT)[None, :] * height + m
        b = right + _source(order, row, kept, k, GATHER == _RIGHT)[:, None] * width + n
        a = tl.load(a, mask=kept[None, :] & (m < height), other=0)
        sums = _dot(a, tl.load(b, mask=kept[:, None] & (n < width), other=0), sums, PRECISION)
    to = out + expert.to(tl.int64) * height * width + (m * width + n)
    tl.store(to, sums.to(out.dtype.element_ty), mask=(m < height) & (n < width))


@triton.jit
@no_type_check
def combine(rows, weights, inverse, out, k, dim, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr):
    """out (tokens, dim) = sum over a token's choices of its rows, times the routing weights if WEIGHTED."""
    token = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK,), tl.float32)
    for choice in range(0, k):
        row = tl.load(inverse + token * k + choice).to(tl.int64)
        part = tl.load(rows + row * dim + n, mask=n < dim, other=0).to(tl.float32)
        if WEIGHTED:
            part *= tl.load(weights + token * k + choice).to(tl.float32)
        sums += part
    tl.store(out + token * dim + n, sums.to(out.dtype.element_ty), mask=n < dim)
