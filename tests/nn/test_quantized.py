"""A model in codes: the named matrices and no others, the same numbers as its dequantised self, for inference only."""

import copy
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch

from moekit.config import ModelConfig
from moekit.errors import UnsupportedError
from moekit.generate import generate
from moekit.nn.model import Model
from moekit.nn.quantized import dequantize_, matrices, quantize_
from moekit.nn.router import Probe
from moekit.nn.weights import QuantizedWeight
from moekit.ops.quantize import Codes

CODES = get_args(Codes)
SETTINGS: dict[str, dict[str, Any]] = {
    "mha, first layer dense": {"ffn": {"first_k_dense_replace": 1, "intermediate_size": 20}},
    "mla": {"attention": {"kind": "mla", "q_lora_rank": 5}},
    "tied head, bias": {"tie_word_embeddings": True, "ffn": {"topk_method": "noaux_tc"}},
    "dense": {"ffn": {"kind": "dense"}},
    "biases, norms and a shared gate": {
        "attention": {"attention_bias": "all", "qk_norm": "head"},
        "ffn": {"shared_expert_gate": True},
    },
}

Pair = tuple[Model, Model]


@pytest.fixture(params=SETTINGS.values(), ids=SETTINGS.keys())
def model(request: pytest.FixtureRequest, tiny_config: Callable[..., ModelConfig], device: torch.device) -> Model:
    return Model(tiny_config(**request.param)).to(device).eval()


def coded(model: Model, kind: Codes) -> Pair:
    """Returns the model in codes, and an ordinary one of the numbers that they stand for."""
    quantized = copy.deepcopy(model)
    quantize_(quantized, kind)
    numbers = copy.deepcopy(quantized)
    dequantize_(numbers, torch.float32)
    return quantized, numbers


@pytest.mark.parametrize("kind", CODES)
def test_logits_loss_and_cached_logits_are_those_of_the_numbers(model: Model, kind: Codes) -> None:
    ids = torch.randint(61, (2, 17), device=model.norm.weight.device)
    quantized, numbers = coded(model, kind)
    with torch.no_grad():
        ours, theirs = quantized(ids, labels=ids), numbers(ids, labels=ids)
        torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-5, atol=1e-5)
        assert not torch.equal(ours.logits, model(ids).logits)
    assert torch.equal(generate(quantized, ids, 8), generate(numbers, ids, 8))


@pytest.mark.parametrize("kind", CODES)
def test_experts_in_codes_are_probed_as_the_numbers(
    tiny_config: Callable[..., ModelConfig], device: torch.device, kind: Codes
) -> None:
    ids, probe = torch.randint(61, (2, 17), device=device), Probe(skip_top=2, num_experts_per_tok=4, shared=False)
    quantized, numbers = coded(Model(tiny_config()).to(device).eval(), kind)
    with torch.no_grad():
        ours = quantized(ids, probe=probe).logits
        torch.testing.assert_close(ours, numbers(ids, probe=probe).logits, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(ours, quantized(ids).logits, rtol=1e-4, atol=1e-4)


def test_everything_but_gates_vectors_embedding_and_the_absorbed_projection_is_in_codes(model: Model) -> None:
    names = [name for name, _, _ in matrices(model)]
    quantize_(model, "int8")
    kept = [name for name, _ in model.named_parameters()]
    assert {f"{name}.codes" for name in names} < model.state_dict().keys()
    allowed = ("router.weight", "norm.weight", "embed_tokens.weight", "kv_b_proj.weight", "gate.weight", ".bias")
    allowed = (*allowed, "lm_head.weight") if model.config.tie_word_embeddings else allowed
    assert all(name.endswith(allowed) for name in kept), kept
    assert ("lm_head.weight" in names) is not model.config.tie_word_embeddings


def test_numbers_again_have_the_names_and_shapes_of_before(model: Model) -> None:
    _, numbers = coded(model, "int4")
    assert {k: v.shape for k, v in numbers.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    assert all(parameter.requires_grad for parameter in numbers.parameters())
    numbers.train()


def test_it_is_in_evaluation_and_training_it_is_an_error(model: Model) -> None:
    model.train()
    quantize_(model, "int4")
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(UnsupportedError, match=r"^int4 weights are for inference; train the model"):
        model.train()


@pytest.mark.parametrize("kind", CODES)
def test_another_dtype_is_of_the_rest_only(model: Model, kind: Codes) -> None:
    ids = torch.randint(61, (1, 9), device=model.norm.weight.device)
    quantize_(model, kind)
    with torch.no_grad():
        before = model(ids).logits
        model.to(torch.bfloat16)
        scales = [m.scales.dtype for m in model.modules() if isinstance(m, QuantizedWeight)]
        assert set(scales) == {torch.bfloat16}
        model.float()
        assert {m.scales.dtype for m in model.modules() if isinstance(m, QuantizedWeight)} == {torch.bfloat16}
        assert model(ids).logits.dtype == before.dtype


def test_a_back_end_that_cannot_run_on_codes_is_refused(tiny_config: Callable[..., ModelConfig]) -> None:
    model = Model(tiny_config())
    quantize_(model, "int8")
    model.set_experts_backend("torch")
    with pytest.raises(UnsupportedError, match="backend is 'grouped', which cannot run here: "):
        model.set_experts_backend("grouped")  # 18 is not a multiple of 8


@pytest.mark.parametrize("kind", CODES)
def test_codes_are_not_quantised_again(tiny_config: Callable[..., ModelConfig], kind: Codes) -> None:
    model, ids = Model(tiny_config()), torch.tensor([[3, 1]])
    quantize_(model, kind)
    with torch.no_grad():
        before = model(ids).logits
        with pytest.raises(UnsupportedError, match=f"the weights are in {kind} already"):
            quantize_(model, "int8")
        assert torch.equal(model(ids).logits, before)
