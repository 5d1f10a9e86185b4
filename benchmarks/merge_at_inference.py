"""What merging experts at inference does to a model that was trained to mix their outputs.

    python benchmarks/merge_at_inference.py RUN ... --data DATA --out benchmarks/results/merge_at_inference.md

MEO (arXiv 2310.09832) merges linear maps, for which the mix of outputs and the mix of weights are the same. A SwiGLU
expert is none. Each MODEL (a directory, or a run, whose newest checkpoint is taken) has its routed experts replaced in
all MoE layers, without training: by one expert merged for each token, of the same experts with the same weights; and by
one merged for each segment or sequence, of the experts that are best by the mean of their affinities there. Runs beside
each other in one folder are seeds of one architecture. Beside the page stands a picture (.png).
"""

import argparse
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import measure
import torch
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

import moekit
from moekit import files, receipts
from moekit.config import DataConfig, MoEConfig
from moekit.data import open_dataset
from moekit.errors import ConfigError
from moekit.formats.tokenizer import load_tokenizer
from moekit.nn.model import Model
from moekit.nn.moe import MoE
from moekit.nn.router import RouterContext
from moekit.ops import dispatch
from moekit.ops.experts import mixed_experts
from moekit.ops.merge import merged_linear, mixing
from moekit.ops.routing import Routing, route
from moekit.train.hardware import Hardware
from moekit.train.state import model_folder
from moekit.train.validation import validate

MIXED, RAW, SCALED = "outputs mixed", "weights merged", "weights merged, then scaled"
NONE = "routed experts left out"
SPREADS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
ABOUT = """{tokens:,} tokens of validation text in windows of {length}, the same for all; segments of {segment}.

- *Weights merged*: one expert of the chosen ones' weights times their gate values; *then scaled*: of gate values that
  are divided by their sum, and the output times the sum. With `norm_topk_prob` false they sum to less than 1.
- *By segment*, *by sequence*: the experts best by the mean affinity there, with it as gate values. This looks ahead.
- *Error*: ||used otherwise - as it is|| / ||as it is|| of the routed experts' output, over all tokens, on the inputs
  that the unaltered model gives each layer; mean over seeds and layers (least to most of a layer). *At best*: if the
  output were multiplied by whatever constant suits the layer most.
- *Loss*: nats per token with all layers replaced, mean over domains; +/- is the standard deviation over seeds."""
MADE = """Four SwiGLU experts, base + s * delta, of width 32 and 48 inside, all chosen: base and delta are normal, of
standard deviation 1 / sqrt(inputs). Weights sum to 1: equal ones, or softmaxes of normal logits. Mean of 5 draws."""


class Way(NamedTuple):
    """How the routed experts are used."""

    unit: str
    """token, segment or sequence: what has a gate of its own."""
    how: str

    def __str__(self) -> str:
        return f"{self.how}, by {self.unit}" if self.unit else self.how


class Found(NamedTuple):
    """One model's figures."""

    error: dict[Way, list[float]]
    """Relative to the layer as it is, by layer."""
    at_best: dict[Way, list[float]]
    """The same after the constant that makes it least."""
    linear: float
    """The error of the up projections alone, which are linear maps, merged by token."""
    cosine: float
    """Of the weights of two experts of a layer, the mean over pairs and layers."""
    loss: dict[Way | None, float]
    """Nats per token, the mean over domains; None: the model as it is."""


def merged(x: Tensor, mix: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Returns (units, tokens, dim) through the one expert that each unit's experts are merged into."""
    gate, up = merged_linear(x, mix, gate_up).chunk(2, -1)
    return merged_linear(F.silu(gate) * up, mix, down)


def by_unit(routing: Routing, config: MoEConfig, size: int, real: Tensor) -> Routing:
    """Returns the routing of units of `size` tokens by the mean affinities of their real tokens."""
    if size == 1:
        return routing
    assert routing.scores is not None
    scores = (routing.scores * real.unsqueeze(-1)).unflatten(0, (-1, size)).sum(1)
    mean = scores / real.view(-1, size).sum(1, keepdim=True).clamp(min=1)
    return route(  # a softmax of logarithms gives them back
        mean.clamp(min=1e-30).log(),
        config.num_experts_per_tok,
        norm_topk_prob=config.norm_topk_prob,
        routed_scaling_factor=config.routed_scaling_factor,
    )


def replaced(x: Tensor, routing: Routing, how: str, gate_up: Tensor, down: Tensor) -> Tensor:
    """Returns tokens through the routed experts, used as `how` says by units of equal size."""
    size, n_experts = len(x) // len(routing.weights), len(gate_up)
    if how == NONE:
        return torch.zeros_like(x)
    if how == MIXED:
        ids, weights = (part.repeat_interleave(size, 0) for part in (routing.expert_ids, routing.weights))
        return mixed_experts(x, weights, dispatch.plan(ids, n_experts), gate_up, down)
    mix = mixing(routing, n_experts)
    scale = mix.sum(1, keepdim=True).clamp(min=1e-30) if how == SCALED else torch.ones_like(mix[:, :1])
    y = merged(x.unflatten(0, (-1, size)), mix / scale, gate_up, down) * scale.unsqueeze(1)
    return y.flatten(0, 1)


def linear_error(x: Tensor, routing: Routing, weight: Tensor) -> tuple[float, float]:
    """Returns the squares of the difference and of the outputs, where a linear map's experts are merged by token."""
    k = routing.weights.shape[1]
    plan = dispatch.plan(routing.expert_ids, len(weight))
    rows = dispatch.gather(x, plan, k).split([*plan.tokens_per_expert.tolist(), int((routing.expert_ids < 0).sum())])
    each = [part @ one.T for part, one in zip(rows, (*weight, torch.zeros_like(weight[0])), strict=True)]
    mixed = dispatch.combine(torch.cat(each), routing.weights, plan)
    once = merged_linear(x.unsqueeze(1), mixing(routing, len(weight)), weight).squeeze(1)
    return float((once - mixed).square().sum()), float(mixed.square().sum())


Each = Callable[[int, MoE, Tensor, Routing, Tensor, Tensor], Tensor | None]
"""(layer, module, tokens, routing, real, what the routed experts gave) -> what to take instead, or None."""


@contextmanager
def watched(model: Model, each: Each) -> Iterator[None]:
    """Calls `each` wherever routed experts have been computed."""
    handles = []
    for number, layer in enumerate(model.moe_layers):
        seen: dict[str, Any] = {}

        def keep(module: Any, args: tuple[Tensor, RouterContext], out: Routing, seen: Any = seen) -> None:
            everyone = torch.ones(len(out.expert_ids), dtype=torch.bool)
            seen.update(routing=out, real=everyone if args[1].mask is None else args[1].mask)

        def swap(module: Any, args: Any, out: Tensor, seen: Any = seen, at: tuple[int, MoE] = (number, layer)) -> Any:
            return each(*at, args[0], seen["routing"], seen["real"], out)

        handles += [layer.router.register_forward_hook(keep), layer.experts.register_forward_hook(swap)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def study(model: Model, score: Callable[[], float], units: dict[str, int]) -> Found:
    """Returns how far each way is from the layers as they are, and what it does to the loss."""
    config, layers = model.config.ffn, len(model.moe_layers)
    if not isinstance(config, MoEConfig) or (config.scoring_func, config.topk_method) != ("softmax", "greedy"):
        raise ConfigError("a model of kind moe is needed, with scoring_func softmax and topk_method greedy")
    ways = [Way(unit, how) for unit in units for how in (MIXED, RAW, SCALED) if (unit, how) != ("token", MIXED)]
    ways.append(Way("", NONE))
    squares: dict[Way, Tensor] = defaultdict(lambda: torch.zeros(layers, 3, dtype=torch.float64))
    linear = torch.zeros(2, dtype=torch.float64)

    def use(way: Way, layer: MoE, x: Tensor, routing: Routing, real: Tensor) -> Tensor:
        gate = by_unit(routing, config, units.get(way.unit, 1), real)
        return replaced(x, gate, way.how, layer.experts.gate_up_proj, layer.experts.down_proj)

    def compare(number: int, layer: MoE, x: Tensor, routing: Routing, real: Tensor, out: Tensor) -> None:
        up = layer.experts.gate_up_proj[:, layer.config.moe_intermediate_size :]
        linear.add_(torch.tensor(linear_error(x, routing, up)))
        for way in ways:
            y = use(way, layer, x, routing, real)
            squares[way][number] += torch.stack([part[real].double().square().sum() for part in (y - out, out, y)])

    with watched(model, compare):
        loss: dict[Way | None, float] = {None: score()}
    for way in ways:
        with watched(model, lambda _number, *found, way=way: use(way, *found[:-1])):
            loss[way] = score()
    error, at_best = {}, {}
    for way, (off, out, y) in ((way, sums.unbind(1)) for way, sums in squares.items()):
        error[way] = (off / out).sqrt().tolist()
        inner = (y + out - off) / 2
        at_best[way] = (1 - inner.square() / (y * out).clamp(min=1e-30)).clamp(min=0).sqrt().tolist()
    return Found(error, at_best, math.sqrt(linear[0] / linear[1]), statistics.mean(map(cosine, model.moe_layers)), loss)


def cosine(layer: MoE) -> float:
    """Returns the mean cosine of two experts' weights."""
    flat = torch.cat((layer.experts.gate_up_proj.flatten(1), layer.experts.down_proj.flatten(1)), 1).detach().double()
    unit, n = F.normalize(flat, dim=1), len(flat)
    return float((unit.sum(0).square().sum() - n) / (n * (n - 1))) if n > 1 else 1.0


def synthetic(spread: float, seed: int, equal: bool) -> float:
    """Returns the error of merging experts base + spread * delta, for 64 units of 8 tokens; see MADE."""
    torch.manual_seed(seed)
    n, dim, ff = 4, 32, 48
    gate_up, down = (
        (torch.randn(1, out, width) + spread * torch.randn(n, out, width)).double() / math.sqrt(width)
        for out, width in ((2 * ff, dim), (dim, ff))
    )
    x, logits = torch.randn(64 * 8, dim).double(), torch.zeros(64, n) if equal else torch.randn(64, n)
    routing = route(logits.double(), n)
    mixed = replaced(x, routing, MIXED, gate_up, down)
    return float((replaced(x, routing, RAW, gate_up, down) - mixed).norm() / mixed.norm())


def picture(curve: dict[float, float], found: dict[str, list[Found]], path: Path) -> None:
    """Draws the error over how alike experts are, and the loss that each way costs."""
    figure = Figure(figsize=(10.5, 4.1), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.35))
    left.plot(
        [1 / (1 + s * s) for s in curve],
        list(curve.values()),
        "o-",
        color="0.45",
        ms=4,
        label="made experts",
    )
    for at, (name, seeds) in enumerate(found.items()):
        errors = [statistics.mean(one.error[Way("token", SCALED)]) for one in seeds]
        left.plot([one.cosine for one in seeds], errors, f"C{at}s", ms=6, label=name, clip_on=False)
        ways = [way for way in seeds[0].loss if way is not None]
        costs = [[one.loss[way] - one.loss[None] for one in seeds] for way in ways]
        places = [row + (at - (len(found) - 1) / 2) * 0.8 / len(found) for row in range(len(ways))]
        right.barh(places, [statistics.mean(cost) for cost in costs], 0.8 / len(found), color=f"C{at}", label=name)
    left.set(
        xlabel="cosine of two experts' weights (1: copies)", ylabel="error of merging by token, scaled", ylim=(0, 1)
    )
    left.set_xlim(1.03, -0.06)
    right.set_yticks(range(len(ways)), [str(way) for way in ways])
    right.invert_yaxis()
    right.set_xlabel("nats per token more than the model as it is")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False, loc="upper left")
    figure.savefig(path, dpi=110)


def page(args: argparse.Namespace, found: dict[str, list[Found]], tokens: int) -> str:
    """Returns the page, and draws its picture."""
    curve = {s: statistics.mean(synthetic(s, seed, True) for seed in range(5)) for s in SPREADS}
    uneven = [statistics.mean(synthetic(s, seed, False) for seed in range(5)) for s in SPREADS]
    ran = receipts.versions()
    parts = [
        "# Merging at inference",
        f"`{args.command}`, commit {measure.commit()}, moekit {ran['moekit']}, torch {ran['torch']}, {ran['system']}, "
        f"{torch.get_num_threads()} threads.",
        ABOUT.format(tokens=tokens, length=args.length, segment=args.segment),
    ]
    if args.out:
        picture(curve, found, args.out.with_suffix(".png"))
        parts.append(f"![error of merging and what it costs]({args.out.with_suffix('.png').name})")
    for name, seeds in found.items():
        parts += [f"## {name}, {len(seeds)} seed{'s' * (len(seeds) > 1)}", _table(seeds)]
        alike = statistics.mean(one.cosine for one in seeds)
        parts.append(
            f"Cosine of two experts' weights: {alike:.3f}. Up projections alone, which are linear, merged by token: "
            f"error {statistics.mean(one.linear for one in seeds):.1e}."
        )
    rows = [
        [f"{s:g}", f"{1 / (1 + s * s):.3f}", f"{error:.1%}", f"{other:.1%}"]
        for (s, error), other in zip(curve.items(), uneven, strict=True)
    ]
    header = ["s", "cosine", "error, equal weights", "error, softmax weights"]
    parts += ["## Made experts", MADE, measure.table(header, rows)]
    return "\n\n".join(parts) + "\n"


def _table(seeds: list[Found]) -> str:
    def error(of: list[list[float]]) -> str:
        layers = [statistics.mean(values) for values in zip(*of, strict=True)]
        return f"{statistics.mean(layers):.1%} ({min(layers):.0%} to {max(layers):.0%})"

    def spread(values: list[float], sign: str) -> str:
        several = f" +/- {statistics.stdev(values):.3f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):{sign}.3f}{several}"

    rows = [["as it is: outputs mixed, by token", "", "", spread([one.loss[None] for one in seeds], ""), ""]]
    for way in seeds[0].error:
        losses = [one.loss[way] for one in seeds]
        more = [one.loss[way] - one.loss[None] for one in seeds]
        errors = error([one.error[way] for one in seeds]), error([one.at_best[way] for one in seeds])
        rows.append([str(way), *errors, spread(losses, ""), spread(more, "+")])
    return measure.table(["routed experts", "error", "at best", "loss", "more"], rows)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("models", nargs="+", type=Path, metavar="MODEL", help="a model directory or a run")
    add("--data", type=Path, required=True, help="what `moekit prepare` wrote; its validation text is used")
    add("--length", type=int, default=256, help="tokens of a window, which is a sequence (256)")
    add("--segment", type=int, default=32, help="tokens of a segment (32)")
    add("--tokens", type=int, default=1024, help="of each domain at most (1,024)")
    add("--out", type=Path, metavar="FILE.md", help="the result file; standard output without it")
    words = list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(words)
    args.command = " ".join(["python", "benchmarks/merge_at_inference.py", *words])
    if args.length % args.segment:
        raise ConfigError(f"segment is {args.segment} but must divide length, {args.length}")
    dataset, units = open_dataset(args.data, "valid"), {"token": 1, "segment": args.segment, "sequence": args.length}
    data, hardware = (
        DataConfig(path="", sequence_length=args.length, batch_size=4),
        Hardware(torch.device("cpu"), False),
    )
    found: dict[str, list[Found]] = defaultdict(list)
    tokens, token_bytes = 0, load_tokenizer(args.data).token_bytes()
    for given in args.models:
        model = moekit.load(model_folder(given)).eval()

        def score(model: Model = model) -> float:
            nonlocal tokens
            domains = validate(model, dataset, token_bytes, hardware, data, args.tokens).values()
            tokens = sum(domain.tokens for domain in domains)
            return statistics.mean(domain.loss for domain in domains)

        with torch.no_grad():
            found[given.resolve().parent.name].append(study(model, score, units))
        measure.progress(str(given))
    text = page(args, found, tokens)
    if args.out:
        files.write(args.out, text)
    else:
        sys.stdout.write(text)


if __name__ == "__main__":
    main()
