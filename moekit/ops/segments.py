"""Sequences in segments: their means, without padding, and what a segment may know of those before it."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor


def segmented(x: Float[Tensor, "batch length dim"], size: int) -> Float[Tensor, "units tokens dim"]:
    """Returns the segments of `size` tokens of all sequences, in order; the last of each is filled up with zeros."""
    batch, length, dim = x.shape
    return F.pad(x, (0, 0, 0, -length % size)).reshape(batch * -(-length // size), size, dim)


def joined(y: Float[Tensor, "units tokens dim"], batch: int, length: int) -> Float[Tensor, "batch length dim"]:
    """Returns the sequences that the segments were cut from."""
    _, size, dim = y.shape
    return y.reshape(batch, -(-length // size) * size, dim)[:, :length]


def segment_tokens(
    batch: int, length: int, size: int, mask: Bool[Tensor, "batch length"] | None, device: torch.device
) -> Int[Tensor, "batch segments"]:
    """Returns the real tokens of each segment."""
    real = torch.ones(batch, length, dtype=torch.bool, device=device) if mask is None else mask
    return F.pad(real, (0, -length % size)).view(batch, -(-length // size), size).sum(2)


def segment_means(
    x: Float[Tensor, "batch length dim"], size: int, mask: Bool[Tensor, "batch length"] | None = None
) -> Float[Tensor, "batch segments dim"]:
    """Returns the mean of the real tokens of each segment, at least float32; 0 for a segment without any."""
    batch, length, dim = x.shape
    if mask is not None:
        x = x.masked_fill(~mask.unsqueeze(-1), 0)  # whatever padding holds, not a number included
    dtype = torch.promote_types(x.dtype, torch.float32)
    tokens = segment_tokens(batch, length, size, mask, x.device)
    return segmented(x, size).sum(1, dtype=dtype).view(*tokens.shape, dim) / tokens.clamp(min=1).unsqueeze(-1)


def previous(
    values: Float[Tensor, "batch segments dim"], first: Float[Tensor, "batch 1 dim"]
) -> Float[Tensor, "batch segments dim"]:
    """Returns for each segment the value of the one before it in the same sequence, and `first` for the first.

    Shifted within a sequence: a roll over all segments of a batch would give a first segment the last of another one.
    """
    return torch.cat((first, values[:, :-1]), dim=1)[:, : values.shape[1]]


def sequence_means(
    x: Float[Tensor, "batch length dim"], mask: Bool[Tensor, "batch length"] | None = None
) -> Float[Tensor, "batch dim"]:
    """Returns the mean of the real tokens of each sequence, at least float32; 0 for one without any."""
    return segment_means(x, max(x.shape[1], 1), mask).sum(1)  # of one segment, or of none
