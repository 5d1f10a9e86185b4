"""The experts' products: every back end equals the loop over experts, output and every gradient."""

from itertools import accumulate

import pytest
import torch
from torch import Tensor

from moekit.errors import ConfigError, UnsupportedError
from moekit.ops import dispatch, reference
from moekit.ops.experts import BACKENDS, Backend, choose, mixed_experts, swiglu_experts, unavailable
from moekit.ops.kernels.loop import without_gradient
from moekit.ops.quantize import Codes, dequantize, quantize

COUNTS = {
    "odd sizes": [3, 5, 1, 7],
    "an expert is empty": [4, 0, 6, 1],
    "first and last are empty": [0, 3, 9, 0],
    "one row": [0, 1, 0, 0],
    "no row": [0, 0, 0, 0],
    "all in one": [0, 0, 13, 0],
    "more than a block": [64, 65, 1, 130],
}


FAST: list[Backend] = [name for name in BACKENDS if name != "reference"]  # type: ignore[misc]


def need(backend: Backend, *tensors: Tensor) -> None:
    """Skips the test where the back end cannot run on such tensors, and says why."""
    if reason := BACKENDS[backend].unavailable(*tensors):
        pytest.skip(f"{backend}: {reason}")


def weights(device: torch.device, dtype: torch.dtype, dim: int = 5, ff: int = 3) -> tuple[Tensor, Tensor]:
    gate_up = torch.randn(4, 2 * ff, dim, dtype=dtype, device=device, requires_grad=True)
    down = torch.randn(4, dim, ff, dtype=dtype, device=device, requires_grad=True)
    return gate_up, down


def loop(rows: Tensor, gate_up: Tensor, down: Tensor, counts: list[int]) -> Tensor:
    """Returns the reference, expert by expert; rows behind the last expert's are zero."""
    starts = [0, *accumulate(counts)]
    parts = [reference.swiglu(rows[starts[e] : starts[e + 1]], gate_up[e], down[e]) for e in range(len(counts))]
    return torch.cat((*parts, torch.zeros_like(rows[starts[-1] :])))


def compare(
    rows: Tensor, gate_up: Tensor, down: Tensor, counts: list[int], backend: Backend = "auto"
) -> list[tuple[Tensor, Tensor]]:
    """Returns (ours, reference in float64) for the output and the gradients of rows, gate_up and down."""
    probe = torch.randn_like(rows)
    y = swiglu_experts(rows, gate_up, down, torch.tensor(counts, device=rows.device), backend)
    ours = (y, *torch.autograd.grad(y, (rows, gate_up, down), probe))
    exact = [t.detach().double().requires_grad_() for t in (rows, gate_up, down)]
    z = loop(*exact, counts)
    return list(zip(ours, (z, *torch.autograd.grad(z, exact, probe.double())), strict=True))


def worst(pairs: list[tuple[Tensor, Tensor]]) -> float:
    """Returns the largest error relative to the largest value of each tensor."""
    errors = [(a.double() - b).abs().max() / b.abs().max().clamp(min=1e-9) for a, b in pairs if a.numel()]
    return float(torch.stack(errors).max().detach())  # a NaN stays one


@pytest.mark.parametrize("dropped", [0, 4])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
def test_experts_equal_the_loop_in_float64(device: torch.device, counts: list[int], dropped: int) -> None:
    rows = torch.randn(sum(counts) + dropped, 5, dtype=torch.float64, device=device, requires_grad=True)
    for ours, expected in compare(rows, *weights(device, torch.float64), counts):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("sizes", [(16, 8), (64, 96), (70, 37)])
@pytest.mark.parametrize("dropped", [0, 4])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
@pytest.mark.parametrize(
    ("dtype", "bound"),
    # measured worst over these cases and five seeds: 2e-6 and 1.2e-2
    [(torch.float32, 5e-6), (torch.bfloat16, 3e-2)],
    ids=["float32", "bfloat16"],
)
def test_every_back_end_stays_within_rounding_of_the_loop(
    device: torch.device,
    backend: Backend,
    sizes: tuple[int, int],
    counts: list[int],
    dropped: int,
    dtype: torch.dtype,
    bound: float,
) -> None:
    rows = torch.randn(sum(counts) + dropped, sizes[0], dtype=dtype, device=device, requires_grad=True)
    matrices = weights(device, dtype, *sizes)
    need(backend, rows, *matrices)
    pairs = compare(rows, *matrices, counts, backend)
    assert all(ours.dtype == dtype for ours, _ in pairs)
    assert worst(pairs) < bound
    assert (pairs[0][0][sum(counts) :] == 0).all()
    assert (pairs[1][0][sum(counts) :] == 0).all()


MIXED = {
    "few tokens": (3, 5, 16, 8, 2),
    "odd sizes": (50, 7, 37, 21, 3),
    "wide": (300, 6, 64, 96, 2),
    "k is all": (9, 4, 33, 17, 4),
}


def mixed_inputs(
    device: torch.device,
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    tokens: int,
    experts: int,
    dim: int,
    ff: int,
    k: int,
) -> tuple[dispatch.Plan, list[Tensor]]:
    """Returns a routing with an empty expert and a dropped choice, and x, weights, gate_up and down."""
    scores = torch.rand(tokens, experts, device=device)
    if k < experts:
        scores[:, 1] = -1
    ids = scores.topk(k).indices
    ids[0, 0] = -1
    x = torch.randn(dim, tokens, device=device).to(dtype).T  # not contiguous
    gate_up = torch.randn(experts, 2 * ff, dim, device=device) / dim**0.5
    down = torch.randn(experts, dim, ff, device=device) / ff**0.5
    inputs = [x, torch.rand(tokens, k, device=device), gate_up.to(weight_dtype), down.to(weight_dtype)]
    return dispatch.plan(ids, experts), [value.requires_grad_() for value in inputs]


def mixed_reference(plan: dispatch.Plan, x: Tensor, mix: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Returns the sum over choices, one (token, choice) pair after another."""
    ends = plan.tokens_per_expert.cumsum(0).tolist()
    y = list(torch.zeros_like(x))
    for row, pair in enumerate(plan.order.tolist()):
        if row < ends[-1]:
            expert = next(e for e, end in enumerate(ends) if row < end)
            token, choice = divmod(pair, mix.shape[1])
            y[token] = y[token] + mix[token, choice] * reference.swiglu(x[token], gate_up[expert], down[expert])
    return torch.stack(y)


@pytest.mark.parametrize("backend", ["reference", *FAST])
@pytest.mark.parametrize("sizes", MIXED.values(), ids=MIXED.keys())
@pytest.mark.parametrize(
    ("dtype", "weight_dtype", "bound"),
    # measured worst over these cases and five seeds: 2e-6, 1.3e-2, 1.2e-2
    [
        (torch.float32, torch.float32, 5e-6),
        (torch.bfloat16, torch.float32, 4e-2),
        (torch.bfloat16, torch.bfloat16, 4e-2),
    ],
    ids=["float32", "bfloat16 with float32 weights", "bfloat16"],
)
def test_every_back_end_mixes_like_the_formula(
    device: torch.device,
    backend: Backend,
    sizes: tuple[int, ...],
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    bound: float,
) -> None:
    plan, inputs = mixed_inputs(device, dtype, weight_dtype, *sizes)
    need(backend, inputs[0], inputs[2].to(dtype), inputs[3].to(dtype))
    y = mixed_experts(inputs[0], inputs[1], plan, *inputs[2:], backend)
    probe = torch.randn_like(y)
    exact = [value.detach().double().requires_grad_() for value in inputs]
    z = mixed_reference(plan, *exact)
    pairs = list(
        zip(
            (y, *torch.autograd.grad(y, inputs, probe)),
            (z, *torch.autograd.grad(z, exact, probe.double())),
            strict=True,
        )
    )
    assert [ours.dtype for ours, _ in pairs] == [dtype, dtype, torch.float32, weight_dtype, weight_dtype]
    assert worst(pairs) < bound
    with torch.no_grad():  # without gradients another path may be taken
        alone = mixed_experts(inputs[0], inputs[1], plan, *inputs[2:], backend)
    assert worst([(alone, z)]) < bound


@pytest.mark.parametrize("backend", FAST)
def test_no_token_at_all_is_fine(device: torch.device, backend: Backend) -> None:
    plan = dispatch.plan(torch.empty(0, 2, dtype=torch.int64, device=device), 4)
    gate_up, down = weights(device, torch.float32, 16, 8)
    x = torch.empty(0, 16, device=device, requires_grad=True)
    need(backend, x, gate_up, down)
    y = mixed_experts(x, torch.empty(0, 2, device=device), plan, gate_up, down, backend)
    gradients = torch.autograd.grad(y.sum(), (x, gate_up, down))
    assert y.shape == (0, 16)
    assert all((gradient == 0).all() for gradient in gradients)


def test_a_back_end_that_cannot_run_says_why(device: torch.device) -> None:
    x, (gate_up, down) = torch.randn(3, 5, dtype=torch.float64, device=device), weights(device, torch.float64)
    with pytest.raises(UnsupportedError, match=r"backend is 'native', which cannot run here: .*; use auto"):
        choose("native", x, gate_up, down)
    with pytest.raises(ConfigError, match=r"backend is 'nativ' \(did you mean native\?\); allowed: auto, reference"):
        choose("nativ", x, gate_up, down)


def test_experts_whose_two_stacks_differ_in_dtype_are_not_the_compiled_kernels() -> None:
    """They read both as one kind: the output would be made of other memory."""
    rows = torch.randn(3, 5, dtype=torch.bfloat16)
    gate_up, down = weights(torch.device("cpu"), torch.float32)
    said = "gate_up is torch.float32 and down torch.bfloat16; it takes one dtype"
    assert unavailable("native", rows, gate_up, down.bfloat16()) == said
    y = swiglu_experts(rows, gate_up, down.bfloat16(), torch.tensor([1, 0, 2, 0]))
    expected = loop(rows.double(), gate_up.double(), down.double(), [1, 0, 2, 0])
    assert (y.double() - expected).norm() <= 2e-2 * expected.norm()


def test_gradcheck_with_an_empty_expert_and_dropped_rows(device: torch.device) -> None:
    rows = torch.randn(6, 5, dtype=torch.float64, device=device, requires_grad=True)
    counts = torch.tensor([2, 0, 1, 2], device=device)
    assert torch.autograd.gradcheck(
        lambda *args: swiglu_experts(*args, counts), (rows, *weights(device, torch.float64)), atol=1e-6
    )


def test_non_contiguous_inputs_and_gradients_change_nothing(device: torch.device) -> None:
    counts = torch.tensor([3, 0, 2, 1], device=device)
    rows = torch.randn(5, 6, dtype=torch.float64, device=device, requires_grad=True)
    gate_up = torch.randn(4, 5, 6, dtype=torch.float64, device=device, requires_grad=True)
    down = torch.randn(4, 3, 5, dtype=torch.float64, device=device, requires_grad=True)
    probe = torch.randn(5, 6, dtype=torch.float64, device=device)

    def run(copy: bool) -> tuple[Tensor, ...]:
        args = [rows.T, gate_up.transpose(1, 2), down.transpose(1, 2)]
        y = swiglu_experts(*([a.contiguous() for a in args] if copy else args), counts)
        return (y, *torch.autograd.grad(y, (rows, gate_up, down), probe.T))

    for a, b in zip(run(copy=False), run(copy=True), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_runs_are_equal_to_the_bit(device: torch.device, dtype: torch.dtype, backend: Backend) -> None:
    plan, inputs = mixed_inputs(device, dtype, dtype, 90, 6, 16, 8, 2)
    need(backend, inputs[0], *inputs[2:])

    def run() -> tuple[Tensor, ...]:
        y = mixed_experts(inputs[0], inputs[1], plan, *inputs[2:], backend)
        return (y, *torch.autograd.grad(y.float().square().sum(), inputs))

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_a_row_depends_on_no_other_row(device: torch.device) -> None:
    gate_up, down = (w.detach() for w in weights(device, torch.float64))
    rows = torch.randn(6, 5, dtype=torch.float64, device=device)
    counts = torch.tensor([2, 0, 3, 1], device=device)
    before = swiglu_experts(rows, gate_up, down, counts)
    rows[3] += 1
    changed = (swiglu_experts(rows, gate_up, down, counts) != before).any(1)
    assert changed.tolist() == [False, False, False, True, False, False]


@pytest.mark.parametrize("frozen", ["gate_up", "down"])
def test_a_frozen_weight_gets_no_gradient_and_changes_no_other(device: torch.device, frozen: str) -> None:
    gate_up, down = weights(device, torch.float64)
    rows = torch.randn(16, 5, dtype=torch.float64, device=device, requires_grad=True)
    counts = torch.tensor(COUNTS["odd sizes"], device=device)
    trained = {"gate_up": gate_up, "down": down}
    full = torch.autograd.grad(swiglu_experts(rows, gate_up, down, counts).sum(), (rows, gate_up, down))
    expected = dict(zip(("rows", "gate_up", "down"), full, strict=True))
    trained[frozen].requires_grad_(False)
    swiglu_experts(rows, gate_up, down, counts).sum().backward()
    assert trained[frozen].grad is None
    for name, tensor in {"rows": rows, **trained}.items():
        assert name == frozen or torch.equal(tensor.grad, expected[name])


@pytest.mark.parametrize("backend", ["reference", *FAST])
@pytest.mark.parametrize("sizes", MIXED.values(), ids=MIXED.keys())
@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize(
    ("dtype", "bound"),
    # measured worst over these cases and five seeds: 6e-7 and 1.1e-2
    [(torch.float32, 5e-6), (torch.bfloat16, 4e-2)],
    ids=["float32", "bfloat16"],
)
def test_experts_in_codes_give_what_their_numbers_give(
    device: torch.device, backend: Backend, sizes: tuple[int, ...], kind: Codes, dtype: torch.dtype, bound: float
) -> None:
    plan, inputs = mixed_inputs(device, dtype, torch.float32, *sizes)
    x, mix, gate_up, down = (value.detach() for value in inputs)
    coded = quantize(gate_up, kind), quantize(down, kind)
    if reason := unavailable(backend, x, *coded):
        pytest.skip(f"{backend}: {reason}")
    numbers = (dequantize(weight).double() for weight in coded)
    y = mixed_experts(x, mix, plan, *coded, backend)
    assert y.dtype == dtype
    assert worst([(y, mixed_reference(plan, x.double(), mix.double(), *numbers))]) < bound
    rows = dispatch.gather(x, plan, mix.shape[1])
    assert (
        worst([(dispatch.combine(swiglu_experts(rows, *coded, plan.tokens_per_expert, backend), mix, plan), y)]) < bound
    )


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_codes_and_no_token_at_all_are_fine(device: torch.device, backend: Backend) -> None:
    plan = dispatch.plan(torch.empty(0, 2, dtype=torch.int64, device=device), 4)
    x = torch.empty(0, 16, device=device)
    coded = [quantize(weight.detach(), "int4") for weight in weights(device, torch.float32, 16, 8)]
    if reason := unavailable(backend, x, *coded):
        pytest.skip(f"{backend}: {reason}")
    assert mixed_experts(x, torch.empty(0, 2, device=device), plan, *coded, backend).shape == (0, 16)


def test_gradients_of_unused_experts_become_zero_whatever_is_there(device: torch.device) -> None:
    """On devices of capability 10 torch's grouped product writes nothing there."""
    weight = torch.randn(3, 2, 4, device=device, requires_grad=True)
    unused = torch.tensor([False, True, False], device=device)
    garbage = torch.where(unused[:, None, None], torch.nan, torch.ones_like(weight))
    for _ in range(2):  # nothing stays with the weight
        (found,) = torch.autograd.grad(without_gradient(weight, unused), weight, garbage)
        assert torch.equal(found, garbage.nan_to_num(0))
    assert not weight._backward_hooks


def test_a_gradient_through_codes_is_an_error(device: torch.device) -> None:
    plan, (x, mix, gate_up, down) = mixed_inputs(device, torch.float32, torch.float32, *MIXED["few tokens"])
    coded = quantize(gate_up.detach(), "int8"), quantize(down.detach(), "int8")
    for inputs in ((x, mix.detach()), (x.detach(), mix)):
        with pytest.raises(UnsupportedError, match=r"^int8 weights are for inference and have no gradients"):
            mixed_experts(*inputs, plan, *coded)
