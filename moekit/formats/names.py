"""Tensor names on disk: the DeepSeek checkpoints' own, one key an expert. One table, used both ways."""

from collections.abc import Mapping
from typing import NamedTuple

Index = tuple[int | slice, ...]

RENAMED = {
    ".mlp.router.weight": ".mlp.gate.weight",
    ".mlp.router.expert_bias": ".mlp.gate.e_score_correction_bias",
    ".mlp.router.table": ".mlp.gate.hash_table",
}
"""Our suffix -> theirs; what is not listed keeps its name."""

CODED = {".codes": "", ".scales": "_scale"}
"""What is kept in codes: the suffix in our state dict -> behind the name of the matrix on disk."""


class Piece(NamedTuple):
    """One tensor on disk and the part of ours that it holds."""

    key: str
    index: Index  # type: ignore[assignment]  # hides tuple.index, which nobody asks a piece for


def pieces(name: str, shape: tuple[int, ...], renamed: Mapping[str, str] = {}) -> list[Piece]:
    """Returns the tensors on disk that together are the state-dict tensor `name`.

    `renamed` is another layout's: part of a name here -> what stands there instead, replaced in order.
    """
    if renamed:
        return [Piece(_replaced(key, renamed), index) for key, index in pieces(name, shape)]
    for ours, theirs in CODED.items():
        if name.endswith(ours):
            return [Piece(key + theirs, index) for key, index in pieces(name.removesuffix(ours), shape)]
    key = name if name.startswith(("lm_head.", "score.")) else f"model.{name}"
    for ours, theirs in RENAMED.items():
        if key.endswith(ours):
            return [Piece(key.removesuffix(ours) + theirs, ())]
    if key.endswith(".experts.gate_up_proj"):
        stem, ff = key.removesuffix("gate_up_proj"), shape[1] // 2
        halves = (("gate_proj", slice(0, ff)), ("up_proj", slice(ff, 2 * ff)))
        return [Piece(f"{stem}{e}.{half}.weight", (e, rows)) for e in range(shape[0]) for half, rows in halves]
    if key.endswith(".experts.down_proj"):
        stem = key.removesuffix("down_proj")
        return [Piece(f"{stem}{e}.down_proj.weight", (e,)) for e in range(shape[0])]
    return [Piece(key, ())]


def _replaced(key: str, renamed: Mapping[str, str]) -> str:
    for ours, theirs in renamed.items():
        key = key.replace(ours, theirs)
    return key
