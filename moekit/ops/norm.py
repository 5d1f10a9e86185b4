"""RMSNorm as a function, alone and behind a residual connection."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from moekit.ops.autocast import cast_once
from moekit.ops.kernels import step


class Normed(NamedTuple):
    """What follows a residual connection."""

    stream: Float[Tensor, "*batch dim"]
    """x + delta."""
    exact: Float[Tensor, "*batch dim"]
    """The stream's norm in its own dtype; `low` itself if only that is wanted."""
    low: Float[Tensor, "*batch dim"]
    """What products read: the same in autocast's dtype, or `exact` itself outside of autocast."""


def rms_norm(x: Float[Tensor, "*batch dim"], weight: Float[Tensor, " dim"], eps: float) -> Float[Tensor, "*batch dim"]:
    """Returns x / rms(x) * weight in x's dtype (arXiv 1910.07467, Eq. 4), the mean square in float32 or better."""
    if step.has_norm(x, None, weight):
        y: Tensor = step.add_norm(x, None, weight, eps)[1]
        return y
    if x.dtype in (torch.bfloat16, torch.float16):
        return F.rms_norm(x.float(), weight.shape, weight.float(), eps).to(x.dtype)
    return F.rms_norm(x, weight.shape, weight, eps)


def add_rms_norm(
    x: Float[Tensor, "*batch dim"],
    delta: Float[Tensor, "*batch dim"] | None,
    weight: Float[Tensor, " dim"],
    eps: float,
    exact: bool,
) -> Normed:
    """Returns x + delta and its norm, `exact` too or only as products read it: in one pass where our kernels run."""
    low = cast_once(x.new_empty(0)).dtype
    if step.has_norm(x, delta, weight) and low in (x.dtype, torch.bfloat16):
        once = low == x.dtype
        stream, y, rounded = step.add_norm(x, delta, weight, eps, exact or once, not once)
        return Normed(stream, rounded if y is None else y, y if rounded is None else rounded)
    stream = x if delta is None else x + delta
    y = rms_norm(stream, weight, eps)
    return Normed(stream, y, cast_once(y))
