"""A model that starts as another one: with a new head, or with experts that are copies of its dense layers.

All experts of a layer begin alike, as the trained dense weight: of a GELU network for MEO (arXiv 2310.09832), each
linear map by itself; of a SwiGLU network for Lory (arXiv 2405.03133). Merged with weights that sum to 1 they compute
what the dense model does, whatever the gates say. Gates keep their initial values.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from moekit.config import ModelConfig
from moekit.errors import ConfigError, UnsupportedError
from moekit.formats.layouts.layout import TRAINING, flatten
from moekit.formats.names import pieces
from moekit.formats.weights import tied
from moekit.nn.model import Model

FREE = {"num_labels", "initializer_range", "max_position_embeddings"}
"""Settings that may differ, beside those of another kind of feed-forward layer: no tensor that is copied knows them."""
IN_TRAINING = TRAINING | {"noisy_gating", "description_ids"}
"""Settings of the same kind of layer that may differ."""
MADE_OF = {"meo": ("dense", "gelu"), "lory": ("dense", "silu")}
"""A layer's kind -> the kind and activation of which its experts can be copies."""
JOINED = {
    ".mlp.experts.gate_up_proj": (".mlp.gate_proj.weight", ".mlp.up_proj.weight"),
    ".mlp.experts.down_proj": (".mlp.down_proj.weight",),
}
"""Our stacked experts -> the dense matrices that one of them is made of, rows below rows."""
HEADS = ("lm_head.", "score.")


class Copied(NamedTuple):
    """A model and what became of every tensor, as receipts say it: used, created, dropped, by their keys on disk."""

    model: Model
    report: dict[str, dict[str, object]]


@torch.no_grad()
def apply(source: Model, config: ModelConfig) -> Copied:
    """Returns a new model of `config` with the weights of `source`, copied or repeated.

    What has no counterpart is drawn as in any new model. Raises ConfigError where the two differ in more than a head or
    a feed-forward layer that copies can make, and UnsupportedError for weights in codes.
    """
    if source.quantization is not None or source.mapped:
        raise UnsupportedError(
            "the weights to start from are in codes or mapped files; take the model they were made of"
        )
    _check(source.config, config)
    model, other = Model(config), source.config.ffn.kind != config.ffn.kind
    theirs = {name: tensor for name, tensor in source.state_dict().items() if not tied(source.config, name)}
    left = set(theirs)
    report: dict[str, dict[str, object]] = {"used": {}, "created": {}, "dropped": {}}
    for name, tensor in model.state_dict().items():
        if tied(config, name):
            continue
        keys = [piece.key for piece in pieces(name, tuple(tensor.shape))]
        if found := _sources(name, theirs):
            tensor.copy_(_fitted(name, torch.cat([theirs[one] for one in found]), tensor))
            left -= set(found)
            there = [piece.key for one in found for piece in pieces(one, tuple(theirs[one].shape))]
            sources = there if len(there) == len(keys) else [_named(key, there) for key in keys]
            report["used"] |= {key: {"source": one} for key, one in zip(keys, sources, strict=True)}
        elif name.startswith(HEADS):
            report["created"] |= dict.fromkeys(keys, "another head than that of the weights to start from")
        elif other and (".mlp." in name or name.startswith("embed_task.")):
            report["created"] |= dict.fromkeys(keys, "of the routing, which a dense layer has not")
        else:
            raise ConfigError(f"the weights to start from have no {name}, which the model needs")
    for name in sorted(left):
        if not name.startswith(HEADS):
            raise ConfigError(f"the weights to start from have {name}, for which the model has no place")
        report["dropped"][pieces(name, tuple(theirs[name].shape))[0].key] = "the model has another head"
    return Copied(model, report)


def _check(old: ModelConfig, new: ModelConfig) -> None:
    """Raises ConfigError, with the setting and both values, where copies cannot make the new model of the old one."""
    ours, theirs = flatten(new.model_dump()), flatten(old.model_dump())
    if (kind := new.ffn.kind) != old.ffn.kind:
        made_of = MADE_OF.get(kind)
        if made_of != (old.ffn.kind, theirs.get("ffn.hidden_act")):
            can = "; ".join(f"{one} of {of[0]} with hidden_act {of[1]}" for one, of in MADE_OF.items())
            raise ConfigError(f"model.ffn.kind is {kind} but that to start from is {old.ffn.kind}; copies make {can}")
        skipped = {key for key in ours | theirs if key.startswith("ffn.") and key != "ffn.intermediate_size"}
    else:
        skipped = {f"ffn.{name}" for name in IN_TRAINING}
    for key in ours | theirs:
        if key not in skipped | FREE and ours.get(key) != theirs.get(key):
            found = f"model.{key} is {ours.get(key)} but {theirs.get(key)} in the model to start from"
            raise ConfigError(f"{found}; only its head and its feed-forward layers may change")


def _sources(name: str, theirs: dict[str, Tensor]) -> list[str]:
    """Returns the tensors that one of ours is made of, or one expert of ours; none where there is no such."""
    if name in theirs:
        return [name]
    for ours, parts in JOINED.items():
        if name.endswith(ours):
            return [one for part in parts if (one := name.removesuffix(ours) + part) in theirs]
    return []


def _fitted(name: str, value: Tensor, like: Tensor) -> Tensor:
    """Returns the value in the shape of our tensor: as it is, or once for each expert."""
    if value.shape not in (like.shape, like.shape[1:]):
        shapes = f"{tuple(value.shape)} in the weights to start from but {tuple(like.shape)} in the model"
        raise ConfigError(f"{name} has shape {shapes}")
    return value.expand(like.shape)


def _named(key: str, sources: list[str]) -> str:
    """Returns which of the sources an expert's piece on disk is a copy of: the one of the same matrix."""
    return next((one for one in sources if key.endswith(one.rpartition(".mlp.")[2])), sources[0])
