"""Speed of decoding beside transformers' model of the same shape and weights, and llama.cpp's own bench.

    python benchmarks/decode.py --out benchmarks/results/decode.md
    python benchmarks/decode.py --dtype fp32 bf16 --batch 1 8 --impl grouped_mm batched_mm --gguf model-q8_0.gguf

Greedy tokens after a random prompt, another one each round; the prompt is read untimed. Ours is `moekit.generate`'s
loop, transformers' the plain loop over its model and cache, which is faster than its `generate`. The contestants of a
model and dtype take turns in one process; the speed-up is over the fastest of transformers, round by round.
"""

import argparse
import copy
from collections.abc import Callable, Iterator, Sequence

import binding
import measure
import peers
import torch
from torch import Tensor, nn

from moekit.generate import decode
from moekit.generate.sampling import SamplingSettings
from moekit.nn.model import Model
from moekit.nn.quantized import quantize_

Decoding = Callable[[Tensor, int], Iterator[Tensor]]
"""Prompts and a number of tokens -> the next token of every sequence, one step after the other."""


def ours(model: Model) -> Decoding:
    return lambda ids, count: decode.tokens(model, ids.tolist(), SamplingSettings(), count)


def theirs(model: nn.Module) -> Decoding:
    @torch.no_grad()
    def tokens(ids: Tensor, count: int) -> Iterator[Tensor]:
        cache = None
        for _ in range(count):
            out = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, chosen = out.past_key_values, out.logits[:, -1].argmax(-1)
            yield chosen
            ids = chosen.unsqueeze(1)

    return tokens


class Decoder:
    """A contestant: reads a prompt and its first token untimed, then decodes; keeps what it said."""

    def __init__(self, args: argparse.Namespace, tokens: Decoding, dtype: str, batch: int) -> None:
        self.args, self.tokens, self.dtype, self.batch = args, tokens, dtype, batch
        self.said: list[list[int]] = []

    def prepare(self, number: int) -> None:
        ids = peers.random_ids(self.args, self.args.shape, self.batch, self.args.prompt, number)
        self.steps = self.tokens(ids, self.args.tokens + 1)
        with peers.precision(self.args, self.dtype):
            self.said = [next(self.steps).tolist()]

    def decode(self) -> None:
        with peers.precision(self.args, self.dtype):
            self.said += [step.tolist() for step in self.steps]


def agreement(one: Decoder, other: Decoder) -> str:
    """Returns how many tokens of the last round came out equal before the first that did not, the sequences' mean."""
    equal = 0
    for mine, theirs in zip(zip(*one.said, strict=True), zip(*other.said, strict=True), strict=True):
        equal += next((place for place, (a, b) in enumerate(zip(mine, theirs, strict=True)) if a != b), len(mine))
    return f"{equal / len(one.said[0]):.0f} of {len(one.said)}"


def compare(args: argparse.Namespace, kind: str, dtype: str) -> tuple[list[list[str]], list[str]]:
    """Returns the rows of a model and dtype, and who is missing."""
    found = peers.lineup(args, args.shape, kind, dtype, args.prompt + args.tokens + 1)
    loops = {name: theirs(model) for name, model in found.theirs.items()}
    loops |= {name: ours(model) for name, model in found.ours.items()}
    for codes in args.codes:
        for name, model in found.ours.items():
            coded = copy.deepcopy(model)
            quantize_(coded, codes)
            loops[f"{name} {codes}"] = ours(coded)
    rows = []
    for batch in args.batch:
        decoders = {name: Decoder(args, loop, dtype, batch) for name, loop in loops.items()}
        entrants = {name: measure.Contestant({"decode": one.decode}, one.prepare) for name, one in decoders.items()}
        seconds = measure.in_turn(entrants, args.repeats, args.device)
        best, first = measure.fastest(seconds, found.theirs), decoders[next(iter(found.ours))]
        for name, stages in seconds.items():
            took = measure.median(stages)
            rows.append([
                peers.KINDS[kind], dtype, str(batch), name, f"{batch * args.tokens / took:,.1f}",
                f"{took / args.tokens * 1e3:.2f}", measure.speedup(stages, best), agreement(decoders[name], first),
            ])  # fmt: skip
            measure.progress(" ".join(rows[-1]))
    return rows, found.missing


def main(argv: Sequence[str]) -> None:
    parser = measure.parser(__file__, __doc__, repeats=5)
    peers.options(parser, dtypes=("fp32", "bf16"))
    peers.llama_options(parser)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="sequences at once, each in turn (1 8)")
    parser.add_argument(
        "--codes", nargs="*", choices=("int8", "int4"), default=["int8", "int4"], help="our matrices in these too"
    )
    parser.add_argument("--prompt", type=int, default=128, help="tokens read before the clock starts (128)")
    parser.add_argument("--tokens", type=int, default=64, help="tokens timed, of each sequence (64)")
    args = measure.parse(parser, argv)
    guard, rows, missing = measure.Guard(args.device), [], []
    for kind in args.models:
        for dtype in args.dtype:
            more, absent = compare(args, kind, dtype)
            rows, missing = rows + more, missing + absent
    header = ["shape of", "dtype", "batch", "who", "tokens/s", "ms a step", "speed-up", "tokens as ours"]
    llama, not_run = peers.llama_bench(args, ["-p", "0", "-n", str(args.tokens)])
    missing += not_run
    what = f"{args.tokens} tokens after a prompt of {args.prompt}, greedy. {args.shape}."
    measure.report(args, "Decoding", what, guard, [measure.table(header, rows), *llama], missing, peers.versions())


if __name__ == "__main__":
    binding.bound(main)
