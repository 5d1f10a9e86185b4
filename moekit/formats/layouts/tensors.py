"""What tensors on disk are called, how their numbers are kept, and which of them a model has no place for."""

import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from moekit.errors import CheckpointError, UnsupportedError
from moekit.formats.layouts.layout import QUANTIZATION, Layout, Values
from moekit.formats.names import Piece, pieces
from moekit.formats.safetensors import Safetensors
from moekit.ops.scaled import Scaled

SCALE = "_scale_inv"
"""Behind the name of a weight in 8 bits: the name of its blocks' scales."""
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


class Disk(NamedTuple):
    """A directory's tensors. By default a moekit directory's own."""

    renamed: Mapping[str, str] = {}
    block: tuple[int, int] | None = None
    """Rows and columns of a weight that share a scale, where weights are in 8 bits (DeepSeek-V3, section 3.3)."""
    extra: range = range(0)
    """Layers behind the last one, for multi-token prediction (DeepSeek-V3, section 2.2)."""
    tied: bool = False
    foreign: bool = False

    def pieces(self, name: str, shape: tuple[int, ...]) -> list[Piece]:
        """Returns the tensors on disk that together are the state-dict tensor `name`."""
        return pieces(name, shape, self.renamed)

    def tensor(self, opened: Mapping[str, Safetensors], key: str, dtype: torch.dtype | None) -> Tensor | Scaled:
        """Returns a tensor as a model can hold it: biases in float32; the numbers of 8 bits are `dtype` or bfloat16."""
        tensor: Tensor = opened[key].tensor(key)
        if tensor.is_floating_point() and tensor.dtype.itemsize == 1:
            there = self.block is not None and key + SCALE in opened
            found = f"{tensor.dtype} {'with' if there else 'without'} {key}{SCALE} and {QUANTIZATION} in config.json"
            if tensor.dtype != torch.float8_e4m3fn or self.block is None or not there:
                raise CheckpointError(f"{key} is in 8 bits or fewer: read are float8_e4m3fn with scales, found {found}")
            scales = opened[key + SCALE].tensor(key + SCALE)
            return scaled(key, tensor, scales, self.block, dtype or torch.bfloat16)
        choice = self.foreign and key.endswith(".e_score_correction_bias") and tensor.is_floating_point()
        return tensor.float() if choice else tensor  # the selection bias: bfloat16 would round its steps

    def ahead(self, opened: Mapping[str, Safetensors]) -> list[str]:
        """Returns the keys of the layers for multi-token prediction, without scales that belong to a weight."""
        scales = {f"{key}{SCALE}" for key in opened}
        return sorted(key for key in opened.keys() - scales if self._ahead(key))

    def _ahead(self, key: str) -> bool:
        layer = re.match(r"model\.layers\.(\d+)\.", key)
        return layer is not None and int(layer[1]) in self.extra

    def dropped(self, opened: Mapping[str, Safetensors], left: set[str]) -> dict[str, str]:
        """Returns, of the tensors that the model has no place for, those that may be there, each with the reason."""
        reasons: dict[str, str] = {}
        for key in sorted(left) if self.foreign else ():
            weight = key.removesuffix(SCALE)
            if self._ahead(key) and weight in left:
                reasons[key] = "multi-token prediction, which moekit does not do"
            elif 0 in opened[key].shape(key):
                reasons[key] = "it holds no number: transformers' shared experts where there are none"
            elif key.endswith(".rotary_emb.inv_freq"):
                reasons[key] = "a buffer that follows from the configuration"
            elif key != weight and weight in opened and opened[weight].kind(weight) == "F8_E4M3":
                reasons[key] = f"scales, multiplied into {weight}"
            elif self.tied and key == HEAD and EMBEDDING in opened:
                if not torch.equal(*(opened[name].tensor(name) for name in (HEAD, EMBEDDING))):
                    raise CheckpointError(f"{HEAD} differs from {EMBEDDING} but tie_word_embeddings is true")
                reasons[key] = f"tied: it is {EMBEDDING} again"
        return reasons


def disk(layout: Layout, content: Values) -> Disk:
    """Returns how the tensors beside a config.json are kept; UnsupportedError for codes that are not read."""
    values, codes, block = layout.values(content), content.get(QUANTIZATION), None
    if codes is not None:
        sizes = codes.get("weight_block_size") if isinstance(codes, dict) else None
        if not isinstance(codes, dict) or codes.get("quant_method") != "fp8" or codes.get("fmt", "e4m3") != "e4m3":
            raise UnsupportedError(f"{QUANTIZATION} is {codes!r:.200} but of codes only fp8, e4m3, is read")
        if not (isinstance(sizes, list) and [type(n) for n in sizes] == [int, int] and min(sizes) > 0):
            raise UnsupportedError(f"weight_block_size is {sizes!r} but fp8 is read with scales of blocks only")
        block = (sizes[0], sizes[1])
    layers, more = values["num_hidden_layers"], values[layout.extra_layers] if layout.extra_layers else 0
    return Disk(layout.renamed, block, range(layers, layers + more), values["tie_word_embeddings"], foreign=True)


def scaled(key: str, codes: Tensor, scales: Tensor, block: tuple[int, int], dtype: torch.dtype) -> Scaled:
    """Returns a weight in 8 bits with its blocks' scales, once their shapes fit."""
    if codes.dim() != 2 or not scales.is_floating_point():
        raise CheckpointError(f"{key} in 8 bits has {codes.dim()} axes and scales of {scales.dtype}: no matrix")
    rows, columns = (-(-n // size) for n, size in zip(codes.shape, block, strict=True))
    if scales.shape != (rows, columns):
        found = f"{tuple(scales.shape)} but its weight {tuple(codes.shape)} has {(rows, columns)} blocks of {block}"
        raise CheckpointError(f"{key}{SCALE} has shape {found}")
    return Scaled(codes, scales, block, dtype)
