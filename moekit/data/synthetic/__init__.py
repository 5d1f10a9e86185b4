"""Tasks of which every answer is known: Mixture of Parrots (arXiv 2410.19034), memory against path finding."""

from moekit.data.synthetic.prepare import prepare_synthetic
from moekit.data.synthetic.tasks import TASKS, Question, Task, read_questions

__all__ = ["TASKS", "Question", "Task", "prepare_synthetic", "read_questions"]
