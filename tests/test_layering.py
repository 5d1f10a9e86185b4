"""Imports only go down. The layers, from the bottom, are those of the design."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).parents[1] / "moekit"
LAYERS: list[set[str]] = [
    {"config", "errors", "files", "page", "pictures", "shapes", "tables", "version"},
    {"ops"},
    {"nn"},
    {"receipts"},
    {"formats"},
    {"data"},
    {"train", "generate", "hf", "upcycle"},
    {"evaluate", "start"},
    {"inspect"},
    {"compare"},
    {"doctor"},
    {"quickstart"},
    {"cli"},
    {"__main__", "__init__"},
]
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}
MAY_IMPORT_LATE = ("moekit.cli", "moekit.ops.experts")


class Import(NamedTuple):
    source: str
    target: str
    line: int
    inside_function: bool


def _module(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {_module(path): path for path in PACKAGE.rglob("*.py")}


def _part(module: str) -> str:
    return [*module.split("."), "__init__"][1]


def _targets(node: ast.Import | ast.ImportFrom, source: str) -> Iterator[str]:
    """Yields the modules of moekit that one statement names."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "moekit")
        return
    base = node.module or ""
    if node.level:
        package = source.split(".") if FILES[source].name == "__init__.py" else source.split(".")[:-1]
        base = ".".join([*package[: len(package) - node.level + 1], *base.split(".")]).rstrip(".")
    if base.split(".")[0] == "moekit":
        for alias in node.names:
            yield f"{base}.{alias.name}" if f"{base}.{alias.name}" in FILES else base


def _walk(node: ast.AST, source: str, inside: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            continue
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield from (Import(source, target, child.lineno, inside) for target in _targets(child, source))
        is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from _walk(child, source, inside or is_function)


@cache
def _imports() -> list[Import]:
    return [
        found
        for module, path in FILES.items()
        for found in _walk(ast.parse(path.read_text(encoding="utf-8")), module, False)
    ]


def test_the_reader_of_imports_sees_them() -> None:
    edges = {(found.source, found.target) for found in _imports()}
    assert ("moekit.config.model", "moekit.config.counts") in edges
    assert ("moekit.config.presets", "moekit.errors") in edges
    assert any(found.inside_function for found in _imports() if found.source == "moekit.cli.plan")


def test_every_part_of_the_package_has_a_layer() -> None:
    assert {_part(module) for module in FILES} <= LEVEL.keys()


def test_imports_only_go_down() -> None:
    wrong = [found for found in _imports() if LEVEL[_part(found.target)] > LEVEL[_part(found.source)]]
    assert not wrong, wrong


def test_parts_of_one_layer_do_not_import_each_other() -> None:
    bottom = LAYERS[0] | LAYERS[-1]
    wrong = [
        found
        for found in _imports()
        if (source := _part(found.source)) != (target := _part(found.target))
        and LEVEL[source] == LEVEL[target]
        and not {source, target} <= bottom
    ]
    assert not wrong, wrong


def test_nothing_is_imported_inside_a_function_but_where_it_is_allowed() -> None:
    wrong = [found for found in _imports() if found.inside_function and not found.source.startswith(MAY_IMPORT_LATE)]
    assert not wrong, wrong


def test_imports_have_no_cycle() -> None:
    graph: dict[str, set[str]] = {module: set() for module in FILES}
    for found in _imports():
        graph[found.source].add(found.target)
    TopologicalSorter(graph).prepare()  # raises CycleError with the cycle


@pytest.mark.parametrize(
    ("code", "heavy"),
    [
        ("import moekit", "torch pydantic numpy"),
        ("import moekit.config", "torch numpy"),
        ("from moekit.cli import main; assert main(['--help']) == 0", "torch pydantic numpy"),
        ("from moekit.cli import main; assert main(['--version']) == 0", "torch pydantic numpy rich"),
        ("from moekit.cli import main; assert main(['plan', 'tiny-dense', '--json']) == 0", "torch numpy"),
        ("from moekit.cli import main; assert main(['train', '--help']) == 0", "torch numpy"),
    ],
)
def test_what_must_be_fast_imports_nothing_heavy(code: str, heavy: str) -> None:
    check = f"import sys; {code}; sys.exit(str(sys.modules.keys() & set({heavy!r}.split()) or ''))"
    done = subprocess.run([sys.executable, "-c", check], cwd=PACKAGE.parent, capture_output=True, text=True)
    assert done.stderr.strip() == ""


def test_kernels_are_imported_by_ops_alone() -> None:
    uses = {one.source for one in _imports() if one.target.startswith("moekit.ops.kernels")}
    assert "moekit.ops.experts" in uses
    assert all(source.startswith("moekit.ops.") for source in uses)
