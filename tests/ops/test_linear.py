"""The product with one matrix: the same whatever the weights are kept in and whoever computes it."""

import pytest
import torch
from torch import Tensor

from moekit.errors import UnsupportedError
from moekit.ops import product as ops_product
from moekit.ops.kernels import build
from moekit.ops.kernels import linear as kernels
from moekit.ops.linear import linear, linears
from moekit.ops.quantize import dequantize, quantize
from moekit.ops.scaled import Matrix, Scaled

KINDS = ["float32", "bfloat16", "int8", "int4", "float8"]


def kept(weight: Tensor, kind: str) -> tuple[Matrix, Tensor]:
    """Returns the weight as it is kept, and the numbers that this stands for."""
    if kind in ("int8", "int4"):
        coded = quantize(weight, kind)  # type: ignore[arg-type]
        return coded, dequantize(coded)
    if kind == "float8":
        scaled = Scaled(weight.to(torch.float8_e4m3fn), torch.rand(-(-len(weight) // 8), 1), (8, 200), torch.float32)
        return scaled.to(weight.device), scaled.to(weight.device).numbers()
    cast = weight.to(getattr(torch, kind))
    return cast, cast.float()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(64, 96), (70, 37), (1, 3), (33, 130)])
@pytest.mark.parametrize("rows", [(1,), (3,), (4, 1), (9,), (2, 5), (0,)])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 1.2e-2)])
def test_it_is_the_product_with_the_numbers(
    device: torch.device, kind: str, shape: tuple[int, int], rows: tuple[int, ...], dtype: torch.dtype, bound: float
) -> None:
    weight, numbers = kept(torch.randn(shape[1], shape[0], device=device), kind)
    if isinstance(weight, Tensor):
        weight = weight.to(dtype)
    x = torch.randn(*rows, shape[0], device=device).to(dtype)
    y, exact = linear(x, weight), x.double() @ numbers.to(dtype).double().T
    assert y.dtype == dtype
    assert y.shape == exact.shape
    scale = (x.double().abs() @ numbers.double().abs().T).clamp(min=1e-9)
    assert ((y - exact).abs() <= bound * scale).all()


def test_gradients_are_those_of_the_plain_product(device: torch.device) -> None:
    x, weight = (torch.randn(*shape, device=device, requires_grad=True) for shape in ((2, 7), (5, 7)))
    ours = torch.autograd.grad(linear(x, weight).square().sum(), (x, weight))
    theirs = torch.autograd.grad((x @ weight.T).square().sum(), (x, weight))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("rows", "width", "out"), [(300, 130, 70), (300, 70, 131), (1, 64, 70), (9, 1, 3)])
@pytest.mark.parametrize("lies", ["as it comes", "across", "apart", "everywhere the same"])
def test_wide_products_are_the_plain_ones(
    rows: int, width: int, out: int, lies: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(ops_product, "LEAST", 0)
    monkeypatch.setattr(ops_product, "native", lambda: build.native()._replace(wide_amd=True))
    x, weight = drawn(lies, rows, width), drawn(lies, out, width)
    assert ops_product.is_wide(x, weight, 1)
    y = ops_product.product(x, weight.T)
    torch.testing.assert_close(y.double(), x.double() @ weight.double().T, rtol=1e-5, atol=1e-4)


def drawn(lies: str, *shape: int) -> Tensor:
    """Returns random numbers that lie in memory in one way or another."""
    if lies == "across":
        return torch.randn(*shape[::-1]).permute(*range(len(shape))[::-1])
    if lies == "apart":
        return torch.randn(*shape[:-1], 2 * shape[-1])[..., ::2]
    return torch.randn(1, *[1] * (len(shape) - 1)).expand(shape) if lies != "as it comes" else torch.randn(shape)


@pytest.mark.parametrize(
    ("rows", "width", "out"),
    [((300,), 130, 70), ((2, 150), 70, 131), ((1,), 64, 70), ((9,), 1, 3), ((5000,), 6, 3), ((41,), 70, 1300)],
)
@pytest.mark.parametrize("lies", ["as it comes", "across", "apart", "everywhere the same"])
def test_float32_by_our_kernels_is_the_plain_product(
    rows: tuple[int, ...], width: int, out: int, lies: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if build.native().library is None:
        pytest.skip("there are no native kernels")
    monkeypatch.setattr(kernels, "native", lambda: build.native()._replace(wide_amd=True))
    inputs = [drawn(lies, *rows, width).requires_grad_(), drawn(lies, out, width).requires_grad_()]
    assert kernels.has_linears(inputs[0], inputs[1:])
    dy, y = drawn(lies, *rows, out), linear(*inputs)
    exact = [part.detach().double().requires_grad_() for part in inputs]
    wanted = exact[0] @ exact[1].T
    torch.testing.assert_close(y.double(), wanted, rtol=1e-5, atol=1e-4)
    y.backward(dy)
    wanted.backward(dy.double())
    for ours, theirs in zip(inputs, exact, strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=3e-5, atol=2e-4)  # sums of 5,000


def test_under_autocast_it_is_autocasts(device: torch.device) -> None:
    x, weight = torch.randn(2, 7, device=device), torch.randn(5, 7, device=device)
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16


def test_a_gradient_through_codes_is_an_error(device: torch.device) -> None:
    x = torch.randn(2, 7, device=device, requires_grad=True)
    with pytest.raises(UnsupportedError, match=r"^int4 weights are for inference and have no gradients"):
        linear(x, quantize(torch.randn(5, 7, device=device), "int4"))


@pytest.mark.parametrize("kind", KINDS[:4])
@pytest.mark.parametrize("rows", [4, 41])
def test_a_strided_input_suits_the_kernel(kind: str, rows: int) -> None:
    weight, numbers = kept(torch.randn(37, 70), kind)
    x = torch.randn(rows, 140)[:, ::2].to(torch.bfloat16 if kind == "bfloat16" else torch.float32)
    if build.native().library is None:
        pytest.skip("there are no native kernels")
    (y,), exact = kernels.linears(x, (weight,)), x.double() @ numbers.double().T
    bound = 1e-2 if kind == "bfloat16" else 2e-6
    assert ((y - exact).abs() <= bound * (x.double().abs() @ numbers.double().abs().T)).all()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("rows", "width", "outs"),
    [(1, 64, (32,)), (37, 70, (33, 1, 64)), (600, 96, (130, 64)), (2100, 32, (7,)), (300, 70, (2500, 33))],
)
@pytest.mark.parametrize("weights_in", [torch.float32, torch.bfloat16])
def test_several_products_of_the_same_rows_have_the_right_gradients(
    rows: int, width: int, outs: tuple[int, ...], weights_in: torch.dtype, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    x = torch.randn(rows, width, dtype=torch.bfloat16).requires_grad_()
    weights = [torch.randn(out, width, dtype=weights_in).requires_grad_() for out in outs]
    if not kernels.has_linears(x, weights, mixed=True):
        pytest.skip("torch multiplies bfloat16 on this machine")
    exact = [part.detach().bfloat16().double().requires_grad_() for part in (x, *weights)]
    dys = [torch.randn(rows, out, dtype=torch.bfloat16) for out in outs]
    with torch.autocast("cpu", torch.bfloat16):
        ys = linears(x, *weights)
    wanted = [exact[0] @ w.T for w in exact[1:]]
    torch.autograd.backward(ys, dys)
    torch.autograd.backward(wanted, [dy.double() for dy in dys])
    for y, one, w in zip(ys, wanted, exact[1:], strict=True):
        rounding = one.abs() + (
            exact[0].abs() @ w.abs().T if rows <= kernels.FEW else 1e-3 * width
        )  # few: w as it lies
        assert ((y - one).abs() <= 4e-3 * rounding).all()
    for ours, theirs in zip((x, *weights), exact, strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert ours.grad.dtype == ours.dtype
        rounds = 8e-3 if ours.dtype == torch.bfloat16 else 2e-5
        most = float(theirs.grad.abs().max())
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=rounds, atol=rounds * most)


def test_threads_change_no_bit_and_frozen_matrices_get_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3, 200, 70).bfloat16().transpose(0, 1).requires_grad_()
    weights = [torch.randn(out, 70).requires_grad_(out != 40) for out in (33, 40, 2096)]
    made = []
    for threads in (1, 2, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda n=threads: n)
        x.grad = None
        for w in weights:
            w.grad = None
        with torch.autocast("cpu", torch.bfloat16):
            ys = linears(x, *weights)
        sum(y.float().square().sum() for y in ys).backward()  # type: ignore[union-attr]
        assert weights[1].grad is None
        made.append([*ys, x.grad, weights[0].grad, weights[2].grad])
    for one in made[1:]:
        for a, b in zip(made[0], one, strict=True):
            assert torch.equal(a, b)


def test_without_autocast_two_dtypes_are_an_error() -> None:
    with pytest.raises(RuntimeError, match="dtype"):
        linear(torch.randn(40, 8).bfloat16(), torch.randn(6, 8))
