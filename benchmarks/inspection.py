"""What inspecting a text costs: the pass of `moekit inspect` over the forward pass alone, and its memory.

    python benchmarks/inspection.py --out benchmarks/results/inspection.md

Both read the same windows of the included text, in turn; that of inspect reads, tokenises and counts, the other one
only computes, without logits. On a CPU the time is the process's own, so that others' work does not count. Peak memory
is that of a process of its own, over the text once and over four times as much. `narrow` is 28 layers of 64 experts in
a model so small that counting weighs as much as it ever can.
"""

import argparse
import contextlib
import gzip
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.resources import files
from pathlib import Path

import binding
import measure
import numpy as np
import torch

from moekit.config import ModelConfig, preset
from moekit.data import prepare
from moekit.formats.tokenizer import Tokenizer, load_tokenizer
from moekit.inspect.collect import collect
from moekit.inspect.text import Window, rows, text_windows
from moekit.inspect.vocabulary import vocabulary
from moekit.nn.model import Model
from moekit.train import hardware

NARROW = {
    "vocab_size": 4096,
    "hidden_size": 64,
    "num_hidden_layers": 28,
    "max_position_embeddings": 512,
    "attention": {"kind": "mha", "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16},
    "ffn": {
        "kind": "moe",
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "moe_intermediate_size": 16,
    },
}


def build(name: str, device: torch.device, dtype: str) -> Model:
    torch.manual_seed(0)
    config = ModelConfig.model_validate(NARROW) if name == "narrow" else preset(name)
    return Model(config).to(device, getattr(torch, dtype)).eval()


def write_text(folder: Path) -> None:
    """Writes the included training text, a file a domain, and a tokenizer of it."""
    packed = [file for file in (files("moekit") / "quickstart" / "text").iterdir() if ".train." in file.name]
    for file in packed:
        (folder / file.name.removesuffix(".gz")).write_bytes(gzip.decompress(file.read_bytes()))
    prepare([folder], folder / "data", vocab_size=4096, tokenizer_bytes=2_000_000)


def inspected(
    model: Model, tokenizer: Tokenizer, kinds: np.ndarray, folder: Path, args: argparse.Namespace, tokens: int
) -> int:
    """Returns the tokens that the pass of inspect has read, from the files on."""
    texts = sorted(folder.glob("*.jsonl"))
    windows = text_windows(texts, tokenizer, args.length, tokens // len(texts))
    return int(collect(model, windows, kinds, args.length, args.batch).tokens.sum())


@torch.inference_mode()
def forward(model: Model, windows: Sequence[Window], batch: int) -> None:
    """Reads the windows, already tokens, and does nothing with what comes out."""
    for one in rows(windows, batch, model.config.vocab_size):
        mask = None if one.real is None else one.real.to(model.embed_tokens.weight.device)
        model(one.input_ids.to(model.embed_tokens.weight.device), padding_mask=mask, return_logits=False)


def own_time(device: torch.device, run: Callable[[], object]) -> float | None:
    """Returns the processor's seconds that the process takes; None on a GPU, where the clock has to tell."""
    start = time.process_time()
    run()
    return time.process_time() - start if device.type == "cpu" else None


def main(argv: Sequence[str]) -> None:
    parser = measure.parser(__file__, __doc__, repeats=5)
    parser.add_argument("--models", nargs="+", default=["tiny-deepseekmoe", "mini-deepseekmoe", "narrow"])
    parser.add_argument("--tokens", type=int, default=50_000, help="of a round (50,000)")
    parser.add_argument("--length", type=int, default=256, help="tokens of a window (256)")
    parser.add_argument("--batch", type=int, default=8, help="windows at a time (8)")
    parser.add_argument("--dtype", default="float32", help="of the weights (float32)")
    parser.add_argument(
        "--one", nargs=3, metavar=("MODEL", "TOKENS", "FOLDER"), help="peak memory of one pass, as JSON"
    )
    args = measure.parse(parser, argv)
    if args.one:
        name, tokens, folder = args.one
        model = build(name, args.device, args.dtype)
        tokenizer = load_tokenizer(Path(folder) / "data")
        kinds = vocabulary(tokenizer, model.config.vocab_size).kinds
        read = inspected(model, tokenizer, kinds, Path(folder), args, int(tokens))
        sys.stdout.write(json.dumps([read, hardware.peak_memory(args.device)]))
        return
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        write_text(folder)
        guard, lines = measure.Guard(args.device), []
        tokenizer, texts = load_tokenizer(folder / "data"), sorted(folder.glob("*.jsonl"))
        windows = list(text_windows(texts, tokenizer, args.length, args.tokens // len(texts)))
        for model_name in args.models:
            model = build(model_name, args.device, args.dtype)
            kinds = vocabulary(tokenizer, model.config.vocab_size).kinds
            timed = {
                "inspect": partial(inspected, model, tokenizer, kinds, folder, args, args.tokens),
                "forward": partial(forward, model, windows, args.batch),
            }
            contestants = {
                name: measure.Contestant({"pass": partial(own_time, args.device, run)}) for name, run in timed.items()
            }
            seconds = measure.in_turn(contestants, args.repeats, args.device)
            memory = []
            for tokens in (args.tokens, 4 * args.tokens):
                command = [sys.executable, __file__, *argv, "--one", model_name, str(tokens), str(folder)]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, preexec_fn=binding.unbound)
                memory.append(json.loads(done.stdout))
            read = sum(len(window.tokens) for window in windows)
            lines.append([
                model_name, f"{read:,}", f"{read / measure.median(seconds['forward']):,.0f}",
                f"{read / measure.median(seconds['inspect']):,.0f}",
                measure.speedup(seconds["forward"], seconds["inspect"]),
                *(f"{peak / 2**20:,.0f} ({tokens:,} tokens)" for tokens, peak in memory),
            ])  # fmt: skip
            measure.progress(" ".join(lines[-1]))
    header = ["model", "tokens", "forward, tokens/s", "inspect, tokens/s", "ratio of times", "peak MiB", "peak MiB"]
    what = f"Windows of {args.length} tokens, {args.batch} at a time, {args.dtype}, random weights, the included text."
    measure.report(args, "What inspecting costs", what, guard, [measure.table(header, lines)], [])


if __name__ == "__main__":
    binding.bound(main)
