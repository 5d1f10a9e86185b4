"""The documentation is true: its commands and its code run, its links lead somewhere, its lists are the package's.

A command stands behind `$ ` in a console block; lines under it are its output, `...` stands for some of it, and
`$ echo $?` tells the status that it ends with (0 otherwise). All pages share one directory: README first, then the
order of docs/index.md. What an earlier page has run is not run again.
"""

import contextlib
import io
import os
import pkgutil
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from moekit.cli import main, parsers
from moekit.config import describe_keys

ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "docs" / "results"
"""What long runs came to: their commands took hours and are not run here."""
WRITTEN = [path for path in (ROOT / "docs").rglob("*.md") if RECORDS not in path.parents]
LINK = re.compile(r"\]\(([^)\s#:]*)(?:#([\w-]+))?\)")

REDUCED = {
    "moekit quickstart": "--steps 1",
    "moekit train": "--steps 2 --schedule.warmup_steps 0 --data.batch_size 4 --data.sequence_length 32 --eval_tokens 64"
    " --eval_every 2 --save_every 1",
    "moekit compare shared-ratio": "--seeds 0 --recipe.steps 2 --recipe.schedule.warmup_steps 0"
    " --recipe.data.batch_size 4 --recipe.data.sequence_length 32 --recipe.eval_tokens 64",
    "python examples/train_loop.py": "2",
}
"""Added to commands that would take minutes. A resumed run keeps its settings, so there nothing is added."""
COMPARED = ("moekit plan", "moekit presets", "moekit prepare", "moekit compare table1")
"""Their output is the same everywhere, so it is held against the page; so is every error."""
NOT_RUN = {
    "git clone": "needs a network",
    "cd": "the tests have their own directory",
    "python3 -m venv": "needs a network to be of use",
    ". .venv/bin/activate": "the tests have their own environment",
    "pip install": "needs a network",
    "pytest": "this is it",
    "ruff": "run by make lint",
    "mypy": "run by make lint",
    "MOEKIT_TEST_DEVICE=cuda": "needs a GPU",
    "python docs/update.py": "its result is tested below",
}


class Command(NamedTuple):
    """A command of a page, the output shown under it and the exit status claimed."""

    text: str
    shown: tuple[str, ...]
    status: int


class Done(NamedTuple):
    status: int
    output: str
    errors: str


def _pages() -> list[Path]:
    """Returns all pages, in reading order."""
    index = ROOT / "docs" / "index.md"
    listed = [
        (index.parent / target).resolve() for target, _ in LINK.findall(index.read_text(encoding="utf-8")) if target
    ]
    order = [ROOT / "README.md", index, *listed]
    return sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *WRITTEN], key=lambda p: order.index(p))


def _blocks(page: Path) -> list[tuple[str, str]]:
    """Returns (language, content) of every fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def _commands(block: str) -> list[Command]:
    found: list[Command] = []
    for piece in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
        text, _, output = piece.replace("\\\n", " ").partition("\n")
        if text.strip() == "echo $?":
            found[-1] = found[-1]._replace(status=int(output))
        else:
            found.append(Command(" ".join(text.split()), tuple(output.splitlines()), 0))
    return found


def _rule(command: str, table: Any) -> str | None:
    return next((prefix for prefix in table if f"{command} ".startswith(f"{prefix} ")), None)


def _run(command: Command, where: Path) -> Done:
    """Runs a command in `where`, made short where it is long; moekit and the examples in this process, to save time."""
    words = shlex.split(command.text, comments=True)
    words = [found for word in words for found in (sorted(map(str, Path().glob(word))) if "*" in word else [word])]
    rule = _rule(command.text, REDUCED)
    if rule and not command.status and not {"--resume", "--print_config"} & set(words):
        words += shlex.split(REDUCED[rule])
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        if words[0] == "moekit":
            return Done(main(words[1:]), output.getvalue(), errors.getvalue())
        if words[0] == "python" and words[1].startswith("examples/"):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sys, "argv", words[1:])
                runpy.run_path(words[1], run_name="__main__")
            return Done(0, output.getvalue(), errors.getvalue())
    assert words[0] in ("ls", "cat", "head", "make"), f"no rule for running `{command.text}`; add one to NOT_RUN?"
    words = [*words, "--dry-run"] if words[0] == "make" else words
    done = subprocess.run(words, cwd=where, capture_output=True, text=True)
    return Done(done.returncode, done.stdout, done.stderr)


def _assert_shows(output: str, shown: tuple[str, ...], command: str) -> None:
    """Every line that the page shows is in the output, in order."""
    lines = iter([line.rstrip() for line in output.splitlines()])
    for expected in filter(None, (line.rstrip() for line in shown)):
        assert expected == "..." or expected in lines, f"`{command}` no longer prints\n{expected}\nbut\n{output}"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that looks like a clone as far as the pages name its files."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("moekit", "examples", "docs", "Makefile", "constraints.txt", "pyproject.toml"):
        (folder / name).symlink_to(ROOT / name)
    return folder


@pytest.fixture(scope="module")
def already_run() -> dict[str, Done]:
    return {}


@pytest.mark.parametrize("page", _pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_and_code_block_of_a_page_runs(
    page: Path, workplace: Path, already_run: dict[str, Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workplace)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    namespace: dict[str, Any] = {"__name__": page.stem}
    for language, block in _blocks(page):
        if language == "python":
            with contextlib.redirect_stdout(io.StringIO()):
                exec(compile(block, str(page), "exec"), namespace)
        for command in _commands(block) if language in ("console", "bash") else ():
            if _rule(command.text, NOT_RUN):
                continue
            if command.text not in already_run:
                already_run[command.text] = _run(command, workplace)
            done = already_run[command.text]
            assert done.status == command.status, f"`{command.text}` ended with {done.status}\n{done.errors}"
            if command.status or _rule(command.text, COMPARED):
                _assert_shows(done.errors if command.status == 2 else done.output, command.shown, command.text)


def test_every_shell_block_has_a_command() -> None:
    for page in _pages():
        for language, block in _blocks(page):
            assert language not in ("sh", "shell", ""), f"{page.name}: a block without a language cannot be tested"
            assert language not in ("console", "bash") or _commands(block), f"{page.name}: no `$ ` in\n{block}"


def test_every_page_is_in_the_table_of_contents() -> None:
    assert set(WRITTEN) | {ROOT / "README.md", ROOT / "CONTRIBUTING.md"} == set(_pages())


@pytest.mark.parametrize("page", [*_pages(), *RECORDS.rglob("*.md")], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in LINK.findall(page.read_text(encoding="utf-8")):
        file = (page.parent / target) if target else page
        assert file.exists(), f"{page.name} links to {target}, which does not exist"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, f"{page.name} links to #{anchor} of {file.name}, which has no such heading"


@pytest.mark.parametrize("page", _pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_names_of_code_exist(page: Path) -> None:
    settings = {key.key for key in describe_keys()}
    packages = "|".join(path.stem for path in (ROOT / "moekit").iterdir() if path.is_dir() or path.suffix == ".py")
    for name in re.findall(rf"`((?:{packages})(?:\.[a-zA-Z_]\w*)+)", page.read_text(encoding="utf-8")):
        if name not in settings and not name.endswith((".py", ".json", ".tsv", ".yaml")):
            pkgutil.resolve_name(f"moekit.{name}")


def test_the_tree_of_the_readme_is_the_package() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (tree,) = re.findall(r"^```text\n(moekit/\n.*?)^```$", text, re.DOTALL | re.MULTILINE)
    listed, parents = set(), [""]
    for line in tree.splitlines():
        name, clause = re.fullmatch(r"\s*(\S+)\s*(.*)", line).groups()
        depth = (len(line) - len(line.lstrip())) // 2
        parents = [*parents[: depth + 1], f"{parents[depth]}{name}"]
        assert clause or depth == 0, f"{name} has no clause"
        listed.add(parents[-1])
    package = ROOT / "moekit"
    files = {path for path in package.rglob("*.py") if path.name != "__init__.py" or path.parent == package}
    folders = {f"{path.parent.relative_to(ROOT)}/" for path in files}
    found = {str(path.relative_to(ROOT)) for path in files} | folders
    other = {"moekit/quickstart/text/", "moekit/ops/kernels/cpu/", "moekit/evaluate/tasks/"}
    assert {name for name in listed if name.endswith((".py", "/"))} == found | other
    assert all((ROOT / name).exists() for name in listed)


def test_every_verb_has_a_page_that_names_all_its_options() -> None:
    _, verbs = parsers()
    assert {page.stem for page in (ROOT / "docs" / "verbs").glob("*.md")} == set(verbs)
    for verb, parser in verbs.items():
        text = (ROOT / "docs" / "verbs" / f"{verb}.md").read_text(encoding="utf-8")
        options = {option for action in parser._actions for option in action.option_strings}
        missing = sorted(option for option in options - {"-h", "--help"} if f"`{option}" not in text)
        assert not missing, f"docs/verbs/{verb}.md does not name {missing}"


def test_tables_of_settings_and_defaults_are_those_of_the_code() -> None:
    update = runpy.run_path(str(ROOT / "docs" / "update.py"))
    for page in update["TABLES"]:
        text = page.read_text(encoding="utf-8")
        assert update["updated"](page) == text, f"{page.name} is out of date; run `python docs/update.py`"


def test_the_pip_lines_of_the_readme_are_those_of_make() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for target, extras in (("quickstart", "."), ("test", "'.[track,dev]'")):
        words = ["make", "--dry-run", "--always-make", target]
        made = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        assert f"pip install --quiet --constraint constraints.txt --editable {extras}\n" in made
        assert f"$ pip install -c constraints.txt -e {extras}\n" in text
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
