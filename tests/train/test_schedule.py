"""The learning rate at every boundary of every schedule."""

import pytest

from moekit.config import ConstantSchedule, CosineSchedule, ScheduleConfig, StepSchedule, WSDSchedule
from moekit.train.schedule import factor


@pytest.mark.parametrize("steps", [10, 100, 1000, 2000, 106_449 * 10])
def test_the_papers_steps_fall_at_80_and_90_percent(steps: int) -> None:
    schedule = StepSchedule()
    first, second = steps * 8 // 10, steps * 9 // 10
    assert factor(schedule, 0, steps) == 1
    assert factor(schedule, first - 1, steps) == 1
    assert factor(schedule, first, steps) == 0.316
    assert factor(schedule, second - 1, steps) == 0.316
    assert factor(schedule, second, steps) == 0.316**2
    assert factor(schedule, steps - 1, steps) == 0.316**2


def test_the_papers_steps_can_be_moved() -> None:
    schedule = StepSchedule(first=0.5, second=0.75, factor=0.1)
    assert [factor(schedule, step, 8) for step in range(8)] == pytest.approx([1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01])


@pytest.mark.parametrize(
    "schedule",
    [
        StepSchedule(warmup_steps=4),
        CosineSchedule(warmup_steps=4),
        WSDSchedule(warmup_steps=4),
        ConstantSchedule(warmup_steps=4),
    ],
)
def test_warm_up_is_linear_and_its_last_step_is_the_peak(schedule: ScheduleConfig) -> None:
    assert [factor(schedule, step, 100) for step in range(5)] == [0.25, 0.5, 0.75, 1, 1]


def test_a_run_that_is_all_warm_up_ends_at_the_peak() -> None:
    for schedule in (StepSchedule(warmup_steps=3), CosineSchedule(warmup_steps=3), WSDSchedule(warmup_steps=3)):
        assert factor(schedule, 2, 3) == 1


def test_constant_stays_to_the_end() -> None:
    assert {factor(ConstantSchedule(), step, 50) for step in range(50)} == {1}


def test_cosine_is_half_way_in_the_middle_and_ends_above_its_floor() -> None:
    schedule = CosineSchedule(warmup_steps=10, final_ratio=0.1)
    assert factor(schedule, 10, 110) == 1
    assert factor(schedule, 60, 110) == pytest.approx(0.55)
    assert factor(schedule, 110, 110) == pytest.approx(0.1)
    values = [factor(schedule, step, 110) for step in range(10, 110)]
    assert values == sorted(values, reverse=True)
    assert 0.1 < values[-1] < 0.101


def test_wsd_is_flat_and_then_linear_to_its_floor() -> None:
    schedule = WSDSchedule(warmup_steps=10, decay_fraction=0.2, final_ratio=0.0)
    assert {factor(schedule, step, 100) for step in range(10, 81)} == {1}
    assert [factor(schedule, step, 100) for step in (81, 90, 99, 100)] == pytest.approx([0.95, 0.5, 0.05, 0])
    floor = WSDSchedule(decay_fraction=1.0, final_ratio=0.5)
    assert [factor(floor, step, 4) for step in range(5)] == pytest.approx([1, 0.875, 0.75, 0.625, 0.5])
