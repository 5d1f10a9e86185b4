"""Speed of decoding beside transformers and llama.cpp with the same weights, and whether the tokens are right.

    python benchmarks/decode.py --out benchmarks/results/decode.md
    python benchmarks/decode.py --models qwen2_moe --dtype int8 int4 --batch 1 --llama "--repack 0"

Greedy tokens after a random prompt, another one each round; the prompt is read untimed. Ours is `moekit.generate`'s
loop, transformers' the plain loop over its model and cache, which is faster than its `generate`, llama.cpp's what
llama-bench times after as many tokens: steps without choosing a token, a cache in float16. The contestants of a model
and dtype take turns, round by round; speed-ups are over the fastest of transformers and over llama.cpp.

The last round's tokens are held against an exact model: the numbers that the weights stand for, in float64, experts by
the slow loop, one pass over prompt and tokens. The last column counts the tokens that it would have chosen too, and
says by how much the worst of the others fell short of its choice, as a logit and as a share of the logits' spread.
"""

import argparse
import copy
from collections.abc import Callable, Iterator, Sequence

import binding
import llama
import measure
import peers
import torch
from torch import Tensor, nn

from moekit.generate import decode
from moekit.generate.sampling import SamplingSettings
from moekit.nn.model import Model
from moekit.nn.quantized import dequantize_

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
        self.prompt = peers.random_ids(self.args, self.args.shape, self.batch, self.args.prompt, number)
        self.steps = self.tokens(self.prompt, self.args.tokens + 1)
        with peers.precision(self.args, self.dtype):
            self.said = [next(self.steps).tolist()]

    def decode(self) -> None:
        with peers.precision(self.args, self.dtype):
            self.said += [step.tolist() for step in self.steps]

    @torch.no_grad()
    def checked(self, exact: Model) -> str:
        """Returns how many tokens the exact model chooses too, and how far the worst of the others fell short."""
        said = torch.tensor(self.said, device=self.prompt.device).T
        read = torch.cat((self.prompt, said[:, :-1]), dim=1)
        logits = exact(read).logits[:, self.args.prompt - 1 :]
        short = (logits.amax(-1) - logits.gather(-1, said.unsqueeze(-1)).squeeze(-1)).flatten()
        worst = f", {float(short.max()):.1e} ({float(short.max() / logits.std()):.1%})" if bool(short.any()) else ""
        return f"{int((short == 0).sum())} of {len(short)}{worst}"


def exact(model: Model) -> Model:
    """Returns a copy that computes slowly and plainly with the numbers that the weights stand for."""
    made = copy.deepcopy(model)
    dequantize_(made, torch.float64)
    made.double().set_experts_backend("reference")
    return made.eval()


def compare(args: argparse.Namespace, kind: str, dtype: str) -> tuple[list[list[str]], list[str]]:
    """Returns the rows of a model and dtype, and who is missing."""
    found = peers.lineup(args, args.shape, kind, dtype, args.prompt + args.tokens + 1)
    loops = {name: theirs(model) for name, model in found.theirs.items()}
    loops |= {name: ours(model) for name, model in found.ours.items()}
    oracle, rows = exact(next(iter(found.ours.values()))), []
    with llama.bench(args, kind, dtype, found.missing) as bench:
        for batch in args.batch:
            decoders = {name: Decoder(args, loop, dtype, batch) for name, loop in loops.items()}
            entrants = {name: measure.Contestant({"decode": one.decode}, one.prepare) for name, one in decoders.items()}
            others = bench("-p", 0, "-n", args.tokens, "-d", args.prompt) if batch == 1 else {}
            seconds = measure.in_turn(others | entrants, args.repeats, args.device)
            best, llamas = (measure.fastest(seconds, names) for names in (found.theirs, others))
            for name, stages in seconds.items():
                took = measure.median(stages)
                rows.append([
                    peers.KINDS[kind], dtype, str(batch), name, f"{batch * args.tokens / took:,.1f}",
                    f"{took / args.tokens * 1e3:.2f}", measure.speedup(stages, best), measure.speedup(stages, llamas),
                    decoders[name].checked(oracle) if name in decoders else "",
                ])  # fmt: skip
    return rows, found.missing


def main(argv: Sequence[str]) -> None:
    parser = measure.parser(__file__, __doc__, repeats=5)
    peers.options(parser, dtypes=("fp32", "bf16", *peers.CODES), more=peers.CODES)
    llama.options(parser)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="sequences at once, each in turn (1 8)")
    parser.add_argument("--prompt", type=int, default=128, help="tokens read before the clock starts (128)")
    parser.add_argument("--tokens", type=int, default=64, help="tokens timed, of each sequence (64)")
    args = measure.parse(parser, argv)
    what = f"{args.tokens} tokens after a prompt of {args.prompt}, greedy. {args.shape}."
    header = "shape of | dtype | batch | who | tokens/s | ms a step | x transformers | x llama.cpp | tokens as exact"
    peers.report(args, "Decoding", what, header, compare, llama.versions())


if __name__ == "__main__":
    binding.bound(main)
