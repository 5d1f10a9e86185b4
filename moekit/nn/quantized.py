"""A model's matrices into codes and back, in place.

In codes: the routed and shared experts, dense feed-forward, attention projections and the head. As they are: routers,
the shared experts' gate, norms, biases and the embedding, with a head that is tied to it, and MLA's `kv_b_proj`, which
decoding absorbs into query and output and so needs as numbers at every step.
"""

from collections.abc import Iterator

import torch
from torch import nn

from moekit.errors import UnsupportedError
from moekit.nn.experts import Experts
from moekit.nn.linear import Linear
from moekit.nn.model import Model
from moekit.nn.weights import QuantizedWeight, operand
from moekit.ops.quantize import Codes, Quantized, dequantize, quantize


def matrices(model: Model) -> Iterator[tuple[str, nn.Module, str]]:
    """Yields each place of a matrix that codes may hold: its name in the state dict, its module, its attribute."""
    for path, module in list(model.named_modules()):
        if isinstance(module, Experts):
            yield from ((f"{path}.{name}", module, name) for name in ("gate_up_proj", "down_proj"))
        elif isinstance(module, Linear):
            tied = path == "lm_head" and model.config.tie_word_embeddings
            if not tied and not path.endswith((".kv_b_proj", ".shared_expert_gate")):
                yield f"{path}.weight", module, "weight"


@torch.no_grad()
def quantize_(model: Model, kind: Codes) -> None:
    """Turns the matrices into codes and the model into one for inference: evaluation mode, no gradients."""
    if model.quantization is not None or model.mapped:
        found = "are mapped" if model.mapped else f"are in {model.quantization} already"
        raise UnsupportedError(f"the weights {found}; quantise the model as it was trained, loaded into memory")
    for _, module, name in matrices(model):
        codes = quantize(getattr(module, name), kind)
        delattr(module, name)  # a module is not put over a parameter
        setattr(module, name, QuantizedWeight(codes))
    model.quantization = kind
    model.requires_grad_(False).eval()


@torch.no_grad()
def dequantize_(model: Model, dtype: torch.dtype) -> None:
    """Turns the codes into the numbers that they stand for, and the model into an ordinary one."""
    for _, module, name in matrices(model):
        weight = operand(getattr(module, name))
        if isinstance(weight, Quantized):
            delattr(module, name)
            setattr(module, name, nn.Parameter(dequantize(weight, dtype)))
    model.quantization = None
    model.requires_grad_(True)
