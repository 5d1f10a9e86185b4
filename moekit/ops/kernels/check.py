"""What a compiled library must give before it is used: numpy's results, in float32 and bfloat16, over awkward sizes."""

import ctypes
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moekit.ops.kernels.build import BuildError, load, matrices


def check(library: ctypes.CDLL) -> None:
    """Raises BuildError unless every function equals numpy's."""
    _check_experts(library)
    _check_linear(library)
    _check_attention(library)
    _check_merge(library)
    _check_choice(library)
    _check_routes(library)


def _check_experts(library: ctypes.CDLL) -> None:
    rng = np.random.default_rng(0)
    counts = np.array([0, 1, 35, 0, 300])
    offsets = np.concatenate(([0], counts.cumsum())).astype(np.int64)
    rows, dim, ff = int(offsets[-1]), 70, 37
    for half, bound in ((0, 1e-4), (1, 3e-2)):

        def stored(*shape: int, half: int = half) -> np.ndarray:
            values = rng.standard_normal(shape).astype(np.float32) / shape[-1] ** 0.5
            return _truncated(values) if half else values

        x, dy = stored(rows, dim), stored(rows, dim)
        gate_up, down = stored(len(counts), 2 * ff, dim), stored(len(counts), dim, ff)
        hidden, y, d_hidden, act, dx = (_empty(half, rows, n) for n in (2 * ff, dim, 2 * ff, ff, dim))
        d_gate_up, d_down = _empty(half, *gate_up.shape), _empty(half, *down.shape)
        keep = [_bits(half, value) for value in (x, dy, gate_up, down)]
        px, pdy, pg, pd = (value.ctypes.data for value in keep)
        table = _table(half, keep[2:], len(counts))
        where = (len(counts), dim, ff, offsets.ctypes.data, None, 2)
        at = [value.ctypes.data for value in (hidden, y, d_hidden, act, dx, d_gate_up, d_down)]
        library.moekit_forward(half, *where, px, dim, table.ctypes.data, at[0], at[1])
        library.moekit_backward_rows(half, half, *where, pdy, dim, pg, pd, None, at[0], at[2], at[3], at[4], None)
        gradient = (half, half, len(counts), offsets.ctypes.data, None, 2)
        library.moekit_weight_gradient(*gradient, at[2], 2 * ff, 0, 2 * ff, px, dim, 0, dim, at[5])
        library.moekit_weight_gradient(*gradient, pdy, dim, 0, dim, at[3], ff, 0, ff, at[6])
        wanted: list[list[np.ndarray]] = [[], [], [], []]
        for e, (begin, end) in enumerate(itertools.pairwise(offsets)):
            h = x[begin:end] @ gate_up[e].T
            g, u = h[:, :ff], h[:, ff:]
            s = 1 / (1 + np.exp(-g))
            da = dy[begin:end] @ down[e]
            dh = np.concatenate((da * u * (s + g * s * (1 - s)), da * g * s), axis=1)
            parts = ((g * s * u) @ down[e].T, dh @ gate_up[e], [dh.T @ x[begin:end]], [dy[begin:end].T @ (g * s * u)])
            for kept, part in zip(wanted, parts, strict=True):
                kept.append(np.asarray(part))
        found = (y, dx, d_gate_up, d_down)
        for name, value, parts_of in zip(("y", "dx", "gate_up", "down"), found, wanted, strict=True):
            _compare(name, half, value, np.concatenate(parts_of), bound)
    _check_codes(library, rng)


def _check_linear(library: ctypes.CDLL) -> None:
    rng, tokens, outs = np.random.default_rng(0), 301, (70, 96, 1)
    for (half, bound), k in itertools.product(((0, 1e-4), (1, 3e-2)), (37, 64)):
        drawn = [rng.standard_normal(shape).astype(np.float32) for shape in ((tokens, k), *((n, k) for n in outs))]
        x, *ws = (_truncated(value) if half else value for value in drawn)
        dys = [rng.standard_normal((tokens, n)).astype(np.float32) for n in outs]
        dys = [_truncated(dy) if half else dy for dy in dys]
        rows, *kept = (_bits(half, value) for value in (x, *ws, *dys))
        weights, given = kept[: len(outs)], kept[len(outs) :]
        ys, dx, dws = (
            [_empty(half, *dy.shape) for dy in dys],
            _empty(half, tokens, k),
            [_empty(half, *w.shape) for w in ws],
        )
        sizes = (len(outs), tokens, k, 2)
        library.moekit_linear(half, *sizes, rows.ctypes.data, k, _maps(half, weights, ys))
        library.moekit_linear_backward(half, half, *sizes, _maps(half, weights, given), dx.ctypes.data)
        library.moekit_linear_gradient(half, half, *sizes, rows.ctypes.data, k, _maps(half, dws, given))
        for w, dy, y, dw in zip(ws, dys, ys, dws, strict=True):
            _compare("a product", half, y, x @ w.T, bound)
            _compare("a matrix's gradient", half, dw, dy.T @ x, bound)
        _compare(
            "a product's gradient", half, dx, np.asarray(sum(dy @ w for dy, w in zip(dys, ws, strict=True))), bound
        )


def _check_attention(library: ctypes.CDLL) -> None:
    rng, (length, heads, kv_heads, width, value_width), scale = np.random.default_rng(0), (300, 4, 2, 70, 37), 0.1
    documents = (np.arange(length) // 60 % 4).astype(np.int32)  # the first comes back
    same = documents[:, None] == documents
    shapes = ((length, heads, width), (length, kv_heads, width), (length, kv_heads, value_width))
    sizes = (1, length, length, heads, kv_heads, width, value_width, *(n for _, h, d in shapes for n in (0, h * d, d)))
    for (half, bound), causal in itertools.product(((0, 1e-4), (1, 3e-2)), (1, 0)):
        inputs = [rng.standard_normal(shape).astype(np.float32) for shape in (*shapes, (length, heads, value_width))]
        inputs = [_truncated(x) if half else x for x in inputs]
        keep, y, log_sums = (
            [_bits(half, x) for x in inputs],
            _empty(half, length, heads, value_width),
            _empty(0, heads, length),
        )
        gradients = [_empty(half, *shape) for shape in shapes]
        *qkv, dy = (x.ctypes.data for x in keep)
        made = (y.ctypes.data, log_sums.ctypes.data)
        numbers = (ctypes.c_int64 * (len(sizes) + 1))(*sizes, causal)
        library.moekit_attention(half, numbers, scale, None, documents.ctypes.data, 2, *qkv, *made)
        rest = (documents.ctypes.data, 2, *qkv, *made, dy, *(x.ctypes.data for x in gradients))
        library.moekit_attention_backward(half, numbers, scale, *rest)
        q, k, v, d = (x.astype(np.float64).repeat(heads // x.shape[1], 1).transpose(1, 0, 2) for x in inputs)
        scores = np.exp(q @ k.transpose(0, 2, 1) * scale)
        shares = np.where(np.tril(same) if causal else same, scores, 0)
        shares /= shares.sum(-1, keepdims=True)
        d_scores = d @ v.transpose(0, 2, 1)
        d_scores = shares * (d_scores - (shares * d_scores).sum(-1, keepdims=True)) * scale
        wanted = [shares @ v, d_scores @ k, d_scores.transpose(0, 2, 1) @ q, shares.transpose(0, 2, 1) @ d]
        for name, found, whole in zip(("y", "dq", "dk", "dv"), (y, *gradients), wanted, strict=True):
            summed = whole.reshape(found.shape[1], -1, length, found.shape[2]).sum(1).transpose(1, 0, 2)
            _compare(f"attention's {name}", half, found, summed, bound)
        for few in (3, 40):  # the last queries alone, as in decoding, of all documents
            numbers[1], offset, found = few, np.array([length - few]), _empty(half, few, heads, value_width)
            at = (keep[0][-few:].ctypes.data, *qkv[1:], found.ctypes.data, None)
            library.moekit_attention(half, numbers, scale, offset.ctypes.data, None, 2, *at)
            shares = (np.tril(scores) if causal else scores)[:, -few:]
            whole = (shares / shares.sum(-1, keepdims=True) @ v).transpose(1, 0, 2)
            _compare(f"attention's last {few}", half, found, whole, bound)


def _check_merge(library: ctypes.CDLL) -> None:
    rng, (units, tokens, experts) = np.random.default_rng(0), (5, 35, 3)
    mix = rng.random((units, experts), dtype=np.float32) * (rng.random((units, experts)) < 0.7)
    for (half, bound), (rows, dim) in itertools.product(((0, 1e-4), (1, 3e-2)), ((70, 37), (37, 70))):
        sizes = (ctypes.c_int64 * 5)(units, tokens, experts, rows, dim)
        shapes = ((units, tokens, dim), (units, tokens, rows), (experts, rows, dim))
        values = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
        x, dy, w = (_truncated(value) if half else value for value in values)
        keep = [_bits(half, value) for value in (x, dy, w)]
        found = [_empty(half, *shape) for shape in (dy.shape, x.shape, w.shape)] + [_empty(0, *mix.shape)]
        at_x, at_dy, at_w, at_mix, *to = (value.ctypes.data for value in (*keep, mix, *found))
        library.moekit_merged(half, half, sizes, at_mix, 2, 0, at_x, at_w, to[0])
        library.moekit_merged(half, half, sizes, at_mix, 2, 1, at_dy, at_w, to[1])
        library.moekit_merged_gradient(half, half, sizes, at_mix, 2, at_x, at_dy, at_w, *to[2:])
        merged = np.einsum("ue,eod->uod", mix, w)
        d_merged = np.einsum("uto,utd->uod", dy, x)
        wanted = (
            np.einsum("utd,uod->uto", x, merged),
            np.einsum("uto,uod->utd", dy, merged),
            np.einsum("ue,uod->eod", mix, d_merged),
            np.einsum("uod,eod->ue", d_merged, w),
        )
        for name, value, of, one in zip(
            ("y", "dx", "weights", "mix"), found, wanted, (half, half, half, 0), strict=True
        ):
            _compare(f"merging's {name}", one, value, of, bound)


def _check_choice(library: ctypes.CDLL) -> None:
    x = np.random.default_rng(0).standard_normal((9, 37)).astype(np.float32).round(1)  # many are equal
    x[1, [3, 5]], x[2, 7], x[3, :30] = np.nan, np.inf, -np.inf
    ids = np.empty((9, 20), np.int64)
    library.moekit_largest(*x.shape, 20, x.ctypes.data, ids.ctypes.data, 2)
    if not np.array_equal(ids, np.argsort(np.where(np.isnan(x), -np.inf, -x), axis=1, kind="stable")[:, :20]):
        raise BuildError("the choice of the largest is not that of a stable sort")
    pairs = np.where(ids.ravel() % 5 == 4, -1, ids.ravel())
    order, inverse, counts = np.empty_like(pairs), np.empty_like(pairs), np.empty(39, np.int64)
    library.moekit_plan(len(pairs), 37, *(array.ctypes.data for array in (pairs, order, inverse, counts)))
    wanted = np.argsort(np.where(pairs < 0, 37, pairs), kind="stable")
    if not (np.array_equal(order, wanted) and np.array_equal(inverse[order], np.arange(len(order)))):
        raise BuildError("the order of pairs is not that of a stable sort")


def _check_routes(library: ctypes.CDLL) -> None:
    x = np.random.default_rng(0).standard_normal((6, 37)).astype(np.float32)
    scores, weights, log_sums = np.empty_like(x), np.empty((6, 5), np.float32), np.empty(6, np.float32)
    sums, squares = np.empty((2, 37), np.float32), np.empty(2, np.float32)
    ids, counts = np.empty((6, 5), np.int64), np.empty((2, 37), np.int64)
    outputs = (scores, ids, weights, log_sums, sums, squares, counts)
    library.moekit_route(
        np.array([2, 3, 37, 5, 0, 0]).ctypes.data, 1, 2, x.ctypes.data, None, *(array.ctypes.data for array in outputs)
    )
    exact = np.exp(x.astype(np.float64))
    shares = exact / exact.sum(1, keepdims=True)
    wanted = np.argsort(-x, axis=1, kind="stable")[:, :5]
    of = np.log(exact.sum(1)).reshape(2, 3)
    if not (np.array_equal(ids, wanted) and np.array_equal(counts.sum(1), [15, 15])):
        raise BuildError("the choice of experts is not that of their affinities")
    for name, found, right in (
        ("affinities", scores, shares),
        ("weights", weights, np.take_along_axis(shares, wanted, 1)),
        ("sums of affinities", sums, shares.reshape(2, 3, 37).sum(1)),
        ("sums of squared log-sums", squares, (of * of).sum(1)),
    ):
        _compare(name, 0, found, right, 1e-5)


def _compare(name: str, half: int, found: np.ndarray, wanted: np.ndarray, bound: float) -> None:
    worst = float(np.abs(_floats(half, found) - wanted).max() / np.abs(wanted).max())
    if not worst < bound:
        raise BuildError(f"{name} in {'bfloat16' if half else 'float32'} is off by {worst:.1e}")


def _check_codes(library: ctypes.CDLL, rng: np.random.Generator) -> None:
    """Raises BuildError unless weights in codes give what the numbers that they stand for give."""
    counts, dim, ff = np.array([1, 0, 4, 9, 33]), 70, 37
    offsets = np.concatenate(([0], counts.cumsum())).astype(np.int64)
    x = _truncated(rng.standard_normal((int(offsets[-1]), dim)).astype(np.float32))
    where = (len(counts), dim, ff, offsets.ctypes.data, None, 2)
    for half, bound in ((0, 1e-5), (1, 3e-2)):  # rows in bfloat16 may be rounded to 8 bits
        rows = _bits(half, x)
        for kind, bits in ((2, 8), (3, 4)):
            gate_up, down = _codes(rng, bits, len(counts), 2 * ff, dim), _codes(rng, bits, len(counts), dim, ff)
            found, wanted = _empty(half, len(x), dim), _empty(0, len(x), dim)
            coded = _table(kind, (gate_up[0], down[0]), len(counts), (gate_up[1], down[1]))
            library.moekit_forward(half, *where, rows.ctypes.data, dim, coded.ctypes.data, None, found.ctypes.data)
            plain = _table(0, (gate_up[2], down[2]), len(counts))
            library.moekit_forward(0, *where, x.ctypes.data, dim, plain.ctypes.data, None, wanted.ctypes.data)
            _compare(f"y of int{bits}", half, found, wanted, bound)
            for tokens in (3, 9, len(x)):
                y = _empty(half, tokens, 2 * ff)
                maps = _maps(kind, [gate_up[0][0]], [y], [gate_up[1][0]])
                library.moekit_linear(half, 1, tokens, dim, 2, rows.ctypes.data, dim, maps)
                _compare(f"{tokens} rows of int{bits}", half, y, x[:tokens] @ gate_up[2][0].T, bound)


def _table(
    kind: int, arrays: Sequence[np.ndarray], experts: int, scales: Sequence[np.ndarray] | None = None
) -> np.ndarray:
    """Returns the library's table of experts whose gate and up, and down, are stacked."""
    parts = []
    for number, (array, each) in enumerate(zip(arrays, (2, 1), strict=True)):
        of = (scales[number].ctypes.data, scales[number].nbytes) if scales else ()
        parts.append(matrices(each * experts, kind, array.ctypes.data, array.nbytes, *of).reshape(experts, each, 3))
    return np.concatenate(parts, axis=1)


def _maps(kind: int, weights: Sequence[np.ndarray], ys: Sequence[np.ndarray], scales: Sequence[np.ndarray] = ()) -> Any:
    """Returns the library's `Map` of each weight and its product."""
    at = [of.ctypes.data for of in scales] or [0] * len(weights)
    rows = zip(weights, at, ys, strict=True)
    numbers = [n for w, of, y in rows for n in (w.ctypes.data, of, kind, y.shape[1], y.ctypes.data)]
    return (ctypes.c_int64 * len(numbers))(*numbers)


def _codes(rng: np.random.Generator, bits: int, *shape: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns random codes as they are kept, their scales in bfloat16, and the numbers that they stand for."""
    *rows, width = shape
    codes = rng.integers(-8, 8, (*rows, -(-width // 32), 32))
    codes.reshape(*rows, -1)[..., width:] = 0
    scales = _truncated(rng.uniform(-0.1, 0.1, codes.shape[:-1]).astype(np.float32))
    numbers = (codes * scales[..., None]).reshape(*rows, -1)[..., :width].astype(np.float32)
    kept = codes.astype(np.int8) if bits == 8 else (codes[..., :16] + 8 | codes[..., 16:] + 8 << 4).astype(np.uint8)
    return np.ascontiguousarray(kept), _bits(1, scales), np.ascontiguousarray(numbers)


def _truncated(x: np.ndarray) -> np.ndarray:
    return (x.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


def _bits(half: int, x: np.ndarray) -> np.ndarray:
    return (x.view(np.uint32) >> 16).astype(np.uint16) if half else np.ascontiguousarray(x)


def _floats(half: int, x: np.ndarray) -> np.ndarray:
    return (x.astype(np.uint32) << 16).view(np.float32) if half else x


def _empty(half: int, *shape: int) -> np.ndarray:
    return np.full(shape, 0x7FC0 if half else np.nan, dtype=np.uint16 if half else np.float32)


def main(path: str) -> None:
    """Checks the library at `path`."""
    library = load(Path(path)).library
    assert library is not None
    check(library)
