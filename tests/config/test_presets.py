"""One contract over all presets, and what the families promise."""

from pathlib import Path

import pytest

from moekit.config import (
    DenseConfig,
    MHAConfig,
    MoEConfig,
    dump,
    load_model_config,
    load_run_config,
    memory,
    parameters,
    plan,
    preset,
    preset_names,
    recipe,
    summary,
)
from moekit.errors import ConfigError

FAMILIES = {
    "2b": lambda kind, *rest: "-".join([kind, "2b", *rest]),
    "tiny": lambda *parts: "-".join(["tiny", *parts]),
    "mini": lambda *parts: "-".join(["mini", *parts]),
}
SAME_TOTAL = ["hash", "switch", "gshard", "deepseekmoe", "dense-x16"] + [
    f"deepseekmoe-{variant}" for variant in ("m1", "m2", "shared0", "shared2", "shared4", "half")
]
SAME_ACTIVE = [name for name in SAME_TOTAL if name.startswith(("gshard", "deepseekmoe")) and "half" not in name]


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_keeps_the_contract(name: str, tmp_path: Path) -> None:
    config = preset(name)
    run = load_run_config(name, **{"data.path": "data"})
    assert run.model == config
    for comments in (False, True):
        (tmp_path / "run.yaml").write_text(dump(run, comments), encoding="utf-8")
        assert load_run_config(tmp_path / "run.yaml") == run
        (tmp_path / "model.yaml").write_text(dump(config, comments), encoding="utf-8")
        assert load_model_config(tmp_path / "model.yaml") == config
    for role, count in parameters(config).items():
        assert 0 <= count.active <= count.total, role
    embedding = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    assert config.num_active_parameters_without_embedding == config.num_active_parameters - embedding > 0
    assert config.num_active_parameters <= config.num_parameters
    assert all(count > 0 for count in plan(config)["flops"].values())
    assert all(value >= 0 for value in memory(config, 1, 16).values())
    assert summary(config)


@pytest.mark.parametrize("family", FAMILIES)
def test_families_have_equal_expert_parameters(family: str) -> None:
    def experts(name: str, kind: str) -> int:
        counts = parameters(preset(FAMILIES[family](*name.split("-"))))
        return sum(getattr(counts[role], kind) for role in ("routed", "shared", "dense"))

    standard = experts("dense", "total")
    assert {experts(name, "total") for name in SAME_TOTAL} == {16 * standard}
    assert {experts(name, "active") for name in [*SAME_ACTIVE, "dense-x2"]} == {2 * standard}
    assert {experts(name, "active") for name in ("hash", "switch", "deepseekmoe-half")} == {standard}
    assert experts("gshard-x1.2", "total") == pytest.approx(1.2 * 16 * standard, rel=0.005)
    assert experts("gshard-x1.5", "total") == pytest.approx(1.5 * 16 * standard, rel=0.005)


@pytest.mark.parametrize("family", FAMILIES)
def test_models_of_a_family_differ_in_their_ffn_only(family: str) -> None:
    of_family = [preset(FAMILIES[family](*name.split("-"))) for name in ["dense", *SAME_TOTAL]]
    assert len({dump(config.model_copy(update={"ffn": of_family[0].ffn})) for config in of_family}) == 1


@pytest.mark.parametrize(
    ("variant", "shared", "routed", "chosen", "width"),
    [
        ("deepseekmoe-2b", 1, 63, 7, 856),
        ("deepseekmoe-2b-m1", 1, 15, 1, 3424),
        ("deepseekmoe-2b-m2", 1, 31, 3, 1712),
        ("deepseekmoe-2b-shared0", 0, 64, 8, 856),
        ("deepseekmoe-2b-shared2", 2, 62, 6, 856),
        ("deepseekmoe-2b-shared4", 4, 60, 4, 856),
        ("deepseekmoe-2b-half", 1, 63, 3, 856),
        ("switch-2b", 0, 16, 1, 3424),
        ("gshard-2b-x1.2", 0, 16, 2, 4096),
        ("gshard-2b-x1.5", 0, 16, 2, 5120),
        ("tiny-deepseekmoe", 1, 63, 7, 64),
        ("mini-deepseekmoe", 1, 63, 7, 128),
        ("deepseekmoe-16b", 2, 64, 6, 1408),
        ("deepseekmoe-145b", 4, 128, 12, 1408),
    ],
)
def test_experts_are_those_of_the_paper(variant: str, shared: int, routed: int, chosen: int, width: int) -> None:
    ffn = preset(variant).ffn
    assert isinstance(ffn, MoEConfig)
    found = (ffn.n_shared_experts, ffn.n_routed_experts, ffn.num_experts_per_tok, ffn.moe_intermediate_size)
    assert found == (shared, routed, chosen, width)


def test_hash_has_no_router_and_the_67b_has_eight_key_value_heads() -> None:
    assert parameters(preset("hash-2b"))["router"].total == 0
    big = preset("deepseek-67b")
    assert isinstance(big.attention, MHAConfig)
    assert isinstance(big.ffn, DenseConfig)
    assert (big.attention.num_key_value_heads, big.ffn.intermediate_size) == (8, 22016)


@pytest.mark.parametrize(
    ("name", "tokens"), [("deepseekmoe-2b", 104.9e9), ("deepseekmoe-16b", 2.009e12), ("deepseekmoe-145b", 245.4e9)]
)
def test_recipes_train_on_the_tokens_of_the_paper(name: str, tokens: float) -> None:
    settings = recipe(name)
    found = settings["steps"] * settings["data"]["batch_size"] * settings["data"]["sequence_length"]
    assert found == pytest.approx(tokens, rel=1e-3)


def test_the_140b_comparison_shares_one_recipe() -> None:
    assert recipe("gshard-137b") == recipe("deepseek-67b") == recipe("deepseekmoe-145b")
    assert recipe("deepseekmoe-145b")["schedule"]["kind"] == "constant"
    assert recipe("deepseekmoe-2b-half") == recipe("dense-2b") != recipe("deepseekmoe-16b")


def test_changing_a_recipe_leaves_the_next_one_alone() -> None:
    recipe("tiny-dense")["data"]["batch_size"] = 3
    assert recipe("tiny-dense")["data"]["batch_size"] == 16


def test_an_unknown_preset_names_the_nearest_and_says_how_to_list() -> None:
    with pytest.raises(ConfigError, match=r"no preset 'deepseek-16b' .*did you mean .*`moekit presets` lists them"):
        preset("deepseek-16b")
