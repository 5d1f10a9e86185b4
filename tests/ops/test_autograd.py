"""A gradient of ours is not differentiated again without a word."""

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

from moekit.config import ModelConfig
from moekit.nn.model import Model

KINDS: dict[str, dict[str, Any]] = {
    "moe": {},
    "latent attention": {"attention": {"kind": "mla"}},
    "dense": {"ffn": {"kind": "dense"}},
}


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives_are_an_error(tiny_config: Callable[..., ModelConfig], kind: str, low: bool) -> None:
    """torch's own mark of such functions lets a loss's through as zeros."""
    model, ids = Model(tiny_config(**KINDS[kind])), torch.randint(61, (2, 9))
    with torch.autocast("cpu", torch.bfloat16) if low else contextlib.nullcontext():
        loss = model(ids, labels=ids).loss
    parameters = list(model.parameters())
    first = torch.autograd.grad(loss, parameters, create_graph=True)
    assert all(gradient.requires_grad for gradient in first)
    for gradient in first:
        with pytest.raises(RuntimeError, match="there are no second derivatives"):
            gradient.square().sum().backward(retain_graph=True)
    penalty = sum(gradient.square().sum() for gradient in first)
    with pytest.raises(RuntimeError, match="there are no second derivatives"):
        torch.autograd.grad(loss + penalty, parameters)
    plain = torch.autograd.grad(model(ids, labels=ids).loss, parameters)
    assert low or all(torch.equal(a, b) for a, b in zip(first, plain, strict=True))
