"""What a result record holds, so that a score can be understood, and had again, without asking who measured it."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from moekit import files, receipts
from moekit.errors import DataError
from moekit.evaluate.text import Encoded, mean, prefix, score_documents
from moekit.formats.tokenizer import Tokenizer
from moekit.nn.model import Model

PREDICTED = "every token of each document once, the document by itself; end-of-text is not predicted"


def about(folder: Path, model: Model, tokenizer: Tokenizer) -> dict[str, Any]:
    """Returns the beginning of a record: which model this is, in which precision, and with which versions."""
    named = [name for name in ("manifest.json", "config.json") if (folder / name).is_file()]
    weight = model.embed_tokens.weight
    return {
        "model": {
            "path": str(folder),
            "sha256": {name: files.sha256(folder / name) for name in named},
            "tokenizer": tokenizer.fingerprint,
            "parameters": model.config.num_parameters,
            "active_parameters": model.config.num_active_parameters,
            "dtype": str(weight.dtype).removeprefix("torch."),
            "codes": None if model.quantization is None else str(model.quantization),
            "device": str(weight.device),
            "backend": model.experts_backend,
            "looks_ahead": model.config.looks_ahead,
        },
        "time": receipts.now(),
        "versions": receipts.versions(),
    }


def text_record(
    model: Model,
    documents: Iterable[Encoded],
    tokenizer: Tokenizer,
    source: Sequence[str],
    *,
    batch_size: int = 8,
    sequence_length: int | None = None,
    stride: int | None = None,
) -> dict[str, Any]:
    """Returns the scores of text by domain and their mean, with what they depend on; DataError without a token."""
    length = model.config.max_position_embeddings if sequence_length is None else sequence_length
    windows = {"sequence_length": length, "stride": length if stride is None else stride}
    first = prefix(tokenizer)
    scores = score_documents(model, documents, first, batch_size=batch_size, **windows)
    if not scores:
        raise DataError(f"{', '.join(source)} holds no token to predict")
    return {
        "source": list(source),
        "settings": {**windows, "batch_size": batch_size, "prefix_token": first, "predicted": PREDICTED},
        "domains": {domain: score._asdict() for domain, score in scores.items()},
        "mean": mean(scores),
    }
