"""Every model of the paper and its small families by name, with the settings they were (or are to be) trained with.

`presets.yaml` beside this file holds them; families of one size are built here from its sizes and variants.
"""

from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

from moekit.config.files import Tree, read_yaml
from moekit.config.model import ModelConfig
from moekit.config.variants import MEOConfig
from moekit.errors import ConfigError, nearest


@cache
def _runs() -> dict[str, Tree]:
    """Returns every preset as a run's tree without `data.path`."""
    book = read_yaml(Path(__file__).with_name("presets.yaml"))
    families = {size: _family(size, run, book["variants"]) for size, run in book["families"].items()}
    return {**families["2b"], **book["models"], **families["tiny"], **families["mini"]}


def _family(size: str, run: Tree, variants: dict[str, Tree]) -> dict[str, Tree]:
    """Returns all variants at one size: same depth, width, attention and vocabulary, only the FFN differs."""
    standard, model, family = run.pop("standard_width"), run["model"], {}
    for variant, ffn in variants.items():
        width = int(standard * ffn["nominal_size"])
        if ffn["nominal_size"] in (1.2, 1.5):  # these apply to 8/3 hidden_size, like the counts that the paper prints
            width = 4 * round(2 / 3 * model["hidden_size"] * ffn["nominal_size"])
        key = "intermediate_size" if ffn.get("kind") == "dense" else "moe_intermediate_size"
        family[family_name(size, variant)] = {**run, "model": {**model, "ffn": {**ffn, key: width}}}
    return family


def family_name(size: str, variant: str) -> str:
    """Returns the preset's name of a variant at a size: tiny-gshard-x1.5, but gshard-2b-x1.5 for the paper's own."""
    kind, *rest = variant.split("-")
    return "-".join([kind, size, *rest] if size == "2b" else [size, variant])


def preset_names() -> list[str]:
    """Returns the names of all presets, the paper's 2B comparison first."""
    return list(_runs())


@cache
def preset(name: str) -> ModelConfig:
    """Returns the model called `name`; `preset_names()` and `moekit presets` list them."""
    if name not in _runs():
        raise ConfigError(f"there is no preset {name!r}{nearest(name, _runs())}; `moekit presets` lists them")
    return ModelConfig.model_validate(_runs()[name]["model"])


def recipe(name: str) -> dict[str, Any]:
    """Returns the training settings for a preset: a run's tree without `model` and `data.path`."""
    preset(name)
    return deepcopy({key: value for key, value in _runs()[name].items() if key != "model"})


def summary(config: ModelConfig) -> str:
    """Returns one line on a model's shape, for a list of presets."""
    ffn, attention = config.ffn, config.attention.kind.upper()
    shape = f"{config.num_hidden_layers} layers of {config.hidden_size}, {attention}"
    if ffn.kind == "dense":
        return f"{shape}; dense FFN of width {ffn.intermediate_size}"
    if isinstance(ffn, MEOConfig):
        chosen = f"{ffn.num_experts_per_tok} of {ffn.n_routed_experts} experts of each linear map"
        mixed = "merged" if ffn.mode == "merge" else "dispatched to"
        return f"{shape}; {chosen}, width {ffn.intermediate_size}, {mixed} by {ffn.level}"
    if ffn.kind != "moe":
        return f"{shape}; {ffn.n_routed_experts} experts of width {ffn.intermediate_size}, {ffn.kind}"
    chosen = f"{ffn.num_experts_per_tok} of {ffn.n_routed_experts} experts of width {ffn.moe_intermediate_size}"
    shared = f" + {ffn.n_shared_experts} shared" if ffn.n_shared_experts else ""
    return f"{shape}; {chosen}{shared}{', chosen by a hash' if ffn.topk_method == 'hash' else ''}"
