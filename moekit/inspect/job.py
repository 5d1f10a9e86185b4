"""The whole inspection: one pass over the text, every analysis, the report; what `moekit inspect` does."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from moekit.config import MoEConfig
from moekit.data import open_dataset
from moekit.data.shards import read_manifest
from moekit.errors import CheckpointError, ConfigError, nearest
from moekit.files import check_writable, write, write_json
from moekit.formats.checkpoint import load as load_model
from moekit.formats.checkpoint import load_config
from moekit.formats.tokenizer import Tokenizer, load_tokenizer
from moekit.inspect import report
from moekit.inspect.agreement import agreement
from moekit.inspect.beside import beside
from moekit.inspect.collect import Stats, collect
from moekit.inspect.domains import domains
from moekit.inspect.kinds import kinds, positions
from moekit.inspect.load import load
from moekit.inspect.probes import NAMES, probes
from moekit.inspect.result import Analysis
from moekit.inspect.similarity import similarity
from moekit.inspect.text import Progress, Window, dataset_windows, predictions, text_windows
from moekit.inspect.together import together
from moekit.inspect.tokens import tokens
from moekit.inspect.trace import trace, trace_page, write_trace
from moekit.inspect.vocabulary import Vocabulary, vocabulary
from moekit.nn.model import Model
from moekit.train.hardware import choose_device
from moekit.train.state import finished, model_folder

logger = logging.getLogger(__name__)

LENGTH = 512
"""Tokens of a window, where the model can read as many."""
SUMMARY = "inspect.json"
"""Written last: what the command prints with --json, and the sign that a folder holds an inspection."""


class Subject(NamedTuple):
    """A model under inspection, the text, and what one pass of the one over the other found."""

    path: Path
    model: Model
    tokenizer: Tokenizer
    vocabulary: Vocabulary
    windows: Callable[[], Iterator[Window]]
    """The text once more, from its start, for an analysis that needs a pass of its own."""
    stats: Stats
    checkpoints: list[Path]
    """Of the run, oldest first; empty for a model that is no run's."""


ANALYSES: dict[str, Callable[[Subject], Analysis | None]] = {
    "load": lambda subject: load(subject.stats),
    "domains": lambda subject: domains(subject.stats),
    "kinds": lambda subject: kinds(subject.stats),
    "positions": lambda subject: positions(subject.stats),
    "tokens": lambda subject: tokens(subject.stats, subject.vocabulary, subject.tokenizer.decode),
    "together": lambda subject: together(subject.stats),
    "similarity": lambda subject: similarity(subject.model, subject.stats.sample),
    "agreement": lambda subject: agreement(
        subject.checkpoints, subject.stats.sample, subject.model.embed_tokens.weight.device
    ),
}
"""Every analysis by name, in the order of the report; None where it does not apply."""


class Text(NamedTuple):
    """What is read: files, or a prepared dataset; `limit` is the most tokens of a domain."""

    files: Sequence[str | Path]
    data: str | Path | None
    limit: int
    text_field: str = "text"
    domain_field: str = "domain"


def inspect(
    model: str | Path,
    text: Text,
    out: str | Path,
    *,
    against: str | Path | None = None,
    analyses: Sequence[str] | None = None,
    probed: bool = False,
    trace_text: str | None = None,
    sequence_length: int | None = None,
    batch_size: int = 8,
    device: str = "auto",
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Returns the findings and writes the report, its tables and the trace to `out`, the report last.

    `model` and `against` are model directories or runs, of which the newest checkpoint is taken. `analyses` are names
    of `ANALYSES` (all). `probed` asks the paper's probes too, of both models side by side where there are two, which
    takes a forward pass for every point of their curves. Raises ConfigError for a dense model, and for an `out` that
    holds something else.
    """
    started, out = time.perf_counter(), Path(out)
    chosen = list(ANALYSES) if analyses is None else list(analyses)
    for name in chosen:
        if name not in ANALYSES:
            hint = nearest(name, ANALYSES)
            raise ConfigError(f"there is no analysis {name!r}{hint}; analyses: {', '.join(ANALYSES)}")
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / SUMMARY).is_file())):
        raise ConfigError(f"{out} holds something else; choose another --out")
    if bool(text.files) == (text.data is not None):
        raise ConfigError("give the text either as files (--text) or as a prepared dataset (--data)")
    if text.data is not None and (text.text_field, text.domain_field) != ("text", "domain"):
        raise ConfigError("--text-field and --domain-field have no effect with --data; leave them out")
    check_writable(out / SUMMARY)
    paths = [Path(model)] if against is None else [Path(model), Path(against)]
    lengths = [_length(path, sequence_length) for path in paths]
    subjects, inspected, pages = list[Subject](), list[report.Inspected](), list[str]()
    names = _names(paths)
    for name, path, length in zip(names, paths, lengths, strict=True):
        loaded, tokenizer = _opened(path, text.data, device, dtype)
        words = vocabulary(tokenizer, loaded.config.vocab_size)
        if trace_text is not None and not subjects:  # first: a text that is too long is told before the work
            pages = _write_trace(out, loaded, tokenizer, words, trace_text, name)
        subject = _read(path, loaded, tokenizer, words, text, length, batch_size, progress)
        found = {question: ANALYSES[question](subject) for question in chosen}
        if skipped := [question for question, one in found.items() if one is None]:
            logger.info("%s: there is nothing for %s to look at", path, ", ".join(skipped))
        kept = [one for one in found.values() if one is not None]
        inspected.append(report.Inspected(name, str(path), _facts(subject), kept))
        subjects.append(subject)
    extra = []
    if probed:
        extra += _probes(subjects, tuple(names), batch_size, progress)
    if len(inspected) == 2:
        extra.append(beside((inspected[0].name, inspected[1].name), inspected[0].analyses, inspected[1].analyses))
    written = report.write_report(out, inspected, extra, pages[-1] if pages else None)
    document = {
        "out": str(out),
        "report": str(out / report.FILE),
        "models": [_document(subject, one) for subject, one in zip(subjects, inspected, strict=True)],
        "findings": [finding for one in extra for finding in one.findings],
        "files": [*written, *pages],
        "seconds": round(time.perf_counter() - started, 1),
    }
    write_json(out / SUMMARY, document)
    return document


def _names(paths: Sequence[Path]) -> list[str]:
    """Returns what the models are called: the last part of a path, of two paths the last in which they differ."""
    parts = [path.resolve().parts for path in paths]
    while len(parts) == 2 and parts[0][-1] == parts[1][-1] and min(map(len, parts)) > 1:
        parts = [of[:-1] for of in parts]
    names = [of[-1] for of in parts]
    return names if len({*names}) == len(paths) else list(map(str, paths))


def _length(path: Path, wanted: int | None) -> int:
    """Returns how long windows are. ConfigError for a dense model, or one that reads less than is wanted."""
    config = load_config(model_folder(path))
    if not config.moe_layers:
        raise ConfigError(
            f"{path} has no MoE layers to inspect: ffn.kind is {config.ffn.kind}; name a model of kind moe"
        )
    limit = config.max_position_embeddings
    if wanted is not None and wanted > limit:
        raise ConfigError(f"--sequence-length is {wanted} but {path} reads at most {limit} tokens")
    return wanted or min(LENGTH, limit)


def _opened(path: Path, data: str | Path | None, device: str, dtype: torch.dtype | None) -> tuple[Model, Tokenizer]:
    """Returns the model and the tokenizer that its text is read with, the dataset's if that is another file."""
    folder = model_folder(path)
    model = load_model(folder, choose_device(device), dtype)
    tokenizer = load_tokenizer(folder) if data is None or (folder / "tokenizer.json").is_file() else None
    if data is not None:
        own = load_tokenizer(data)
        if tokenizer is not None and own.fingerprint != tokenizer.fingerprint:
            raise ConfigError(f"{data} was prepared with another tokenizer than that of {path}; give --text instead")
        tokenizer = own
    assert tokenizer is not None
    size = model.config.vocab_size
    if tokenizer.vocab_size > size:
        raise CheckpointError(f"the tokenizer has {tokenizer.vocab_size} entries but {path} has a vocab_size of {size}")
    return model, tokenizer


def _read(
    path: Path,
    model: Model,
    tokenizer: Tokenizer,
    words: Vocabulary,
    text: Text,
    length: int,
    batch_size: int,
    progress: Progress | None,
) -> Subject:
    """Returns the subject after the one pass over the text."""

    def windows(shown: Progress | None = None) -> Iterator[Window]:
        if text.data is None:
            fields = {"text_field": text.text_field, "domain_field": text.domain_field}
            return text_windows(text.files, tokenizer, length, text.limit, **fields, progress=shown)
        valid = read_manifest(text.data).splits.get("valid")
        split = "valid" if valid is not None and valid.tokens else "train"
        return dataset_windows(open_dataset(text.data, split), length, text.limit, shown)

    stats = collect(model, windows(progress), words.kinds, length, batch_size)
    checkpoints = finished(path) if (path / "checkpoints").is_dir() else []
    return Subject(path, model, tokenizer, words, windows, stats, checkpoints)


def _probes(
    subjects: Sequence[Subject], names: tuple[str, ...], batch_size: int, progress: Progress | None
) -> list[Analysis]:
    """Returns the paper's probes of the models on the text, which they must read in the same tokens."""
    first, *others = subjects
    for other in others:
        if other.tokenizer.fingerprint != first.tokenizer.fingerprint:
            raise ConfigError(f"--probes lays losses side by side, but {first.path} and {other.path} read other tokens")
    total = 2 * int(first.stats.tokens.sum())

    def shown(tokens: int) -> None:
        if progress is not None:
            progress("probes", min(2 * tokens, total), total)  # in bytes, as the pass over a dataset counts

    text = predictions(first.windows(), batch_size)
    pair = (names[0], names[1]) if others else (names[0], NAMES[1] if names[0] != NAMES[1] else NAMES[0])
    return probes(first.model, text, others[0].model if others else None, names=pair, progress=shown)


def _write_trace(out: Path, model: Model, tokenizer: Tokenizer, words: Vocabulary, text: str, name: str) -> list[str]:
    """Returns the names of the trace's two files, the arrays and the page."""
    ids, ffn = tokenizer.encode(text), model.config.ffn
    assert isinstance(ffn, MoEConfig)
    found = trace(model, ids)
    write_trace(out / "trace.npz", found)
    texts = [words.texts[number] for number in ids]
    page = trace_page(found, texts, list(model.config.moe_layers), ffn.n_routed_experts, name)
    write(out / "trace.html", page)
    return ["trace.npz", "trace.html"]


def _facts(subject: Subject) -> dict[str, str]:
    """Returns what the strip at the top of the report says of the model and the text."""
    ffn, stats = subject.model.config.ffn, subject.stats
    assert isinstance(ffn, MoEConfig)
    scoring = "by a hash" if ffn.topk_method == "hash" else ffn.scoring_func
    return {
        "MoE layers": str(len(stats.layers)),
        "routed experts, of which chosen": f"{ffn.n_routed_experts}, {ffn.num_experts_per_tok}",
        "shared experts": str(ffn.n_shared_experts),
        "scores": scoring,
        "tokens read": f"{int(stats.tokens.sum()):,}",
        "domains": str(len(stats.domains)),
    }


def _document(subject: Subject, inspected: report.Inspected) -> dict[str, Any]:
    tables = {one.name: one.tables for one in inspected.analyses}
    rows: dict[Any, dict[str, Any]] = {layer: {"layer": layer} for layer in subject.stats.layers}
    wanted = {"load": ("entropy", "max_load", "dead", "dominant", "margin_p50"), "domains": ("bits", "error")}
    for name, columns in wanted.items():
        if name in tables:
            found = tables[name]["layers"]
            for row in found.rows:
                values = dict(zip(found.columns, row, strict=True))
                rows[row[0]] |= {f"domain_{key}" if name == "domains" else key: values[key] for key in columns}
    tokens = dict(zip(subject.stats.domains, map(int, subject.stats.tokens), strict=True))
    return {
        "model": inspected.path,
        "facts": inspected.facts,
        "tokens": tokens,
        "findings": {one.name: list(one.findings) for one in inspected.analyses},
        "layers": list(rows.values()),
    }
