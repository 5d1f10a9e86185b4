"""How well a model predicts text: nats per token, bits per byte and perplexity of each domain.

Every token of every document is predicted once, in the document by itself; the first from the tokenizer's
beginning-of-text token, where it has one, else from end-of-text. End-of-text itself is not predicted: validation in
training predicts it, lm-evaluation-harness does not, and these are the harness's numbers.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from moekit.data import TokenDataset
from moekit.data.text import Document, file_documents, text_files
from moekit.errors import ConfigError, DataError
from moekit.evaluate.windows import Window, rolling, score_windows
from moekit.formats.tokenizer import Tokenizer
from moekit.nn.model import Model

Progress = Callable[[str, int, int], None]
ENCODED_AT_ONCE = 1 << 20
"""Characters that are tokenised at once; with POOL, all of a text that is in memory."""
POOL = 256
"""Windows among which those of like length are put together."""


class Encoded(NamedTuple):
    """A document as tokens."""

    domain: str
    tokens: Sequence[int]
    """Without end-of-text."""
    bytes: int
    """Of its text in UTF-8."""


class DomainScore(NamedTuple):
    """A domain's result."""

    loss: float
    """Nats per token."""
    bits_per_byte: float
    """The same sum in bits, per UTF-8 byte of the text: comparable between tokenizers."""
    perplexity: float
    """exp(loss), per token."""
    byte_perplexity: float
    """2 to the bits per byte."""
    tokens: int
    bytes: int
    documents: int


def score_text(
    model: Model, tokenizer: Tokenizer, documents: Iterable[Document], *, batch_size: int = 8, **windows: int | None
) -> dict[str, DomainScore]:
    """Returns the score of each domain of these documents, by name; `windows` are those of `score_documents`."""
    return score_documents(model, encoded(tokenizer, documents), prefix(tokenizer), batch_size=batch_size, **windows)


def score_documents(
    model: Model,
    documents: Iterable[Encoded],
    prefix: int,
    *,
    batch_size: int = 8,
    sequence_length: int | None = None,
    stride: int | None = None,
) -> dict[str, DomainScore]:
    """Returns the score of each domain that has a token, by name. Scores do not depend on the batch size.

    `sequence_length` is what a window sees (all positions of the model), `stride` what each after the first adds
    (`sequence_length`): see `windows.rolling`. Memory does not grow with the text. Raises ConfigError for windows that
    the model has no room for, and where a loss is not finite.
    """
    limit = model.config.max_position_embeddings
    length = limit if sequence_length is None else sequence_length
    if not 1 <= length <= limit:
        raise ConfigError(f"sequence_length is {length} but must be 1 to {limit}, the model's max_position_embeddings")
    stride = length if stride is None else stride
    if not 1 <= stride <= length:
        raise ConfigError(f"stride is {stride} but must be 1 to {length}, the tokens that a window sees")
    sums: dict[str, list[float]] = {}  # nats, tokens, bytes, documents

    def cut() -> Iterator[tuple[str, Window]]:
        for domain, tokens, size in documents:
            entry = sums.setdefault(domain, [0.0, 0, 0, 0])
            entry[1:] = entry[1] + len(tokens), entry[2] + size, entry[3] + 1
            for window in rolling(tokens, prefix, length, stride):
                yield domain, window

    windows = cut()
    while pool := list(itertools.islice(windows, max(POOL, 4 * batch_size))):
        found = score_windows(model, [window for _, window in pool], batch_size)
        for (domain, _), score in zip(pool, found, strict=True):
            sums[domain][0] -= score.log_likelihood
    return {
        domain: _score(domain, nats, int(tokens), int(size), int(count))
        for domain, (nats, tokens, size, count) in sorted(sums.items())
        if tokens
    }


def _score(domain: str, nats: float, tokens: int, size: int, documents: int) -> DomainScore:
    if not math.isfinite(nats):
        raise ConfigError(f"the loss of {domain} is {nats}; compute in another dtype (float32)")
    loss, bits = nats / tokens, nats / math.log(2) / max(size, 1)
    return DomainScore(loss, bits, _exp(loss), _exp(bits * math.log(2)), tokens, size, documents)


def _exp(nats: float) -> float:
    return math.exp(min(nats, 700.0))  # beyond it a float, and JSON, has no number


def mean(scores: dict[str, DomainScore]) -> dict[str, float]:
    """Returns loss and bits per byte as means over domains, each counting the same, and the perplexity of that loss."""
    loss, bits = (sum(score[column] for score in scores.values()) / len(scores) for column in (0, 1))
    return {"loss": loss, "bits_per_byte": bits, "perplexity": _exp(loss), "byte_perplexity": _exp(bits * math.log(2))}


def prefix(tokenizer: Tokenizer) -> int:
    """Returns the token that stands before a document's first: beginning-of-text where there is one, else its end."""
    return tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id


def encoded(tokenizer: Tokenizer, documents: Iterable[Document]) -> Iterator[Encoded]:
    """Yields the documents as tokens, many being tokenised at a time."""
    batch, size = list[Document](), 0
    for document in itertools.chain(documents, (None,)):
        if document is not None:
            batch.append(document)
            size += len(document.text) + ENCODED_AT_ONCE // 1024
        if document is None or size >= ENCODED_AT_ONCE:
            tokens = tokenizer.encode_batch([document.text for document in batch])
            for one, ids in zip(batch, tokens, strict=True):
                yield Encoded(one.domain, ids, len(one.text.encode()))
            batch, size = [], 0


def read_files(
    paths: Iterable[str | Path],
    text_field: str = "text",
    domain_field: str = "domain",
    progress: Progress | None = None,
) -> Iterator[Document]:
    """Yields the documents of text files and folders, read as `moekit prepare` reads them."""
    files = text_files(paths, text_field, domain_field)
    done, total = 0, sum(file.stat().st_size for file in files)
    for path, folder in files.items():
        with path.open("rb") as raw:
            for document in file_documents(path, raw, text_field, domain_field, folder):
                yield document
                if progress is not None:
                    progress("text", done + raw.tell(), total)
        done += path.stat().st_size


def read_dataset(dataset: TokenDataset, tokenizer: Tokenizer, progress: Progress | None = None) -> Iterator[Encoded]:
    """Yields the documents of prepared data, domain by domain; DataError when it is in another tokenizer's tokens."""
    if dataset.tokenizer_fingerprint != tokenizer.fingerprint:
        raise DataError(f"{dataset.directory} was prepared with another tokenizer than the model's; give its text")
    done = 0
    for domain in dataset.domains:
        for tokens, size in dataset.documents(domain):
            yield Encoded(domain, tokens.tolist(), size)
            done += len(tokens) + 1
            if progress is not None:
                progress("text", done, dataset.num_tokens)
