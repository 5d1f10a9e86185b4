"""How a command line is read: argparse, with our errors of one line, and settings of a run as options."""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from moekit.errors import ConfigError, nearest

Add = Callable[..., argparse.Action]
"""`ArgumentParser.add_argument` of a verb."""
DEVICE: dict[str, Any] = {"default": "auto", "help": "auto, cpu, cuda or cuda:N (auto)"}
SHOWN: dict[str, Any] = {"action": "store_true", "help": "print the resolved YAML and exit"}


class Parser(argparse.ArgumentParser):
    """Raises our one-line error instead of printing a usage block."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see `{self.prog} --help`")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """argparse's own, which names no likely one, and is worded by the version of Python."""
        if action.choices is not None and value not in action.choices:
            allowed = [str(choice) for choice in action.choices]
            raise argparse.ArgumentError(
                action, f"{value!r}{nearest(str(value), allowed)}; allowed: {', '.join(allowed)}"
            )


def take_overrides(verb: Parser, words: list[str]) -> tuple[list[str], dict[str, str]]:
    """Returns the words that are the parser's own, and the overrides, `--a.b v` or `--a.b=v`, wherever they stand."""
    known = verb._option_string_actions
    kept: list[str] = []
    overrides: dict[str, str] = {}
    rest = iter(words)
    for word in rest:
        option, equals, value = word.partition("=")
        if not option.startswith("--") or option in known:
            kept.append(word)
            continue
        _check_override(verb, option, known)
        if not equals and (value := next(rest, "--")).startswith("--"):
            raise ConfigError(f"{option} needs a value: `{option} VALUE`")
        overrides[option[2:].replace("-", "_")] = value
    return kept, overrides


def _check_override(verb: Parser, option: str, known: Mapping[str, Any]) -> None:
    """Raises unless the option is an override, dotted or a setting of a run, and the verb takes them."""
    hint = nearest(option.replace("_", "-"), known)
    if verb.get_default("settings") is not None:
        from moekit.config import RunConfig, where

        key = option[2:].replace("-", "_")
        if "." in key or key in RunConfig.model_fields:
            return
        hint = hint or where(key)
    raise ConfigError(f"unknown option {option}{hint}; see `{verb.prog} --help`")


def settings_help(root: str) -> str:
    """Returns all settings below `root`, by part, each as the option that changes it.

    `recipe` is that of a comparison: all but the model and the seed, under that name.
    """
    from moekit.config import describe_keys

    lines = ["settings, each changed by --NAME VALUE, (default):"]
    keys, part = describe_keys(), None
    if root == "recipe":
        keys = [
            key._replace(key=f"recipe.{key.key}") for key in keys if key.key.partition(".")[0] not in ("model", "seed")
        ]
    for key, kind, default, description in keys:
        if not key.startswith(root):
            continue
        if part != (part := key.rpartition(".")[0]):
            lines.append(f"\n{part or 'run'}:")
        lines += [f"  --{key} {kind.replace(' | ', '|')} ({default})", f"        {description}"]
    return "\n".join(lines)


def dtype(text: str) -> str:
    """Returns the name of a dtype that stands in `choices`; the short ones are understood too."""
    return {"fp32": "float32", "fp16": "float16", "half": "float16", "bf16": "bfloat16"}.get(text, text)


def given(text: str) -> str:
    if not text:  # a variable that was never set, say
        raise argparse.ArgumentTypeError("it is empty")
    return text


def path(text: str) -> Path:
    return Path(given(text))  # which would take nothing for the directory that we are in


def whole(text: str) -> int:
    if not text.isascii() or not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)


def positive(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)
