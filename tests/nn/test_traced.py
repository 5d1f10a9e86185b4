"""Models that are not run but traced: compiled, or with tensors that have no numbers."""

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from moekit.config import ModelConfig
from moekit.errors import UnsupportedError
from moekit.formats.checkpoint import save
from moekit.nn.model import Model

TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])
DENSE = {"ffn": {"kind": "dense", "intermediate_size": 70}}


@pytest.fixture
def compiled(tmp_path: Path) -> Callable[..., None]:
    """Runs lines with `model` and `ids` in another process, which may print nothing, no warning either.

    Here the types of arguments are checked, which cannot be compiled.
    """

    def run(model: Model, then: str) -> None:
        save(model, tmp_path / "model")
        code = f"""
import torch
from moekit.formats.checkpoint import load
model, ids = load({str(tmp_path / "model")!r}), torch.tensor([[3, 1, 2]])
"""
        done = subprocess.run([sys.executable, "-c", code + then], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")

    return run


@pytest.mark.skipif(TORCH < (2, 13), reason="torch 2.10 does not trace a property of a NamedTuple")
def test_what_is_compiled_is_one_graph(compiled: Callable[..., None], tiny_config: Callable[..., ModelConfig]) -> None:
    """Nothing of ours is asked for where it could not run, so nothing of it breaks the graph."""
    compiled(
        Model(tiny_config(**DENSE)).double(),
        """
for learns in (False, True):
    with torch.set_grad_enabled(learns):
        found = torch.compile(model, backend="eager", fullgraph=True)(ids).logits
        torch.testing.assert_close(found, model(ids).logits)
    torch._dynamo.reset()
""",
    )


def test_a_hooked_norm_of_a_compiled_model_is_called(
    compiled: Callable[..., None], tiny_config: Callable[..., ModelConfig]
) -> None:
    """Where one graph is all: behind a break torch takes a module with hooks for another of its class without."""
    compiled(
        Model(tiny_config(**DENSE)).double(),
        """
before = model(ids).logits
for layer in model.layers:
    layer.post_attention_layernorm.register_forward_hook(lambda module, inputs, y: -y)
hooked = model(ids).logits
assert not torch.allclose(hooked, before)
torch.testing.assert_close(torch.compile(model, backend="eager")(ids).logits, hooked)
""",
    )


@pytest.mark.parametrize("whole", [False, True])
def test_compiled_with_kernels_of_ours_it_gives_the_same(
    whole: bool, compiled: Callable[..., None], tiny_config: Callable[..., ModelConfig]
) -> None:
    compiled(
        Model(tiny_config()),
        f"""
expected = model(ids).logits
for module in [model] if {whole} else model.layers:
    module.compile(backend="eager")
torch.testing.assert_close(model(ids).logits, expected)
""",
    )


def test_tensors_without_numbers_give_shapes(tiny_config: Callable[..., ModelConfig]) -> None:
    with FakeTensorMode():
        model = Model(tiny_config(**DENSE))
        ids = torch.zeros(2, 5, dtype=torch.long)
        output = model(ids, labels=ids)
        assert output.loss is not None
        output.loss.backward()
        assert isinstance(model.embed_tokens.weight.grad, FakeTensor)
        with torch.no_grad():
            logits = model(ids).logits
    assert logits is not None
    assert logits.shape == (2, 5, model.config.vocab_size)


def test_experts_refuse_tensors_without_numbers(tiny_config: Callable[..., ModelConfig]) -> None:
    """Which experts have tokens is asked of the numbers."""
    with FakeTensorMode():
        model = Model(tiny_config())
        with pytest.raises(DataDependentOutputException):
            model(torch.zeros(2, 5, dtype=torch.long))
        for layer in model.moe_layers:
            with pytest.raises(UnsupportedError, match=r"backend is 'native'.*: it reads plain tensors"):
                layer.experts.set_backend("native")


def test_tensors_without_numbers_leave_nothing_behind(tiny_config: Callable[..., ModelConfig]) -> None:
    """What passes keep for each other, of RoPE, is of real numbers."""
    config = tiny_config(**DENSE, attention={"kind": "mha", "num_attention_heads": 2, "rope": {"theta": 777.0}})
    with FakeTensorMode():
        Model(config)(torch.zeros(2, 5, dtype=torch.long))
    assert Model(config)(torch.zeros(2, 5, dtype=torch.long)).logits.isfinite().all()
    with FakeTensorMode():
        Model(config)(torch.zeros(2, 5, dtype=torch.long))


@pytest.mark.parametrize("learns", [False, True])
def test_a_counter_of_flops_sees_all_products(learns: bool, tiny_config: Callable[..., ModelConfig]) -> None:
    """As many as of the same model in float64, which none of our kernels computes."""
    model, ids = Model(tiny_config()), torch.randint(0, 16, (2, 7))

    def counted() -> int:
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(learns):
            loss = model(ids, labels=ids).loss
            assert loss is not None
            if learns:
                loss.backward()
        return counter.get_total_flops()

    found = counted()
    model.double()
    assert found == counted() > 0


def test_selective_checkpointing_keeps_the_products_it_is_told_to(tiny_config: Callable[..., ModelConfig]) -> None:
    """Whatever is kept may not be written over."""
    model, ids = Model(tiny_config()), torch.randint(0, 16, (2, 7))
    kept: list[torch.Size] = []

    def policy(context: Any, op: Any, *args: Any, **options: Any) -> CheckpointPolicy:
        if op not in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default):
            return CheckpointPolicy.PREFER_RECOMPUTE
        kept.append(args[-1].shape)
        return CheckpointPolicy.MUST_SAVE

    def loss() -> torch.Tensor:
        found = model(ids, labels=ids).loss
        assert isinstance(found, torch.Tensor)
        return found

    gradients = []
    for checkpointed in (False, True):
        model.zero_grad()
        selective = partial(create_selective_checkpoint_contexts, policy)
        (checkpoint(loss, use_reentrant=False, context_fn=selective) if checkpointed else loss()).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert kept
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)


def test_a_tangent_goes_through_without_gradients(tiny_config: Callable[..., ModelConfig]) -> None:
    config = tiny_config(**DENSE)
    tangents = []
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(0)
        model = Model(config)
        direction = torch.randn_like(model.norm.weight).to(dtype)
        model.to(dtype)
        with torch.no_grad(), forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):  # torch's other one has none
            weight = model.layers[0].get_parameter("input_layernorm.weight")
            dual = forward_ad.make_dual(weight, direction)
            logits = torch.func.functional_call(
                model, {"layers.0.input_layernorm.weight": dual}, (torch.tensor([[3, 1, 2]]),)
            ).logits
            tangents.append(forward_ad.unpack_dual(logits).tangent)
    assert tangents[0] is not None
    torch.testing.assert_close(tangents[0].double(), tangents[1], rtol=1e-3, atol=1e-5)


MEO = {
    **{"kind": "meo", "intermediate_size": 26, "n_routed_experts": 7, "num_experts_per_tok": 3},
    **{"level": "prefix", "segment_size": 3, "noisy_gating": False},
}


@pytest.mark.parametrize("ffn", [{}, MEO], ids=["moe", "meo"])
@pytest.mark.parametrize("precision", [torch.float32, torch.float64])
def test_transforms_of_torch_func_go_through_experts(
    precision: torch.dtype, ffn: dict[str, Any], tiny_config: Callable[..., ModelConfig]
) -> None:
    """First derivatives as autograd's of the same model; along a direction, and a second time, as their differences."""
    torch.manual_seed(0)
    model = Model(tiny_config(ffn=ffn))
    for parameter in model.parameters():  # MEO's gates begin at zero, where any step changes the choice
        nn.init.normal_(parameter, parameter.mean().item(), 0.25)
    oracle = Model(model.config).double()
    oracle.load_state_dict(model.state_dict())
    model.to(precision)
    ids = torch.randint(0, model.config.vocab_size, (2, 9))

    def loss(parameters: dict[str, torch.Tensor]) -> torch.Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            found = torch.func.functional_call(model, parameters, (ids,), {"labels": ids}).loss
        assert isinstance(found, torch.Tensor)
        return found

    def gradients(step: float) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            for name, parameter in oracle.named_parameters():
                parameter += step * directions[name].double()
        oracle(ids, labels=ids).loss.backward()
        found = {name: parameter.grad for name, parameter in oracle.named_parameters()}
        oracle.zero_grad()
        return {name: grad for name, grad in found.items() if grad is not None}

    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    directions = {name: torch.randn_like(parameter) for name, parameter in parameters.items()}
    expected = gradients(0)
    found = torch.func.grad(loss)(parameters)
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if precision == torch.float32 else {"rtol": 1e-9, "atol": 1e-10}
    torch.testing.assert_close({n: g.double() for n, g in found.items()}, expected, **tolerance)
    along = torch.func.jvp(loss, (parameters,), (directions,))[1]
    slope = sum((expected[name] * directions[name].double()).sum() for name in expected)
    torch.testing.assert_close(along.double(), slope, rtol=1e-4, atol=1e-5)

    step = 1e-6
    before, after = gradients(-step), gradients(2 * step)
    second = torch.func.jvp(torch.func.grad(loss), (parameters,), (directions,))[1]
    numeric = {name: (after[name] - before[name]) / (2 * step) for name in after}
    torch.testing.assert_close({n: g.double() for n, g in second.items()}, numeric, rtol=1e-3, atol=1e-3)
