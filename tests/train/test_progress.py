"""The terminal display: a line per record where there is no terminal, a picture where there is one."""

import io
from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Console

from moekit.config import RunConfig
from moekit.train.progress import TerminalProgress, spark

TRAIN: dict[str, Any] = {
    "kind": "train",
    "step": 6,
    "loss": 2.34567,
    "lr": 1e-3,
    "aux": {"expert_balance": 0.0123},
    "tokens_per_second": 12345.6,
    "matmul_share": 0.42,
    "load": {"max_violation": [0.5, 1.25], "entropy": [0.987, 0.9], "dead": [0, 3], "router_z": [1, 1]},
    "tokens_per_expert": [[4] * 8, [32, 0, 0, 0, 0, 0, 0, 0]],
}
EVAL = {"kind": "eval", "step": 6, "loss": 3.0, "domains": {"[/b]odd": {"bits_per_byte": 1.5}}}
ALARM = {"kind": "alarm", "step": 6, "text": "expert [3] died"}


def shown(config: RunConfig, *records: dict[str, Any], terminal: bool) -> str:
    out = io.StringIO()
    sink = TerminalProgress(config, Console(file=out, force_terminal=terminal, width=200, color_system=None))
    for record in records:
        sink.record(record)
    sink.close()
    return out.getvalue()


def test_without_a_terminal_each_record_is_one_line(run_config: Callable[..., RunConfig]) -> None:
    text = shown(run_config(), TRAIN, EVAL, ALARM, terminal=False)
    assert text.splitlines() == [
        "step 6/12  loss 2.3457  lr 1.00e-03  12,346 tokens/s  42% of matmul  load +125%  dead 3",
        "step 6  validation loss 3.0000  bits per byte: [/b]odd 1.500",
        "step 6  ALARM expert [3] died",
    ]


def test_a_dense_model_shows_no_load(run_config: Callable[..., RunConfig]) -> None:
    config = run_config(ffn={"kind": "dense", "intermediate_size": 48})
    record = {**TRAIN, "load": {}, "tokens_per_expert": [], "aux": {}}
    assert shown(config, record, terminal=False).endswith("42% of matmul\n")
    assert "max violation" not in shown(config, record, terminal=True)


def test_the_picture_holds_loss_load_and_scores_whatever_the_names_are(run_config: Callable[..., RunConfig]) -> None:
    text = shown(run_config(), TRAIN, EVAL, ALARM, terminal=True)
    for part in ("6/12", "loss 2.3457", "expert balance 0.0123", "42% of matmul", "max violation"):
        assert part in text
    for part in ("▄▄▄▄▄▄▄▄", "█       ", "1.25", "0.987", "[/b]odd 1.500", "expert [3] died"):
        assert part in text


def test_closing_gives_the_cursor_back_and_may_be_done_twice(run_config: Callable[..., RunConfig]) -> None:
    out = io.StringIO()
    sink = TerminalProgress(run_config(), Console(file=out, force_terminal=True))
    sink.close()
    sink.close()
    assert out.getvalue().count("\x1b[?25h") == 1


@pytest.mark.parametrize(
    ("counts", "bars"),
    [([1, 1], "▄▄"), ([0, 4, 2], "█▄ "), ([0, 0], "  "), ([1000, 1, 0], "█▁ "), ([3], "▄")],
)
def test_bars_are_sorted_and_relative_to_the_mean(counts: list[int], bars: str) -> None:
    assert spark(counts) == bars


def test_a_wide_layer_is_thinned_out_to_the_width() -> None:
    assert len(spark([5] * 64)) == 64
    assert len(spark([5] * 65)) == 33
    assert len(spark([5] * 1000)) <= 64
