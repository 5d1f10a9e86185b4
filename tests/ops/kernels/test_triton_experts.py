"""The Triton experts equal a loop over tokens, output and every gradient.

With `MOEKIT_TEST_DEVICE=cuda` the kernels run on that device. Elsewhere they run in Triton's interpreter, in a process
of their own: `TRITON_INTERPRET` counts when a kernel is defined, and would change other tests' kernels too.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moekit.ops import dispatch, reference
from moekit.ops.experts import mixed_experts, swiglu_experts
from moekit.ops.kernels import triton_experts
from moekit.ops.quantize import quantize

INSTALLED = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_CUDA = os.environ.get("MOEKIT_TEST_DEVICE", "cpu").startswith("cuda")
MISSING = "triton is not installed"
kernels = pytest.mark.skipif(
    not (INSTALLED and (INTERPRETED or ON_CUDA)),
    reason="runs on CUDA or by test_all_of_this_holds_in_the_interpreter" if INSTALLED else MISSING,
)
compiles = pytest.mark.skipif(not INSTALLED or INTERPRETED, reason="interpreted" if INSTALLED else MISSING)

# measured worst in the interpreter, over these cases and five seeds: 5e-7, 1.4e-3, 2e-2 (it truncates to bfloat16)
BOUND = {torch.float32: 5e-6, torch.float16: 4e-3, torch.bfloat16: 6e-2}
DTYPES = pytest.mark.parametrize("dtype", BOUND, ids=lambda dtype: str(dtype).removeprefix("torch."))


class Case:
    """One layer's inputs. The last expert is never chosen; `dropped` pairs have no expert."""

    def __init__(self, dtype: torch.dtype, device: torch.device, sizes: str, dropped: int = 0) -> None:
        tokens, k, experts, dim, ff = map(int, sizes.split())
        self.x = torch.randn(tokens, dim, dtype=dtype, device=device)
        self.weights = torch.rand(tokens, k, device=device)
        self.gate_up = (torch.randn(experts, 2 * ff, dim, device=device) / dim**0.5).to(dtype)
        self.down = (torch.randn(experts, dim, ff, device=device) / ff**0.5).to(dtype)
        self.ids = torch.rand(tokens, max(experts - 1, k), device=device).argsort(1)[:, :k].contiguous()
        self.ids.view(-1)[torch.randperm(tokens * k)[:dropped].to(device)] = -1
        self.probe = torch.randn_like(self.x)

    def tensors(self) -> list[Tensor]:
        return [t.requires_grad_() for t in (self.x, self.weights, self.gate_up, self.down)]

    def run(self) -> tuple[Tensor, ...]:
        """Returns the output and the gradients of x, weights, gate_up and down."""
        plan = dispatch.plan(self.ids, len(self.down))
        x, weights, gate_up, down = self.tensors()
        y = triton_experts.mixed_experts(x, weights, plan, gate_up, down)
        return (y.detach(), *torch.autograd.grad(y, (x, weights, gate_up, down), self.probe))

    def exact(self) -> tuple[Tensor, ...]:
        """Returns the same in float64, token by token."""
        tensors = x, weights, gate_up, down = [t.detach().double().requires_grad_() for t in self.tensors()]
        y = 0 * x
        for token, ids in enumerate(self.ids.tolist()):
            for choice, i in enumerate(ids):
                if i >= 0:
                    part = weights[token, choice] * reference.swiglu(x[token], gate_up[i], down[i])
                    y = y.index_add(0, torch.tensor([token], device=y.device), part[None])
        gradients = torch.autograd.grad(y, tensors, self.probe.double(), allow_unused=True)
        return (y.detach(), *(torch.zeros_like(t) if g is None else g for g, t in zip(gradients, tensors, strict=True)))


def worst(ours: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> float:
    """Returns the largest error relative to the largest value of each tensor."""
    errors = [
        (a.double() - b).abs().max() / b.abs().max().clamp(min=1e-9)
        for a, b in zip(ours, exact, strict=True)
        if a.numel()
    ]
    return float(torch.stack(errors).max())  # a NaN stays one


def same(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(a, b, strict=True))


@pytest.mark.skipif(
    not INSTALLED or INTERPRETED or ON_CUDA, reason="all runs in this process" if INSTALLED else MISSING
)
def test_all_of_this_holds_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, cwd=Path(__file__).parents[3], capture_output=True, text=True)
    if "triton/runtime/interpreter.py" in done.stdout and "only 0-dimensional arrays can be" in done.stdout:
        pytest.skip("the interpreter of this triton (3.6, of torch 2.10) does not run with numpy 2.4")
    assert done.returncode == 0, done.stdout


SIZES = {  # tokens, k, experts, dim, ff
    "several tiles each way": ("27 3 4 35 37", 5),
    "one tile": ("3 2 5 5 3", 1),
    "one token": ("1 2 3 7 2", 0),
    "no token": ("0 2 3 7 2", 0),
    "all experts chosen": ("5 4 4 16 16", 0),
    "one expert": ("18 1 1 16 32", 0),
    "everything dropped": ("4 2 3 5 3", 8),
    "most experts empty": ("2 1 17 5 3", 0),
}


@kernels
@pytest.mark.parametrize(("sizes", "dropped"), SIZES.values(), ids=SIZES)
@DTYPES
def test_mixed_experts_equal_the_loop_over_tokens(
    device: torch.device, dtype: torch.dtype, sizes: str, dropped: int
) -> None:
    case = Case(dtype, device, sizes, dropped)
    assert triton_experts.unavailable(case.x, case.gate_up, case.down) is None
    ours = case.run()
    assert worst(ours, case.exact()) < BOUND[dtype]
    assert [t.dtype for t in ours] == [dtype, dtype, torch.float32, dtype, dtype]


@kernels
@pytest.mark.parametrize("behind", [0, 5])
@pytest.mark.parametrize("counts", [[3, 0, 18, 1], [0, 2, 0, 0], [0, 0, 0, 0]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_swiglu_experts_equal_the_torch_path(
    device: torch.device, dtype: torch.dtype, counts: list[int], behind: int
) -> None:
    layer = Case(dtype, device, f"{sum(counts) + behind} 1 4 21 18")
    tensors = [t.requires_grad_() for t in (layer.x, layer.gate_up, layer.down)]
    per_expert = torch.tensor(counts, device=device)
    y = triton_experts.swiglu_experts(*tensors, per_expert)
    ours = (y.detach(), *torch.autograd.grad(y, tensors, layer.probe))
    exact = [t.detach().double().requires_grad_() for t in tensors]
    z = swiglu_experts(*exact, per_expert)
    assert worst(ours, (z.detach(), *torch.autograd.grad(z, exact, layer.probe.double()))) < BOUND[dtype]
    assert not ours[0][sum(counts) :].any()
    assert not ours[1][sum(counts) :].any()


@kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_runs_are_equal_to_the_bit(device: torch.device, dtype: torch.dtype) -> None:
    case = Case(dtype, device, "12 2 4 18 17", 3)
    assert same(case.run(), case.run())


@kernels
def test_non_contiguous_inputs_and_gradients_change_nothing(device: torch.device) -> None:
    case = Case(torch.float32, device, "9 2 4 7 5", 2)
    before = case.run()
    case.x, case.weights, case.probe = (t.detach().T.contiguous().T for t in (case.x, case.weights, case.probe))
    case.gate_up, case.down = (t.detach().mT.contiguous().mT for t in (case.gate_up, case.down))
    assert not any(t.is_contiguous() for t in (*case.tensors(), case.probe))
    assert same(before, case.run())


@kernels
def test_weights_of_another_dtype_are_copied_as_under_autocast(device: torch.device) -> None:
    case = Case(torch.float32, device, "6 2 4 7 5")
    plan, x = dispatch.plan(case.ids, 4), case.x.bfloat16()
    low = [weight.bfloat16() for weight in (case.gate_up, case.down)]
    expected = triton_experts.mixed_experts(x, case.weights, plan, *low)
    assert torch.equal(mixed_experts(x, case.weights, plan, case.gate_up, case.down, "triton"), expected)


@kernels
@pytest.mark.parametrize("sizes", ["3 2 4 7 5", "0 2 4 7 5"], ids=["all dropped", "no token"])
def test_experts_in_codes_none_of_which_has_rows_give_zero(device: torch.device, sizes: str) -> None:
    case = Case(torch.float32, device, sizes, dropped=6)
    gate_up, down = quantize(case.gate_up, "int8"), quantize(case.down, "int8")
    y = mixed_experts(case.x, case.weights, dispatch.plan(case.ids, 4), gate_up, down, "triton")
    assert torch.equal(y, torch.zeros_like(case.x))


@kernels
@pytest.mark.parametrize("frozen", range(4), ids=["x", "weights", "gate_up", "down"])
def test_a_frozen_input_gets_no_gradient_and_changes_no_other(device: torch.device, frozen: int) -> None:
    case = Case(torch.float32, device, "6 2 4 7 5")
    _, *expected = case.run()
    tensors = case.tensors()
    tensors[frozen].requires_grad_(False)
    y = triton_experts.mixed_experts(*tensors[:2], dispatch.plan(case.ids, 4), *tensors[2:])
    y.backward(case.probe)
    for i, (tensor, gradient) in enumerate(zip(tensors, expected, strict=True)):
        assert tensor.grad is None if i == frozen else torch.equal(tensor.grad, gradient)


@kernels
def test_only_inputs_and_pre_activations_are_kept_for_the_backward(device: torch.device) -> None:
    case = Case(torch.float32, device, "6 3 5 7 2")
    x, weights, gate_up, down = case.tensors()
    kept: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.shape), t)[1], lambda t: t):
        triton_experts.mixed_experts(x, weights, dispatch.plan(case.ids, 5), gate_up, down)
    assert kept == [x.shape, weights.shape, gate_up.shape, down.shape, (6 * 3, 2 * 2)]


@kernels
def test_memory_that_nothing_wrote_is_never_read(device: torch.device) -> None:
    case = Case(torch.float32, device, "9 2 5 7 5", 4)
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        assert torch.empty(1, device=device).isnan().all()
        ours = case.run()
    finally:
        torch.use_deterministic_algorithms(False)
    assert worst(ours, case.exact()) < BOUND[torch.float32]


@kernels
def test_without_gradients_the_output_is_the_same(device: torch.device) -> None:
    case = Case(torch.float32, device, "6 2 4 7 5", 1)
    with torch.no_grad():
        y = triton_experts.mixed_experts(case.x, case.weights, dispatch.plan(case.ids, 4), case.gate_up, case.down)
    assert torch.equal(y, case.run()[0])


@kernels
@pytest.mark.skipif(not ON_CUDA, reason="only a device can be waited for")
def test_nothing_waits_for_the_device(device: torch.device) -> None:
    case = Case(torch.bfloat16, device, "64 2 4 32 16", 3)
    case.run()  # tunes, which does wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        case.run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


class NoNumbers(TorchDispatchMode):
    """Raises where a number becomes a tensor of the CPU; with another device, what takes it waits for the copy."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten.lift_fresh.default, f"{func} of {args}"
        return func(*args, **(kwargs or {}))


@kernels
def test_no_number_is_copied_to_the_device(device: torch.device) -> None:
    case = Case(torch.float32, device, "6 2 4 7 5", 1)
    plan, tensors = dispatch.plan(case.ids, 4), case.tensors()
    with NoNumbers():
        y = triton_experts.mixed_experts(*tensors[:2], plan, *tensors[2:])
        torch.autograd.grad(y, tensors, case.probe)


@compiles
@pytest.mark.parametrize(("dtype", "capability"), [("bf16", 80), ("bf16", 90), ("fp32", 80)])
def test_every_product_compiles_without_a_device(
    dtype: str, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import triton
    from triton.backends.compiler import GPUTarget

    from moekit.ops.kernels import triton_products as products

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    own = {"order": "*i64", "starts": "*i32", "weights": "*fp32", "d_weights": "*fp32"}
    numbers = dict.fromkeys(("experts", "k", "dim", "ff", "length", "width", "height", "stride_n", "stride_k"), "i32")
    flags = {"GATHER": 1, "SAVE": 1, "MIXED": 1, "WEIGHTED": 1, "PRECISION": "ieee", "EXPERTS": 8, "BLOCK": 64}
    for kernel in (products.gate_up_swiglu, products.rows_product, products.act_backward, products.weight_gradient):
        names, config = kernel.fn.arg_names, kernel.configs[-1 if dtype == "fp32" else 1]
        fixed = {"BLOCK_M": 64, "BLOCK_N": products.FF_TILE, **flags, **config.kwargs}
        types = own | numbers | dict.fromkeys(fixed, "constexpr")
        signature = {name: types.get(name, f"*{dtype}") for name in names}
        source = triton.compiler.ASTSource(kernel.fn, signature, {n: v for n, v in fixed.items() if n in names})
        options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
        binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        assert binary.asm["cubin"]


@compiles
def test_float32_without_tf32_gets_tiles_of_its_own() -> None:
    from moekit.ops.kernels import triton_products as products

    for kernel in (products.gate_up_swiglu, products.rows_product, products.act_backward, products.weight_gradient):
        assert "PRECISION" in kernel.keys  # what fits with one may not with the other
        shallow = [config for config in kernel.configs if config.kwargs["BLOCK_K"] == 16]
        deeper = [config for config in kernel.configs if config not in shallow]
        for dtype, precision, tried in (
            (torch.float32, "ieee", shallow),
            (torch.float32, "tf32", deeper),
            (torch.bfloat16, "ieee", deeper),
        ):
            kernel.nargs = dict.fromkeys(kernel.arg_names, torch.empty(1, dtype=dtype))
            assert tried
            assert kernel.prune_configs({"PRECISION": precision}) == tried


def test_what_cannot_run_says_why() -> None:
    x = torch.zeros(1, 2)
    if not INSTALLED:
        assert triton_experts.unavailable(x, x, x) == "triton is not installed"
    elif INTERPRETED:
        assert "float64" in str(triton_experts.unavailable(x.double(), x.double(), x))
        assert "float16, torch.float32" in str(triton_experts.unavailable(x.half(), x, x))
        assert "meta" in str(triton_experts.unavailable(x.to("meta"), x, x))
    else:
        assert triton_experts.unavailable(x, x, x) == "triton needs tensors on CUDA and these are on cpu"


def test_the_module_can_be_imported_where_triton_is_missing() -> None:
    code = "import sys, torch; sys.modules['triton'] = None; from moekit.ops.kernels import triton_experts as t; "
    code += "x = torch.zeros(1, 1); assert t.unavailable(x, x, x) == 'triton is not installed'"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(not INSTALLED, reason=MISSING)
def test_the_module_can_be_imported_with_a_triton_that_is_too_old() -> None:
    code = "import torch, triton; del triton.knobs; triton.__version__ = '3.2.0'; "
    code += "from moekit.ops.kernels import triton_experts as t; x = torch.zeros(1, 1); "
    code += "assert t.unavailable(x, x, x) == 'triton 3.2.0 is too old: 3.6 is needed', t.unavailable(x, x, x)"
    subprocess.run([sys.executable, "-c", code], check=True)
