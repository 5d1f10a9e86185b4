"""Comparison files: what they may say, what each rule of the budget holds, and that what is resolved stays so."""

import re
from pathlib import Path
from typing import Any

import pytest

from moekit.compare.config import Comparison, comparison_names, load_comparison
from moekit.compare.plan import Plan, plan_document, resolve, training_flops
from moekit.config import preset
from moekit.config.files import write_yaml
from moekit.errors import ConfigError

TWO: dict[str, Any] = {
    "title": "two",
    "size": "tiny",
    "architectures": {"dense": None, "gshard": None},
    "baseline": "dense",
    "recipe": {"steps": 40, "schedule": {"warmup_steps": 4}},
}


def _plan(folder: Path, overrides: dict[str, str] | None = None, **changes: Any) -> Plan:
    (folder / "c.yaml").write_text(write_yaml(TWO | changes), encoding="utf-8")
    return resolve(load_comparison(folder / "c.yaml", overrides), template=True)


SIZED = [name for name in comparison_names() if load_comparison(name).size]


@pytest.mark.parametrize(
    ("name", "size"),
    [
        *((name, size) for name in SIZED for size in ("tiny", "mini", "2b")),
        *((name, None) for name in comparison_names() if name not in SIZED),
    ],
)
def test_every_ready_made_comparison_holds_its_own_budget_at_every_size(name: str, size: str | None) -> None:
    comparison = load_comparison(name, size=size)
    plan = resolve(comparison, template=True)
    assert len(plan.configs) == len(comparison.architectures)
    for one in comparison.expected:
        assert comparison.baseline in one.values
        assert set(one.values) <= set(plan.configs)
    assert {config.data.path for config in plan.configs.values()} == {"DATA"}
    assert {config.keep_checkpoints for config in plan.configs.values()} == {1}


def test_the_ready_made_comparisons_are_the_papers_architectures() -> None:
    names = {name: [*load_comparison(name).architectures] for name in comparison_names()}
    assert names["table1"] == ["dense", "hash", "switch", "gshard", "deepseekmoe"]
    assert names["table2"] == ["gshard-x1.2", "gshard-x1.5", "dense-x4", "dense-x16", "deepseekmoe"]
    models = resolve(load_comparison("ablation", size="mini"), template=True).configs.values()
    experts = [(one.model.ffn.n_shared_experts, one.model.ffn.num_experts_per_tok, one.model.ffn.n_routed_experts)
               for one in models if one.model.ffn.kind == "moe"]  # fmt: skip
    assert experts == [(0, 2, 16), (1, 1, 15), (1, 3, 31), (1, 7, 63)]
    models = resolve(load_comparison("shared-ratio"), template=True).configs.values()
    shared = [(one.model.ffn.n_shared_experts, one.model.ffn.num_experts_per_tok)
              for one in models if one.model.ffn.kind == "moe"]  # fmt: skip
    assert shared == [(1, 7), (2, 6), (4, 4)]


def test_the_parrots_have_one_active_size_and_dense_models_of_the_same_widths() -> None:
    models = {name: one.model for name, one in resolve(load_comparison("parrots"), template=True).configs.items()}
    active = {name: model.num_active_parameters for name, model in models.items() if name.startswith("experts")}
    routers = {name: 2 * 64 * model.ffn.n_routed_experts for name, model in models.items() if name in active}
    assert len({count - routers[name] for name, count in active.items()}) == 1
    for experts in (4, 16, 64):
        sparse, dense = models[f"experts-{experts}"], models[f"dense-x{experts}"]
        assert sparse.num_parameters - routers[f"experts-{experts}"] == dense.num_parameters


def test_architectures_are_variants_presets_changed_presets_or_models(tmp_path: Path) -> None:
    given = {
        "dense": None,
        "other": "gshard",
        "mini": "mini-dense",
        "wide": {"preset": "dense", "model": {"ffn": {"intermediate_size": 300, "nominal_size": None}}},
        "own": {"model": preset("tiny-hash").model_dump()},
    }
    configs = _plan(tmp_path, architectures=given).configs
    assert configs["dense"].model == preset("tiny-dense")
    assert configs["other"].model == preset("tiny-gshard")
    assert configs["mini"].model == preset("mini-dense")
    assert configs["own"].model == preset("tiny-hash")
    assert configs["wide"].model.ffn.intermediate_size == 300
    assert configs["wide"].model.attention == preset("tiny-dense").attention
    assert configs["mini"].optimizer.lr == configs["dense"].optimizer.lr == 3e-3  # the baseline's recipe is everyone's


def test_what_is_resolved_resolves_to_itself(tmp_path: Path) -> None:
    first = _plan(tmp_path, budget={"rule": "equal_flops", "tolerance": 0.05})
    (tmp_path / "again.yaml").write_text(write_yaml(first.comparison.model_dump()), encoding="utf-8")
    assert resolve(load_comparison(tmp_path / "again.yaml")) == first


def test_any_setting_can_be_changed_from_outside(tmp_path: Path) -> None:
    plan = _plan(
        tmp_path, {"recipe.steps": "7", "recipe.optimizer.lr": "0.5", "budget.tolerance": "0.5", "seeds": "[4]"}
    )
    assert [config.steps for config in plan.configs.values()] == [7, 7]
    assert [config.optimizer.lr for config in plan.configs.values()] == [0.5, 0.5]
    assert plan.comparison.seeds == [4]
    assert {config.seed for config in plan.configs.values()} == {4}


def test_an_architecture_may_have_an_optimizer_of_its_own_but_no_data_of_its_own(tmp_path: Path) -> None:
    own = {"dense": None, "gshard": {"recipe": {"optimizer": {"lr": 1e-3}}}}
    plan = _plan(tmp_path, architectures=own)
    assert [config.optimizer.lr for config in plan.configs.values()] == [3e-3, 1e-3]
    with pytest.raises(ConfigError, match=r"recipe\.data cannot differ between architectures; only optimizer"):
        _plan(tmp_path, architectures={"dense": None, "gshard": {"recipe": {"data": {"batch_size": 2}}}})


def test_equal_flops_gives_each_the_steps_that_spend_the_baselines(tmp_path: Path) -> None:
    plan = _plan(tmp_path, recipe={"steps": 300, "schedule": {"warmup_steps": 30}}, budget={"rule": "equal_flops"})
    dense, gshard = plan.configs["dense"], plan.configs["gshard"]
    per_token = [config.model.flops(256) for config in (dense, gshard)]
    assert dense.steps == 300
    assert gshard.steps == round(300 * per_token[0] / per_token[1])
    assert gshard.schedule.warmup_steps == round(30 * gshard.steps / 300)
    assert training_flops(gshard) == pytest.approx(training_flops(dense), rel=0.005)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"rule": "equal_total"}, "gshard has 5,659,488 parameters and the baseline dense 1,229,664, +360.2%"),
        ({"rule": "equal_active"}, "gshard has 1,530,720 active parameters and the baseline dense 1,229,664, +24.5%"),
        ({"rule": "equal_flops", "tolerance": 0.001}, "training FLOPs and the baseline dense 1,014,686,023,680, +0.1%"),
    ],
)
def test_a_budget_that_does_not_hold_names_both_numbers(tmp_path: Path, budget: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        _plan(tmp_path, budget=budget)
    assert _plan(tmp_path, budget=budget | {"tolerance": 4.0})


def test_a_plan_counts_what_it_would_train(tmp_path: Path) -> None:
    document = plan_document(_plan(tmp_path, seeds=[0, 5]))
    dense, gshard = document["architectures"].values()
    assert document["runs"] == 4
    assert document["training_flops"] == 2 * (dense["training_flops"] + gshard["training_flops"])
    assert dense["tokens"] == 40 * 16 * 256
    assert dense["training_flops"] == dense["tokens"] * dense["flops_per_token"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 3}, "seed is not a setting of a comparison (did you mean seeds?)"),
        ({"steps": 3}, "steps is not a setting of a comparison"),
        ({"baseline": "desne"}, "baseline is 'desne' (did you mean dense?); architectures: dense, gshard"),
        ({"seeds": [0, 0]}, "seeds are [0, 0] but must be different numbers"),
        ({"seeds": []}, "seeds: List should have at least 1 item"),
        ({"architectures": {"a/b": "dense"}, "baseline": "a/b"}, "architectures has the name 'a/b'"),
        ({"architectures": {"dense": None, "gshrd": None}}, "size tiny has no variant 'gshrd' (did you mean gshard"),
        ({"size": "huge"}, "size is 'huge' but there are the families 2b, tiny and mini"),
        ({"architectures": {"dense": "mini-dense"}}, "size is tiny but no architecture is a variant of a family"),
        (
            {"size": None, "architectures": {"dense": {"run": "r"}}},
            "architectures.dense.run is r, one run, but seeds are [0, 1, 2]",
        ),
        ({"recipe": {"lr": 3}}, "recipe: lr is not a setting; lr is optimizer.lr"),
        ({"recipe": {"seed": 3}}, "recipe.seed is given, but seeds says that"),
        ({"recipe": {"model": {}}}, "recipe.model is given, but architectures says that"),
        ({"expected": [{"measure": "m", "source": "s", "values": {"hash": 1.0}}]}, "expected has a value for 'hash'"),
        ({"budget": {"rule": "equal"}}, "budget.rule: Input should be 'equal_data'"),
        ({"architectures": {"dense": {"modl": 3}}}, "architectures.dense.modl: Extra inputs are not permitted"),
        ({"architectures": {"dense": {"model": {"ffn": 3}}}}, "architectures.dense: model.vocab_size is missing"),
        ({"architectures": {"dense": {"model": {"hidden_siz": 3}}}}, "architectures.dense: model.hidden_siz is not a"),
    ],
)
def test_a_mistake_in_the_file_is_one_line_that_names_it(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        _plan(tmp_path, **change)
    assert message in str(caught.value)


def test_an_unknown_name_lists_what_there_is() -> None:
    with pytest.raises(ConfigError, match=r"'tabel1' \(did you mean table1\?\); ready-made comparisons: ablation, "):
        load_comparison("tabel1")


def test_every_field_is_described() -> None:
    assert all(field.description for field in Comparison.model_fields.values())


def test_what_does_not_learn_next_tokens_is_not_compared(tmp_path: Path) -> None:
    encoder = {"preset": "tiny-dense", "model": {"causal": False}}
    with pytest.raises(ConfigError, match=r"recipe.objective.kind is masked but a comparison is of next tokens"):
        _plan(
            tmp_path, size=None, architectures={"dense": encoder}, recipe={"steps": 40, "objective": {"kind": "masked"}}
        )
