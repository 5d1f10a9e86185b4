"""Tiny models of every architecture that GGUF has for us, in sizes that divide nothing, and llama.cpp to run them."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moekit.config import ModelConfig
from moekit.formats.tokenizer import Tokenizer, train_tokenizer
from moekit.nn.model import Model
from moekit.nn.router import Router

MHA = {"kind": "mha", "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 6}
MLA = {"kind": "mla", "num_attention_heads": 3, "kv_lora_rank": 22, "qk_nope_head_dim": 10, "qk_rope_head_dim": 6}
DENSE = {"kind": "dense", "intermediate_size": 50}
V1 = {
    "kind": "moe", "n_routed_experts": 10, "n_shared_experts": 2, "num_experts_per_tok": 3, "moe_intermediate_size": 14,
    "first_k_dense_replace": 2, "intermediate_size": 50,
}  # fmt: skip
ALL_MOE = {**V1, "first_k_dense_replace": 0, "intermediate_size": None, "n_shared_experts": 1}
V3 = {
    **V1, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True, "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 1, "n_group": 5, "topk_group": 2,
}  # fmt: skip
MIXTRAL = {"n_routed_experts": 5, "n_shared_experts": 0, "num_experts_per_tok": 2, "norm_topk_prob": True}


def yarn(mscale: float, mscale_all_dim: float) -> dict[str, Any]:
    scaling = {"factor": 8.0, "original_max_position_embeddings": 24}
    return {"rope": {"theta": 5000.0, "yarn": {**scaling, "mscale": mscale, "mscale_all_dim": mscale_all_dim}}}


MODELS: dict[str, dict[str, Any]] = {
    "deepseek": {"attention": MHA, "ffn": V1},
    "deepseek tied, all layers MoE": {"attention": MHA, "ffn": ALL_MOE, "tie_word_embeddings": True},
    "deepseek scaled": {"attention": MHA, "ffn": {**V1, "routed_scaling_factor": 1.7}},
    "deepseek yarn": {"attention": {**MHA, **yarn(0.707, 0.707)}, "ffn": V1},
    "deepseek yarn 1, 0": {"attention": {**MHA, **yarn(1.0, 0.0)}, "ffn": V1},
    "deepseek yarn 0.4, 1.3": {"attention": {**MHA, **yarn(0.4, 1.3)}, "ffn": V1},
    "deepseek2": {"attention": MLA, "ffn": V1},
    "deepseek2 q": {"attention": {**MLA, "q_lora_rank": 26}, "ffn": V1},
    "deepseek2 yarn": {"attention": {**MLA, **yarn(0.707, 0.707)}, "ffn": V1},
    "deepseek2 yarn 1, 1": {"attention": {**MLA, **yarn(1.0, 1.0)}, "ffn": V1},
    "deepseek2 renormalised": {"attention": MLA, "ffn": {**V1, "norm_topk_prob": True, "routed_scaling_factor": 1.5}},
    "deepseek2 groups": {"attention": {**MLA, "q_lora_rank": 26}, "ffn": V3},
    "deepseek2 softmax and bias": {
        "attention": MLA, "ffn": {**V3, "scoring_func": "softmax", "n_group": 1, "topk_group": 1},
    },
    "deepseek2 dense": {"attention": MLA, "ffn": DENSE},
    "llama": {"attention": {**MHA, "head_dim": 8}, "ffn": DENSE},
    "llama yarn": {"attention": {**MHA, **yarn(0.5, 0.0)}, "ffn": DENSE, "tie_word_embeddings": True},
    "whole blocks": {
        "hidden_size": 64, "attention": {**MHA, "num_attention_heads": 4, "head_dim": 16},
        "ffn": {**V1, "moe_intermediate_size": 32, "intermediate_size": 96},
    },
    "whole blocks, MLA": {
        "hidden_size": 64,
        "attention": {**MLA, "kv_lora_rank": 32, "q_lora_rank": 64, "qk_nope_head_dim": 32, "v_head_dim": 32},
        "ffn": {**V1, "moe_intermediate_size": 32, "intermediate_size": 96},
    },
    "llama mixture": {"attention": MHA, "ffn": MIXTRAL},
}  # fmt: skip

TEXT = "the quick brown fox jumps over the lazy dog 0123456789, said the fox.\n"


@pytest.fixture(params=list(MODELS))
def parts(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The parts of one model after the other."""
    return MODELS[request.param]


@pytest.fixture
def make(tiny_config: Callable[..., ModelConfig]) -> Callable[..., Model]:
    """Returns a factory of models from parts (a name of MODELS, or the parts themselves), all weights random."""

    def model(parts: str | dict[str, Any], **rest: Any) -> Model:
        parts = MODELS[parts] if isinstance(parts, str) else parts
        sizes = {"vocab_size": 300, "hidden_size": 36, "num_hidden_layers": 3, "max_position_embeddings": 192}
        made = Model(tiny_config(**{**sizes, "initializer_range": 0.2, **parts, **rest})).eval()
        with torch.no_grad():
            for parameter in made.parameters():
                if parameter.dim() == 1:
                    parameter.uniform_(0.5, 1.5)
            for module in made.modules():
                if isinstance(module, Router) and module.expert_bias is not None:
                    module.expert_bias.normal_(0, 0.1)
        return made

    return model


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer([TEXT], 290)


@pytest.fixture(scope="session")
def llama_logits() -> Iterator[Callable[[Path, Tensor], Tensor]]:
    """Returns what computes the logits of a GGUF file with llama.cpp, in float32 wherever the weights are."""
    llama_cpp = pytest.importorskip("llama_cpp")
    silent = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(silent, None)

    def logits(path: Path, ids: Tensor) -> Tensor:
        cache = {"type_k": 0, "type_v": 0, "flash_attn": False}  # float32, not float16
        threads = {"n_threads": 1, "n_threads_batch": 1}
        model = llama_cpp.Llama(str(path), n_ctx=512, logits_all=True, verbose=False, **cache, **threads)
        model.eval(ids.tolist())
        found = torch.tensor(model.scores[: len(ids)])
        model.close()
        return found

    yield logits
    llama_cpp.llama_log_set(llama_cpp.llama_log_callback(0), None)


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(290, (120,))


@pytest.fixture(scope="session")
def our_logits() -> Callable[[Model, Tensor], Tensor]:
    """Returns what computes the logits of one sequence with a model of ours."""

    def logits(model: Model, ids: Tensor) -> Tensor:
        with torch.no_grad():
            found: Tensor = model(ids.unsqueeze(0)).logits[0].float()
        return found

    return logits
