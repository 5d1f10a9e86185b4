"""The report: one self-contained page whose words follow the numbers of the runs."""

import gzip
import json
import re
import shlex
import shutil
import warnings
from collections.abc import Callable, Mapping
from html import unescape
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moekit.cli import main
from moekit.config import DataConfig, ModelConfig, RunConfig, dump, preset
from moekit.data import prepare
from moekit.errors import DataError
from moekit.generate import Completion
from moekit.inspect.domains import by_favourite, mutual_information
from moekit.pictures import pool, smooth
from moekit.quickstart.report import write_report
from moekit.quickstart.results import read_result
from moekit.train import train

DOMAINS = ["math_en", "poetry_zh"]
MODEL, BASELINE = "tiny-deepseekmoe", "tiny-dense-x2"
SAMPLES = {
    "math_en": [Completion("<script>alert('x')</script>", "1 < 2 & 3 > 2, $body", 7, "length")],
    "poetry_zh": [Completion("床前明月光", "疑是地上霜。\x00\r\n", 9, "end")],
}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, tiny_config: Callable[..., ModelConfig]) -> Path:
    """A folder with a dataset of two domains and a real run of a small MoE and of a small dense model on it."""
    folder = tmp_path_factory.mktemp("work")
    texts = []
    for domain in DOMAINS:
        packed = (files("moekit") / "quickstart" / "text" / f"{domain}.valid.jsonl.gz").read_bytes()
        texts.append(folder / f"{domain}.jsonl")
        texts[-1].write_bytes(b"".join(gzip.decompress(packed).splitlines(keepends=True)[:12]))
    prepare(texts, folder / "data", valid_fraction=0.3, vocab_size=300)
    for name, ffn in ((MODEL, {"aux_loss_alpha": 0.01}), (BASELINE, {"kind": "dense", "intermediate_size": 40})):
        config = RunConfig(
            model=tiny_config(ffn=ffn, vocab_size=300, max_position_embeddings=128),
            data=DataConfig(path=str(folder / "data"), sequence_length=32, batch_size=2),
            **{"steps": 6, "log_every": 2, "eval_every": 3, "eval_tokens": 256, "device": "cpu"},
        )
        train(config, folder / name)
    return folder


@pytest.fixture
def runs(work: Path, tmp_path: Path) -> dict[str, Path]:
    """Copies of the two runs, to be changed at will."""
    return {name: shutil.copytree(work / name, tmp_path / name) for name in (MODEL, BASELINE)}


def change(run: Path, edit: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> None:
    file = run / "metrics.jsonl"
    records = edit([json.loads(line) for line in file.read_text().splitlines()])
    file.write_text("".join(json.dumps(record) + "\n" for record in records))


def set_score(run: Path, score: float) -> None:
    def edit(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
        records[-1]["bits_per_byte"] = score
        return records

    change(run, edit)


def report(out: Path, runs: Mapping[str, Path], samples: Any = SAMPLES, corpus: Any = None) -> str:
    counts = {"math_en": {"documents": 1234, "tokens": 5000, "bytes": 20_000}} if corpus is None else corpus
    path = write_report(out, runs, samples, counts)
    assert path == out / "report.html"
    return path.read_text(encoding="utf-8")


class Page(HTMLParser):
    """Fails on a tag that is not closed in order; collects tags, their attributes and the text."""

    VOID = ("meta", "br", "image", "use", "path")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())


def check_self_contained(html: str) -> None:
    page = Page(html)
    assert "://" not in html
    assert not re.search(r"<(script|link|iframe)|@import|url\((?!#)", html)
    for _, name, value in page.attributes:
        if name in ("src", "href", "xlink:href"):
            assert value.startswith(("data:image/png;base64,", "#"))
    ids = {value for _, name, value in page.attributes if name == "id"}
    for target in re.findall(r'(?:href="|url\()#([^")]+)', html):
        assert target in ids


def commands(html: str) -> list[list[str]]:
    """Returns the words after moekit of each command on the page."""
    found = re.findall(r"<pre>(.*?)</pre>", html, re.DOTALL)
    return [shlex.split(unescape(command).replace("\\\n", ""))[1:] for command in found]


def test_the_page_is_well_formed_self_contained_and_shows_every_part(runs: dict[str, Path], tmp_path: Path) -> None:
    html = report(tmp_path, runs)
    check_self_contained(html)
    page = Page(html)
    for part in (
        *DOMAINS,
        "How they learned",
        "Layer 0",
        "Layer 1",
        "Maximum violation",
        "mutual information",
        "1,234",
    ):
        assert part in page.text
    assert html.count("data:image/png") == 4  # two layers: load over time, and domains by experts
    assert "#0102" not in html  # every stand-in became a colour of the page
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_samples_are_escaped_and_chinese_shows(runs: dict[str, Path], tmp_path: Path) -> None:
    html = report(tmp_path, runs)
    assert "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;" in html
    assert "1 &lt; 2 &amp; 3 &gt; 2, $body" in html
    assert "床前明月光</span>" in html
    assert "疑是地上霜。\ufffd\n</span>" in html


@pytest.mark.parametrize(
    ("ours", "theirs", "ahead", "lead"),
    [(2.31, 2.38, MODEL, "0.070 bits per byte, or 2.9%"), (2.40, 2.38, BASELINE, "0.020 bits per byte, or 0.8%")],
)
def test_the_headline_names_the_winner_either_way(
    runs: dict[str, Path], tmp_path: Path, ours: float, theirs: float, ahead: str, lead: str
) -> None:
    set_score(runs[MODEL], ours)
    set_score(runs[BASELINE], theirs)
    text = Page(report(tmp_path, runs)).text
    assert f"{MODEL} reached {ours:.2f} bits per byte on unseen text, {BASELINE}, a dense model" in text
    assert f", {theirs:.2f}, both after 384 tokens." in text
    assert f"{ahead} is ahead by {lead}. One seed proves nothing" in text


def test_a_difference_below_the_third_digit_is_a_tie(runs: dict[str, Path], tmp_path: Path) -> None:
    set_score(runs[MODEL], 2.3801)
    set_score(runs[BASELINE], 2.3803)
    text = Page(report(tmp_path, runs)).text
    assert "That is a tie." in text
    assert "is ahead" not in text


def test_equal_compute_is_claimed_only_where_it_is_so(runs: dict[str, Path], tmp_path: Path) -> None:
    assert "a dense model of equal active compute" in Page(report(tmp_path, runs)).text
    file = runs[BASELINE] / "config.yaml"
    file.write_text(file.read_text().replace("intermediate_size: 40", "intermediate_size: 80"))
    ours, theirs = (read_result(name, run, "first").flops for name, run in runs.items())
    assert theirs / ours > 1.1
    assert f"a dense model with {theirs / ours:.2f} times its active compute" in Page(report(tmp_path, runs)).text


def test_the_better_score_of_a_domain_is_bold(runs: dict[str, Path], tmp_path: Path) -> None:
    for name, score in ((MODEL, 3.0), (BASELINE, 2.5)):

        def edit(records: list[dict[str, Any]], score: float = score) -> list[dict[str, Any]]:
            records[-1]["domains"]["math_en"]["bits_per_byte"] = score
            return records

        change(runs[name], edit)
    assert "<td>3.000</td><td><b>2.500</b></td><td>+0.500 (+20.0%)</td>" in report(tmp_path, runs)


def test_a_run_without_baseline_or_validation_or_experts_is_reported_too(runs: dict[str, Path], tmp_path: Path) -> None:
    text = Page(report(tmp_path, {MODEL: runs[MODEL]}, corpus={})).text
    assert "There is no baseline" in text
    assert BASELINE not in text
    text = Page(report(tmp_path, {BASELINE: runs[BASELINE]}, samples={})).text
    assert "expert" not in text.partition("What to try next")[0]
    change(runs[MODEL], lambda records: [r for r in records if r["kind"] == "train"])
    text = Page(report(tmp_path, runs)).text
    assert "nothing is known of how it does on text that it has not seen" in text
    assert "Who does what" not in text


def test_a_run_without_a_step_is_refused(runs: dict[str, Path], tmp_path: Path) -> None:
    (runs[BASELINE] / "metrics.jsonl").write_text("")
    with pytest.raises(DataError, match=r"tiny-dense-x2/metrics\.jsonl has no record of kind train"):
        report(tmp_path, runs)


def test_alarms_are_told_only_where_there_were_some(runs: dict[str, Path], tmp_path: Path) -> None:
    assert "Alarms" not in report(tmp_path, runs)
    alarm = {"kind": "alarm", "step": 4, "layer": 1, "experts": [3], "text": "expert 3 of layer 1 <idle>"}
    change(runs[MODEL], lambda records: [*records, *[alarm] * 10])
    html = report(tmp_path, runs)
    assert html.count("<li>Step 4: expert 3 of layer 1 &lt;idle&gt;.</li>") == 8
    assert "And 2 more." in html


def test_the_commands_to_try_next_work(
    runs: dict[str, Path], work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-texts").mkdir()
    shutil.copy(work / "math_en.jsonl", tmp_path / "my-texts")
    (tmp_path / "a folder").mkdir()
    moved = {MODEL: runs[MODEL].rename(tmp_path / "a folder" / "run")}
    steps = commands(report(tmp_path, moved))
    assert [words[0] for words in steps] == ["generate", "train", "train", "train", "prepare", "plan", "presets"]
    for words in steps:
        assert main([*words, "--print_config"] if words[0] == "train" else words) == 0
    dense = commands(report(tmp_path, {"other": runs[BASELINE]}))
    assert [words[0] for words in dense] == ["generate", "train", "prepare", "plan", "presets"]


def test_27_layers_of_64_experts_and_many_steps_stay_below_5_megabytes(tmp_path: Path) -> None:
    """Random load, the hardest to compress; domain names that matplotlib could take for a formula or for HTML."""
    rng = np.random.default_rng(0)
    config = RunConfig(
        model=preset("deepseekmoe-16b"), data=DataConfig(path="data", sequence_length=4096), steps=4000, log_every=10
    )
    layers, names = len(config.model.moe_layers), ["$x$", "诗歌", "<b>", "a" * 30, *"defgh"]
    loads = rng.integers(0, 4000, (400, layers, 64))
    zeros = [0.0] * layers
    health = {"max_violation": zeros, "entropy": zeros, "dead": [0] * layers, "router_z": zeros}
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(dump(config))
    steps = [{"step": 10 * (i + 1), "tokens": 655_360 * (i + 1)} for i in range(len(loads))]
    timing = {"loss": 2.0, "seconds": 9.0, "matmul_share": 0.5, "load": health}
    records = [
        {"kind": "train", **step, **timing, "tokens_per_expert": load.tolist()}
        for step, load in zip(steps, loads, strict=True)
    ]
    domains = {name: {"bits_per_byte": 1.0, "tokens_per_expert": loads[i].tolist()} for i, name in enumerate(names)}
    records.append({"kind": "eval", **steps[-1], "loss": 2.0, "bits_per_byte": 1.0, "domains": domains})
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns of letters that its own font lacks
        html = report(tmp_path, {"big": run}, samples={})
    check_self_contained(html)
    assert html.count("data:image/png") == 2 * layers
    assert len(html.encode()) < 5_000_000


def test_the_same_runs_give_the_same_bytes(runs: dict[str, Path], tmp_path: Path) -> None:
    assert report(tmp_path / "a", runs) == report(tmp_path / "b", runs)


def test_mutual_information_is_zero_for_like_domains_and_log2_domains_for_specialists() -> None:
    like = np.full((4, 1, 8), 1 / 8)
    apart = np.kron(np.eye(4), [0.5, 0.5])[:, None]  # two experts a domain
    some = np.array([[[0.5, 0.5, 0.0]], [[0.5, 0.0, 0.5]]])  # half of the choices tell the domain
    bits = [mutual_information(share)[0] for share in (like, apart, some)]
    np.testing.assert_allclose(bits, [0.0, 2.0, 0.5], atol=1e-12)


def test_experts_stand_by_favourite_domain_the_choosiest_first_and_unused_ones_last() -> None:
    share = np.array([[0.1, 0.0, 0.4, 0.0, 0.5], [0.7, 0.0, 0.1, 0.2, 0.0]])
    order, starts = by_favourite(share)
    assert order.tolist() == [4, 2, 3, 0, 1]
    assert starts.tolist() == [2, 4]


def test_pooling_keeps_the_mean_and_smoothing_keeps_a_constant() -> None:
    values = np.arange(1000.0).reshape(500, 2)
    assert pool(values, 100).shape == (100, 2)
    np.testing.assert_allclose(pool(values, 100).mean(0), values.mean(0))
    assert pool([3, 1], 100).tolist() == [3, 1]
    np.testing.assert_allclose(smooth(np.full(200, 2.5)), 2.5)
