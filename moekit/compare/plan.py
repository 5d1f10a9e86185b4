"""From a comparison to the runs it consists of: every architecture a whole configuration, and the budget kept."""

from typing import Any, NamedTuple

from moekit.compare.config import Architecture, Budget, Comparison
from moekit.config import ModelConfig, RunConfig, family_name, preset_names, run_tree, validate
from moekit.config.files import Tree
from moekit.errors import ConfigError, nearest

SHARED = {"keep_checkpoints": 1}
"""What a comparison's runs have unless its recipe says otherwise: they are many, and only their ends are of use."""


class Plan(NamedTuple):
    """A comparison with everything resolved."""

    comparison: Comparison
    """Whole models and a whole recipe, no names of presets: it gives the same plan again in any later version."""
    configs: dict[str, RunConfig]
    """Of each architecture, with the first seed."""

    @property
    def baseline(self) -> RunConfig:
        return self.configs[self.comparison.baseline]


def resolve(comparison: Comparison, *, template: bool = False) -> Plan:
    """Returns the plan; raises ConfigError where a configuration is not sound or the budget's rule does not hold.

    The recipe is that of the baseline's preset or run, with `recipe` on top, for all. With `template` a comparison
    that names no data gets the text DATA for it.
    """
    trees = {name: _tree(comparison, name) for name in comparison.architectures}
    for name, tree in trees.items():  # first: what is wrong with a model is not to be blamed on the recipe
        validate(ModelConfig, tree.get("model", {}), f"architectures.{name}: ")
    named = {one.preset or name for name, one in comparison.architectures.items() if not (one.model or one.run)}
    named |= {one.preset for one in comparison.architectures.values() if one.preset}
    if comparison.size is not None and named <= {*preset_names()}:
        raise ConfigError(f"size is {comparison.size} but no architecture is a variant of a family")
    seed = {"seed": comparison.seeds[0]}
    base = run_tree(SHARED, trees[comparison.baseline], comparison.recipe, seed)
    if template and "path" not in base.get("data", {}):
        base = run_tree({"data": {"path": "DATA"}}, base)
    shared = validate(RunConfig, base, "recipe: ")
    if (kind := shared.objective.kind) != "next_token":
        raise ConfigError(f"recipe.objective.kind is {kind} but a comparison is of next tokens, in bits per byte")
    recipe = {key: value for key, value in shared.model_dump().items() if key not in ("model", "seed")}
    configs = {
        name: validate(
            RunConfig,
            run_tree(recipe, one.recipe, {"model": trees[name]["model"]}, seed),
            f"architectures.{name}: ",
        )
        for name, one in comparison.architectures.items()
    }
    whole = {
        name: Architecture(model=configs[name].model.model_dump(), run=one.run, recipe=one.recipe)
        for name, one in comparison.architectures.items()
    }
    resolved = comparison.model_copy(update={"size": None, "architectures": whole, "recipe": recipe})
    return Plan(resolved, spend(configs, comparison.baseline, comparison.budget))


def _tree(comparison: Comparison, name: str) -> Tree:
    """Returns an architecture's model, and the recipe that comes with it, as a run's tree."""
    one, size = comparison.architectures[name], comparison.size
    if one.run and not (one.preset or one.model):
        if "{seed}" not in one.run and len(comparison.seeds) > 1:
            raise ConfigError(
                f"architectures.{name}.run is {one.run}, one run, but seeds are {comparison.seeds}; "
                "write {seed} where the seed stands"
            )
        tree = run_tree(one.run.replace("{seed}", str(comparison.seeds[0])) + "/config.yaml")
        return {key: value for key, value in tree.items() if key != "keep_checkpoints"}
    if one.model is not None and not one.preset:
        return {"model": one.model}
    source = one.preset or name
    if size is not None and source not in preset_names():
        variants = {variant: family_name(size, variant) for variant in _variants(size)}
        if source not in variants and not source.endswith((".yaml", ".yml")):
            hint = nearest(source, variants)
            raise ConfigError(
                f"architectures.{name}: size {size} has no variant {source!r}{hint}; variants: {', '.join(variants)}"
            )
        source = variants.get(source, source)
    return run_tree(run_tree(source), {"model": one.model or {}})


def _variants(size: str) -> list[str]:
    """Returns the variants of a family."""
    tiny = [name.removeprefix("tiny-") for name in preset_names() if name.startswith("tiny-")]
    if family_name(size, tiny[0]) not in preset_names():
        raise ConfigError(f"size is {size!r} but there are the families 2b, tiny and mini")
    return tiny


def spend(configs: dict[str, RunConfig], baseline: str, budget: Budget) -> dict[str, RunConfig]:
    """Returns the configurations under the budget's rule; raises ConfigError that gives both numbers.

    equal_flops gives each architecture the number of steps that spends what the baseline spends, nearest whole number,
    and scales its warm-up; the other rules change nothing.
    """
    if budget.rule == "equal_flops":
        target = training_flops(configs[baseline])
        configs = {name: _with_flops(config, target) for name, config in configs.items()}
    kind = {"equal_total": "parameters", "equal_active": "active parameters", "equal_flops": "training FLOPs"}
    if budget.rule in kind:
        reference = _amount(configs[baseline], budget.rule)
        for name, config in configs.items():
            amount = _amount(config, budget.rule)
            if abs(amount - reference) > budget.tolerance * reference:
                raise ConfigError(
                    f"budget.rule is {budget.rule} but {name} has {amount:,} {kind[budget.rule]} and the baseline "
                    f"{baseline} {reference:,}, {amount / reference - 1:+.1%}; budget.tolerance is {budget.tolerance:g}"
                )
    return configs


def _amount(config: RunConfig, rule: str) -> int:
    if rule == "equal_flops":
        return training_flops(config)
    return config.model.num_parameters if rule == "equal_total" else config.model.num_active_parameters


def _with_flops(config: RunConfig, target: int) -> RunConfig:
    steps = max(1, round(target * config.steps / training_flops(config)))
    warmup = min(steps, round(config.schedule.warmup_steps * steps / config.steps))
    schedule = config.schedule.model_copy(update={"warmup_steps": warmup})
    return config.model_copy(update={"steps": steps, "schedule": schedule})


def flops_per_token(config: RunConfig) -> float:
    """Returns the training FLOPs of one token, by the exact rule."""
    length = config.data.sequence_length
    return config.model.flops(length) / length


def training_flops(config: RunConfig) -> int:
    """Returns the training FLOPs of a whole run, validation aside."""
    return config.steps * config.data.batch_size * config.model.flops(config.data.sequence_length)


def costs(config: RunConfig) -> dict[str, Any]:
    """Returns what an architecture is and spends, as counted from its configuration."""
    return {
        "parameters": config.model.num_parameters,
        "active_parameters": config.model.num_active_parameters,
        "flops_per_token": flops_per_token(config),
        "steps": config.steps,
        "tokens": config.steps * config.data.batch_size * config.data.sequence_length,
        "training_flops": training_flops(config),
    }


def plan_document(plan: Plan) -> dict[str, Any]:
    """Returns what will be trained, as one JSON document."""
    comparison = plan.comparison
    rows = {name: costs(config) for name, config in plan.configs.items()}
    trained = {name: row for name, row in rows.items() if comparison.architectures[name].run is None}
    return {
        "title": comparison.title,
        "budget": comparison.budget.model_dump(),
        "baseline": comparison.baseline,
        "seeds": comparison.seeds,
        "architectures": {name: row | {"run": comparison.architectures[name].run} for name, row in rows.items()},
        "runs": len(trained) * len(comparison.seeds),
        "training_flops": sum(row["training_flops"] for row in trained.values()) * len(comparison.seeds),
    }
