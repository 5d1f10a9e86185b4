"""One cast for several products: under autocast each `F.linear` would make, and keep, a copy of the same input."""

import torch
from jaxtyping import Float
from torch import Tensor


def cast_once(x: Float[Tensor, "*tokens dim"]) -> Float[Tensor, "*tokens dim"]:
    """Returns x in autocast's dtype, or x itself outside of autocast."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x
