"""The score of a model on questions of synthetic tasks: it writes an answer, and a solver says whether it is right."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from moekit.data.synthetic import TASKS, Question
from moekit.errors import ConfigError
from moekit.formats.tokenizer import Tokenizer
from moekit.generate import SamplingSettings, tokens
from moekit.nn.model import Model


class Share(NamedTuple):
    """How many answers were right."""

    right: int
    questions: int

    @property
    def accuracy(self) -> float:
        return self.right / self.questions

    @property
    def standard_error(self) -> float:
        """Of the accuracy, as if the questions had been drawn from many."""
        return float((self.accuracy * (1 - self.accuracy) / self.questions) ** 0.5)


class Score(NamedTuple):
    """A task's result."""

    all: Share
    by_group: dict[str, Share]
    """By the length of the shortest path, or by the right answer."""
    answers: list[str]
    """What the model wrote, question by question."""


def score(
    model: Model,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    *,
    batch_size: int = 64,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Score]:
    """Returns the score of each task that the questions are of.

    An answer is the likeliest token, one after the other, up to the end of the text, with one token of room beyond the
    longest right answer. A number and yes or no must be exact, a path may be any of the shortest. The batch size
    changes no answer. `progress` gets how many questions are answered, of how many.
    """
    if not questions:
        raise ConfigError("there is no question")
    room = max(len(ids) for ids in tokenizer.encode_batch([question.text for question in questions])) + 1
    answers = list[str]()
    for first in range(0, len(questions), batch_size):
        batch = questions[first : first + batch_size]
        answers += _answers(model, tokenizer, [question.prompt for question in batch], room)
        progress(len(answers), len(questions))
    return {
        task: _score([pair for pair in zip(questions, answers, strict=True) if pair[0].domain == task])
        for task in dict.fromkeys(question.domain for question in questions)
    }


def _score(answered: Sequence[tuple[Question, str]]) -> Score:
    """Returns the score of one task's questions and answers."""
    task, groups = TASKS[answered[0][0].domain], dict[str, list[bool]]()
    for question, answer in answered:
        groups.setdefault(task.group(question), []).append(task.is_right(question, answer))
    by_group = {group: Share(sum(right), len(right)) for group, right in sorted(groups.items())}
    every = Share(sum(share.right for share in by_group.values()), len(answered))
    return Score(every, by_group, [answer for _, answer in answered])


def _answers(model: Model, tokenizer: Tokenizer, prompts: list[str], room: int) -> list[str]:
    """Returns what the model writes after each prompt, without the end of the text."""
    written: list[list[int]] = [[] for _ in prompts]
    running = set(range(len(prompts)))
    for chosen in tokens(model, tokenizer.encode_batch(prompts), SamplingSettings(), room, tokenizer.vocab_size):
        for number, token in enumerate(chosen.tolist()):
            if token == tokenizer.eos_id:
                running.discard(number)
            elif number in running:
                written[number].append(token)
        if not running:
            break
    return [tokenizer.decode(ids) for ids in written]
