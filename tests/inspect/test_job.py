"""The command from end to end: a small model, the package's text, the report and everything beside it."""

import csv
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moekit.cli import main
from moekit.inspect.job import ANALYSES, _names
from moekit.inspect.text import Window, predictions


class Page(HTMLParser):
    """Fails on a tag that is not closed in order; collects attributes that load or lead somewhere."""

    VOID = ("meta", "br", "input", "image", "use", "path")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "action")]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def model(model_of: Callable[..., Path]) -> Path:
    return model_of()


def inspect(capsys: pytest.CaptureFixture[str], *words: str | Path) -> dict[str, Any]:
    assert main(["inspect", *map(str, words), "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def files_of(text: Path) -> list[Path]:
    return [text / "math_en.jsonl", text / "poetry_zh.jsonl"]


def test_the_report_needs_nothing_and_every_table_lies_beside_it(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ("--text", *files_of(text), "--out", out, "--tokens", "600", "--sequence-length", "50")
    document = inspect(capsys, model, *words, "--trace", "One and </script> two")
    html = (out / "report.html").read_text(encoding="utf-8")
    assert "://" not in html
    assert not re.search(r"<(link|iframe)|@import|url\((?!#)|fetch\(|XMLHttp", html)
    page = Page(html)
    for link in page.links:
        local = link.startswith("data:image/png;base64,") or (link.startswith("#") and link[1:] in page.ids)
        assert local or (out / link).is_file(), link
    assert {path.name for path in out.iterdir()} == {*document["files"], "inspect.json"}
    (told,) = document["models"]
    assert told["tokens"] == {"math_en": 600, "poetry_zh": 600}
    assert [row["layer"] for row in told["layers"]] == [0, 1]
    for name in told["findings"]:
        content = json.loads((out / f"{name}.json").read_text(encoding="utf-8"))
        for table, one in content["tables"].items():
            with (out / f"{name}-{table}.csv").open(encoding="utf-8", newline="") as file:
                header, *lines = list(csv.reader(file))
            assert header == one["columns"]
            assert lines == [["" if cell is None else str(cell) for cell in row] for row in one["rows"]]
    assert set(told["findings"]) == set(ANALYSES) - {"agreement"}  # a model, not a run
    loads = json.loads((out / "load.json").read_text(encoding="utf-8"))["tables"]["experts"]["rows"]
    assert sum(row[2] for row in loads) == 1200 * 3 * 2
    trace = np.load(out / "trace.npz")
    assert trace["expert_ids"].shape == (len(trace["token_ids"]), 2, 3)
    Page((out / "trace.html").read_text(encoding="utf-8"))


def test_the_batch_size_changes_no_table(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tables = []
    for size in ("1", "7"):
        words = ("--text", *files_of(text), "--tokens", "300", "--sequence-length", "40", "--batch-size", size)
        inspect(capsys, model, *words, "--out", tmp_path / size, "--analyses", "load,domains,kinds,together")
        tables.append([(tmp_path / size / f"{name}-layers.csv").read_text() for name in ("load", "domains", "kinds")])
    assert tables[0] == tables[1]


def test_two_models_stand_beside_each_other(
    model: Path, model_of: Callable[..., Path], text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = model_of("other", ffn={"n_routed_experts": 5, "topk_method": "hash"})
    out = tmp_path / "out"
    words = ("--data", text / "data", "--out", out, "--analyses", "load,similarity")
    document = inspect(capsys, model, "--against", other, *words)
    assert [one["model"] for one in document["models"]] == [str(model), str(other)]
    with (out / "beside-measures.csv").open(encoding="utf-8", newline="") as file:
        rows = {row["measure"]: row for row in csv.DictReader(file) if row["analysis"] == "load"}
    for name in ("model", "other"):
        folder = out if name == "model" else out / "against"
        with (folder / "load-percentiles.csv").open(encoding="utf-8", newline="") as file:
            alone = {row["measure"]: row["p50"] for row in csv.DictReader(file)}
        assert {measure: row[name] for measure, row in rows.items()} == alone
    assert rows["token_entropy"]["other"] == rows["token_entropy"]["difference"] == ""
    Page((out / "report.html").read_text(encoding="utf-8"))


def test_people_are_shown_a_table_the_findings_and_where_the_report_is(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["inspect", model, "--data", text / "data", "--out", tmp_path / "out", "--analyses", "load,domains"]
    assert main(list(map(str, words))) == 0
    shown = capsys.readouterr().out
    assert "max load" in shown
    assert "bits of 1.0 possible" in shown
    assert f"the report: {tmp_path / 'out' / 'report.html'}" in shown
    assert main(list(map(str, words))) == 0  # its own folder may be written again


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--text", "FILE", "--analyses", "loads"], "there is no analysis 'loads' (did you mean load?)"),
        (["--text", "FILE", "--out", "MODEL"], "holds something else; choose another --out"),
        ([], "give the text either as files (--text) or as a prepared dataset (--data)"),
        (["--text", "FILE", "--data", "DATA"], "give the text either as files"),
        (["--text", "FILE", "--out", "INSIDE"], "report/inspect.json: Not a directory"),
        (["--data", "DATA", "--text-field", "body"], "--text-field and --domain-field have no effect with --data"),
        (["--text", "FILE", "--sequence-length", "129"], "reads at most 128 tokens"),
        (["--text", "FILE", "--trace", "x", "--trace-file", "FILE"], "--trace and --trace-file are both given"),
        (["--text", "FILE", "--trace-file", "FILE"], "tokens; allowed: 1 to 128"),
        (["--text", "FILE", "--against", "DENSE"], "has no MoE layers to inspect: ffn.kind is dense"),
    ],
)
def test_a_mistake_is_one_line_before_any_work(
    model: Path,
    model_of: Callable[..., Path],
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    file = files_of(text)[0]
    places = {"FILE": file, "INSIDE": file / "report", "MODEL": model, "DATA": text / "data"}
    if "DENSE" in words:
        places["DENSE"] = model_of("dense", ffn={"kind": "dense"})
    given = [str(places.get(word, word)) for word in words]
    out = [] if "--out" in words else ["--out", str(tmp_path / "out")]
    assert main(["inspect", str(model), *given, *out]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert message in shown.err
    assert shown.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_probes_of_two_models_stand_in_the_report(
    model: Path, model_of: Callable[..., Path], text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = model_of("other", ffn={"n_routed_experts": 16, "n_shared_experts": 0})
    words = ("--analyses", "load", "--probes", "--tokens", "256", "--out", tmp_path / "out")
    found = inspect(capsys, model, "--against", other, "--text", *files_of(text), *words)
    rows = list(csv.DictReader((tmp_path / "out" / "disable_top-mean_over_domains.csv").open()))
    assert {row["model"] for row in rows} == {"model", "other"}
    assert {row["ratio"] for row in rows if row["masked"] == "0"} == {"1.0"}
    assert any(float(row["ratio"]) != 1 for row in rows)
    assert any(said.startswith("model: at most ") for said in found["findings"])
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Without the shared experts" in page
    assert all(said in page for said in found["findings"])


def test_probes_predict_every_token_but_a_windows_first() -> None:
    windows = [Window("a", 0, np.arange(5)), Window("b", 0, np.arange(1)), Window("a", 1, np.arange(5, 8))]
    ((domain, batch),) = predictions(windows, 4)
    assert domain == "a"
    assert batch.input_ids.tolist() == [[0, 1, 2, 3], [5, 6, 0, 0]]
    assert batch.labels.tolist() == [[1, 2, 3, 4], [6, 7, -100, -100]]
    assert (batch.document_ids >= 0).tolist() == [[True] * 4, [True, True, False, False]]


@pytest.mark.parametrize(
    ("first", "second", "names"),
    [("a/x/s", "b/y/s", ["x", "y"]), ("a/x", "a/x/y", ["x", "y"]), ("x/a", "x/a", ["x/a", "x/a"])],
)
def test_two_models_are_called_by_what_tells_them_apart(first: str, second: str, names: list[str]) -> None:
    assert _names([Path(first), Path(second)]) == names


def test_an_option_beside_watch_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "run", "--watch", "--probes"]) == 2
    assert "--probes has no effect with --watch; leave it out" in capsys.readouterr().err


def test_an_option_with_a_default_beside_watch_is_an_error_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "run", "--watch", "--tokens", "64"]) == 2
    assert "--tokens has no effect with --watch; leave it out" in capsys.readouterr().err
