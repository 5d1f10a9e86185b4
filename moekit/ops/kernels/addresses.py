"""Where tensors lie, as the compiled library reads them."""

import ctypes
import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from moekit.errors import ConfigError
from moekit.ops.kernels.build import library, matrices, native
from moekit.ops.kernels.memory import empty
from moekit.ops.mapped import Mapped, Weights
from moekit.ops.quantize import Quantized
from moekit.ops.scaled import Matrix, Scaled

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2, torch.uint8: 3}
"""What the library calls the dtypes of numbers and of codes."""


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def missing() -> str | None:
    """Returns why there is no compiled library, or None. A compiled graph takes the answer for a constant."""
    return native().reason


def readable(*tensors: Tensor) -> bool:
    """Returns whether the library may read these tensors' numbers where they lie: on a CPU, and not in a tensor of
    another class, whose memory may hold something else, or nothing (a fake tensor). And not where `watched`."""
    return not watched() and all(t.device.type == "cpu" and type(t) in (Tensor, nn.Parameter) for t in tensors)


def watched() -> bool:
    """Returns whether something must learn of each operation, which it would not of ours: a mode (that counts FLOPs,
    or traces), or what is `transformed`."""
    return is_in_torch_dispatch_mode() or transformed()


def transformed() -> bool:
    """Returns whether gradients of our own cannot take part: in a transform of `torch.func`, or where a tangent goes
    along. The plain formulas can, and can be differentiated again."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def at(tensor: Tensor | None) -> int | None:
    """Returns the tensor's address; the caller keeps the tensor."""
    return None if tensor is None else tensor.data_ptr()


def matrix(weight: Tensor | Quantized) -> tuple[int, int, int]:
    """Returns the library's `Matrix`: where numbers or codes lie, their scales or 0, the kind."""
    if isinstance(weight, Quantized):
        return weight.codes.data_ptr(), weight.scales.data_ptr(), KINDS[weight.codes.dtype]
    return weight.data_ptr(), 0, KINDS[weight.dtype]


def room(name: str, *of: bool | bytes) -> Tensor:
    """Returns memory for what a way back needs of a layer, of the size that the library's function tells."""
    count = ctypes.c_int64()
    getattr(library(), name)(*of, ctypes.byref(count))
    return empty((count.value,), torch.uint8)


def table(gate_up: Weights, down: Weights) -> np.ndarray:
    """Returns the library's table of where each expert's gate, up and down lie; the caller keeps the weights."""
    if isinstance(gate_up, Mapped) or isinstance(down, Mapped):
        return np.concatenate((_matrices(gate_up, 2), _matrices(down, 1)), axis=1)
    return _table(_lies(gate_up, 2), _lies(down, 1))


@functools.lru_cache(maxsize=1024)
def _table(*stacks: tuple[int, ...]) -> np.ndarray:
    """Returns the table of what `_lies` says, made once for weights that stay where they are."""
    return np.concatenate([matrices(each * count, *of).reshape(-1, each, 3) for each, count, *of in stacks], axis=1)


def _lies(weight: Tensor | Quantized, each: int) -> tuple[int, ...]:
    """Returns how many matrices an expert has in the stack, how many experts there are, and `matrices`' numbers."""
    kept = stored(weight)
    of = (weight.scales.data_ptr(), weight.scales.nbytes) if isinstance(weight, Quantized) else ()
    return each, weight.shape[0], KINDS[kept.dtype], kept.data_ptr(), kept.nbytes, *of


def _matrices(weight: Weights, each: int) -> np.ndarray:
    if not isinstance(weight, Mapped):
        return _table(_lies(weight, each))
    kinds = np.full((*weight.addresses.shape[:2], 1), KINDS[stored(weight).dtype])
    return np.concatenate((weight.addresses, kinds), axis=2)


def contiguous(weight: Weights | Matrix) -> Any:
    """Returns the weight with its rows one after another, as the library reads them."""
    if isinstance(weight, Quantized):
        if weight.scales.dtype != torch.bfloat16:
            raise ConfigError(f"scales of weights in codes are {weight.scales.dtype} but must be torch.bfloat16")
        return Quantized(weight.codes.contiguous(), weight.scales.contiguous(), weight.width)
    return weight.contiguous() if isinstance(weight, Tensor) else weight


def stored(weight: Weights | Matrix) -> Tensor:
    """Returns the numbers or codes of a weight, of mapped ones the first expert's."""
    one = weight.one if isinstance(weight, Mapped) else weight
    return one.codes if isinstance(one, Quantized | Scaled) else one
