"""YAML in and out: 1e-3 is a number, a key given twice is an error, and what is written loads to the same values."""

import re
from pathlib import Path
from typing import Any

import yaml

from moekit.errors import ConfigError

Tree = dict[str, Any]


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
    """Quotes the strings that `_Loader` would read as numbers, and keeps every string and list on one line."""

    def represent_str(self, text: str) -> yaml.ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')

    def represent_tuple(self, items: tuple[Any, ...]) -> yaml.SequenceNode:
        return self.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=True)


_Dumper.add_representer(str, _Dumper.represent_str)
_Dumper.add_representer(tuple, _Dumper.represent_tuple)
for _yaml_class in (_Loader, _Dumper):
    _float = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$")
    _yaml_class.add_implicit_resolver("tag:yaml.org,2002:float", _float, list("-+.0123456789"))


def parse_yaml(text: str) -> Any:
    """Returns the value that YAML text stands for; raises yaml.YAMLError."""
    return yaml.load(text, _Loader)


def read_yaml(path: Path) -> Tree:
    """Returns the mapping in a YAML file; anything else is a ConfigError naming file and line."""
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{path}{line}: {error.problem}") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:  # not UTF-8, or a character that YAML does not allow
        raise ConfigError(f"{path}: {str(error).splitlines()[0]}") from None
    if not isinstance(tree, dict):
        found = "empty" if tree is None else f"a {type(tree).__name__}"
        raise ConfigError(f"{path} is {found}; a configuration is a mapping of settings, see `moekit train --help`")
    return tree


def write_yaml(tree: Tree) -> str:
    """Returns YAML with one line per key, in the order of the tree."""
    text: str = yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=2**31)
    return text
