"""Configurations from presets, YAML files and dotted overrides, and back to YAML.

A file may start from a preset: `preset: NAME` at the top takes the model and its training settings, `preset: NAME`
under `model` takes the model only; every other key of the file goes on top. A file's part or an override that changes a
`kind` replaces that part, so keys of the former kind do not linger; `optimizer` and `schedule` keep the keys that the
new kind has too.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, get_args, get_origin

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from moekit.config.model import ModelConfig, Strict
from moekit.config.presets import MODELS, preset, recipe
from moekit.config.run import RunConfig
from moekit.errors import ConfigError, nearest

Tree = dict[str, Any]
_Config = TypeVar("_Config", bound=Strict)

_KINDS = ModelConfig.default_kinds | RunConfig.default_kinds
_KEPT = {
    part: {kind.model_fields["kind"].default: kind.model_fields.keys() for kind in get_args(field.annotation)}
    for part, field in RunConfig.model_fields.items()
    if part in RunConfig.default_kinds
}
"""Parts of a run, their kinds, and the settings of each. `lr` means the same in all of them; in a model's parts equal
names do not (`intermediate_size`)."""


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads 1e-3 as a number (PyYAML does not) and refuses a key that is given twice."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"key {key.value!r} is given twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes the strings that `_Loader` would read as numbers."""


_FLOAT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$")
for _yaml_class in (_Loader, _Dumper):
    _yaml_class.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


class Key(NamedTuple):
    """One setting, as help texts and docs show it."""

    key: str
    type: str
    default: str
    description: str
    """Begins with [kind] where the setting exists for some kinds of its part only."""


def load_run_config(
    source: str | Path, overrides: Mapping[str, str] | None = None, *, template: bool = False, **fixed: Any
) -> RunConfig:
    """Returns the run that a preset name or a YAML file describes, with overrides on top.

    `overrides` maps dotted keys to YAML text ("model.ffn.n_routed_experts": "64"); `fixed` maps dotted keys to values
    as they are, and wins. With `template` a run that names no data gets the text DATA for `data.path`.
    """
    base: Tree = {"data": {"path": "DATA"}} if template else {}
    for tree in (_source(source), parse_overrides(overrides or {}), _nest(fixed)):
        base = _merge(base, tree)
    return validate(RunConfig, base, _origin(source))


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
    if "model" not in tree:
        raise ConfigError(f"{_origin(source)}model is missing; give its settings or `preset: NAME`")
    return validate(ModelConfig, _merge(tree, given)["model"], _origin(source))


def dump(config: Strict, comments: bool = False) -> str:
    """Returns YAML that loads to an equal config; with `comments` each setting's description stands behind it."""
    return "".join(_lines(config, 0, comments))


def describe_keys() -> list[Key]:
    """Returns every setting of a run, in the order of the YAML file: dotted key, type, default, description."""
    merged: dict[Key, list[str]] = {}
    kinds_of = {}
    for key, kind, kinds in _walk(RunConfig, ""):
        merged.setdefault(key, []).append(kind)
        kinds_of[key.key] = kinds
    return [
        key if len(given) == kinds_of[key.key] else key._replace(description=f"[{', '.join(given)}] {key.description}")
        for key, given in merged.items()
    ]


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
            values[key] = yaml.load(text, _Loader)
        except yaml.YAMLError:
            raise ConfigError(f"--{key} is {text!r}, which is not a YAML value; quote it if it is text") from None
    return _nest(values)


def read_yaml(path: Path) -> Tree:
    """Returns the mapping in a YAML file; anything else is a ConfigError naming file and line."""
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text: byte {error.start}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}{_problem(error)}") from None
    if not isinstance(tree, dict):
        found = "empty" if tree is None else f"a {type(tree).__name__}"
        raise ConfigError(f"{path} is {found}; a configuration is a mapping of settings, see `moekit train --help`")
    return tree


def _problem(error: yaml.YAMLError) -> str:
    """Returns ":line: what is wrong", or what is wrong where the parser names no line."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        return f":{error.problem_mark.line + 1}: {error.problem}"
    return f": {str(error).splitlines()[0]}"


def _origin(source: str | Path) -> str:
    return "" if str(source) in MODELS else f"{source}: "


def _source(source: str | Path) -> Tree:
    """Returns the tree of a preset or a file, presets inside it expanded."""
    name, path = str(source), Path(source)
    if name in MODELS:
        return _expand({"preset": name})
    if path.exists() or path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        return _expand(read_yaml(path))
    raise ConfigError(f"there is no preset or file {name!r}{nearest(name, MODELS)}; `moekit presets` lists the presets")


def _expand(tree: Tree) -> Tree:
    """Returns the tree with `preset`, at the top and under `model`, replaced by what it stands for."""
    rest = {key: value for key, value in tree.items() if key != "preset"}
    model = rest.get("model")
    if isinstance(model, dict) and "preset" in model:
        own = {key: value for key, value in model.items() if key != "preset"}
        rest["model"] = _merge(preset(str(model["preset"])).model_dump(), own)
    if "preset" not in tree:
        return rest
    name = str(tree["preset"])
    return _merge({"model": preset(name).model_dump(), **recipe(name)}, rest)


def _nest(values: Mapping[str, Any]) -> Tree:
    tree: Tree = {}
    for key, value in values.items():
        *parents, leaf = key.split(".")
        part = tree
        for parent in parents:
            part = part.setdefault(parent, {})
            if not isinstance(part, dict):
                raise ConfigError(f"--{key} is given, but so is a value for {parent} as a whole; give one of them")
        old = part.get(leaf)
        if isinstance(old, dict) and not isinstance(value, dict):
            raise ConfigError(f"--{key} is given as a whole, but so are settings inside it; give one of them")
        part[leaf] = _merge(old, value) if isinstance(old, dict) else value
    return tree


def _merge(base: Tree, over: Tree) -> Tree:
    """Returns `base` with `over` on top, part by part; of a part whose kind changes only `_KEPT` stays."""
    merged = dict(base)
    for key, value in over.items():
        old = base.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            former = old.get("kind", _KINDS.get(key))
            if (kind := value.get("kind", former)) != former:
                kept = _KEPT.get(key, {}).get(str(kind), ())
                old = {name: setting for name, setting in old.items() if name in kept}
            merged[key] = _merge(old, value)
        else:
            merged[key] = value
    return merged


def validate(schema: type[_Config], tree: Any, origin: str = "") -> _Config:
    """Returns the tree as a configuration, or raises one ConfigError that begins with `origin`, a file say."""
    prefix = "model" if schema is ModelConfig else ""
    try:
        return schema.model_validate(tree)
    except ValidationError as error:
        errors = error.errors(include_url=False)
        # a misspelt key is reported as unknown and as missing; the unknown one is what the user wrote
        first = min(errors, key=lambda details: details["type"] != "extra_forbidden")
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        raise ConfigError(f"{origin}{_explain(first, prefix)}{more}") from None


def _explain(error: ErrorDetails, prefix: str) -> str:
    """Returns one line for one of pydantic's errors: the dotted field, what was found, what is allowed."""
    path, tag_follows = [prefix] if prefix else [], False
    for name in error["loc"]:
        if tag_follows:  # behind a part with kinds pydantic names the kind, which is no key
            tag_follows = False
            continue
        path.append(str(name))
        tag_follows = ".".join([*path, "kind"]) in {key.key for key in _KEYS}
    key, found, message = ".".join(path), error["input"], error["msg"]
    match error["type"]:
        case "extra_forbidden":
            return _unknown(key)
        case "missing":
            found = [f"{k.description} ({k.type})" for k in _KEYS if k.key == key and k.default == "required"]
            return f"{key} is missing: {found[0].rpartition('] ')[2] if found else 'give its settings'}"
        case "value_error":  # our own checks begin with the field's name
            return ".".join([*path, str(error["ctx"]["error"])])
        case "union_tag_invalid" | "union_tag_not_found":
            allowed = next(k.type for k in _KEYS if k.key == f"{key}.kind").split(" | ")
            kind = found.get("kind") if isinstance(found, dict) else None
            return f"{key}.kind is {_show(kind)}{nearest(str(kind), allowed)}; allowed: {', '.join(allowed)}"
        case "literal_error":
            allowed = re.findall(r"'([^']*)'", error["ctx"]["expected"])
            return f"{key} is {_show(found)}{nearest(str(found), allowed)}; allowed: {', '.join(allowed)}"
        case "model_type" | "model_attributes_type" | "dict_type":
            return f"{key or 'the file'} is {_show(found)} but must be a mapping of settings"
        case "invalid_key":
            return f"{key} is not the name of a setting; names are text"
    return f"{key} is {_show(found)} but {message.replace('Input should be', 'must be', 1)}"


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


def _lines(config: Strict, depth: int, comments: bool) -> Iterator[str]:
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        part = isinstance(value, Strict)
        line = f"{'  ' * depth}{name}:" + ("" if part else f" {_scalar(value)}")
        yield f"{line:<44}  # {field.description}\n" if comments else f"{line}\n"
        if part:
            yield from _lines(value, depth + 1, comments)


def _scalar(value: Any) -> str:
    style = '"' if isinstance(value, str) and not value.isprintable() else None
    text: str = yaml.dump(value, Dumper=_Dumper, default_style=style, allow_unicode=True, width=2**31)
    return text.removesuffix("...\n").strip()


def _walk(schema: type[Strict], prefix: str, kind: str = "", kinds: int = 1) -> Iterator[tuple[Key, str, int]]:
    """Yields every setting below `schema` with the kind of the part it belongs to, and how many kinds that part has."""
    for name, field in schema.model_fields.items():
        key, options = prefix + name, get_args(field.annotation) or (field.annotation,)
        parts = [option for option in options if isinstance(option, type) and issubclass(option, Strict)]
        if len(parts) > 1:
            names = [str(part.model_fields["kind"].default) for part in parts]
            default = _KINDS[name] if name in schema.default_kinds else "required"
            yield Key(f"{key}.kind", " | ".join(names), default, str(field.description)), kind, kinds
            for part, part_kind in zip(parts, names, strict=True):
                yield from _walk(part, f"{key}.", part_kind, len(parts))
            continue
        if not (name == "kind" or (parts and type(None) not in options)):
            default = "required" if field.is_required() else _show(field.default).strip('"')
            yield Key(key, _type(field.annotation), default, str(field.description)), kind, kinds
        for part in parts:
            yield from _walk(part, f"{key}.", kind, kinds)


def _type(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return " | ".join(get_args(annotation))
    options = get_args(annotation) or (annotation,)
    names = {type(None): "null"}
    return " | ".join(names.get(o, "mapping" if issubclass(o, Strict) else o.__name__) for o in options)


_KEYS = describe_keys()
