"""Rotary embedding in a config.json: `rope_theta` and `rope_scaling`, or transformers 5's `rope_parameters`."""

import math

from moekit.config import Llama3RopeConfig, ModelConfig, YarnConfig
from moekit.errors import CheckpointError, UnsupportedError
from moekit.formats.layouts.layout import LARGEST, Null, Ours, Part, Values
from moekit.nn.rope import magnitude


def rope(theta: float = 10000.0, *, kinds: tuple[str, ...] = ("yarn", "llama3"), deepseek: bool = False) -> Part:
    """Returns the fields of rotary embedding; `deepseek` for its reading of YaRN's mscale and mscale_all_dim.

    There both are magnitudes, 1 and 0 by default, and the latter scales the softmax. Elsewhere the softmax is not
    scaled, and the magnitude of cos and sin is `attention_factor`, by default 0.1 ln(factor) + 1, or the ratio of both
    if both are given. Written is what all versions read, with `attention_factor` where transformers would take another.
    """

    def read(values: Values) -> Ours:
        scaling, parameters = values["rope_scaling"], values["rope_parameters"]
        if scaling and parameters and scaling != parameters:
            raise CheckpointError("rope_scaling and rope_parameters are both given and differ; keep one of them")
        given = dict(scaling or parameters or {})
        types = {given.pop(key) for key in ("rope_type", "type") if isinstance(given.get(key), str)} or {"default"}
        if len(types) > 1 or not types <= {"default", *kinds}:
            known = ", ".join(("default", *kinds))
            raise UnsupportedError(f"rope_type is {' and '.join(map(repr, types))} but moekit computes {known} only")
        kind = types.pop()
        if given.pop("truncate", True) is not True:
            raise UnsupportedError("truncate is false but moekit computes YaRN with whole dimensions only")
        for key, value in given.items():
            if not isinstance(value, int | float | None) or isinstance(value, bool):
                raise UnsupportedError(f"{key} of rope_type {kind} is {value!r} but moekit knows numbers there only")
        given = {key: value for key, value in given.items() if value is not None}
        for factor in (values["partial_rotary_factor"], given.pop("partial_rotary_factor", None)):
            if factor not in (None, 1):
                raise UnsupportedError(f"partial_rotary_factor is {factor} but moekit turns whole heads only")
        ours = {"attention.rope.theta": given.pop("rope_theta", values["rope_theta"])}
        if kind != "default":
            length = values["max_position_embeddings"]
            original = given.pop("original_max_position_embeddings", length)
            factor = given.pop("factor", length / max(original, 1))
            if not 1 < factor < LARGEST:
                raise UnsupportedError(f"factor of rope_type {kind} is {factor} but moekit extends a context only")
            settings: Values = {"factor": factor, "original_max_position_embeddings": original}
            settings |= _yarn(given, factor, deepseek) if kind == "yarn" else {}
            wanted = YarnConfig if kind == "yarn" else Llama3RopeConfig
            settings |= {key: given.pop(key) for key in list(given) if key in wanted.model_fields}
            ours |= {f"attention.rope.{kind}.{key}": value for key, value in settings.items()}
        if given:
            raise UnsupportedError(f"{min(given)} is a setting of rope_type {kind} that moekit does not know")
        return ours

    def write(config: ModelConfig) -> Values:
        ours, scaling = config.attention.rope, None
        if ours.yarn is not None or ours.llama3 is not None:
            kind, settings = ("yarn", ours.yarn) if ours.yarn is not None else ("llama3", ours.llama3)
            assert settings is not None
            scaling = {"rope_type": kind, "type": kind, **settings.model_dump()}
            if isinstance(settings, YarnConfig):
                scaling |= _attention_factor(settings, deepseek)
                if not deepseek:
                    del scaling["mscale"], scaling["mscale_all_dim"]
        return {"rope_theta": ours.theta, "rope_scaling": scaling}

    defaults: Values = {"rope_theta": theta, "partial_rotary_factor": Null(float)}
    defaults |= dict.fromkeys(("rope_scaling", "rope_parameters"), Null(dict))
    return Part(defaults, read, write)


def _yarn(given: Values, factor: float, deepseek: bool) -> Values:
    """Takes the magnitudes out of `given` and returns them as ours."""
    mscale, all_dim = given.pop("mscale", None), given.pop("mscale_all_dim", None)
    ratio = given.pop("attention_factor", None)
    if deepseek:
        ours = {"mscale": 1.0 if mscale is None else mscale, "mscale_all_dim": all_dim or 0.0}
    else:
        ours = {"mscale": 1.0, "mscale_all_dim": 0.0}
        if ratio is None and mscale and all_dim:
            ratio = magnitude(factor, mscale) / magnitude(factor, all_dim)
    if ratio is not None:
        below = magnitude(factor, ours["mscale_all_dim"])
        if not math.isclose(magnitude(factor, ours["mscale"]) / below, ratio, rel_tol=1e-12):
            ours["mscale"] = (ratio * below - 1) / (0.1 * math.log(factor))
    return ours


def _attention_factor(yarn: YarnConfig, deepseek: bool) -> Values:
    """Returns the magnitude of cos and sin, where transformers would not find the same."""
    ratio = magnitude(yarn.factor, yarn.mscale) / magnitude(yarn.factor, yarn.mscale_all_dim)
    found = ratio if deepseek and yarn.mscale and yarn.mscale_all_dim else magnitude(yarn.factor, 1.0)
    return {} if found == ratio else {"attention_factor": ratio}
