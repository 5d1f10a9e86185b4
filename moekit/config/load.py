"""Configurations from presets, YAML files and dotted overrides, and back to YAML.

A file may start from a preset: `preset: NAME` at the top takes the model and its training settings, `preset: NAME`
under `model` takes the model only; every other key of the file goes on top. A file's part or an override that changes a
`kind` replaces that part, so keys of the former kind do not linger; `optimizer` and `schedule` keep the keys that the
new kind has too.
"""

import json
import re
from collections.abc import Iterator, Mapping
from functools import reduce
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, get_args, get_origin

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from moekit.config.files import Tree, parse_yaml, read_yaml, write_yaml
from moekit.config.model import ModelConfig
from moekit.config.presets import preset, preset_names, recipe
from moekit.config.run import RunConfig
from moekit.config.strict import Strict
from moekit.errors import ConfigError, nearest

_Config = TypeVar("_Config", bound=Strict)

_KINDS = ModelConfig.default_kinds | RunConfig.default_kinds
_KEPT = {
    (part, kind.model_fields["kind"].default): kind.model_fields.keys()
    for part in RunConfig.default_kinds
    for kind in get_args(RunConfig.model_fields[part].annotation)
}
"""The settings of each kind of a run's parts. `lr` means the same in all of them; in a model's parts equal names do not
(`intermediate_size`)."""


class Key(NamedTuple):
    """One setting, as help texts and docs show it."""

    key: str
    type: str
    default: str
    description: str
    """Begins with [kind] where the setting exists for some kinds of its part only."""


def load_run_config(
    source: str | Path | None,
    overrides: Mapping[str, str] | None = None,
    *,
    template: bool = False,
    model: ModelConfig | None = None,
    **fixed: Any,
) -> RunConfig:
    """Returns the run that a preset name or a YAML file describes, with overrides on top.

    `overrides` maps dotted keys to YAML text ("model.ffn.n_routed_experts": "64"); `fixed` maps dotted keys to values
    as they are, and wins. With `template` a run that names no data gets the text DATA for `data.path`. `model` is what
    the source and the overrides go on top of; with it there need be no source.
    """
    base: Tree = {"data": {"path": "DATA"}} if template else {}
    if model is not None:
        base["model"] = model.model_dump()
    for tree in ({} if source is None else _source(source), parse_overrides(overrides or {}), _nest(fixed)):
        base = _merge(base, tree)
    return validate(RunConfig, base, "" if source is None else _origin(source))


def run_tree(source: str | Path | Tree, *over: Tree) -> Tree:
    """Returns the tree of a preset, of a file, or of a tree that may name presets, with `over` on top, part by part."""
    return reduce(_merge, over, _expand(source) if isinstance(source, dict) else _source(source))


def load_model_config(source: str | Path, overrides: Mapping[str, str] | None = None) -> ModelConfig:
    """Returns the model that a preset name, a run's YAML file or a model's own YAML file describes.

    Override keys begin with `model.`, as they do for a run.
    """
    tree, given = _source(source), parse_overrides(overrides or {})
    if "model" not in tree and tree.keys() & ModelConfig.model_fields.keys():
        tree = {"model": tree}
    for key in tree.keys() - RunConfig.model_fields.keys():
        raise ConfigError(f"{_origin(source)}{_unknown(key)}")
    for key in given.keys() - {"model"}:
        raise ConfigError(f"--{key} is no setting of a model; overrides here begin with --model.")
    return validate(ModelConfig, _merge(tree, given).get("model", {}), _origin(source))


def dump(config: Strict, comments: bool = False) -> str:
    """Returns YAML that loads to an equal config; with `comments` each setting's description stands behind it."""
    text = write_yaml(config.model_dump())
    if not comments:
        return text
    described = zip(text.splitlines(), _descriptions(config), strict=True)
    return "".join(f"{line:<44}  # {description}\n" for line, description in described)


def _descriptions(config: Strict) -> Iterator[str | None]:
    for name, field in type(config).model_fields.items():
        yield field.description
        if isinstance(part := getattr(config, name), Strict):
            yield from _descriptions(part)


def describe_keys(schema: type[Strict] = RunConfig, prefix: str = "") -> list[Key]:
    """Returns every setting of a run, in the order of the YAML file: dotted key, type, default, description."""
    keys: list[Key] = []
    for name, field in schema.model_fields.items():
        key, description = prefix + name, str(field.description)
        options = get_args(field.annotation) or (field.annotation,)
        parts = [option for option in options if isinstance(option, type) and issubclass(option, Strict)]
        kinds = [str(part.model_fields["kind"].default) for part in parts if "kind" in part.model_fields]
        if kinds:
            keys.append(Key(f"{key}.kind", " | ".join(kinds), schema.default_kinds[name], description))
        elif name != "kind" and (not parts or type(None) in options):
            default = "required" if field.is_required() else _show(field.default).strip('"')
            keys.append(Key(key, _type(field.annotation), default, description))
        inside = [describe_keys(part, f"{key}.") for part in parts]
        for setting in dict.fromkeys(chain(*inside)):
            known = [kind for kind, settings in zip(kinds, inside, strict=False) if setting in settings]
            note = f"[{', '.join(known)}] " if len(known) < len(kinds) else ""
            keys.append(setting._replace(description=note + setting.description))
    return keys


def _type(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return " | ".join(get_args(annotation))
    if get_origin(annotation) is tuple:
        return "list"
    if options := get_args(annotation):
        return " | ".join(map(_type, options))
    return "null" if annotation is type(None) else "mapping" if issubclass(annotation, Strict) else annotation.__name__


def where(name: str) -> str:
    """Returns "; NAME is a.b.NAME" for a setting that exists under a dotted key, or a near miss, or an empty string."""
    leaf = name.rpartition(".")[2]
    homes = list(dict.fromkeys(key.key for key in _KEYS if key.key.rpartition(".")[2] == leaf and key.key != name))
    return f"; {leaf} is {' or '.join(homes)}" if homes else nearest(leaf, [k.key.rpartition(".")[2] for k in _KEYS])


def parse_overrides(overrides: Mapping[str, str]) -> Tree:
    """Returns the nested tree of dotted keys, each value read as YAML: numbers, true, null, lists, mappings."""
    values = {}
    for key, text in overrides.items():
        try:
            values[key] = parse_yaml(text)
        except yaml.YAMLError:
            raise ConfigError(f"--{key} is {text!r}, which is not a YAML value; quote it if it is text") from None
    return _nest(values)


def _origin(source: str | Path) -> str:
    return "" if str(source) in preset_names() else f"{source}: "


def _source(source: str | Path) -> Tree:
    """Returns the tree of a preset or a file, presets inside it expanded."""
    name, path = str(source), Path(source)
    if name in preset_names():
        return _expand({"preset": name})
    if path.exists() or path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        return _expand(read_yaml(path), _origin(path))
    hint = nearest(name, preset_names())
    raise ConfigError(f"there is no preset or file {name!r}{hint}; `moekit presets` lists the presets")


def _expand(tree: Tree, origin: str = "") -> Tree:
    """Returns the tree with `preset`, at the top and under `model`, replaced by what it stands for."""
    base: Tree = {}
    if "preset" in tree:
        tree = dict(tree)
        name = _known(tree.pop("preset"), f"{origin}preset")
        base = {"model": preset(name).model_dump(), **recipe(name)}
    if isinstance(tree.get("model"), dict) and "preset" in tree["model"]:
        own = dict(tree["model"])
        base["model"] = preset(_known(own.pop("preset"), f"{origin}model.preset")).model_dump()
        tree = {**tree, "model": own}
    return _merge(base, tree)


def _known(name: Any, field: str) -> str:
    if not isinstance(name, str):
        raise ConfigError(f"{field} is {_show(name)} but must be the name of a preset; `moekit presets` lists them")
    if name not in preset_names():
        hint = nearest(name, preset_names())
        raise ConfigError(f"{field} is {_show(name)}, which is none{hint}; `moekit presets` lists them")
    return name


def _nest(values: Mapping[str, Any]) -> Tree:
    tree: Tree = {}
    for key, value in sorted(values.items()):  # a part as a whole comes before the settings inside it
        *parents, leaf = key.split(".")
        part = tree
        for parent in parents:
            part = part.setdefault(parent, {})
            if not isinstance(part, dict):
                raise ConfigError(f"--{key} is given, but so is a value for {parent} as a whole; give one of them")
        part[leaf] = value
    return tree


def _merge(base: Tree, over: Tree) -> Tree:
    """Returns `base` with `over` on top, part by part; of a part whose kind changes only `_KEPT` stays."""
    merged = base | over
    for key in base.keys() & over.keys():
        old, new = base[key], over[key]
        if isinstance(old, dict) and isinstance(new, dict):
            former = old.get("kind", _KINDS.get(key))
            if (kind := new.get("kind", former)) != former:
                kept = _KEPT.get((key, str(kind)), ())
                old = {name: setting for name, setting in old.items() if name in kept}
            merged[key] = _merge(old, new)
    return merged


def validate(schema: type[_Config], tree: Any, origin: str = "") -> _Config:
    """Returns the tree as a configuration, or raises one ConfigError that begins with `origin`, a file say."""
    try:
        return schema.model_validate(tree)
    except ValidationError as error:
        errors = error.errors(include_url=False)
        # a misspelt key is reported as unknown and as missing; the unknown one is what the user wrote
        first = min(errors, key=lambda details: details["type"] != "extra_forbidden")
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        raise ConfigError(f"{origin}{_explain(first, 'model' if schema is ModelConfig else '')}{more}") from None


def _explain(error: ErrorDetails, root: str) -> str:
    """Returns one line for one of pydantic's errors below `root`: the dotted field, what was found, what is allowed."""
    names = [root, *map(str, error["loc"])]
    path = [name for parent, name in pairwise(["", *names]) if name and (parent, name) not in _TAGS]
    key, found, context = ".".join(path), error["input"], error.get("ctx", {})
    match error["type"]:
        case "extra_forbidden" | "invalid_key":
            return _unknown(key)
        case "missing":
            wanted = [f"{k.description} ({k.type})" for k in _KEYS if k.key == key and k.default == "required"]
            return f"{key} is missing: {wanted[0].rpartition('] ')[2] if wanted else 'give its settings'}"
        case "value_error":  # our own checks begin with the field's name
            return ".".join([*path, str(context["error"])])
        case "literal_error":
            return _choose(key, found, re.findall(r"'([^']*)'", context["expected"]))
        case "union_tag_invalid" | "union_tag_not_found":
            key = f"{key}.kind"
            return _choose(key, found.get("kind"), next(k.type for k in _KEYS if k.key == key).split(" | "))
        case "model_type" | "model_attributes_type" | "dict_type":
            return f"{key or 'the file'} is {_show(found)} but must be a mapping of settings"
    return f"{key} is {_show(found)} but {error['msg'].replace('Input should be', 'must be', 1)}"


def _choose(key: str, found: Any, allowed: list[str]) -> str:
    return f"{key} is {_show(found)}{nearest(str(found), allowed)}; allowed: {', '.join(allowed)}"


def _unknown(key: str) -> str:
    """Returns one line on a key that does not exist at its level: the nearest that does, or where it does exist."""
    parent, _, leaf = key.rpartition(".")
    if kinds := [k.description.partition("]")[0][1:] for k in _KEYS if k.key == key]:
        return f"{key} is a setting of {parent}.kind {' and '.join(kinds)} only"
    start = f"{parent}." if parent else ""
    level = [k.key.removeprefix(start).partition(".")[0] for k in _KEYS if k.key.startswith(start)]
    return f"{key} is not a setting{nearest(leaf, level) or where(key)}"


def _show(value: Any) -> str:
    """Returns a value as YAML would spell it, cut to a glance."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


_KEYS = describe_keys()
_TAGS = {(k.key.split(".")[-2], kind) for k in _KEYS if k.key.endswith(".kind") for kind in k.type.split(" | ")}
"""(part, kind): behind a part with kinds pydantic's locations name the kind, which is no key."""
