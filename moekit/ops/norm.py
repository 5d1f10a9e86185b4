"""RMSNorm as a function."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from moekit.ops.kernels import native


def rms_norm(x: Float[Tensor, "*batch dim"], weight: Float[Tensor, " dim"], eps: float) -> Float[Tensor, "*batch dim"]:
    """Returns x / rms(x) * weight in x's dtype (arXiv 1910.07467, Eq. 4), the mean square in float32 or better."""
    if native.has_rest(x, weight):
        y: Tensor = native.rms_norm(x, weight, eps)
        return y
    if x.dtype in (torch.bfloat16, torch.float16):
        return F.rms_norm(x.float(), weight.shape, weight.float(), eps).to(x.dtype)
    return F.rms_norm(x, weight.shape, weight, eps)
