"""lm-evaluation-harness's view of a model: importing this registers `moekit` there.

A class of its own beside `HFLM` with `moekit.hf`, which works too: this one takes every layout that `moekit.load`
reads (codes of 4 and 8 bits among them) without transformers, masks padding, so that no expert sees it, scores answers
of one token that share a question in one pass, and counts the prompts that did not fit. Both give the same numbers.
"""

import itertools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.api.task import ConfigurableTask
from tqdm import tqdm

from moekit.errors import ConfigError, UnsupportedError
from moekit.evaluate.text import POOL, prefix
from moekit.evaluate.windows import Window, rolling, score_windows
from moekit.formats.checkpoint import load
from moekit.formats.tokenizer import Tokenizer, load_tokenizer
from moekit.generate import complete
from moekit.nn.model import Model
from moekit.train.hardware import choose_device

NEW_TOKENS = 256
"""Generated at most where a task does not say, as in HFLM."""


@register_model("moekit")
class MoekitLM(TemplateLM):  # type: ignore[misc]
    """A model directory, or a model with its tokenizer, for `lm_eval.simple_evaluate`. No score depends on the batch.

    Differs from HFLM where that stops with an error: a continuation longer than the model's positions is scored in
    windows, and where a task asks for more new tokens than half of the positions, that half is generated. The harness
    passes `max_batch_size` to every model; it bounds automatic batch sizes, which are refused here.
    """

    def __init__(
        self,
        pretrained: str | Path | Model,
        tokenizer: Tokenizer | None = None,
        batch_size: int | str = 8,
        device: str = "auto",
        dtype: str | None = None,
        max_length: int | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(pretrained, Model):
            folder = Path(pretrained)
            tokenizer = tokenizer or load_tokenizer(folder)
            pretrained = load(folder, choose_device(device), None if dtype is None else getattr(torch, dtype))
        if tokenizer is None:
            raise ConfigError("tokenizer is missing: a model that is not a directory comes with its own")
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ConfigError(f"batch_size is {batch_size!r} but must be a whole number above 0")
        limit = pretrained.config.max_position_embeddings
        if max_length is not None and not 1 < max_length <= limit:
            raise ConfigError(f"max_length is {max_length} but must be 2 to {limit}, the model's positions")
        self.model, self.vocabulary, self.batch_size = pretrained, tokenizer, int(batch_size)
        self.max_length = limit if max_length is None else max_length
        self.truncated = 0
        """Requests so far that did not fit: prompts cut from the left, continuations scored in windows."""

    @property
    def eot_token_id(self) -> int:
        return self.vocabulary.eos_id

    @property
    def prefix_token_id(self) -> int:
        return prefix(self.vocabulary)

    @property
    def tokenizer_name(self) -> str:
        return self.vocabulary.fingerprint

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Returns the ids of the text alone: special tokens are never added, nor read out of it."""
        return self.vocabulary.encode(string)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        windows: list[list[Window]] = []
        for _text, context, continuation in requests:
            whole = context + continuation
            self.truncated += len(whole) > self.max_length + 1
            if len(continuation) > self.max_length:
                windows.append([*rolling(continuation, context[-1], self.max_length, self.max_length)])
            else:
                kept = Window(whole[-(self.max_length + 1) :], len(continuation))
                windows.append([kept] if continuation else [])
        found = self._score(list(itertools.chain(*windows)), disable_tqdm)
        scores = [list(itertools.islice(found, len(parts))) for parts in windows]
        answers = [(sum(log for log, _ in parts), all(greedy for _, greedy in parts)) for parts in scores]
        for (text, *_rest), answer in zip(requests, answers, strict=True):
            if text is not None:
                self.cache_hook.add_partial("loglikelihood", text, answer)
        return answers

    def _score(self, windows: list[Window], quiet: bool) -> Iterable[tuple[float, bool]]:
        """Yields the score of each window; those of like length are put together, and answers to one question."""
        order = sorted(range(len(windows)), key=lambda n: (len(windows[n].tokens), windows[n].tokens), reverse=True)
        found: list[tuple[float, bool]] = [(0.0, True)] * len(windows)
        size = max(POOL, 4 * self.batch_size)
        with tqdm(total=len(windows), desc="log-likelihood", disable=quiet or not windows) as bar:
            for first in range(0, len(order), size):
                numbers = order[first : first + size]
                scores = score_windows(self.model, [windows[number] for number in numbers], self.batch_size)
                for number, score in zip(numbers, scores, strict=True):
                    found[number] = (score.log_likelihood, score.greedy)
                bar.update(len(numbers))
        yield from found

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Returns the log-likelihood of each text, in nats."""
        length, texts = self.max_length, [request.args[0] for request in requests]
        windows = [[*rolling(self.tok_encode(text), self.prefix_token_id, length, length)] for text in texts]
        found = self._score(list(itertools.chain(*windows)), disable_tqdm)
        totals = [sum(log for log, _ in itertools.islice(found, len(parts))) for parts in windows]
        for text, total in zip(texts, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Returns the greedy continuation of each prompt, up to the first of its stop strings or end-of-text."""
        texts = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
        with tqdm(total=len(requests), desc="generation", disable=disable_tqdm) as bar:
            for key, group in groups.items():
                stop, new_tokens = self.generation(json.loads(key))
                lengths = {n: len(self.tok_encode(requests[n].args[0])) for n in group}
                self.truncated += sum(length > self.max_length - new_tokens for length in lengths.values())
                group.sort(key=lengths.__getitem__, reverse=True)
                for first in range(0, len(group), self.batch_size):
                    numbers = group[first : first + self.batch_size]
                    prompts = [requests[number].args[0] for number in numbers]
                    found = complete(
                        self.model,
                        self.vocabulary,
                        prompts,
                        max_new_tokens=new_tokens,
                        stop=stop,
                        max_length=self.max_length,
                    )
                    for number, completion in zip(numbers, found, strict=True):
                        texts[number] = completion.text
                        self.cache_hook.add_partial("generate_until", requests[number].args, completion.text)
                    bar.update(len(numbers))
        return texts

    def generation(self, given: dict[str, Any]) -> tuple[list[str], int]:
        """Returns the stop strings and the number of new tokens; UnsupportedError for anything but greedy decoding."""
        if given.get("do_sample") and given.get("temperature", 1.0) != 0:
            raise UnsupportedError("do_sample is true but moekit's model of the harness decodes greedily only")
        until = given.get("until") or []
        stop = [text for text in ([until] if isinstance(until, str) else until) if text]
        return stop, min(int(given.get("max_gen_toks", NEW_TOKENS)), self.max_length // 2)


class BySubject(ConfigurableTask):  # type: ignore[misc]
    """A task whose worked examples are of the subject of the question."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config={key: value for key, value in config.items() if key != "class"})
        self.examples: dict[str, list[dict[str, Any]]] = {}
        for item in self.fewshot_docs():
            self.examples.setdefault(item["subject"], []).append(item)

    def fewshot_context(self, doc: dict[str, Any], *args: Any, **others: Any) -> Any:
        """Returns the prompt of one question."""
        self.sampler.replace_df(self.examples.get(doc["subject"], []))
        return super().fewshot_context(doc, *args, **others)
