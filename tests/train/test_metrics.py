"""metrics.jsonl survives a kill; TensorBoard shows the same numbers."""

import json
from pathlib import Path
from typing import Any

import pytest

from moekit.train.metrics import FILE, JsonLines, TensorBoard, read

TRAIN: dict[str, Any] = {
    "kind": "train",
    "step": 4,
    "loss": 2.5,
    "aux": {"expert_balance": 0.01},
    "load": {"entropy": [0.5, 1.0], "dead": [0, 2]},
    "tokens_per_expert": [[1, 2], [3, 4]],
}
EVAL: dict[str, Any] = {
    "kind": "eval",
    "step": 4,
    "loss": 3.0,
    "domains": {"诗\u2028": {"loss": 3.0, "tokens_per_expert": [[1]]}},
}
ALARM: dict[str, Any] = {"kind": "alarm", "step": 4, "layer": 1, "experts": [3], "text": "expert 3 died"}


def write(run: Path, step: int, *records: dict[str, Any]) -> None:
    sink = JsonLines(run, step)
    for record in records:
        sink.record(record)
    sink.close()


def test_what_is_recorded_is_read_back_line_by_line(tmp_path: Path) -> None:
    write(tmp_path, 0, TRAIN, EVAL, ALARM)
    assert read(tmp_path) == [TRAIN, EVAL, ALARM]  # a line separator inside a name is no line end
    assert (tmp_path / FILE).read_bytes().count(b"\n") == 3


def test_a_line_is_on_disk_at_once(tmp_path: Path) -> None:
    sink = JsonLines(tmp_path, 0)
    sink.record(TRAIN)
    assert read(tmp_path) == [TRAIN]
    sink.close()


def test_lines_after_the_resumed_step_are_dropped(tmp_path: Path) -> None:
    records = [{**TRAIN, "step": step} for step in (2, 4, 6, 8)]
    write(tmp_path, 0, *records)
    write(tmp_path, 4, {**EVAL, "step": 6})
    assert read(tmp_path) == [*records[:2], {**EVAL, "step": 6}]
    write(tmp_path, 0)
    assert read(tmp_path) == []


def test_a_line_that_a_kill_cut_is_dropped_wherever_it_was_cut(tmp_path: Path) -> None:
    write(tmp_path, 0, TRAIN, EVAL)
    content = (tmp_path / FILE).read_bytes()
    first = content.index(b"\n") + 1
    for end in range(first, len(content)):
        (tmp_path / FILE).write_bytes(content[:end])
        write(tmp_path, 9, ALARM)
        whole = end == len(content) - 1  # only the line end is missing
        assert read(tmp_path) == [TRAIN, *([EVAL] if whole else []), ALARM]


def test_tensorboard_shows_the_scalars_and_hides_what_a_killed_run_wrote(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    first = TensorBoard(tmp_path, 0)
    for record in (TRAIN, EVAL, ALARM, {**TRAIN, "step": 6, "loss": 99.0}):
        first.record(record)
    first.close()
    second = TensorBoard(tmp_path, 4)
    second.record({**TRAIN, "step": 6, "loss": 1.5})
    second.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    scalars = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert scalars["train/loss"] == [(4, 2.5), (6, 1.5)]
    assert scalars["train/aux/expert_balance"][0] == pytest.approx((4, 0.01))
    assert scalars["train/load/dead/layer1"] == [(4, 2), (6, 2)]
    assert scalars["eval/loss"] == [(4, 3.0)]
    assert not [tag for tag in scalars if "tokens_per_expert" in tag or tag.endswith("step")]
    assert events.Tags()["tensors"] == ["alarm/text_summary"]


def test_numbers_survive_json_to_the_bit(tmp_path: Path) -> None:
    record = {"kind": "train", "step": 1, "loss": 0.1 + 0.2, "tiny": 5e-324}
    write(tmp_path, 0, record)
    assert read(tmp_path) == [record]
    assert json.loads((tmp_path / FILE).read_text()) == record
