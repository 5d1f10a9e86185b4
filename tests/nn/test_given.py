"""What is given to a model and its parts is checked before our kernels read it: they know of no size but their own."""

import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jaxtyping
import pytest
import torch
from torch import Tensor, nn

from moekit.config import ModelConfig
from moekit.errors import ConfigError
from moekit.generate import SamplingSettings, tokens
from moekit.nn.cache import KVCache
from moekit.nn.decoder import decoder
from moekit.nn.linear import Linear
from moekit.nn.model import Model
from moekit.nn.norm import RMSNorm
from moekit.nn.quantized import quantize_
from moekit.nn.rope import Rotation
from moekit.ops.attention import rotate
from moekit.ops.swiglu import swiglu


@pytest.fixture(autouse=True)
def unchecked() -> Iterator[None]:
    """As it is outside of these tests: nobody checks the types and shapes of arguments."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


WRONG_TARGETS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "a number beside the vocabulary": (lambda ids: ids.index_fill(1, torch.tensor([3]), 1 << 27), "134217728"),
    "a negative one": (lambda ids: ids.index_fill(1, torch.tensor([3]), -1), "a target is -1 but must be -100 or 0 to"),
    "fractions": (lambda ids: ids.float(), "float32"),
    "too few": (lambda ids: ids[:, :7], "one for each token"),
    "of one sequence": (lambda ids: ids[:1], "one for each token"),
    "turned": (lambda ids: ids.T.contiguous(), "one for each token"),
}


@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("what", WRONG_TARGETS)
def test_targets_that_are_none_are_refused(what: str, learns: bool, tiny_config: Callable[..., ModelConfig]) -> None:
    spoil, said = WRONG_TARGETS[what]
    model = Model(tiny_config())
    ids = torch.randint(0, model.config.vocab_size, (2, 9))
    with torch.set_grad_enabled(learns), pytest.raises(ConfigError, match=said):
        model(ids, targets=spoil(ids))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16])
def test_targets_may_be_short_integers(dtype: torch.dtype, tiny_config: Callable[..., ModelConfig]) -> None:
    model = Model(tiny_config())
    ids = torch.randint(0, model.config.vocab_size, (2, 9))
    losses = []
    for targets in (ids, ids.to(dtype)):
        model.zero_grad()
        loss = model(ids, labels=targets).loss
        assert loss is not None
        loss.backward()
        losses += [loss.detach(), model.embed_tokens.weight.grad]
    assert torch.equal(losses[0], losses[2])
    assert torch.equal(losses[1], losses[3])


DOCUMENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "one row for all": lambda ids: ids[:1],
    "hashes": lambda ids: ids * (1 << 32) + 7,
    "large": lambda ids: ids + (1 << 31) - 1,
    "short integers": lambda ids: ids.to(torch.int16),
}


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("what", DOCUMENTS)
@torch.no_grad()
def test_documents_are_told_apart_by_any_numbers(
    what: str, causal: bool, tiny_config: Callable[..., ModelConfig]
) -> None:
    model = Model(tiny_config(causal=causal)).eval()
    ids = torch.randint(0, model.config.vocab_size, (2, 12))
    documents = torch.tensor([0, 1, 2]).repeat_interleave(4).expand(2, -1)
    padding = None if causal else torch.arange(12).expand(2, -1) < 11
    found = model(ids, document_ids=DOCUMENTS[what](documents), padding_mask=padding).logits
    assert torch.equal(found, model(ids, document_ids=documents, padding_mask=padding).logits)
    exact = model.double()(ids, document_ids=documents, padding_mask=padding).logits
    assert (found - exact).abs().max() < 1e-5 * exact.abs().max()


@pytest.mark.parametrize("shape", [(2, 11), (3, 12), (2, 12, 1)])
def test_documents_of_another_shape_are_refused(shape: Any, tiny_config: Callable[..., ModelConfig]) -> None:
    model = Model(tiny_config()).eval()
    with pytest.raises(ConfigError, match="document_ids are"):
        model(torch.zeros(2, 12, dtype=torch.long), document_ids=torch.zeros(shape, dtype=torch.long))


@pytest.mark.parametrize("attention", [{}, {"kind": "mla"}])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_a_buffer_of_documents_may_be_used_again_before_the_way_back(
    dtype: torch.dtype, attention: dict[str, Any], tiny_config: Callable[..., ModelConfig]
) -> None:
    model = Model(tiny_config(attention=attention))
    ids = torch.randint(0, model.config.vocab_size, (2, 12))
    found = []
    for spoilt in (False, True):
        documents = torch.tensor([0, 1, 2], dtype=dtype).repeat_interleave(4).repeat(2, 1)
        model.zero_grad()
        loss = model(ids, labels=ids, document_ids=documents).loss
        assert loss is not None
        if spoilt:
            documents.zero_()
        loss.backward()
        found.append([p.grad for p in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("learns", [False, True])
def test_rows_of_another_width_are_refused(dtype: torch.dtype, learns: bool) -> None:
    x = torch.randn(3, 128, dtype=dtype)
    with torch.set_grad_enabled(learns):
        for module in (Linear(64, 10), RMSNorm(64, 1e-6), Linear(256, 10), RMSNorm(256, 1e-6)):
            with pytest.raises(RuntimeError):
                module.to(dtype)(x)


def test_what_differs_in_shape_or_dtype_is_torchs() -> None:
    gate, up = torch.randn(4, 6, requires_grad=True), torch.randn(4, 6).bfloat16()
    exact = torch.nn.functional.silu(gate) * up
    torch.testing.assert_close(swiglu(gate, up), exact)
    angles = torch.rand(1, 5, 3)
    x = torch.randn(2, 5, 4, 6)
    found = rotate(x, angles.cos(), angles.sin(), interleaved=False)
    torch.testing.assert_close(found, rotate(x.double(), angles.cos(), angles.sin(), False).float())


def _shorter(module: Any, name: str, size: int = 1) -> None:
    setattr(module, name, nn.Parameter(getattr(module, name).data[:size].clone()))


MISSHAPEN: dict[str, Callable[[Any], None]] = {
    "a norm": lambda block: _shorter(block.input_layernorm, "weight"),
    "the second norm": lambda block: _shorter(block.post_attention_layernorm, "weight"),
    "a latent norm": lambda block: _shorter(block.self_attn.kv_a_layernorm, "weight"),
    "queries": lambda block: _shorter(block.self_attn.q_proj, "weight", 4),
    "a shared gate": lambda block: _shorter(block.mlp.shared_experts.gate_proj, "weight", 4),
    "experts' way down": lambda block: _shorter(block.mlp.experts, "down_proj", 3),
}


@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("what", MISSHAPEN)
def test_parameters_that_do_not_fit_are_refused(
    what: str, learns: bool, tiny_config: Callable[..., ModelConfig]
) -> None:
    model = Model(tiny_config(attention={"kind": "mla"})).eval()
    MISSHAPEN[what](model.layers[1])
    assert decoder(model, KVCache(model.config, 2, 4)) is None
    with torch.set_grad_enabled(learns), pytest.raises((RuntimeError, IndexError)):
        model(torch.randint(0, 16, (2, 9)))


@pytest.mark.parametrize("learns", [False, True])
def test_a_router_may_know_of_fewer_experts(learns: bool, tiny_config: Callable[..., ModelConfig]) -> None:
    model = Model(tiny_config(num_hidden_layers=3)).eval()
    for layer in model.moe_layers:
        _shorter(layer.router, "weight", layer.config.n_routed_experts - 1)
    assert decoder(model, KVCache(model.config, 2, 4)) is None
    ids = torch.randint(0, model.config.vocab_size, (2, 9))
    with torch.set_grad_enabled(learns):
        found = model(ids).logits
    exact = model.double()(ids).logits
    assert (found - exact).abs().max() < 1e-5 * exact.abs().max()


@pytest.mark.parametrize("attention", [{}, {"kind": "mla"}])
def test_a_rotation_may_come_in_bfloat16(attention: dict[str, Any], tiny_config: Callable[..., ModelConfig]) -> None:
    """As FSDP with mixed precision casts what a block is given."""
    model = Model(tiny_config(attention=attention))
    ids = torch.randint(0, model.config.vocab_size, (2, 9))

    def cast(module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        x, delta, context, units = given
        cos, sin = (part.bfloat16() for part in context.rotation)
        return x, delta, context._replace(rotation=Rotation(cos, sin)), units

    for block in model.layers:
        block.register_forward_pre_hook(cast)
    found = model(ids, labels=ids).loss
    exact = model.double()(ids, labels=ids).loss
    assert found is not None
    assert exact is not None
    assert abs(float(found) - float(exact)) < 1e-4


def test_texts_side_by_side_leave_the_mode_as_it_was(tiny_config: Callable[..., ModelConfig]) -> None:
    model = Model(tiny_config()).train()
    first, second = (tokens(model, [[3, 1]], SamplingSettings(), 4) for _ in range(2))
    next(first)
    next(second)
    first.close()  # type: ignore[attr-defined]
    assert not model.training
    list(second)
    assert model.training

    def several() -> None:
        for _ in range(5):
            list(tokens(model, [[3, 1]], SamplingSettings(), 3))

    threads = [threading.Thread(target=several) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert model.training


WRONG_INPUTS: dict[str, tuple[dict[str, Any], str]] = {
    "one sequence": ({"input_ids": torch.zeros(8, dtype=torch.int64)}, r"input_ids has shape \(8,\) but must be"),
    "a mask of numbers": (
        {"padding_mask": torch.ones(2, 8, dtype=torch.int64)},
        r"is torch.int64 .* must be",
    ),
    "a mask of fractions": ({"padding_mask": torch.ones(2, 8)}, r"padding_mask is torch.float32 \(2, 8\)"),
    "a short mask": ({"padding_mask": torch.ones(2, 7, dtype=torch.bool)}, r"\(2, 7\) but must be"),
    "too few loads": ({"prior_load": []}, "prior_load has 0 entries but must have 2"),
}


@pytest.mark.parametrize("case", WRONG_INPUTS)
def test_inputs_of_another_kind_are_refused(tiny_config: Callable[..., ModelConfig], case: str) -> None:
    given, message = WRONG_INPUTS[case]
    with pytest.raises(ConfigError, match=message):
        Model(tiny_config())(**{"input_ids": torch.zeros(2, 8, dtype=torch.int64), **given})


def test_what_cannot_be_generated_leaves_each_module_in_its_mode(tiny_config: Callable[..., ModelConfig]) -> None:
    model = Model(tiny_config()).train()
    model.layers[0].eval()
    before = [module.training for module in model.modules()]
    with pytest.raises(TypeError):
        list(tokens(model, [[3, 1]], SamplingSettings(), 1.5))  # type: ignore[arg-type]
    assert [module.training for module in model.modules()] == before
    list(tokens(model, [[3, 1]], SamplingSettings(), 2))
    assert [module.training for module in model.modules()] == before


def test_a_wrapper_of_a_class_that_takes_its_name_is_called(
    tiny_config: Callable[..., ModelConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = Model(tiny_config()).bfloat16().eval(), torch.tensor([[3, 1, 4]])
    written, seen = RMSNorm.forward, []

    @functools.wraps(written)
    def counted(self: RMSNorm, *given: Any, **named: Any) -> Any:
        seen.append(self)
        return written(self, *given, **named)

    monkeypatch.setattr(RMSNorm, "forward", counted)
    with torch.no_grad():
        model(ids)
        assert len(seen) == 5
        assert decoder(model, KVCache(model.config, 1, 8)) is None


def test_experts_behind_an_adapter_are_told_their_backend(tiny_config: Callable[..., ModelConfig]) -> None:
    class Adapter(nn.Module):
        def __init__(self, base: nn.Module) -> None:
            super().__init__()
            self.base_layer = base

    model = Model(tiny_config())
    experts = model.moe_layers[0].experts
    model.moe_layers[0].experts = Adapter(experts)  # type: ignore[assignment]
    model.set_experts_backend("reference")
    assert experts.backend == "reference"


def test_positions_whose_logits_are_kept(tiny_config: Callable[..., ModelConfig]) -> None:
    model, ids = Model(tiny_config()).eval(), torch.randint(0, 61, (2, 5))
    whole = model(ids).logits
    assert whole is not None
    for kept, expected in ((0, whole), (2, whole[:, -2:]), (9, whole)):
        torch.testing.assert_close(model(ids, logits_to_keep=kept).logits, expected)
    with pytest.raises(ConfigError, match="logits_to_keep is -1 but must be 0 or more"):
        model(ids, logits_to_keep=-1)


def test_scales_loaded_in_another_precision_are_named(tiny_config: Callable[..., ModelConfig]) -> None:
    model, ids = Model(tiny_config()).eval(), torch.randint(0, 61, (2, 5))
    quantize_(model, "int8")
    state = {name: value.float() if "scales" in name else value for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    with torch.no_grad(), pytest.raises(ConfigError, match=r"scales of weights in codes are torch.float32 but must be"):
        model(ids)
