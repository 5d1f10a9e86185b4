"""An embedding's rows are torch's, and so is its gradient, wherever that lies."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

from moekit.ops import embedding as embeddings
from moekit.ops.embedding import embedding
from moekit.ops.kernels import memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(3, 7), (5,), (2, 0), (1, 2, 3), ()])
def test_rows_and_gradient_are_torchs(
    shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embeddings, "LEAST", 0)
    weight = torch.randn(11, 6).to(dtype).requires_grad_()
    ids = torch.randint(0, 4, shape)  # some more than once, most never
    rows, expected = embedding(ids, weight), F.embedding(ids, weight)
    assert torch.equal(rows, expected)
    toward = torch.randn_like(rows)
    (found,) = torch.autograd.grad(rows, weight, toward)
    exact = weight.detach().double().requires_grad_()
    (wanted,) = torch.autograd.grad(F.embedding(ids, exact), exact, toward.double())
    torch.testing.assert_close(found, wanted.to(dtype))


LARGE = memory.LEAST // 256


@pytest.fixture
def lent(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Has the size of each part of the heap that is asked for."""
    made: list[int] = []
    before = memory.heap.lend
    monkeypatch.setattr(memory.heap, "lend", lambda count: made.append(count) or before(count))
    return made


def test_a_large_gradient_lies_in_memory_that_is_kept_and_is_cleared(lent: list[int]) -> None:
    weight = torch.randn(LARGE, 64, requires_grad=True)
    places = []
    for _ in range(2):
        embedding(torch.tensor([3, 5, 3]), weight).sum().backward()
        assert weight.grad is not None
        assert weight.grad.sum(1).nonzero().flatten().tolist() == [3, 5]
        assert weight.grad[3, 0] == 2 * weight.grad[5, 0] == 2
        places.append(weight.grad.data_ptr())
        weight.grad.fill_(7)  # what the next one finds there
        weight.grad = None
    assert lent == [memory.LEAST] * 2
    assert places[0] == places[1]


def test_transforms_and_second_derivatives_are_torchs(lent: list[int]) -> None:
    weight, ids = torch.randn(LARGE, 64), torch.tensor([3, 5, 3])
    toward = torch.randn(LARGE, 64)

    def cubes(of: torch.Tensor) -> torch.Tensor:
        return embedding(ids, of).pow(3).sum()

    expected = torch.zeros_like(weight).index_add_(0, ids, 3 * weight[ids].square())
    torch.testing.assert_close(torch.func.grad(cubes)(weight), expected)
    torch.testing.assert_close(torch.func.jvp(cubes, (weight,), (toward,))[1], (expected * toward).sum())
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(cubes(forward_ad.make_dual(weight.requires_grad_(), toward))).tangent
    torch.testing.assert_close(found, (expected * toward).sum())
    (first,) = torch.autograd.grad(cubes(weight), weight, create_graph=True)
    (second,) = torch.autograd.grad((first * toward).sum(), weight)
    exact = torch.zeros_like(toward).index_add_(0, ids, 6 * weight.detach()[ids] * toward[ids])
    torch.testing.assert_close(second, exact)
    assert lent == [memory.LEAST], "the last one alone is not differentiated again"


def test_an_id_that_is_no_row_is_an_error() -> None:
    with pytest.raises(IndexError):
        embedding(torch.tensor([11]), torch.randn(11, 6, requires_grad=True))
