"""MEO's counts: the figures of its paper to the printed digits, and the rules that they follow."""

import re
from typing import Any

import pytest
import torch

from moekit.config import MEOConfig, ModelConfig, RunConfig, memory, parameters, plan, preset, preset_names, validate
from moekit.config.variants.meo import paper_table
from moekit.config.variants.variant import MERGED_BYTES
from moekit.errors import ConfigError
from moekit.nn.model import Model
from moekit.ops import merge

SIZES: dict[str, Any] = {"intermediate_size": 26, "n_routed_experts": 5, "num_experts_per_tok": 3, "reduce_factor": 4}
SETTINGS: list[dict[str, Any]] = [
    {"level": "task", "description_size": 12},
    {"level": "task", "description_size": 12, "mode": "dispatch"},
    {"level": "token"},
    *(
        {"reduce_factor": 64, **settings}
        for settings in (
            {"level": "sequence"},
            {"level": "sequence", "noisy_gating": False},
            {"level": "sequence", "mode": "dispatch"},
            {"level": "token", "mode": "dispatch"},
            {"level": "prefix", "segment_size": 8},
            {"level": "segment", "segment_size": 8},
        )
    ),
]
WORDS = [" ".join(f"{name} {value}" for name, value in settings.items()) for settings in SETTINGS]


def _meo(**settings: Any) -> MEOConfig:
    return MEOConfig(**{**SIZES, **settings})


def _model(**settings: Any) -> ModelConfig:
    attention = {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 6}
    sizes = {"vocab_size": 61, "hidden_size": 18, "num_hidden_layers": 2}
    return ModelConfig(**sizes, attention=attention, ffn=_meo(**settings).model_dump(), causal=False)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("size", "dispatched", "merged"),
    [
        ("small", [7.42, 9.57, 13.87, 22.46, 39.64, 74.00], {4: (7.46, None), 32: (7.69, None)}),
        ("base", [28.50, 42.99, 71.99, 129.97, 245.93, 477.86], {4: (28.73, 28.95), 32: (30.31, None)}),
        ("large", [87.19, 138.73, 241.81, 447.97, 860.28, 1684.92], {4: (87.99, None), 32: (93.63, None)}),
    ],
)
def test_table_has_the_figures_of_the_paper(
    size: str, dispatched: list[float], merged: dict[int, tuple[float, float | None]]
) -> None:
    table = plan(preset(f"meo-bert-{size}"))["meo_table"]
    assert table["sequence_length"] == 128
    assert [line["num_experts_per_tok"] for line in table["lines"]] == [1, 2, 4, 8, 16, 32]
    assert [round(line["dispatched"] / 1e9, 2) for line in table["lines"]] == dispatched
    for line in table["lines"]:
        once, twice = merged.get(line["num_experts_per_tok"], (None, None))
        assert once is None or round(line["merged_1"] / 1e9, 2) == once
        assert twice is None or round(line["merged_2"] / 1e9, 2) == twice


def test_table_takes_the_length_that_is_asked_for_and_the_models_own_number_of_experts() -> None:
    base = preset("meo-bert-base")
    assert isinstance(base.ffn, MEOConfig)
    six = base.model_copy(update={"ffn": base.ffn.model_copy(update={"num_experts_per_tok": 6})})
    table = plan(six, 64)["meo_table"]
    assert [line["num_experts_per_tok"] for line in table["lines"]] == [1, 2, 4, 6, 8, 16, 32]
    assert table["sequence_length"] == 64
    assert table["lines"][3] == paper_table(12, 768, 3072, 30522, 64, {6})[0]._asdict()
    assert "meo_table" not in plan(preset("tiny-deepseekmoe"))


def test_merging_costs_one_pass_and_two_flops_a_weight_of_each_unit_and_dispatching_a_pass_for_each_expert() -> None:
    weights, length = 2 * 18 * 26, 50

    def flops(length: int = length, **settings: Any) -> int:
        """Returns what is counted without gates: they alone are left when the experts chosen are not."""
        one, two = (_meo(num_experts_per_tok=k, reduce_factor=64, **settings).forward_flops(18, length) for k in (1, 2))
        return two - one

    assert flops(level="token", mode="dispatch") == 2 * weights * length
    assert flops(level="sequence", mode="dispatch") == 2 * weights * length
    assert flops(level="sequence") == 2 * weights
    assert flops(level="prefix", segment_size=8) == 2 * weights
    assert flops(level="segment", segment_size=8) == 7 * 2 * weights
    assert flops(length=48, level="segment", segment_size=8) == 6 * 2 * weights


@pytest.mark.parametrize(
    ("settings", "extra"),
    [
        ({"level": "sequence", "noisy_gating": False}, 2 * 5 * (18 + 26)),
        ({"level": "sequence"}, 2 * 2 * 5 * (18 + 26)),
        ({"level": "segment", "segment_size": 8}, 7 * 2 * 2 * 5 * (18 + 26)),
        ({"level": "token", "mode": "dispatch"}, 50 * 2 * 2 * 5 * (18 + 26)),
        ({"level": "token", "reduce_factor": 4}, 2 * 2 * 5 * (18 + 26) + 50 * 4 * (18 * 4 + 26 * 6)),
        ({"level": "task", "reduce_factor": 4, "description_size": 12}, 2 * 2 * 2 * 5 * 3 + 2 * 2 * 12 * 3),
    ],
)
def test_gates_and_token_blocks_are_counted_as_often_as_they_are_computed(settings: dict[str, Any], extra: int) -> None:
    weights, length = 2 * 18 * 26, 50
    config = _meo(**{"reduce_factor": 64, **settings})
    units = 7 if config.level == "segment" else 1
    experts = 2 * weights * (3 * length if config.mode == "dispatch" else length + 3 * units)
    assert config.forward_flops(18, length) == experts + extra


def test_training_flops_are_three_forward_passes_of_each_layer_beside_attention_and_head() -> None:
    merged, dispatched = _model(reduce_factor=64), _model(reduce_factor=64, mode="dispatch")
    difference = 2 * 2 * 18 * 26 * (3 * 40 - 40 - 3)
    assert dispatched.flops(40) - merged.flops(40) == 3 * 2 * difference


@pytest.mark.parametrize(
    "config",
    [*(preset(name) for name in preset_names() if name.startswith("meo-")), *(_model(**s) for s in SETTINGS)],
    ids=[*(name for name in preset_names() if name.startswith("meo-")), *WORDS],
)
def test_counts_by_role_equal_those_of_the_built_model(config: ModelConfig) -> None:
    """What a layer has beside both maps and their token blocks belongs to its gates."""
    with torch.device("meta"):
        model = Model(config)
    built = {"router": 0, "routed": 0, "dense": 0}
    for key, parameter in model.named_parameters():
        if key.startswith("embed_task."):
            built["router"] += parameter.numel()
        elif found := re.search(r"\.mlp\.(.*)$", key):
            experts = re.fullmatch(r"(up|down)_proj\.(weight|bias)", found[1])
            built["routed" if experts else "dense" if "token" in found[1] else "router"] += parameter.numel()
    assert built == {role: parameters(config)[role].total for role in built}
    assert config.num_parameters == sum(parameter.numel() for parameter in model.parameters())


def test_active_are_the_chosen_experts_and_all_of_gates_and_token_blocks() -> None:
    routed = parameters(_model(level="token"))["routed"]
    assert routed.total == 2 * 5 * (2 * 18 * 26 + 18 + 26)
    assert routed.active * 5 == routed.total * 3
    for role in ("router", "dense"):
        count = parameters(_model(level="token"))[role]
        assert count.active == count.total > 0


def test_merged_weights_grow_with_sequences_and_segments_up_to_the_bound() -> None:
    base = preset("meo-bert-base")
    one = 4 * 768 * 3072

    def merged(batch: int, length: int, **settings: Any) -> dict[str, int]:
        assert isinstance(base.ffn, MEOConfig)
        ffn = MEOConfig(**{**base.ffn.model_dump(), **settings})
        found = memory(base.model_copy(update={"ffn": ffn}), batch, length, "float32")
        parts = ("weights", "gradients", "optimizer", "activations", "buffers", "compute_copy")
        assert found["training_total"] == sum(found[part] for part in parts) + found.get("merged_weights", 0)
        cached = found.get("generation_merged_weights", 0)
        assert found["generation_total"] == found["generation_weights"] + found["kv_cache"] + cached
        return found

    assert merged(1, 128)["merged_weights"] == merged(1, 512)["merged_weights"] == one
    assert merged(8, 128)["merged_weights"] == merged(8, 128)["generation_merged_weights"] == 8 * one
    assert merged(2, 512, level="segment", segment_size=128)["merged_weights"] == 8 * one
    assert merged(64, 128)["merged_weights"] == MERGED_BYTES // one * one
    assert "merged_weights" not in merged(8, 128, mode="dispatch")
    assert memory(base, 8, 128)["merged_weights"] == 4 * one  # in bfloat16


def test_a_matrix_above_the_bound_is_merged_alone() -> None:
    assert _meo(intermediate_size=MERGED_BYTES, reduce_factor=64).merged_bytes(18, 8, 5, 4) == 4 * 18 * MERGED_BYTES


def test_the_bound_is_that_of_the_operation() -> None:
    assert merge.MERGED_BYTES == MERGED_BYTES


def test_dispatch_keeps_rows_for_every_choice_where_merging_keeps_none() -> None:
    few, many = (_meo(reduce_factor=64, num_experts_per_tok=k).kept_bytes(18, 128, 4) for k in (1, 4))
    assert few == many
    few, many = (_meo(reduce_factor=64, num_experts_per_tok=k, mode="dispatch").kept_bytes(18, 128, 4) for k in (1, 4))
    assert many - few == 128 * 3 * (4 * 2 * (18 + 26) + 2 * 28)


def test_a_run_whose_layers_route_by_task_needs_its_description() -> None:
    def run(**ffn: Any) -> RunConfig:
        data = {"path": "x", "sequence_length": 16}
        model = _model(level="task", reduce_factor=4, **ffn).model_dump()
        return validate(RunConfig, {"model": model, "data": data, "objective": {"kind": "masked"}, "steps": 1})

    with pytest.raises(ConfigError, match=r"level is task but no task is described: give objective\.description"):
        run()
    assert run(description_ids=(1, 2)).model.ffn.kind == "meo"
