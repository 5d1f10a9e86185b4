"""Attention and SwiGLU with the products around them, each one call of our own compiled kernels, forward and back.

A small operation costs a step more than its own time: what Python and torch do around it reads memory that the last
product has pushed out of the caches (decision 54).
"""

import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moekit.errors import ConfigError
from moekit.ops.autograd import once_differentiable
from moekit.ops.kernels.addresses import at, matrix, room
from moekit.ops.kernels.build import library
from moekit.ops.kernels.memory import empty
from moekit.ops.quantize import Quantized
from moekit.ops.scaled import Matrix


class Heads(NamedTuple):
    """The numbers of an attention layer, in the library's order."""

    dim: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    turned: int
    """Of a head: all, or the last of it in latent attention."""
    rank: int
    """Of the latent of keys and values; 0: multi-head attention."""
    q_rank: int

    @property
    def entry(self) -> int:
        """How many numbers a cache keeps of a token."""
        return self.rank + self.turned if self.rank else self.kv_heads * (self.head_dim + self.value_dim)

    def fit(self, weights: Sequence[Matrix], dim: int) -> bool:
        """Returns whether an attention layer's matrices, those that it has in `Attending`'s order, are of these sizes
        and for rows of this width: the library asks no further."""
        out, latent = self.heads * self.value_dim, self.rank + self.turned
        q = (self.heads * self.head_dim, self.q_rank or self.dim)
        kv = [(self.kv_heads * width, self.dim) for width in (self.head_dim, self.value_dim)]
        if self.rank:
            kv = [(latent, self.dim), (self.heads * (self.head_dim - self.turned + self.value_dim), self.rank)]
        q_a = [(self.q_rank, self.dim)] if self.q_rank else []
        return self.dim == dim and [tuple(w.shape) for w in weights] == [q, *kv, (self.dim, out), *q_a]


class Attending(NamedTuple):
    """An attention layer as `attention_layer` computes it."""

    weights: Sequence[Float[Tensor, "_ _"] | Quantized | None]
    """Those of q, k, v, o and None; of latent attention q or q_b, kv_a, kv_b, o and q_a."""
    norms: Sequence[Float[Tensor, " _"] | None]
    """Of the latents of keys and of queries."""
    heads: Heads
    rotation: tuple[Float[Tensor, "batch length half"], Float[Tensor, "batch length half"]]
    document_ids: Int[Tensor, "batch length"] | None
    causal: bool
    scale: float
    eps: float
    cache: Float[Tensor, "sequences keys entry"] | None = None
    """Its first entries are written, which needs that no gradients are wanted: keys and values of all heads, or the
    latent and the key."""


def attention_layer(x: Float[Tensor, "batch length dim"], layer: Attending) -> Float[Tensor, "batch length dim"]:
    """Returns attention from its input to its output projection; ConfigError where the cache has no place for it."""
    if torch.is_grad_enabled():
        y: Tensor = _AttentionLayer.apply(layer._replace(weights=(), norms=()), x, *layer.weights, *layer.norms)
        return y
    x = x.contiguous()
    described, _kept = layer_of(x, *layer)
    y = empty(x.shape, x.dtype)
    library().moekit_attention_layer(x.dtype == torch.bfloat16, described, at(x), None, at(y))
    return y


def layer_of(
    x: Tensor,
    weights: Sequence[Tensor | Quantized | None],
    norms: Sequence[Tensor | None],
    heads: Heads,
    rotation: tuple[Tensor, Tensor],
    document_ids: Tensor | None,
    causal: bool,
    scale: float,
    eps: float,
    cache: Tensor | None = None,
) -> tuple[bytes, Any]:
    """Returns the library's `AttentionLayer` for rows like x, and what must live as long as it is used."""
    if cache is not None and (len(cache) != len(x) or cache.shape[1] < x.shape[1] or cache.shape[2] != heads.entry):
        wanted = f"({len(x)}, at least {x.shape[1]}, {heads.entry})"
        raise ConfigError(f"the cache of a layer is {tuple(cache.shape)} but must be {wanted}, as model and batch are")
    documents = None if document_ids is None else document_ids.to(torch.int32).contiguous()
    tensors = [None if norm is None else norm.float().contiguous() for norm in norms]
    tensors += [*(part.float().contiguous() for part in rotation), documents]  # FSDP casts what a block is given
    kept = (0, 0, False) if cache is None else (at(cache), cache.shape[1], cache.dtype == torch.bfloat16)
    where = [at(t) or 0 for t in tensors]
    numbers = (*x.shape[:2], *heads, causal, *_matrices(weights), *where, scale, eps, torch.get_num_threads(), *kept)
    return _ATTENTION.pack(*numbers), tensors


_ATTENTION = struct.Struct("=11q15q5q2d4q")
FEED_FORWARD = struct.Struct("=3q9qq")


def _matrices(weights: Sequence[Tensor | Quantized | None]) -> list[int]:
    return [number for w in weights for number in ((0, 0, 0) if w is None else matrix(w))]


def _gradients(
    tensors: Sequence[Tensor | None], wanted: Sequence[bool], dtype: torch.dtype | None = None
) -> tuple[list[Tensor | None], bytes]:
    """Returns room for the gradients that are wanted, and the library's table of them."""
    made = [
        empty(t.shape, dtype or t.dtype) if want and t is not None else None
        for t, want in zip(tensors, wanted, strict=True)
    ]
    return made, struct.pack(f"={len(made)}q", *(at(d) or 0 for d in made))


class _AttentionLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, of: Attending, x: Tensor, *parameters: Tensor | None) -> Tensor:
        x = x.contiguous()
        layer, _kept = layer_of(x, *of._replace(weights=parameters[:5], norms=parameters[5:]))
        kept = (
            room("moekit_attention_layer_bytes", x.dtype == torch.bfloat16, layer)
            if any(ctx.needs_input_grad)
            else None
        )
        y = empty(x.shape, x.dtype)
        library().moekit_attention_layer(x.dtype == torch.bfloat16, layer, at(x), at(kept), at(y))
        if kept is not None:
            ctx.of = of
            ctx.save_for_backward(kept, x, *parameters)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        kept, x, *parameters = ctx.saved_tensors
        dy, weights, norms = dy.contiguous(), parameters[:5], parameters[5:]
        layer, _kept = layer_of(x, *ctx.of._replace(weights=weights, norms=norms))
        _, learns, *wanted = ctx.needs_input_grad
        dx = empty(x.shape, x.dtype) if learns else None
        matrices, table = _gradients(weights, wanted[:5])
        scales, more = _gradients(norms, wanted[5:], torch.float32)
        library().moekit_attention_layer_backward(
            x.dtype == torch.bfloat16, layer, at(x), at(kept), at(dy), at(dx), table + more
        )
        rounded = (d if d is None else d.to(p.dtype) for d, p in zip(scales, norms, strict=True))
        return None, dx, *matrices, *rounded


def feed_forward(
    x: Float[Tensor, "*tokens dim"],
    gate: Float[Tensor, "ff dim"] | Quantized,
    up: Float[Tensor, "ff dim"] | Quantized,
    down: Float[Tensor, "dim ff"] | Quantized,
) -> Float[Tensor, "*tokens dim"]:
    """Returns down (silu(gate x) * up x)."""
    if torch.is_grad_enabled():
        y: Tensor = _FeedForward.apply(x, gate, up, down)
        return y
    x = x.contiguous()
    y = empty(x.shape, x.dtype)
    library().moekit_feed_forward(x.dtype == torch.bfloat16, _layer(x, gate, up, down), at(x), None, at(y))
    return y


def _layer(x: Tensor, *weights: Tensor | Quantized) -> bytes:
    """Returns the library's `FeedForward`."""
    sizes = (x.numel() // x.shape[-1], x.shape[-1], weights[0].shape[0])
    return FEED_FORWARD.pack(*sizes, *_matrices(weights), torch.get_num_threads())


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> Tensor:
        x = x.contiguous()
        layer, y = _layer(x, *weights), empty(x.shape, x.dtype)
        kept = (
            room("moekit_feed_forward_bytes", x.dtype == torch.bfloat16, layer) if any(ctx.needs_input_grad) else None
        )
        library().moekit_feed_forward(x.dtype == torch.bfloat16, layer, at(x), at(kept), at(y))
        if kept is not None:
            ctx.save_for_backward(kept, x, *weights)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        kept, x, *weights = ctx.saved_tensors
        dy, (learns, *wanted) = dy.contiguous(), ctx.needs_input_grad
        dx = empty(x.shape, x.dtype) if learns else None
        made, table = _gradients(weights, wanted)
        library().moekit_feed_forward_backward(
            x.dtype == torch.bfloat16, _layer(x, *weights), at(x), at(kept), at(dy), at(dx), table
        )
        return dx, *made
