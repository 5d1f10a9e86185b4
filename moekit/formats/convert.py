"""A model directory in another precision, with the account of what that cost: each tensor's error, and the logits'."""

import time
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from moekit import files, receipts
from moekit.errors import CheckpointError, ConfigError, DataError
from moekit.formats.checkpoint import load, save, tied
from moekit.formats.directory import MANIFEST, Manifest
from moekit.formats.names import pieces
from moekit.formats.tokenizer import Tokenizer, load_tokenizer
from moekit.nn.model import Model
from moekit.nn.quantized import dequantize_, matrices, quantize_
from moekit.nn.weights import operand
from moekit.ops.quantize import Quantized, dequantize

Precision = Literal["float32", "bfloat16", "int8", "int4"]
SEQUENCES, LENGTH, SEED = 4, 128, 0


class _Bounds(NamedTuple):
    weights: float
    """Relative RMS error of any one tensor."""
    divergence: float
    """Mean KL divergence of the next token's distribution, nats."""
    agreement: float
    """Share of positions whose likeliest token stays."""


BOUNDS: dict[str, _Bounds] = {
    "float32": _Bounds(0.0, 1e-6, 0.99),
    "bfloat16": _Bounds(2**-8, 0.02, 0.85),
    "int8": _Bounds(0.013, 0.02, 0.85),
    "int4": _Bounds(0.21, 0.2, 0.4),
}
"""Weights: bfloat16's rounding; sqrt(32 / 12) / 127 and / 8, which is what rounding costs a group of one large weight
and little else (a Gaussian: 0.0054 and 0.086). Logits: the quickstart's models, MoE and dense, on text and on random
tokens, diverge by at most 3e-4, 7e-5 and 3e-3 and keep 0.97, 0.99 and 0.91 of the tokens. The bounds also let the worst
models pass that were found, random weights of which every token's choice of experts is a near tie: 0.011, 0.013, 0.12.
"""


@torch.no_grad()
def convert(source: Path, target: Path, dtype: Precision, *, text: str | None = None) -> dict[str, Any]:
    """Writes the model of a directory in another precision, in one atomic step, and returns the receipt.

    float32 and bfloat16 are of all tensors, but for selection biases and hash tables; int8 and int4 are of the matrices
    that `nn.quantized` names, the rest stays as it is. From codes to anything else is by the numbers that they stand
    for. `text` is what the logits are compared on, its first tokens; None: random tokens. Raises CheckpointError for a
    tensor that is not finite; a check that does not hold is only said in the receipt.
    """
    start = time.monotonic()
    if target.exists():
        raise CheckpointError(f"{target} exists already; choose another directory or remove it")
    model = load(source)
    tokenizer = load_tokenizer(source) if (source / "tokenizer.json").is_file() else None
    ids = _tokens(model, tokenizer, text)
    before, came_in, logits = _tensors(model), _precision(model), model(ids).logits
    for name, tensor in before.items():
        if not isinstance(tensor, Quantized) and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{name} in {source} holds a value that is not finite, which nothing can stand for")
    _change(model, dtype)
    tensors = _account(before, _tensors(model))
    if "training.safetensors" in (listed := files.read_json(source / MANIFEST, Manifest, CheckpointError).files):
        tensors["dropped"]["training.safetensors"] = "the state of a training, which this model does not go on with"
    told = {
        "source": str(source),
        "from": came_in,
        "dtype": dtype,
        "compared_on": "random tokens" if text is None else "text",
    }
    if came_in in ("int8", "int4") and came_in != dtype:
        told["note"] = f"made of the numbers that {came_in} codes stand for: what they had lost is not brought back"
    receipt = receipts.make(
        "convert",
        model.config,
        config=told,
        inputs={name: entry.model_dump() for name, entry in listed.items()},
        tensors=tensors,
        checks=_checks(BOUNDS[dtype], tensors["used"], logits, model(ids).logits),
        seed=SEED,
        seconds=round(time.monotonic() - start, 3),
    )
    return save(model, target, tokenizer, receipt=receipt)


def _tokens(model: Model, tokenizer: Tokenizer | None, text: str | None) -> Tensor:
    """Returns at most SEQUENCES rows of LENGTH tokens."""
    length = min(LENGTH, model.config.max_position_embeddings)
    if text is None:
        draw = torch.Generator().manual_seed(SEED)
        return torch.randint(model.config.vocab_size, (SEQUENCES, length), generator=draw)
    if tokenizer is None:
        raise ConfigError(
            "--text needs a tokenizer and the source has no tokenizer.json; leave it out for random tokens"
        )
    ids = tokenizer.encode(text)[: SEQUENCES * length]
    if not ids:
        raise DataError("the text to compare on is empty")
    length = min(length, len(ids))
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)


def _precision(model: Model) -> str:
    return model.quantization or str(model.embed_tokens.weight.dtype).removeprefix("torch.")


def _tensors(model: Model) -> dict[str, Tensor | Quantized]:
    """Returns what the state dict holds, a matrix in codes as one."""
    coded = {name: operand(getattr(module, attribute)) for name, module, attribute in matrices(model)}
    state = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not tied(model.config, name) and name.removesuffix(".codes").removesuffix(".scales") not in coded
    }
    # detached: `model.to` changes parameters in place
    return state | {name: held.detach() if isinstance(held, Tensor) else held for name, held in coded.items()}


def _change(model: Model, dtype: Precision) -> None:
    if model.quantization == dtype:
        return
    if dtype in ("int8", "int4"):
        if model.quantization is not None:
            dequantize_(model, torch.float32)
        quantize_(model, dtype)
    else:
        number = getattr(torch, dtype)
        if model.quantization is not None:
            dequantize_(model, number)
        model.to(number).eval()


def _account(before: dict[str, Tensor | Quantized], after: dict[str, Tensor | Quantized]) -> dict[str, dict[str, Any]]:
    """Returns every tensor on disk, of the source and of the target: used with its error, created, or dropped."""
    account: dict[str, dict[str, Any]] = {"used": {}, "created": {}, "dropped": {}}
    for name, source in before.items():
        target = after[name]
        a, b = (dequantize(t) if isinstance(t, Quantized) else t for t in (source, target))
        kinds = [t.kind if isinstance(t, Quantized) else str(t.dtype).removeprefix("torch.") for t in (source, target)]
        for key, index in pieces(name, tuple(a.shape)):
            used = {"from": kinds[0], "to": kinds[1], "relative_rms": _relative_rms(a[index], b[index])}
            account["used"][key], scales = used, f"{key}_scale"
            if isinstance(source, Quantized) and isinstance(target, Quantized):
                account["used"][scales] = used
            elif isinstance(target, Quantized):
                account["created"][scales] = f"the scales of {key}"
            elif isinstance(source, Quantized):
                account["dropped"][scales] = f"multiplied into {key}"
    return account


def _relative_rms(a: Tensor, b: Tensor) -> float:
    """Returns |b - a| / |a|, 0 where both are zero."""
    if torch.equal(a.double(), b.double()):
        return 0.0
    return float((b.double() - a.double()).norm() / a.double().norm())


def _checks(bounds: _Bounds, used: dict[str, Any], before: Tensor, after: Tensor) -> list[dict[str, Any]]:
    p, q = before.double().log_softmax(-1), after.double().log_softmax(-1)
    worst = max(used, key=lambda key: used[key]["relative_rms"])
    divergence = float((p.exp() * (p - q)).sum(-1).mean().clamp(min=0))
    agreement = float((p.argmax(-1) == q.argmax(-1)).double().mean())
    centred = before.double() - before.double().mean(-1, keepdim=True)
    difference = after.double() - before.double()
    relative = float((difference - difference.mean(-1, keepdim=True)).norm() / centred.norm())
    return [
        _check("largest relative RMS error of a tensor", used[worst]["relative_rms"], "<=", bounds.weights, of=worst),
        _check("mean KL divergence of the next token, nats", divergence, "<=", bounds.divergence, logits_rms=relative),
        _check("positions with the same likeliest token", agreement, ">=", bounds.agreement),
    ]


def _check(name: str, value: float, sign: Literal["<=", ">="], bound: float, **more: Any) -> dict[str, Any]:
    held = value <= bound if sign == "<=" else value >= bound
    return {"name": name, "value": value, "bound": f"{sign} {bound:g}", "held": held, **more}
