"""Softmax attention, and the rotation before it, on a CPU through our own compiled kernels: no matrix of scores."""

import ctypes
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moekit.ops.autograd import once_differentiable
from moekit.ops.kernels.addresses import at, missing, readable
from moekit.ops.kernels.build import library
from moekit.ops.kernels.memory import empty


def has_kernels(device: torch.device) -> bool:
    """Returns whether tensors on this device may find kernels here."""
    return device.type == "cpu" and missing() is None


def unavailable(q: Tensor, k: Tensor, v: Tensor, document_ids: Tensor | None = None) -> str | None:
    """Returns why `attention` cannot run on these tensors, or None."""
    if not _numbers(q, k, v):
        return "it reads plain tensors on a CPU, all float32 or all bfloat16"
    (batch, length, heads, width), kv_heads = q.shape, k.shape[2]
    if k.shape[:3] != v.shape[:3] or k.shape[0] != batch or k.shape[3] != width or heads % kv_heads:
        return "keys and values do not fit the queries"
    if document_ids is not None and (document_ids.shape != (batch, length) or not readable(document_ids)):
        return "document_ids do not fit the queries"
    reason: str | None = missing()
    return reason


def may_rotate(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Returns whether `rotate` can run on these tensors."""
    angles = (*x.shape[:2], x.shape[3] // 2)
    fits = cos.shape == sin.shape == angles and cos.dtype == sin.dtype == torch.float32 and not x.shape[3] % 2
    return fits and _numbers(x) and readable(cos, sin) and missing() is None


def _numbers(*tensors: Tensor) -> bool:
    return readable(*tensors) and {t.dtype for t in tensors} in ({torch.float32}, {torch.bfloat16})


@torch.compiler.disable  # type: ignore[untyped-decorator]
def attention(
    q: Float[Tensor, "batch length heads head_dim"],
    k: Float[Tensor, "batch keys kv_heads head_dim"],
    v: Float[Tensor, "batch keys kv_heads value_dim"],
    scale: float,
    document_ids: Int[Tensor, "batch length"] | None = None,
    offsets: Int[Tensor, " batch"] | None = None,
    causal: bool = True,
) -> Float[Tensor, "batch length heads value_dim"]:
    """Returns softmax attention; a query sees its own document's keys, up to its own position or all of them.

    Query i stands at offsets + i among its sequence's keys. With offsets there are neither documents nor gradients.
    """
    if document_ids is not None:
        document_ids = document_ids.to(torch.int32).contiguous()
    y: Tensor = _Attention.apply(_rows(q), _rows(k), _rows(v), scale, document_ids, offsets, causal)
    return y


@torch.compiler.disable  # type: ignore[untyped-decorator]
def rotate(
    x: Float[Tensor, "batch length heads rope"],
    cos: Float[Tensor, "batch length half_rope"],
    sin: Float[Tensor, "batch length half_rope"],
    interleaved: bool,
) -> Float[Tensor, "batch length heads rope"]:
    """Returns x with each pair turned by its angle, in one pass; cos and sin are float32 and get no gradient."""
    y: Tensor = _Rotate.apply(x, cos.contiguous(), sin.contiguous(), interleaved, False)
    return y


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, back: bool) -> Tensor:
        x = _rows(x)
        (batch, length, heads, _), half = x.shape, cos.shape[2]
        y, pointers = empty(x.shape, x.dtype), (at(cos), at(sin))
        how = (interleaved, back, torch.get_num_threads())
        kind = x.dtype == torch.bfloat16
        library().moekit_rotate(kind, batch, length, heads, half, at(x), *x.stride()[:3], *pointers, at(y), *how)
        ctx.interleaved = interleaved
        ctx.save_for_backward(cos, sin)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _Rotate.apply(dy, cos, sin, ctx.interleaved, True), None, None, None, None


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        document_ids: Tensor | None,
        offsets: Tensor | None,
        causal: bool,
    ) -> Tensor:
        y = empty((*q.shape[:3], v.shape[3]), q.dtype)
        log_sums = empty((q.shape[0], q.shape[2], q.shape[1]), torch.float32) if any(ctx.needs_input_grad) else None
        kind, sizes, threads = q.dtype == torch.bfloat16, _sizes(q, k, v, causal), torch.get_num_threads()
        pointers = (at(t) for t in (q, k, v, y, log_sums))
        library().moekit_attention(kind, sizes, scale, at(offsets), at(document_ids), threads, *pointers)
        if log_sums is not None:
            assert offsets is None
            assert k.shape[1] == q.shape[1]
            ctx.scale, ctx.causal = scale, causal
            ctx.save_for_backward(q, k, v, document_ids, y, log_sums)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, document_ids, y, log_sums = ctx.saved_tensors
        dy = dy.contiguous()
        gradients = tuple(empty(t.shape, t.dtype) for t in (q, k, v))
        kind, sizes, threads = q.dtype == torch.bfloat16, _sizes(q, k, v, ctx.causal), torch.get_num_threads()
        pointers = (at(t) for t in (q, k, v, y, log_sums, dy, *gradients))
        library().moekit_attention_backward(kind, sizes, ctx.scale, at(document_ids), threads, *pointers)
        return *gradients, None, None, None, None


def _sizes(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Any:
    (batch, length, heads, width), (_, keys, kv_heads, value_width) = q.shape, v.shape
    numbers = (
        batch,
        length,
        keys,
        heads,
        kv_heads,
        width,
        value_width,
        *(n for t in (q, k, v) for n in t.stride()[:3]),
        causal,
    )
    return (ctypes.c_int64 * len(numbers))(*numbers)


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(3) == 1 else x.contiguous()
