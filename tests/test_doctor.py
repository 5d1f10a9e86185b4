"""`moekit doctor`: what is there, what is chosen, and what was measured."""

import json
import math

import pytest

from moekit.cli import main
from moekit.doctor import examine
from moekit.ops.experts import BACKENDS


def test_every_back_end_is_measured_or_says_why_not() -> None:
    document = examine("cpu")
    for precision, found in document["experts"].items():
        assert found["backends"].keys() == BACKENDS.keys()
        assert found["backends"][found["chosen"]]["unavailable"] is None
        assert document["matmul_gflops"][precision] > 0
        for state in found["backends"].values():
            times = state["milliseconds"]
            assert not times if state["unavailable"] else all(math.isfinite(t) and t > 0 for t in times.values())


def test_the_command_prints_one_document_or_tables(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--device", "cpu", "--quick", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["device"] == "cpu"
    assert document["matmul_gflops"] == {}
    assert main(["doctor", "--device", "cpu", "--quick"]) == 0
    shown = capsys.readouterr().out
    assert document["name"] in " ".join(shown.split())
    assert "what auto takes" in shown


def test_train_refuses_a_back_end_that_there_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "tiny-deepseekmoe", "--data", "x", "--out", "y", "--backend", "nativ"]) == 2
    assert 'backend is "nativ" (did you mean native?)' in capsys.readouterr().err
