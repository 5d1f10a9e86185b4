"""llama.cpp beside ours: our weights as a GGUF file, and what llama-bench measures on it as a contestant.

llama-bench is $LLAMA_BENCH, or else on PATH; without it `llama_api.py` does the same through the package llama_cpp.
"""

import argparse
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import binding
import measure
import peers
import torch

from moekit.errors import MoekitError
from moekit.nn.model import Model

try:
    import gguf
except ImportError:
    gguf = None

TYPES = {"fp32": "F32", "bf16": "BF16", "int8": "Q8_0", "int4": "Q4_0"}


class Unable(MoekitError):
    """Why llama.cpp cannot take part."""


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--llama", default="", metavar="OPTIONS", help='more for llama-bench, such as "--repack 0"')


def program() -> list[str]:
    """Returns the command of llama-bench or of what stands in for it; none where there is no llama.cpp."""
    if found := os.environ.get("LLAMA_BENCH") or shutil.which("llama-bench"):
        return [found]
    if importlib.util.find_spec("llama_cpp"):
        return [sys.executable, str(Path(__file__).with_name("llama_api.py"))]
    return []


def versions() -> list[str]:
    """Returns the version of llama.cpp."""
    done = subprocess.run([*program(), "--version"], capture_output=True, text=True) if program() else None
    found = done and re.search(r"version: (.+)", done.stdout + done.stderr)
    return [f"llama.cpp {found[1]}"] if found else []


def write(model: Model, shape: peers.Shape, matrices: str, file: Path) -> None:
    """Writes a GGUF file of llama.cpp's `deepseek`: the matrices in that type, the rest float32, no vocabulary."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.DEEPSEEK, shape.layers)
    writer = gguf.GGUFWriter(file, "deepseek")
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(shape.vocab)
    writer.add_context_length(model.config.max_position_embeddings)
    writer.add_block_count(shape.layers)
    writer.add_embedding_length(shape.hidden)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_layer_norm_rms_eps(model.config.rms_norm_eps)
    writer.add_feed_forward_length(shape.dense_width)
    writer.add_leading_dense_block_count(shape.dense_layers)
    writer.add_expert_count(shape.experts)
    writer.add_expert_used_count(shape.chosen)
    writer.add_expert_shared_count(shape.shared)
    writer.add_expert_feed_forward_length(shape.width)
    writer.add_expert_weights_scale(1.0)
    for name, tensor in model.state_dict().items():
        name = (name if name.startswith("lm_head.") else f"model.{name}").replace("mlp.router.", "mlp.gate.")
        parts = {name: tensor}
        if name.endswith("gate_up_proj"):
            gate, up = tensor.chunk(2, dim=1)
            parts = {name.replace("gate_up", "gate"): gate, name.replace("gate_up", "up"): up}
        elif name.endswith(("q_proj.weight", "k_proj.weight")):  # its rotation is of neighbours, ours of halves
            parts = {name: tensor.unflatten(0, (shape.heads, 2, -1)).transpose(1, 2).flatten(0, 2)}
        for part, weight in parts.items():
            as_is = weight.dim() == 1 or ".gate." in part
            kept = gguf.GGMLQuantizationType["F32" if as_is else matrices]
            try:
                data = gguf.quantize(weight.contiguous().numpy(), kept)
            except gguf.quants.QuantError as error:  # of a width that is no multiple of its group
                raise Unable(str(error)) from None
            writer.add_tensor(names.get_name(part.removesuffix(".weight")) + ".weight", data, raw_dtype=kept)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def seconds(command: list[str]) -> float:
    """Returns what llama-bench measured. Its threads are bound to cores as ours are."""
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=binding.unbound)
    if done.returncode:
        raise Unable(f"{Path(command[0]).name} ended with status {done.returncode}")
    (found,) = json.loads(done.stdout)
    (nanoseconds,) = found["samples_ns"]
    return float(nanoseconds / 1e9)


@contextmanager
def bench(
    args: argparse.Namespace, kind: str, dtype: str, missing: list[str]
) -> Iterator[Callable[..., dict[str, measure.Contestant]]]:
    """Yields what makes a contestant of llama-bench's options; it makes none where `missing` is told why."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"{dtype}.gguf"

        def contestant(*words: object) -> dict[str, measure.Contestant]:
            command = [*program(), "-m", str(file), "-t", str(torch.get_num_threads()), "-r", "1", "-o", "json"]
            command += [*map(str, words), *shlex.split(args.llama)]
            try:
                if not program() or gguf is None:
                    raise Unable(f"{'the package gguf' if program() else 'llama-bench'} is not installed")
                if args.device.type != "cpu" or kind != "qwen2_moe":
                    raise Unable(f"measured on a CPU and as {peers.KINDS['qwen2_moe']} only")
                if dtype not in TYPES:
                    raise Unable(f"it has no {dtype}")
                if not file.exists():
                    write(peers.ours(args.shape, kind, 4096), args.shape, TYPES[dtype], file)
                seconds(command)
            except Unable as reason:
                missing.append(f"llama.cpp: {reason}")
                return {}
            return {f"llama.cpp {TYPES[dtype]}": measure.Contestant({"all": lambda: seconds(command)})}

        yield contestant
