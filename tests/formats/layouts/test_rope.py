"""Rotary embedding in its old and new form; the magnitudes of YaRN as each architecture reads them."""

import math
from typing import Any

import pytest
import torch

from moekit.config import Llama3RopeConfig, RopeConfig, YarnConfig
from moekit.errors import CheckpointError, MoekitError, UnsupportedError
from moekit.formats.layouts import LAYOUTS
from moekit.nn.rope import inverse_frequencies, rotation, softmax_scale

YARN = {"factor": 4.0, "original_max_position_embeddings": 512}
KIND = {"type": "yarn"}
SIZES = {
    "deepseek": dict.fromkeys(
        (
            *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "n_routed_experts"),
            *("num_experts_per_tok", "moe_intermediate_size", "intermediate_size"),
        ),
        4,
    ),
    "deepseek_v2": {"num_experts_per_tok": 6},
}


def read(layout: str = "llama", **fields: Any) -> RopeConfig:
    return LAYOUTS[layout].read(SIZES.get(layout, {}) | fields).attention.rope


def test_both_forms_are_the_same() -> None:
    for kind in ({"rope_type": "yarn"}, KIND, {"rope_type": "yarn", "type": "yarn"}):
        settings = {**kind, **YARN}
        old = read(rope_theta=3e5, rope_scaling=settings)
        assert old == read(rope_parameters={"rope_theta": 3e5, **settings})
        assert old == read(rope_scaling={"rope_theta": 3e5, **settings})
        assert old == RopeConfig(theta=3e5, yarn=YarnConfig.model_validate(YARN))
    assert read(rope_parameters={"rope_type": "default", "rope_theta": 7.0}) == RopeConfig(theta=7.0)
    assert read(rope_scaling=None) == read(rope_scaling={}) == read(rope_scaling={"type": "default"}) == RopeConfig()


def test_llama3_is_read_and_written() -> None:
    wanted = Llama3RopeConfig(factor=8.0, original_max_position_embeddings=8192, high_freq_factor=5.0)
    given = {"rope_type": "llama3", **wanted.model_dump()}
    config = LAYOUTS["llama"].read({"rope_theta": 5e5, "rope_scaling": given})
    assert config.attention.rope == RopeConfig(theta=5e5, llama3=wanted)
    assert LAYOUTS["llama"].write(config)["rope_scaling"] == {**given, "type": "llama3"}


@pytest.mark.parametrize(
    ("scaling", "magnitudes"),
    [  # of cos and sin, and of the softmax: as in DeepSeek's code, and elsewhere
        ({}, {"deepseek": (0.1 * math.log(4) + 1, 1.0), "other": (0.1 * math.log(4) + 1, 1.0)}),
        ({"mscale": 0.7}, {"deepseek": (0.07 * math.log(4) + 1, 1.0), "other": (0.1 * math.log(4) + 1, 1.0)}),
        (
            {"mscale": 0.7, "mscale_all_dim": 0.7},
            {"deepseek": (1.0, (0.07 * math.log(4) + 1) ** 2), "other": (1.0, 1.0)},
        ),
        ({"attention_factor": 1.5}, {"deepseek": (1.5, 1.0), "other": (1.5, 1.0)}),
        (
            {"attention_factor": 1.5, "mscale_all_dim": 0.7},
            {"deepseek": (1.5, (0.07 * math.log(4) + 1) ** 2), "other": (1.5, 1.0)},
        ),
        ({"attention_factor": 1.0}, {"deepseek": (1.0, 1.0), "other": (1.0, 1.0)}),
    ],
)
def test_yarns_magnitudes_are_those_of_the_architecture(
    scaling: dict[str, float], magnitudes: dict[str, tuple[float, float]]
) -> None:
    for layout in ("llama", "qwen3_moe", "deepseek_v2", "deepseek_v3"):
        given = {"rope_type": "yarn", **YARN, **scaling}
        rope = read(layout, rope_scaling=given)
        cos, softmax = magnitudes["deepseek" if layout.startswith("deepseek") else "other"]
        start = rotation(rope, 4, torch.zeros(1, 1, dtype=torch.int64)).cos
        torch.testing.assert_close(start, torch.full((1, 1, 2), cos), rtol=1e-6, atol=0)
        assert softmax_scale(rope, 16) == pytest.approx(softmax / 4, rel=1e-12)


@pytest.mark.parametrize("layout", ["llama", "deepseek_v3"])
@pytest.mark.parametrize(
    "scaling",
    [{}, {"mscale": 0.3}, {"mscale": 1.1, "mscale_all_dim": 0.3}, {"attention_factor": 1.2, "beta_fast": 7}],
)
def test_what_is_written_means_the_same_to_transformers(layout: str, scaling: dict[str, float]) -> None:
    transformers = pytest.importorskip("transformers")
    rope_utils = pytest.importorskip("transformers.modeling_rope_utils")
    config = LAYOUTS[layout].read({"rope_scaling": {"rope_type": "yarn", **YARN, **scaling}})
    theirs = getattr(transformers, "LlamaConfig" if layout == "llama" else "DeepseekV3Config")(
        **LAYOUTS[layout].write(config)
    )
    frequencies, factor = rope_utils.ROPE_INIT_FUNCTIONS["yarn"](theirs)
    rope = config.attention.rope
    ours = torch.tensor(inverse_frequencies(rope, theirs.head_dim))
    torch.testing.assert_close(ours, frequencies, rtol=1e-5, atol=0)
    start = rotation(rope, 4, torch.zeros(1, 1, dtype=torch.int64)).cos
    torch.testing.assert_close(start, torch.full((1, 1, 2), float(factor)), rtol=1e-6, atol=0)


def test_lengths_that_are_not_given_follow_from_the_others() -> None:
    bare = {"rope_type": "yarn", "factor": 4.0}
    whole = {"max_position_embeddings": 2048}
    assert read(**whole, rope_scaling=bare).yarn == YarnConfig(factor=4.0, original_max_position_embeddings=2048)
    for missing in ({}, {"factor": None}):
        scaling = {"rope_type": "yarn", "original_max_position_embeddings": 512, **missing}
        assert read(**whole, rope_scaling=scaling).yarn == YarnConfig.model_validate(YARN)
    null = {"rope_type": "yarn", **YARN, "beta_fast": None, "mscale": None, "attention_factor": None}
    assert read(rope_scaling=null).yarn == YarnConfig.model_validate(YARN)


@pytest.mark.parametrize(
    ("layout", "fields", "kind", "said"),
    [
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, UnsupportedError, "rope_type is 'linear' but"),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, UnsupportedError, "rope_type is 'dynamic' but"),
        ("llama", {"rope_scaling": {"type": "longrope"}}, UnsupportedError, "rope_type is 'longrope' but"),
        ("qwen2", {"rope_scaling": {"type": "mrope"}}, UnsupportedError, "rope_type is 'mrope' but"),
        ("deepseek", {"rope_scaling": {**KIND, **YARN}}, UnsupportedError, "moekit computes default only"),
        ("deepseek_v3", {"rope_scaling": {"type": "llama3", **YARN}}, UnsupportedError, "computes default, yarn only"),
        (
            "llama",
            {"rope_scaling": {**KIND, "rope_type": "llama3", **YARN}},
            UnsupportedError,
            "rope_type is '",
        ),
        ("llama", {"partial_rotary_factor": 0.5}, UnsupportedError, "partial_rotary_factor is 0.5"),
        ("llama", {"rope_scaling": {"partial_rotary_factor": 0.5}}, UnsupportedError, "partial_rotary_factor is 0.5"),
        ("llama", {"rope_scaling": {**KIND, **YARN, "truncate": False}}, UnsupportedError, "truncate is false"),
        ("llama", {"rope_scaling": {**KIND, **YARN, "slope": 2}}, UnsupportedError, "slope is a setting of"),
        ("llama", {"rope_scaling": {"factor": 2.0}}, UnsupportedError, "factor is a setting of rope_type default"),
        (
            "llama",
            {"rope_scaling": {**KIND, **YARN, "factor": 1.0}},
            UnsupportedError,
            "factor of rope_type yarn is",
        ),
        (
            "llama",
            {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}},
            UnsupportedError,
            "full_attention of rope_type default is {'rope_theta': 1.0} but moekit knows numbers",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_theta": 1.0}, "rope_scaling": {**KIND, **YARN}},
            CheckpointError,
            "rope_scaling and rope_parameters are both given and differ",
        ),
        ("llama", {"rope_theta": 0.0}, CheckpointError, "model.attention.rope.theta is 0.0 but must be greater than 0"),
        (
            "qwen3",
            {"rope_scaling": {**KIND, **YARN, "attention_factor": 0.5}},
            CheckpointError,
            "model.attention.rope.yarn.mscale is -3.6",
        ),
    ],
)
def test_what_moekit_does_not_turn_is_refused(
    layout: str, fields: dict[str, Any], kind: type[MoekitError], said: str
) -> None:
    with pytest.raises(kind) as caught:
        read(layout, **fields)
    assert said in str(caught.value)
