"""Whether a model directory is what it claims to be: measured from its files, each value with its bound."""

import contextlib
import math
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from moekit import files, receipts
from moekit.config import ModelConfig, parameters
from moekit.errors import CheckpointError, ConfigError
from moekit.formats.checkpoint import load, read_config
from moekit.formats.compare import BOUNDS, check, difference, kind, logits_checks, precision, routing_check, sample
from moekit.formats.directory import MANIFEST, Manifest
from moekit.formats.guard import check_folder
from moekit.formats.layouts.tensors import Disk
from moekit.formats.tokenizer import Tokenizer, load_tokenizer
from moekit.formats.values import Values
from moekit.formats.weights import OURS, Reader, Stored, held, nbytes, split
from moekit.nn.model import Model

Progress = Callable[[str, int, int], None]
Check = dict[str, Any]
READ = (".json", ".safetensors")
"""Of these kinds are the files that a model is read from."""
SHOWN = 8
"""Places that a check names at most."""
ROLES = (
    (r"^embed_tokens\.", "embedding"),
    (r"^(lm_head|score)\.", "head"),
    (r"norm\.weight$", "norm"),
    (r"\.self_attn\.", "attention"),
    (r"^embed_task\.|\.mlp\.router\.(weight|first|\d+)$|_proj\.(gate|task_proj)\.", "router"),
    (r"\.mlp\.experts\.", "routed"),
    (r"\.mlp\.shared_expert", "shared"),
    (r"\.mlp\.\w+_proj\.", "dense"),
)
"""A tensor's role is that of the first pattern that its name in the state dict matches; buffers have none."""


@torch.no_grad()
def verify(
    folder: Path, against: Path | None = None, *, text: str | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """Returns the checks of a model directory, JSON-ready; `held` says whether all of them held.

    `against` is another directory: the two models are compared tensor by tensor, where they have the same ones, and on
    tokens, the first of `text` or random ones. Weights stay in their files and are looked at one by one, so the model
    may be larger than memory. `progress` gets "files" or "weights", bytes done, bytes in all.

    Raises CheckpointError for what cannot be read at all: no directory, no config.json that describes a model, nothing
    to compare with. Files that are damaged are checks that did not hold.
    """
    start = time.monotonic()
    if text is not None and against is None:
        raise ConfigError("--text is what the two models are compared on; it needs --against")
    check_folder(folder)
    config, _, disk = read_config(folder)
    other = None if against is None else _load(against)
    report = progress or (lambda phase, done, total: None)
    checks, notes = _files(folder, not disk.foreign, report)
    roles: dict[str, int] = {}
    try:
        model = _load(folder)
    except CheckpointError as error:
        checks.append(_none("tensors, shapes and types against the config", [str(error)]))
        notes.append("the weights cannot be read as this model, so nothing in them was looked at")
    else:
        checks.append(_none("tensors, shapes and types against the config", _mislabelled(folder, model, disk)))
        roles = _roles(model)
        checks += _counts(folder, config, roles)
        values = Values()
        total, done = sum(nbytes(piece) for _, piece in _pieces(model)), 0
        for (key, piece), (shown, _) in zip(_pieces(model), _pieces(model, disk), strict=True):
            values.look(key, piece, config, shown)
            report("weights", done := done + nbytes(piece), total)
        checks += [_none(name, found) for name, found in values.faults().items()]
        if other is not None:
            more, said = _compare(model, other, _tokenizer(folder, against) if text is not None else None, text)
            checks, notes = checks + more, notes + said
    return {
        "model": str(folder),
        "against": None if against is None else str(against),
        "parameters_by_role": roles,
        "checks": checks,
        "held": all(one["held"] for one in checks),
        "notes": notes,
        "seconds": round(time.monotonic() - start, 3),
    }


def _files(folder: Path, ours: bool, report: Progress) -> tuple[list[Check], list[str]]:
    """Returns the checks of the manifest and of the receipt against the files, and what there was none of."""
    found = sorted(entry.name for entry in folder.iterdir() if entry.is_file() and entry.name != MANIFEST)
    wanted = [name for name in (MANIFEST, receipts.FILE) if (folder / name).is_file()]
    ours = ours or bool(wanted)  # whoever wrote one of them wrote both
    notes = [] if ours else [f"there is no {name}; only moekit writes one" for name in (MANIFEST, receipts.FILE)]
    hashed: dict[str, Any] = {}
    total = sum((folder / name).stat().st_size for name in found)
    for name in found if wanted else ():
        hashed |= files.hashes(folder, [name])
        report("files", sum(entry["bytes"] for entry in hashed.values()), total)
    return [*_against_manifest(folder, hashed), *_against_receipt(folder, hashed)] if ours else [], notes


def _against_manifest(folder: Path, hashed: dict[str, Any]) -> Iterator[Check]:
    name = "files missing or changed since they were written"
    try:
        listed = files.read_json(folder / MANIFEST, Manifest, CheckpointError).model_dump()["files"]
    except CheckpointError as error:
        yield _none(name, [str(error)])
        return
    yield _none(name, [file for file, entry in listed.items() if hashed.get(file) != entry])
    yield _none("files that the manifest does not list", [f for f in hashed if f not in listed and f.endswith(READ)])


def _against_receipt(folder: Path, hashed: dict[str, Any]) -> Iterator[Check]:
    name = "faults in the receipt"
    try:
        receipt = _receipt(folder)
    except CheckpointError as error:
        yield _none(name, [str(error)])
        return
    yield _none(name, receipts.faults(receipt))
    wrong = [file for file, entry in receipt.outputs.items() if hashed.get(file) != entry]
    unsaid = [f for f in hashed if f not in receipt.outputs and f.endswith(READ) and f != receipts.FILE]
    yield _none("outputs in the receipt that are not the files", wrong + unsaid)
    yield _none(
        "checks in the receipt that did not hold", [str(c.get("name")) for c in receipt.checks if not c.get("held")]
    )


def _receipt(folder: Path) -> receipts.Receipt:
    return files.read_json(folder / receipts.FILE, receipts.Receipt, CheckpointError)


def _mislabelled(folder: Path, model: Model, disk: Disk) -> list[str]:
    """Returns the tensors of another type than config.json says; float32 may stand anywhere."""
    if disk.foreign:
        return []
    said = files.read_json(folder / "config.json", dict[str, Any], CheckpointError).get("dtype")
    allowed = (said, "float32", "int64", model.quantization)
    return [f"{key} is {kind(piece)}, not {said}" for key, piece in _pieces(model) if kind(piece) not in allowed]


def _roles(model: Model) -> dict[str, int]:
    """Returns the number of parameters by role, counted on the tensors themselves."""
    roles: Counter[str] = Counter()
    for name, weight in held(model).items():
        role = next((role for pattern, role in ROLES if re.search(pattern, name)), None)
        if role == "dense" and model.config.ffn.kind == "meo" and "token_block" not in name:
            role = "routed"  # what are a dense layer's two maps are there its experts
        if role is not None:
            roles[role] += math.prod(weight.shape)
    return dict(roles)


def _counts(folder: Path, config: ModelConfig, roles: dict[str, int]) -> Iterator[Check]:
    """Yields the checks of what is there against the plan and against the receipt."""
    plan = {role: count.total for role, count in parameters(config).items()}
    yield _none("roles whose parameters are not the plan's", _differences(roles, plan))
    with contextlib.suppress(CheckpointError):  # a receipt that cannot be read has been told
        receipt = _receipt(folder)
        yield _none("roles whose parameters are not the receipt's", _differences(roles, receipt.parameters_by_role))
        if receipt.tensors:
            told = {*receipt.tensors.get("used", ()), *receipt.tensors.get("created", ())}
            yield _none(
                "tensors on disk or in the receipt, but not in both", sorted(told ^ Reader(folder).files.keys())
            )


def _differences(found: dict[str, int], said: dict[str, int]) -> list[str]:
    pairs = {role: (found.get(role, 0), said.get(role, 0)) for role in found | said}
    return [f"{role}: {one:,} here, {other:,} there" for role, (one, other) in pairs.items() if one != other]


def _tokenizer(*folders: Path | None) -> Tokenizer | None:
    """Returns the tokenizer of the first directory that has one."""
    return next((load_tokenizer(one) for one in folders if one and (one / "tokenizer.json").is_file()), None)


def _compare(
    model: Model, other: Model, tokenizer: Tokenizer | None, text: str | None
) -> tuple[list[Check], list[str]]:
    """Returns the checks of a model against another, and what could not be compared."""
    if model.config.vocab_size != other.config.vocab_size:
        sizes = f"{model.config.vocab_size} and {other.config.vocab_size}"
        return [_none("vocabularies of different size", [sizes])], []
    checks, notes = [], []
    kinds = [precision(one) for one in (model, other)]
    ours, theirs = dict(_pieces(model)), dict(_pieces(other))
    if {key: tuple(piece.shape) for key, piece in ours.items()} == {key: tuple(p.shape) for key, p in theirs.items()}:
        apart = {key: difference(theirs[key], piece) for key, piece in ours.items()}
        worst = max(apart, key=lambda key: apart[key])  # in our names: the two may have other ones
        bound = BOUNDS[_coarser(*kinds)].weights if kinds[0] != kinds[1] else 0.0
        name = "largest relative RMS difference of a tensor"
        checks.append(check(name, apart[worst], "<=", bound, of=[worst] if apart[worst] else []))
    else:
        notes.append("the two models have other tensors, so only what they compute was compared")
    if any(one.config.num_labels is not None for one in (model, other)):
        return checks, [*notes, "a model with num_labels predicts no words, so only tensors were compared"]
    shorter = min((model.config, other.config), key=lambda config: config.max_position_embeddings)
    ids = sample(shorter, tokenizer, text)
    before, after = (one(ids, return_routing=True) for one in (other, model))
    if kinds[0] == kinds[1]:  # codes that are equal compute the same
        kinds = [str(one.embed_tokens.weight.dtype).removeprefix("torch.") for one in (model, other)]
    bounds = BOUNDS[_coarser(*kinds)]
    moved, kept = logits_checks(bounds, before.logits, after.logits)
    checks += [moved, kept]
    if moved["value"] is not None:
        notes.append(f"logits: {moved['logits_max']:.3g} apart at most, relative RMS {moved['logits_rms']:.3g}")
    if [one.tokens_per_expert.shape for one in before.routing] == [
        one.tokens_per_expert.shape for one in after.routing
    ]:
        checks += [routing_check(bounds, before.routing, after.routing)] if before.routing else []
    else:
        notes.append("the two models have other layers of experts, so their routing was not compared")
    return checks, notes


def _coarser(one: str, other: str) -> str:
    return max(one, other, key=list(BOUNDS).index)


def _load(folder: Path) -> Model:
    """Returns the model with its weights in their files."""
    return load(folder, check_hashes=False, mapped=True)


def _pieces(model: Model, disk: Disk = OURS) -> Iterator[tuple[str, Stored]]:
    """Yields every tensor on disk that is not a scale, as it lies there, by its name in that layout."""
    return (entry for name, weight in held(model).items() for entry in split(name, weight, disk))


def _none(name: str, found: Sequence[str]) -> Check:
    """Returns the check that something is nowhere; it names the first places where it is."""
    return check(name, len(found), "<=", 0, of=list(found[:SHOWN]))
