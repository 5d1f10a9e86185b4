"""Text in, text out: stop strings, the end of the text, and streaming."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from moekit.errors import ConfigError
from moekit.formats.tokenizer import Tokenizer
from moekit.generate.decode import tokens
from moekit.generate.sampling import SamplingSettings
from moekit.nn.model import Model


class Completion(NamedTuple):
    """One prompt's continuation."""

    prompt: str
    text: str
    """Without the prompt, the stop string and the end-of-text token."""
    tokens: int
    """New tokens, those of a stop string included."""
    finish: str
    """stop (a stop string), end (end of text) or length."""


def complete(
    model: Model,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    settings: SamplingSettings | None = None,
    *,
    max_new_tokens: int = 64,
    stop: Sequence[str] = (),
    max_length: int | None = None,
    stream: Callable[[int, str], None] | None = None,
) -> list[Completion]:
    """Returns one completion per prompt. An empty prompt starts a new document.

    `max_length` is what a prompt and its new tokens may fill; longer prompts then lose their beginning.
    `stream` gets (prompt number, new text) as it becomes certain: whole characters, and nothing of a stop string.
    """

    def say(number: int, certain: str) -> None:
        if stream is not None and certain:
            stream(number, certain)

    if isinstance(prompts, str) or isinstance(stop, str):
        raise ConfigError(f"{'prompts' if isinstance(prompts, str) else 'stop'} is one text; give a list of texts")
    if not prompts:
        raise ConfigError("prompts is empty; give at least one text")
    if "" in stop:
        raise ConfigError("a stop string is empty; leave it out")
    encoded = [tokenizer.encode(prompt) or [tokenizer.eos_id] for prompt in prompts]
    if max_length is not None:
        if max_length <= max_new_tokens:
            raise ConfigError(f"max_length is {max_length} but must exceed max_new_tokens, {max_new_tokens}")
        encoded = [prompt[max_new_tokens - max_length :] for prompt in encoded]
    texts = [_Text(tokenizer, stop) for _ in prompts]
    for chosen in tokens(model, encoded, settings or SamplingSettings(), max_new_tokens, tokenizer.vocab_size):
        for number, (token, text) in enumerate(zip(chosen.tolist(), texts, strict=True)):
            say(number, text.add(token))
        if all(text.finish for text in texts):
            break
    for number, text in enumerate(texts):
        say(number, text.close())
    return [
        Completion(prompt, text.text, len(text.ids), text.finish) for prompt, text in zip(prompts, texts, strict=True)
    ]


class _Text:
    """The text of one sequence as it grows: what is certain, and what could still become a stop string."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self.tokenizer, self.stop = tokenizer, stop
        self.ids: list[int] = []
        self.text, self.finish = "", ""
        self._given = 0

    def add(self, token: int) -> str:
        """Takes a token and returns the text that became certain."""
        if self.finish:
            return ""
        if token == self.tokenizer.eos_id:
            self.finish = "end"
            return ""
        self.ids.append(token)
        text = self.tokenizer.decode(self.ids)
        found = min((at for at in map(text.find, self.stop) if at >= 0), default=-1)
        if found >= 0:
            self.text, self.finish = text[:found], "stop"
            return self._give(len(self.text))
        self.text = text
        settled = text.rstrip("\ufffd")  # an unfinished character decodes to replacement characters at the end
        held = max((n for s in self.stop for n in range(1, len(s)) if settled.endswith(s[:n])), default=0)
        return self._give(len(settled) - held)

    def close(self) -> str:
        """Ends the text and returns what was held back."""
        self.finish = self.finish or "length"
        return self._give(len(self.text))

    def _give(self, end: int) -> str:
        new = self.text[self._given : end]
        self._given = max(self._given, end)
        return new
