"""Agreement: overlap of sets, token by token, over the checkpoints of a real run."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moekit.config import DataConfig, ModelConfig, RunConfig
from moekit.formats.checkpoint import load
from moekit.inspect.agreement import agreement, chosen, overlap
from moekit.train import train
from moekit.train.state import finished

from .conftest import random_windows

WINDOWS = random_windows([9, 12, 5], ["a", "b", "a"])


def test_overlap_is_that_of_sets_whatever_the_order() -> None:
    one = torch.tensor([[[0, 1], [2, 3]], [[4, -1], [5, 6]]])
    two = torch.tensor([[[1, 0], [3, 4]], [[4, -1], [7, 8]]])
    assert overlap(one, two).tolist() == pytest.approx([3 / 4, 1 / 3])
    assert overlap(one, one).tolist() == [1, 1]


def test_checkpoints_of_a_run_are_compared_with_the_one_before_and_the_last(
    text: Path, tmp_path: Path, tiny_config: Callable[..., ModelConfig]
) -> None:
    config = RunConfig(
        model=tiny_config(vocab_size=300),
        data=DataConfig(path=str(text / "data"), sequence_length=32, batch_size=2),
        **{"steps": 3, "save_every": 1, "keep_checkpoints": 3, "device": "cpu"},
    )
    train(config, tmp_path / "run")
    folders = finished(tmp_path / "run")
    found = agreement(folders, WINDOWS)
    assert found is not None
    steps = found.tables["steps"]
    assert [row[0] for row in steps.rows] == [1, 2, 3]
    assert steps.rows[0][1] is None
    assert steps.rows[-1][2] == 1
    choices = [chosen(load(folder), WINDOWS) for folder in (folders[0], folders[-1])]
    expected = [
        [len({*a} & {*b}) / 3 for a, b in zip(one.tolist(), two.tolist(), strict=True)]
        for one, two in zip(*choices, strict=True)
    ]
    layers = found.tables["layers"].rows
    for at in range(2):
        assert layers[at][:2] == (1, at)
        assert layers[at][3] == pytest.approx(sum(expected[at]) / len(expected[at]), rel=1e-3)


def test_one_checkpoint_has_nothing_to_agree_with(tmp_path: Path) -> None:
    assert agreement([tmp_path], WINDOWS) is None
