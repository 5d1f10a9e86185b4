"""No input crashes a reader, none is another model unnoticed: a sample of what benchmarks/fuzz.py tries at length."""

import importlib
import os
from collections import Counter
from pathlib import Path

import pytest

INPUTS = int(os.environ.get("MOEKIT_FUZZ_INPUTS", "500"))


def test_damaged_and_hostile_directories_are_refused_or_give_the_same_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    fuzz = importlib.import_module("fuzz")
    (tmp_path / "sources").mkdir()
    outcomes = fuzz.fuzz(INPUTS, 0, tmp_path)
    counts = Counter(one.result for one in outcomes)
    assert [one for one in outcomes if one.result in ("wrong", "crash")] == []
    assert sum(counts.values()) == INPUTS
    assert counts["refused"] > INPUTS / 2
    assert counts["same"] > 0
    found = Counter((one.mode, one.result) for one in outcomes)
    assert not found["manifest kept", "another"]
    assert not found["verify", "another"]
    kinds = {change for one in outcomes for change in one.changes}
    assert {"header: offsets", "header: renamed", "JSON: twice", "file: link out", "file: pickle"} <= kinds
    assert len(kinds) >= 25
