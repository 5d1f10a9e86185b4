"""Softmax attention: one function, and who may look at whom."""

from contextlib import suppress
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moekit.errors import ConfigError
from moekit.ops.kernels import attention as native
from moekit.ops.kernels.addresses import readable

FAR = 1 << 29
"""Ids up to which `all_seen` stays within 32 bits."""


class Seen(NamedTuple):
    """What a query sees: the keys up to its own position, those of its own document. By default from the first on.

    Either a matrix says so, or what it would be made of: our kernels take the latter and pass over what is not seen.
    Not `causal`: all keys, or those that the matrix allows.
    """

    offsets: Int[Tensor, " batch"] | None = None
    """Where each sequence's queries begin among its keys; None: at the first."""
    document_ids: Int[Tensor, "batch length"] | None = None
    mask: Bool[Tensor, "batch 1 length keys"] | None = None
    causal: bool = True


def as_documents(ids: Int[Tensor, "..."], batch: int, length: int) -> Int[Tensor, "{batch} {length}"]:
    """Returns a number for each token's document, on a CPU in 32 bits and in memory of its own: what the way back reads
    must not change meanwhile. ConfigError for ids that are none, or not of each token."""
    with suppress(RuntimeError):  # of a shape that does not fit
        ids = ids.expand(batch, length)
    if ids.shape != (batch, length) or ids.is_floating_point():
        found = f"document_ids are {tuple(ids.shape)} in {ids.dtype}"
        raise ConfigError(f"{found} but must be ({batch}, {length}), one for each token, in integers")
    if torch.compiler.is_compiling() or not native.has_kernels(ids.device) or not readable(ids):
        return ids
    low, high = ids.aminmax() if ids.numel() else (ids.new_zeros(()),) * 2
    if low < -FAR or high > FAR:  # hashes, say
        ids = ids.unique(return_inverse=True)[1]
    return ids.to(torch.int32, copy=True)


def seen(
    positions: Int[Tensor, "batch length"], keys: int, document_ids: Int[Tensor, "batch length"] | None = None
) -> Seen:
    """Returns what queries at successive positions see of `keys` keys, once for all layers."""
    if keys == positions.shape[1] and document_ids is None:
        return Seen()
    if native.has_kernels(positions.device):
        return Seen(None if keys == positions.shape[1] else positions[:, 0].contiguous(), document_ids)
    return Seen(mask=attention_mask(positions, keys, document_ids))


def attention_mask(
    positions: Int[Tensor, "batch length"], keys: int, document_ids: Int[Tensor, "batch length"] | None = None
) -> Bool[Tensor, "batch 1 length keys"]:
    """Returns true where a query may look: not ahead of its position, and in its own document if ids are given."""
    mask = positions.unsqueeze(-1) >= torch.arange(keys, device=positions.device)
    if document_ids is not None:
        mask = mask & _same(document_ids)
    return mask.unsqueeze(1)


def all_seen(
    document_ids: Int[Tensor, "batch length"] | None = None, padding_mask: Bool[Tensor, "batch length"] | None = None
) -> Seen:
    """Returns what the queries of an encoder see: every token, earlier or later, of their own document.

    Padding is a document of its own: no real token sees it, and a sequence of nothing else has numbers too.
    """
    ids = document_ids
    if padding_mask is not None:
        ids = padding_mask.long() if ids is None else (2 * ids + 1) * padding_mask  # odd for documents, 0 for padding
    if ids is None or native.has_kernels(ids.device):
        return Seen(document_ids=ids, causal=False)
    return Seen(mask=_same(ids).unsqueeze(1), causal=False)


def _same(document_ids: Int[Tensor, "batch length"]) -> Bool[Tensor, "batch length length"]:
    return document_ids.unsqueeze(-1) == document_ids.unsqueeze(-2)


def attend(
    q: Float[Tensor, "batch length heads head_dim"],
    k: Float[Tensor, "batch keys kv_heads head_dim"],
    v: Float[Tensor, "batch keys kv_heads value_dim"],
    seen: Seen,
    scale: float,
) -> Float[Tensor, "batch length heads value_dim"]:
    """Returns softmax attention: by our kernels wherever they can run, else by torch's.

    No size was found where torch's are faster on a CPU, from one query to 2048, alone or with gradients.
    """
    offsets, document_ids, mask, causal = seen
    learns = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
    if mask is None and native.unavailable(q, k, v, document_ids) is None and not (learns and offsets is not None):
        y: Tensor = native.attention(q, k, v, scale, document_ids, offsets, causal)
        return y
    if mask is None and document_ids is not None and not causal:
        mask = _same(document_ids).unsqueeze(1)
    elif mask is None and not (offsets is None and document_ids is None):
        positions = torch.arange(q.shape[1], device=q.device).expand(q.shape[:2])
        positions = positions if offsets is None else positions + offsets.unsqueeze(1)
        mask = attention_mask(positions, k.shape[1], document_ids)
    grouped = q.shape[2] != k.shape[2]
    if grouped and mask is not None and q.is_cuda:  # torch's kernels take a mask or groups: both give the whole matrix
        k, v, grouped = *(part.repeat_interleave(q.shape[2] // k.shape[2], 2) for part in (k, v)), False
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    ahead = causal and mask is None
    y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=ahead, scale=scale, enable_gqa=grouped)
    return y.transpose(1, 2)


def rotate(
    x: Float[Tensor, "batch length heads rope"],
    cos: Float[Tensor, "batch length half_rope"],
    sin: Float[Tensor, "batch length half_rope"],
    interleaved: bool,
) -> Float[Tensor, "batch length heads rope"]:
    """Returns x with each pair turned by its angle: pairs (2i, 2i + 1) when interleaved, (i, i + rope/2) otherwise."""
    if native.may_rotate(x, cos, sin):
        y: Tensor = native.rotate(x, cos, sin, interleaved)
        return y
    cos, sin = cos.unsqueeze(2).to(x.dtype), sin.unsqueeze(2).to(x.dtype)
    if interleaved:
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
