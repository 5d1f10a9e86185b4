"""An embedding's rows are torch's, and so is its gradient, wherever that lies."""

import pytest
import torch
import torch.nn.functional as F

from moekit.ops.embedding import embedding
from moekit.ops.kernels import memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(3, 7), (5,), (2, 0), (1, 2, 3)])
def test_rows_and_gradient_are_torchs(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight = torch.randn(11, 6).to(dtype).requires_grad_()
    ids = torch.randint(0, 4, shape)  # some more than once, most never
    rows, expected = embedding(ids, weight), F.embedding(ids, weight)
    assert torch.equal(rows, expected)
    toward = torch.randn_like(rows)
    (found,) = torch.autograd.grad(rows, weight, toward)
    exact = weight.detach().double().requires_grad_()
    (wanted,) = torch.autograd.grad(F.embedding(ids, exact), exact, toward.double())
    torch.testing.assert_close(found, wanted.to(dtype))


def test_a_large_gradient_lies_in_memory_that_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    lent: list[int] = []
    before = memory.heap.lend
    monkeypatch.setattr(memory.heap, "lend", lambda count: lent.append(count) or before(count))
    weight = torch.randn(memory.LEAST // 256, 64, requires_grad=True)
    for _ in range(2):  # the second is where the first was, which was written
        weight.grad = None
        embedding(torch.tensor([3, 5, 3]), weight).sum().backward()
        assert weight.grad is not None
        assert weight.grad.sum(1).nonzero().flatten().tolist() == [3, 5]
    assert lent == [memory.LEAST] * 2


def test_an_id_that_is_no_row_is_an_error() -> None:
    with pytest.raises(IndexError):
        embedding(torch.tensor([11]), torch.randn(11, 6, requires_grad=True))
