"""Autocast where several products share one input, and where float32 is wanted whatever it says."""

from contextlib import AbstractContextManager, nullcontext

import torch
from jaxtyping import Float
from torch import Tensor


def cast_once(x: Float[Tensor, "*tokens dim"]) -> Float[Tensor, "*tokens dim"]:
    """Returns x in autocast's dtype, or x itself outside of autocast.

    Under autocast each `F.linear` would make, and keep for the backward pass, a copy of the same input.
    """
    device = x.device.type
    if x.is_meta or not torch.is_autocast_enabled(device):  # autocast does not know the meta device
        return x
    return x.to(torch.get_autocast_dtype(device))


def as_cast(x: Float[Tensor, "*tokens dim"]) -> Float[Tensor, "*tokens dim"]:
    """Returns x itself, or what `cast_once` would return without its numbers: for those who ask who may multiply it."""
    dtype = cast_once(x.new_empty(0)).dtype
    return x if dtype == x.dtype else x.new_empty((), dtype=dtype).expand(x.shape)


def autocast_off(x: Tensor) -> AbstractContextManager[object]:
    """Returns a context in which nothing on x's device is cast."""
    on = not x.is_meta and torch.is_autocast_enabled(x.device.type)
    return torch.autocast(x.device.type, enabled=False) if on else nullcontext()
