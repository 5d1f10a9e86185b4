"""The learning rate's course, as a factor of its peak."""

import math

from moekit.config import ConstantSchedule, CosineSchedule, ScheduleConfig, StepSchedule


def factor(schedule: ScheduleConfig, step: int, steps: int) -> float:
    """Returns the learning rate of a step (counted from 0) as a fraction of the peak.

    Warm-up is linear and reaches the peak at its last step. The paper's steps are at 80% and 90%: 0.316 and 0.0999
    (DeepSeekMoE, arXiv 2401.06066, section 4.1.3).
    """
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    if isinstance(schedule, ConstantSchedule):
        return 1.0
    if isinstance(schedule, StepSchedule):
        falls = (step >= schedule.first * steps) + (step >= schedule.second * steps)
        return float(schedule.factor**falls)
    if isinstance(schedule, CosineSchedule):
        progress = (step - schedule.warmup_steps) / max(1, steps - schedule.warmup_steps)
        return schedule.final_ratio + (1 - schedule.final_ratio) * 0.5 * (1 + math.cos(math.pi * progress))
    decay = max(1, round(schedule.decay_fraction * steps))
    left = min(1.0, (steps - step) / decay)
    return schedule.final_ratio + (1 - schedule.final_ratio) * left
