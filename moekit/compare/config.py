"""What a comparison is: a file that names architectures, a budget, seeds, and what they are trained with."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from moekit import files
from moekit.config import Strict, run_tree
from moekit.config.files import read_yaml
from moekit.config.load import parse_overrides
from moekit.errors import ConfigError, nearest

FILES = Path(__file__).parent / "files"
OWN = ("optimizer", "schedule", "grad_clip", "backend", "recompute", "compile")
"""Settings that one architecture may have for itself; all others, data and steps first, are the same for all."""


class Architecture(Strict):
    """What is trained, or taken. Without `preset`, `model` and `run` it is the preset of its own name."""

    preset: str | None = Field(None, description="a preset, a variant of the family `size`, or a run's YAML file")
    model: dict[str, Any] | None = Field(None, description="settings on top of the preset, or the whole model")
    run: str | None = Field(None, description="a finished run that is taken; {seed} stands for the seed")
    recipe: dict[str, Any] = Field({}, description=f"settings of this architecture alone: {', '.join(OWN)}")

    @model_validator(mode="after")
    def _check(self) -> "Architecture":
        for key in self.recipe.keys() - {*OWN}:
            raise ValueError(f"recipe.{key} cannot differ between architectures; only {', '.join(OWN)} can")
        return self


class Budget(Strict):
    """What is made equal."""

    rule: Literal["equal_data", "equal_total", "equal_active", "equal_flops"] = Field(
        "equal_data", description="the same steps and batches for all; total and active are parameters"
    )
    tolerance: float = Field(0.02, ge=0, description="largest deviation from the baseline, as a fraction of it")


class Expected(Strict):
    """Somebody else's figures for the same architectures, shown beside ours."""

    measure: str = Field(description="what was measured, and its unit")
    source: str = Field(description="where it is printed")
    better: Literal["lower", "higher"] = Field("lower", description="which way is better")
    values: dict[str, float] = Field(description="by architecture")


class Comparison(Strict):
    """One comparison."""

    title: str = Field(description="heading of the report")
    about: str = Field("", description="a few sentences on the question, for the report")
    size: str | None = Field(None, description="family whose variants `preset` may name: 2b, tiny, mini")
    architectures: dict[str, Architecture] = Field(min_length=1, description="by name, in the order of the tables")
    baseline: str = Field(description="the architecture that differences are taken from")
    seeds: list[int] = Field([0, 1, 2], min_length=1, description="each trains every architecture once")
    budget: Budget = Field(Budget(), description="what is made equal")
    recipe: dict[str, Any] = Field({}, description="settings of a run for all, on top of the baseline's own")
    expected: list[Expected] = Field([], description="figures to show beside ours")

    @field_validator("architectures", mode="before")
    @classmethod
    def _short_forms(cls, given: Any) -> Any:
        """`NAME: PRESET` is short for `NAME: {preset: PRESET}`, and `NAME:` for the preset of that name."""
        if not isinstance(given, dict):
            return given
        return {name: {"preset": one} if isinstance(one, str) else one or {} for name, one in given.items()}

    @model_validator(mode="after")
    def _check(self) -> "Comparison":
        names = self.architectures
        for name in names:
            if not re.fullmatch(r"\w[\w.+-]*", name):
                raise ValueError(f"architectures has the name {name!r}; use letters, digits and . + - _ only")
        if self.baseline not in names:
            hint = nearest(self.baseline, names)
            raise ValueError(f"baseline is {self.baseline!r}{hint}; architectures: {', '.join(names)}")
        for seed in self.seeds:
            if seed < 0 or self.seeds.count(seed) > 1:
                raise ValueError(f"seeds are {self.seeds} but must be different numbers, 0 or more")
        for one in self.expected:
            for name in one.values.keys() - names.keys():
                raise ValueError(f"expected has a value for {name!r}; architectures: {', '.join(names)}")
        if "model" in self.recipe or "seed" in self.recipe:
            key = "model" if "model" in self.recipe else "seed"
            raise ValueError(f"recipe.{key} is given, but {'architectures' if key == 'model' else 'seeds'} says that")
        return self


def comparison_names() -> list[str]:
    """Returns the names of the comparisons that come with the package."""
    return sorted(path.stem for path in FILES.glob("*.yaml"))


def load_comparison(
    source: str | Path, overrides: Mapping[str, str] | None = None, *, data: str | None = None, **given: Any
) -> Comparison:
    """Returns the comparison of a ready-made name or of a YAML file, with overrides on top.

    `overrides` maps dotted keys to YAML text ("recipe.steps": "100"); `given` are settings as they are (size, seeds,
    baseline), None meaning not given; `data` is recipe.data.path.
    """
    path = FILES / f"{source}.yaml" if str(source) in comparison_names() else Path(source)
    if not path.is_file() and path.suffix not in (".yaml", ".yml"):
        known = comparison_names()
        raise ConfigError(
            f"there is no comparison or file {str(source)!r}{nearest(str(source), known)}; ready-made "
            f"comparisons: {', '.join(known)}"
        )
    over = parse_overrides(overrides or {})
    fixed = {key: value for key, value in given.items() if value is not None}
    tree = run_tree(read_yaml(path), over, fixed, {"recipe": {"data": {"path": data}}} if data else {})
    return _valid(tree, f"{source}: ")


def _valid(tree: Any, origin: str) -> Comparison:
    """Returns the comparison, or raises ConfigError with the first thing that is wrong."""
    level = [*Comparison.model_fields]
    for key in tree.keys() - {*level}:
        raise ConfigError(
            f"{origin}{key} is not a setting of a comparison{nearest(key, level)}; {', '.join(level)} are"
            " (settings of training stand under recipe)"
        )
    try:
        return Comparison.model_validate(tree)
    except ValidationError as problem:
        first = problem.errors(include_url=False)[0]
        if first["type"] == "value_error":
            at = "".join(f"{part}." for part in first["loc"])
            raise ConfigError(f"{origin}{at}{first['ctx']['error']}") from None
        raise ConfigError(f"{origin}{files.explain(problem)}") from None
