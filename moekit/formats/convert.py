"""A model directory in another precision, with the account of what that cost: each tensor's error, and the logits'."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from moekit import receipts
from moekit.errors import CheckpointError, ConfigError, UnsupportedError
from moekit.formats.checkpoint import MODEL_TYPE, describe, load, read_config, seal
from moekit.formats.compare import BOUNDS, SEED, Bounds, blocks, check, kind, logits_checks, precision, sample
from moekit.formats.directory import atomic_directory, listing
from moekit.formats.guard import check_folder
from moekit.formats.layouts import fitting
from moekit.formats.layouts.tensors import Disk
from moekit.formats.tokenizer import load_tokenizer
from moekit.formats.weights import Reader, Stored, held, meta, nbytes, split, write
from moekit.nn.model import Model
from moekit.nn.quantized import matrices
from moekit.ops.quantize import Quantized, dequantize, quantize
from moekit.ops.scaled import unscaled

Precision = Literal["float32", "bfloat16", "int8", "int4"]


@torch.no_grad()
def convert(
    source: Path,
    target: Path,
    dtype: Precision | None = None,
    *,
    layout: str = MODEL_TYPE,
    text: str | None = None,
    mtp: Literal["drop", "keep"] = "drop",
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Writes the model of a directory in another precision or layout, in one atomic step, and returns the receipt.

    float32 and bfloat16 are of all tensors, but for selection biases and hash tables; int8 and int4 are of the matrices
    that `nn.quantized` names, the rest stays as it is; None: all does. From codes to anything else is by the numbers
    that they stand for. `layout` is a `model_type` of `formats.layouts`, or "hf": the first that can hold the model.
    `text` is what the logits are compared on, its first tokens; None: random tokens. Layers for multi-token prediction,
    which moekit does not compute, are left out, or with `mtp` "keep" go along. One matrix at a time is in memory,
    whatever the size of the model. `progress` gets "convert", bytes of the source done, bytes in all.

    Raises CheckpointError for a tensor that is not finite, ConfigError where nothing is to change, UnsupportedError
    where the layout cannot hold the model; a check that does not hold is only said in the receipt.
    """
    start = time.monotonic()
    if target.exists():
        raise CheckpointError(f"{target} exists already; choose another directory or remove it")
    check_folder(source)
    config, codes, names = read_config(source)
    if config.num_labels is not None:
        raise UnsupportedError(f"{source} has num_labels, so it predicts no words, which convert is judged by")
    layout = fitting(config) if layout == "hf" else layout
    if dtype is None and layout == MODEL_TYPE and not names.foreign:
        precisions = ", ".join(get_args(Precision))
        raise ConfigError(f"{source} is a {layout} directory already; --dtype is missing, allowed: {precisions}")
    if mtp == "keep" and not names.extra:
        raise ConfigError(f"mtp is keep but {source} has no layers for multi-token prediction")
    model = load(source, mapped=True)
    tokenizer = load_tokenizer(source) if (source / "tokenizer.json").is_file() else None
    ids = sample(config, tokenizer, text)
    came_in, logits = precision(model), model(ids).logits
    if dtype is not None:
        codes = dtype if dtype == "int8" or dtype == "int4" else None
    number = getattr(torch, dtype) if dtype == "float32" or dtype == "bfloat16" else model.embed_tokens.weight.dtype
    tensors: dict[str, dict[str, Any]] = {"used": {}, "created": {}, "dropped": {}}
    hashed: dict[str, Any] = {}
    with atomic_directory(target, hashed=hashed) as folder:
        ahead = len(names.extra) if mtp == "keep" else 0
        written = describe(folder, config, number, codes, tokenizer, layout, ahead)
        work = [*_work(model, dtype, names, written), *(_ahead(source, dtype, names) if ahead else ())]
        total = sum(nbytes(job.piece) for job in work)

        def converted() -> Iterator[Stored]:
            done = 0
            for job in work:
                result, error = _checked(source, job)
                _account(tensors, job, result, error)
                yield result
                done += nbytes(job.piece)
                if progress is not None:
                    progress("convert", done, total)

        write(folder, [(job.target, _converted(meta(job.piece), job.wanted)[0]) for job in work], converted())
        listed = _sources(source, tensors, names)
        told = {
            "source": str(source),
            "from": came_in,
            "dtype": dtype or came_in,
            "layout": layout,
            "compared_on": "random tokens" if text is None else "text",
            **({"mtp": mtp} if names.extra else {}),
        }
        if came_in in ("int8", "int4") and dtype not in (None, came_in):
            told["note"] = f"made of the numbers that {came_in} codes stand for: what they had lost is not brought back"
        before = model.embed_tokens.weight.dtype
        moved = before != number or names.block is not None  # 8-bit floating point is computed by other kernels
        named = [dtype or "float32", *(str(one).removeprefix("torch.") for one in (before, number) if moved)]
        bounds = BOUNDS[max(named, key=list(BOUNDS).index)]
        after = load(folder, check_hashes=False, mapped=True)(ids).logits
        receipt = receipts.make(
            "convert",
            config,
            config=told,
            inputs=listed,
            tensors=tensors,
            checks=[_largest(BOUNDS[dtype or "float32"], tensors["used"]), *logits_checks(bounds, logits, after)],
            seed=SEED,
            seconds=round(time.monotonic() - start, 3),
        )
        return seal(folder, hashed, receipt)


class _Job(NamedTuple):
    """One key of the source and of the target."""

    source: str
    target: str
    piece: Stored
    wanted: Precision | None
    """None: it stays as it is."""


def _work(model: Model, dtype: Precision | None, source: Disk, target: Disk) -> Iterator[_Job]:
    """Yields every key on disk with what is to become of it."""
    coded = {name for name, _, _ in matrices(model)}
    codes = dtype == "int8" or dtype == "int4"
    for name, weight in held(model).items():
        stays = name not in coded if codes else name.endswith(("expert_bias", ".table"))
        pairs = zip(split(name, weight, source), split(name, weight, target), strict=True)
        yield from (_Job(came, key, piece, None if stays else dtype) for (came, piece), (key, _) in pairs)


def _ahead(source: Path, dtype: Precision | None, names: Disk) -> Iterator[_Job]:
    """Yields the tensors for multi-token prediction, which have the same name in every layout that has them."""
    opened = Reader(source, names).files
    for key in names.ahead(opened):
        piece = names.tensor(opened, key, None)
        yield _Job(key, key, piece, None if key.endswith(".e_score_correction_bias") else dtype)


def _sources(source: Path, tensors: dict[str, dict[str, Any]], names: Disk) -> dict[str, Any]:
    """Returns the source's files by hash, after noting in `tensors` what is in them and was not used."""
    left = {used.get("source", key) for key, used in tensors["used"].items()} | tensors["dropped"].keys()
    tensors["dropped"] |= Reader(source, names).rest(left)
    listed = listing(source)
    if "training.safetensors" in listed:
        tensors["dropped"]["training.safetensors"] = "the state of a training, which this model does not go on with"
    return listed


def _checked(source: Path, job: _Job) -> tuple[Tensor | Quantized, float]:
    """Returns what `_converted` does; CheckpointError if it has a value that is not finite."""
    piece = unscaled(job.piece)
    if isinstance(piece, Tensor) and not bool(torch.isfinite(piece).all()):
        found = f"{job.source} in {source} has a value that is not finite"
        raise CheckpointError(f"{found}, which nothing can stand for")
    return _converted(piece, job.wanted)


def _converted(piece: Tensor | Quantized, dtype: Precision | None) -> tuple[Tensor | Quantized, float]:
    """Returns one matrix in another precision, None: as it is, and its relative RMS error."""
    if dtype is None or kind(piece) == dtype:
        return piece, 0.0
    results: list[Tensor | Quantized] = []
    wrong = whole = 0.0
    for block in blocks(piece):
        numbers = dequantize(block) if isinstance(block, Quantized) else block
        result = quantize(numbers, dtype) if dtype == "int8" or dtype == "int4" else numbers.to(getattr(torch, dtype))
        results.append(result)
        if not numbers.is_meta:
            exact, found = numbers.double(), dequantize(result) if isinstance(result, Quantized) else result
            wrong, whole = wrong + float((found - exact).square().sum()), whole + float(exact.square().sum())
    return _joined(results), (wrong / whole) ** 0.5 if wrong else 0.0


def _joined(blocks: list[Tensor | Quantized]) -> Tensor | Quantized:
    coded = [block for block in blocks if isinstance(block, Quantized)]
    if not coded:
        return torch.cat([block for block in blocks if isinstance(block, Tensor)])
    codes, scales = torch.cat([block.codes for block in coded]), torch.cat([block.scales for block in coded])
    return Quantized(codes, scales, coded[0].width)


def _account(tensors: dict[str, dict[str, Any]], job: _Job, target: Stored, error: float) -> None:
    """Notes what became of the tensors on disk that one key stands for: used with its error, created, or dropped."""
    used: dict[str, Any] = {"from": kind(job.piece), "to": kind(target), "relative_rms": error}
    if job.source != job.target:
        used["source"] = job.source
    tensors["used"][job.target], scales = used, f"{job.target}_scale"
    if isinstance(job.piece, Quantized) and isinstance(target, Quantized):
        tensors["used"][scales] = used
    elif isinstance(target, Quantized):
        tensors["created"][scales] = f"the scales of {job.target}"
    elif isinstance(job.piece, Quantized):
        tensors["dropped"][f"{job.source}_scale"] = f"multiplied into {job.source}"


def _largest(bounds: Bounds, used: dict[str, Any]) -> dict[str, Any]:
    """Returns the check of the tensor that lost most."""
    worst = max(used, key=lambda key: used[key]["relative_rms"])
    value = used[worst]["relative_rms"]
    return check("largest relative RMS error of a tensor", value, "<=", bounds.weights, of=worst)
