"""Labelled sentences and pairs, from files of one example a line: GLUE's (arXiv 1804.07461), and any like them."""

import csv
import gzip
import io
import math
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

from moekit.config import SentencesObjective
from moekit.errors import ConfigError, DataError, nearest


class Example(NamedTuple):
    """One line."""

    text: str
    pair: str | None
    label: float
    """The number of its label, or a number itself."""


class Format(NamedTuple):
    """How files are read, and what is measured on them. A column is a name, or without header a number from 1."""

    text: str
    label: str
    labels: tuple[str, ...]
    """In order; the last one is the positive class of F1. Empty: the label is a number."""
    pair: str | None = None
    header: bool = True
    separator: str = "tab"
    quoted: bool = False
    train: tuple[str, ...] = ("train.tsv",)
    valid: tuple[str, ...] = ("dev.tsv",)
    metrics: tuple[str, ...] = ("accuracy",)


_BINARY = ("0", "1")
_CORRELATIONS = ("pearson", "spearman")
_COLA = Format("4", "2", _BINARY, header=False, metrics=("matthews",))
_STSB = Format("sentence1", "score", (), "sentence2", metrics=_CORRELATIONS)
TASKS: dict[str, tuple[Format, ...]] = {
    "sst2": (Format("sentence", "label", _BINARY),),
    "cola": (
        _COLA,
        _COLA._replace(train=("in_domain_train.tsv",), valid=("in_domain_dev.tsv", "out_of_domain_dev.tsv")),
    ),
    "rte": (Format("sentence1", "label", ("entailment", "not_entailment"), "sentence2"),),
    "mrpc": (Format("#1 String", "Quality", _BINARY, "#2 String", metrics=("f1", "accuracy")),),
    "stsb": (
        _STSB,
        Format("1", "3", (), "2", False, "comma", True, ("stsb-en-train.csv",), ("stsb-en-dev.csv",), _CORRELATIONS),
    ),
}
"""How the files of a task come: as GLUE has them, or as their authors publish them. The first whose files are there."""


def layout(objective: SentencesObjective, path: Path) -> tuple[Path, Format]:
    """Returns the folder of the files, and how they are read: as the task says, the objective's own settings on top.

    `path` is that folder, or the file to learn from.
    """
    if not path.exists():
        raise DataError(f"{path} does not exist; data.path is a folder of TSV files, or one of them")
    comma = None
    if path.is_file():
        if objective.train is not None:
            raise ConfigError(f"objective.train is given but data.path is a file, {path}; leave one of them out")
        comma = ".csv" in path.suffixes
        path, objective = path.parent, objective.model_copy(update={"train": (path.name,)})
    if objective.task is not None:
        known = TASKS[objective.task]
        fitting = [
            one
            for one in known
            if (
                all(_found(path / name) for name in one.train) if comma is None else comma == (one.separator == "comma")
            )
        ]
        base = next(iter(fitting), known[0])
    else:
        base = Format("text", "label", ())
        if objective.labels is None:
            raise ConfigError("objective.labels is missing: the labels as the file spells them, or [] for numbers")
    given = {name: value for name in Format._fields if (value := getattr(objective, name)) is not None}
    found = base._replace(**given)
    if not found.labels and objective.metrics is None:
        found = found._replace(metrics=_CORRELATIONS)
    _check(found)
    return path, found


def _check(found: Format) -> None:
    """Raises ConfigError where a setting contradicts another."""
    numbers = {"pearson", "spearman"}
    for metric in found.metrics:
        if (metric in numbers) == bool(found.labels):
            raise ConfigError(f"objective.metrics has {metric}, which is of {'numbers' if found.labels else 'labels'}")
        if metric == "f1" and len(found.labels) != 2:
            raise ConfigError(f"objective.metrics has f1 but there are {len(found.labels)} labels; it is of two")
    if len(set(found.labels)) < len(found.labels) or len(found.labels) == 1:
        raise ConfigError(f"objective.labels is {list(found.labels)}; give two or more that differ, or [] for numbers")
    for name in ("text", "pair", "label"):
        column = getattr(found, name)
        if column is not None and not found.header and not (column.isascii() and column.isdecimal() and int(column)):
            raise ConfigError(f"objective.{name} is {column!r} but without header a column is a number from 1")


def files(path: Path, names: Sequence[str]) -> list[Path]:
    """Returns the files of a folder by these names, each as it is or with .gz; DataError for one that is missing."""
    found = []
    for name in names:
        if (file := _found(path / name)) is None:
            there = [entry.name for entry in path.glob("*")]
            raise DataError(
                f"{path / name} does not exist{nearest(name, there)}; objective.train and .valid name files"
            )
        found.append(file)
    return found


def _found(file: Path) -> Path | None:
    return next((one for one in (file, file.with_name(f"{file.name}.gz")) if one.is_file()), None)


def examples(file: Path, how: Format) -> Iterator[Example]:
    """Yields the examples of a file, past a byte-order mark; DataError, with the line, for what is not one."""
    rows = _rows(file, how)
    columns = _columns(file, how, rows)
    known = {label: float(number) for number, label in enumerate(how.labels)}
    needed, count = max(columns.values()) + 1, 0
    for line, row in rows:
        count += 1
        if len(row) < needed:
            raise DataError(f"{file}:{line}: {len(row)} columns but {needed} are needed")
        text, label = row[columns["text"]], row[columns["label"]]
        if how.labels:
            if label not in known:
                raise DataError(f"{file}:{line}: the label is {label[:50]!r} but must be one of {', '.join(known)}")
            number = known[label]
        else:
            number = _number(label, f"{file}:{line}")
        yield Example(text, row[columns["pair"]] if "pair" in columns else None, number)
    if not count:
        raise DataError(f"{file} has no example")


def _number(text: str, where: str) -> float:
    try:
        if math.isfinite(number := float(text)):
            return number
    except ValueError:
        pass
    raise DataError(f"{where}: the label is {text[:50]!r} but must be a number")


def _columns(file: Path, how: Format, rows: Iterator[tuple[int, list[str]]]) -> dict[str, int]:
    """Returns where each column stands, counted from 0."""
    wanted = {name: column for name in ("text", "pair", "label") if (column := getattr(how, name)) is not None}
    if not how.header:
        return {name: int(column) - 1 for name, column in wanted.items()}
    _, names = next(rows, (1, []))
    for name, column in wanted.items():
        if column not in names:
            found = f"its first line names {', '.join(names)[:200] or 'none'}"
            raise DataError(f"{file} has no column {column!r}{nearest(column, names)}, objective.{name}; {found}")
    return {name: names.index(column) for name, column in wanted.items()}


def _rows(file: Path, how: Format) -> Iterator[tuple[int, list[str]]]:
    """Yields the fields of each line that is not empty, with its number."""
    delimiter, line = {"tab": "\t", "comma": ","}[how.separator], 0
    with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as raw:
        stream = io.TextIOWrapper(cast(BinaryIO, raw), "utf-8-sig", newline="\n")
        try:
            if how.quoted:
                reader = csv.reader(stream, delimiter=delimiter, strict=True)
                for row in reader:
                    line = reader.line_num
                    if row:
                        yield line, row
            else:
                for line, text in enumerate(stream, 1):
                    if fields := text.rstrip("\r\n"):
                        yield line, fields.split(delimiter)
        except (csv.Error, UnicodeDecodeError, EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DataError(f"{file}:{line + 1}: {error}") from None
