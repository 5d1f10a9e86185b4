"""SwiGLU's activation: the formula, its gradients, and what is kept for them."""

import pytest
import torch
from torch import Tensor

from moekit.ops.swiglu import swiglu


@pytest.mark.parametrize("shape", [(33, 37), (2, 3, 64), (1, 1), (0, 5)])
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-14), (torch.float32, 2e-6), (torch.bfloat16, 1e-2)], ids=str
)
@pytest.mark.parametrize("apart", [False, True])
def test_values_and_gradients(
    device: torch.device, shape: tuple[int, ...], dtype: torch.dtype, bound: float, apart: bool
) -> None:
    both = torch.randn(*shape[:-1], 2 * shape[-1], device=device).mul_(3).to(dtype)
    gate, up = (part.detach().requires_grad_() for part in both.chunk(2, -1))
    if not apart:
        gate, up = (part.detach().contiguous().requires_grad_() for part in (gate, up))
    dy = torch.randn(shape, device=device).to(dtype)
    y = swiglu(gate, up)
    y.backward(dy)
    g, u = (part.detach().double().requires_grad_() for part in (gate, up))
    exact = g / (1 + (-g).exp()) * u
    exact.backward(dy.double())
    assert y.dtype == dtype
    for found, wanted in ((y, exact), (gate.grad, g.grad), (up.grad, u.grad)):
        assert found is not None
        assert wanted is not None
        torch.testing.assert_close(found.double(), wanted, rtol=bound, atol=bound)


def test_gate_and_up_are_all_that_is_kept(device: torch.device) -> None:
    gate, up = (torch.randn(4, 6, device=device, requires_grad=True) for _ in range(2))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        swiglu(gate, up)
    assert {tensor.data_ptr() for tensor in kept} == {gate.data_ptr(), up.data_ptr()}
