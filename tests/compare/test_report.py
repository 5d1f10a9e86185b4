"""The report of a comparison: its numbers are the result's, and it needs nothing but itself."""

import copy
import json
import re
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from moekit.compare.report import axis, band, fixed, signed, write_report
from moekit.compare.results import analysis, beside

NAMES = ("dense", "switch", "deepseekmoe")


def _result(seeds: int = 3, **changes: Any) -> dict[str, Any]:
    """Returns a result of made-up losses: deepseekmoe clearly below dense, switch not told apart from it."""
    noise = {"dense": [0.0, 0.02, -0.01], "switch": [0.03, -0.04, 0.02], "deepseekmoe": [-0.2, -0.17, -0.22]}
    rows: dict[str, Any] = {}
    for name in NAMES:
        scores = {}
        for seed in range(seeds):
            loss = 4.5 + noise[name][seed]
            domains = {d: {"loss": loss + at, "bits_per_byte": loss / 2 + at} for at, d in enumerate(("a", "b"))}
            scores[str(seed)] = {"loss": loss + 0.5, "bits_per_byte": loss / 2 + 0.5, "domains": domains}
        timing = {"seconds": 754.0, "tokens_per_second": 4321.0}
        rows[name] = {"parameters": 5_659_488, "active_parameters": 1_530_720, "flops_per_token": 8.0e6}
        rows[name] |= {"steps": 300, "tokens": 1_228_800, "training_flops": 9_830_400_000_000, "run": None}
        rows[name] |= {"timing": timing, "seeds": scores}
    scored = {name: row["seeds"] for name, row in rows.items()}
    result = {"title": "<three> & more", "data": {"path": "d", "sha256": "f" * 64, "order": {"0": "e" * 64}}}
    result |= {"budget": {"rule": "equal_data", "tolerance": 0.02}, "baseline": "dense", "seeds": [*range(seeds)]}
    result |= {"architectures": rows, "failed": []}
    result |= {measure: analysis(scored, measure, "dense") for measure in ("loss", "bits_per_byte")}
    values = {"dense": 2.06, "switch": 1.881, "deepseekmoe": 1.808}
    printed = {"measure": "Pile loss", "source": "somewhere", "better": "lower", "values": values}
    result["expected"] = [beside(printed, result["loss"], "dense")]
    return result | changes


PLAN = {
    "about": "why < how",
    "seeds": [0, 1, 2],
    "architectures": {name: {"recipe": {}, "run": None} for name in NAMES},
    "recipe": {
        "steps": 300,
        "data": {"batch_size": 16, "sequence_length": 256},
        "optimizer": {"kind": "adamw", "lr": 3e-3},
        "schedule": {"kind": "step", "warmup_steps": 30},
    },
}


def _curves(seeds: int = 3) -> dict[str, dict[int, list[dict[str, Any]]]]:
    def point(step: int, seed: int) -> dict[str, Any]:
        cost = {"tokens": step * 4096, "flops": step * 10**10, "seconds": step * (1.0 + seed)}
        return {"kind": "eval", "step": step, "loss": 9 - step / 100 + seed / 10, **cost}

    return {name: {seed: [point(step, seed) for step in (60, 120)] for seed in range(seeds)} for name in NAMES}


def _page(folder: Path, result: dict[str, Any], **plan: Any) -> str:
    seeds = len(result["seeds"])
    return write_report(folder, result, _curves(seeds), PLAN | plan).read_text(encoding="utf-8")


def _text(page: str) -> str:
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", re.sub(r"(?s)<(style|svg).*?</\1>", "", page))).split())


def _rows(page: str, heading: str) -> list[list[str]]:
    section = page.partition(f"<h2>{heading}</h2>")[2].partition("</section>")[0]
    rows = re.findall(r"(?s)<tr.*?</tr>", section)
    return [[_text(cell) for cell in re.findall(r"(?s)<t[dh].*?</t[dh]>", row)] for row in rows]


def test_the_tables_are_those_of_the_result(tmp_path: Path) -> None:
    result = _result()
    page = _page(tmp_path, result)
    overall = result["loss"]["mean"]
    _, *rows = _rows(page, "The result")
    for name, row in zip(NAMES, rows, strict=True):
        one, gap = overall["summaries"][name], overall["differences"].get(name)
        bits = result["bits_per_byte"]["mean"]["summaries"][name]["mean"]
        span = f"{fixed(one['min'])} to {fixed(one['max'])}"
        assert row[:5] == [name, fixed(one["mean"]), fixed(one["sd"]), span, fixed(bits)]
        last = ["baseline", "", ""]
        if gap:
            last = [signed(gap["mean"]), f"{signed(gap['low'])} to {signed(gap['high'])}", gap["verdict"]]
        assert row[5:] == last
    head, *rows = _rows(page, "Every pair")
    assert head[1:] == [row[0] for row in rows] == ["deepseekmoe", "dense", "switch"]  # best first
    for row in rows:
        for column, cell in zip(head[1:], row[1:], strict=True):
            pair = result["loss"]["pairs"][row[0]].get(column)
            assert cell == (signed(pair["mean"]) if pair else "·")
    _, *rows = _rows(page, "Which text")
    assert rows[0][:2] == ["a", fixed(result["bits_per_byte"]["domains"]["a"]["summaries"]["dense"]["mean"], 3)]


def test_the_words_follow_the_figures(tmp_path: Path) -> None:
    words = _text(_page(tmp_path, _result()))
    assert "deepseekmoe ends with the lowest loss on unseen text, 4.8033 nats per token; next is dense with" in words
    assert "lies below 0 against dense and switch" in words
    assert "not told apart by 3 seeds" in words
    one = _text(_page(tmp_path, _result(seeds=1), seeds=[0]))
    assert "One seed proves nothing" in one
    assert "interval of its paired difference" not in one


def test_the_paper_agrees_only_where_the_interval_says_so() -> None:
    expected = _result()["expected"][0]
    assert expected["differences"] == {"switch": -0.179, "deepseekmoe": -0.252}
    assert expected["agreement"] == {"switch": "not told apart by 3 seeds", "deepseekmoe": "same"}
    printed = {"measure": "accuracy", "source": "s", "better": "higher", "values": {"dense": 5.0, "deepseekmoe": 4.0}}
    assert beside(printed, _result()["loss"], "dense")["agreement"] == {"deepseekmoe": "opposite"}
    printed["values"] = {"dense": 5.0, "deepseekmoe": 5.0}
    assert beside(printed, _result()["loss"], "dense")["agreement"] == {"deepseekmoe": "equal there"}


def test_the_page_is_whole_escaped_and_needs_no_network(tmp_path: Path) -> None:
    page = _page(tmp_path, _result())
    assert page.count("<svg") == 5
    assert "<script" not in page
    assert not re.findall(r"(?:src|href)=\"(?!#)", page)
    assert "&lt;three&gt; &amp; more" in page
    assert "why &lt; how" in page


def test_what_is_missing_is_left_out(tmp_path: Path) -> None:
    result = _result()
    whole = copy.deepcopy(result)
    for part in (result["loss"]["mean"], result["bits_per_byte"]["mean"]):
        del part["summaries"]["switch"], part["differences"]["switch"]
    result["architectures"]["switch"] |= {"seeds": {}, "timing": None}
    result["failed"] = [{"run": "switch/seed-0", "error": "it < broke", "log": "x.log"}]
    for domain in result["bits_per_byte"]["domains"].values():
        del domain["summaries"]["switch"], domain["differences"]["switch"]
    page = _page(tmp_path, result)
    assert [row[0] for row in _rows(page, "The result")[1:]] == ["dense", "deepseekmoe"]
    assert "switch/seed-0 failed: it &lt; broke" in page
    assert json.dumps(whole) == json.dumps(_result())  # made-up results do not share parts


def test_a_band_is_the_mean_and_the_extremes_over_seeds() -> None:
    one = band(_curves()["dense"], "eval")
    assert one.steps == [60, 120]
    assert one.mean.tolist() == pytest.approx([8.5, 7.9])
    assert one.low.tolist() == pytest.approx([8.4, 7.8])
    assert one.high.tolist() == pytest.approx([8.6, 8.0])
    assert one.x["seconds"].tolist() == [120.0, 240.0]


def test_axes_choose_a_unit_that_fits() -> None:
    assert axis("tokens", 9.8e6) == (1e6, "million tokens read")
    assert axis("flops", 3.4e14) == (1e12, "10¹² training FLOPs")
    assert axis("seconds", 90) == (1, "seconds of training")
    assert axis("seconds", 9000) == (3600, "hours of training")
    assert axis("tokens", 500) == (1.0, "tokens read")


def test_numbers_are_written_with_a_real_minus_and_zero_without_a_sign() -> None:
    assert signed(-0.0123456) == "\N{MINUS SIGN}0.0123"
    assert signed(0.5) == "+0.5000"
    assert signed(-0.00001) == "0.0000"
    assert (signed(None), fixed(None), fixed(1.5, 1)) == ("", "", "1.5")
