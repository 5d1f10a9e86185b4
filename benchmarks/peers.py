"""Our model beside transformers' of the same shape and weights, and the file of what came out."""

import argparse
import gc
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple

import measure
import torch
from torch import Tensor, nn

from moekit.config import ModelConfig
from moekit.errors import MoekitError, UnsupportedError
from moekit.nn.model import Model
from moekit.nn.quantized import quantize_

try:
    import transformers
except ImportError:
    transformers = None

KINDS = {"deepseek_v2": "DeepseekV2, MLA", "qwen2_moe": "Qwen2Moe, plain attention"}
DTYPES = ("fp32", "bf16", "amp")
"""amp: float32 weights under bf16 autocast."""
CODES = ("int8", "int4")
"""The matrices in codes, the rest bf16; ours only."""
ROUTER_STD = 0.05


class Shape(NamedTuple):
    """The sizes of a model. The defaults are 164M parameters, 35M of them active: `reference`."""

    vocab: int = 16384
    hidden: int = 512
    layers: int = 8
    dense_layers: int = 1
    dense_width: int = 1408
    heads: int = 8
    head_dim: int = 64
    rope_dim: int = 32
    kv_lora: int = 256
    experts: int = 64
    chosen: int = 6
    shared: int = 2
    width: int = 192


SHAPES = {
    "reference": Shape(),
    "tiny": Shape(256, 64, 2, 1, 96, 2, 32, 16, 32, experts=16, chosen=3, shared=1, width=32),
}


def shape(text: str) -> Shape:
    """Returns the shape that `NAME[,field=value...]` means."""
    name, *changes = text.split(",")
    try:
        made = SHAPES[name]._replace(**{field: int(value) for field, value in (c.split("=") for c in changes)})
    except (KeyError, ValueError) as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no shape ({error}); choose {' or '.join(SHAPES)}, then changes as FIELD=N, with FIELD of "
            f"{', '.join(Shape._fields)}"
        ) from None
    if made.shared < 1 or made.dense_layers >= made.layers:
        raise argparse.ArgumentTypeError(
            f"{text!r} needs shared >= 1, as transformers has it, and dense_layers < layers"
        )
    return made


def options(parser: argparse.ArgumentParser, dtypes: Sequence[str] = DTYPES, more: Sequence[str] = ()) -> None:
    """Adds what the benchmarks of models share; `more` can be asked for beside the dtypes of all."""
    parser.add_argument(
        "--shape", type=shape, default=Shape(), metavar="NAME[,FIELD=N...]", help=f"{' or '.join(SHAPES)}, and changes"
    )
    parser.add_argument("--models", nargs="+", choices=KINDS, default=list(KINDS), help="whose shape; each in turn")
    parser.add_argument("--dtype", nargs="+", choices=(*DTYPES, *more), default=list(dtypes), help="each in turn")
    parser.add_argument(
        "--impl", nargs="*", default=["grouped_mm"], metavar="NAME",
        help="transformers' experts: eager, grouped_mm, batched_mm; none: without transformers",
    )  # fmt: skip
    parser.add_argument("--backend", nargs="+", default=["auto"], metavar="NAME", help="ours: auto, torch, native, ...")


def config(shape: Shape, kind: str, positions: int) -> ModelConfig:
    """Returns our configuration."""
    attention: dict[str, Any] = {"kind": "mha", "num_key_value_heads": shape.heads, "head_dim": shape.head_dim}
    if kind == "deepseek_v2":
        attention = {"kind": "mla", "kv_lora_rank": shape.kv_lora, "qk_nope_head_dim": shape.head_dim}
        attention |= {"qk_rope_head_dim": shape.rope_dim, "v_head_dim": shape.head_dim}
    ffn = {"n_routed_experts": shape.experts, "num_experts_per_tok": shape.chosen, "n_shared_experts": shape.shared}
    ffn |= {"moe_intermediate_size": shape.width}
    if shape.dense_layers:
        ffn |= {"first_k_dense_replace": shape.dense_layers, "intermediate_size": shape.dense_width}
    return ModelConfig.model_validate({
        "vocab_size": shape.vocab, "hidden_size": shape.hidden, "num_hidden_layers": shape.layers,
        "max_position_embeddings": positions, "initializer_range": 0.02,
        "attention": {"num_attention_heads": shape.heads, **attention}, "ffn": ffn,
    })  # fmt: skip


def ours(shape: Shape, kind: str, positions: int, backend: str = "auto") -> Model:
    """Returns our model with random weights, the same at every call; router weights are N(0, 0.05)."""
    torch.manual_seed(0)
    model = Model(config(shape, kind, positions))
    for layer in model.moe_layers:
        nn.init.normal_(layer.router.weight, std=ROUTER_STD)
    model.set_experts_backend(backend)
    return model


def theirs(shape: Shape, kind: str, positions: int, implementation: str, weights: Model) -> nn.Module:
    """Returns transformers' model of the same shape with a copy of our weights, so that it computes the same."""
    sizes = {
        "vocab_size": shape.vocab, "hidden_size": shape.hidden, "num_hidden_layers": shape.layers,
        "intermediate_size": shape.dense_width, "moe_intermediate_size": shape.width,
        "num_attention_heads": shape.heads, "num_key_value_heads": shape.heads, "num_experts_per_tok": shape.chosen,
        "max_position_embeddings": positions, "rms_norm_eps": weights.config.rms_norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "tie_word_embeddings": False,
        "attn_implementation": "sdpa", "use_cache": False,
    }  # fmt: skip
    if kind == "deepseek_v2":
        made = transformers.DeepseekV2ForCausalLM(transformers.DeepseekV2Config(
            **sizes, n_routed_experts=shape.experts, n_shared_experts=shape.shared,
            first_k_dense_replace=shape.dense_layers, kv_lora_rank=shape.kv_lora, q_lora_rank=None,
            qk_nope_head_dim=shape.head_dim, qk_rope_head_dim=shape.rope_dim, v_head_dim=shape.head_dim,
        ))  # fmt: skip
    else:
        made = transformers.Qwen2MoeForCausalLM(transformers.Qwen2MoeConfig(
            **sizes, num_experts=shape.experts, shared_expert_intermediate_size=shape.shared * shape.width,
            mlp_only_layers=list(range(shape.dense_layers)), head_dim=shape.head_dim, qkv_bias=False,
        ))  # fmt: skip
    made.load_state_dict(_renamed(weights, kind))
    made.set_experts_implementation(implementation)
    return made


def _renamed(weights: Model, kind: str) -> dict[str, Tensor]:
    named = {}
    for name, tensor in weights.state_dict().items():
        name = (name if name.startswith("lm_head.") else f"model.{name}").replace("mlp.router.", "mlp.gate.")
        if kind == "qwen2_moe" and ".shared_experts." in name:
            name = name.replace(".shared_experts.", ".shared_expert.")
            if name.endswith(".down_proj.weight"):
                # theirs has a gate on the shared expert: at weight 0 it is sigmoid(0) = 1/2, which this makes up for
                tensor = 2 * tensor
                gate = name.replace(".shared_expert.down_proj.", ".shared_expert_gate.")
                named[gate] = tensor.new_zeros(1, weights.config.hidden_size)
        named[name] = tensor
    return named


class Lineup(NamedTuple):
    """Who takes turns."""

    theirs: dict[str, nn.Module]
    ours: dict[str, Model]
    missing: list[str]
    """Who cannot, and why."""
    difference: dict[str, str]
    """Largest difference of some logits from those of the first of ours, in the precision measured."""


def lineup(args: argparse.Namespace, shape: Shape, kind: str, dtype: str, positions: int, copies: int = 1) -> Lineup:
    """Returns a model of ours for each back end and one of transformers' for each implementation, each for itself.

    `copies` is how often each will hold its weights: 4 with gradients and AdamW's two averages. Whoever does not fit in
    memory, or cannot run here, is missing.
    """
    gc.collect()  # the last lineup's models
    mine: dict[str, Model] = {}
    others: dict[str, nn.Module] = {}
    logits: dict[str, Tensor] = {}
    missing: list[str] = []
    ids = random_ids(args, shape, 1, min(32, positions), 0)
    low = dtype == "bf16" or dtype in CODES

    def tried(name: str, make: Callable[[], nn.Module]) -> Iterator[tuple[str, Any]]:
        """Yields the model if it runs."""
        try:
            model = make().to(args.device, torch.bfloat16 if low else torch.float32).eval()
            if dtype == "int8" or dtype == "int4":
                quantize_(model, dtype)
            with torch.no_grad(), precision(args, dtype):
                logits[name] = model(ids).logits.float()
            yield name, model
        except (MoekitError, ImportError, ValueError, RuntimeError) as error:
            missing.append(f"{name}, {KINDS[kind]}, {dtype}: {' '.join(str(error).split())}")

    for backend in args.backend:
        mine.update(tried(f"moekit {backend}", partial(ours, shape, kind, positions, backend)))
    if not mine:
        raise UnsupportedError(f"there is nothing of ours to measure: {'; '.join(missing)}")
    weights = ours(shape, kind, positions)  # freed again at the end, so one copy less needs room
    size = sum(parameter.numel() for parameter in weights.parameters()) * (2 if low else 4)
    for implementation in [] if args.impl == ["none"] or dtype in CODES else args.impl:
        name = f"transformers {implementation}"
        room = measure.available_memory() if args.device.type == "cpu" else None
        if transformers is None:
            missing.append(f"{name}: transformers is not installed")
        elif room is not None and size * max(1, (copies - 1) * (1 + len(mine) + len(others))) > 0.8 * room:
            missing.append(f"{name}, {shape.experts} experts, {dtype}: no room in memory beside ours")
        else:
            others.update(tried(name, partial(theirs, shape, kind, positions, implementation, weights)))
    first = logits[next(iter(mine))]
    difference = {name: f"{float((found - first).abs().max()):.1e}" for name, found in logits.items()}
    return Lineup(others, mine, missing, difference)


def precision(args: argparse.Namespace, dtype: str) -> AbstractContextManager[Any]:
    """Returns the autocast context of a dtype."""
    return torch.autocast(args.device.type, torch.bfloat16, enabled=dtype == "amp")


def random_ids(args: argparse.Namespace, shape: Shape, batch: int, length: int, seed: int) -> Tensor:
    """Returns random tokens, the same for the same seed: everyone's in a round, others in the next."""
    ids = torch.randint(shape.vocab, (batch, length), generator=torch.Generator().manual_seed(seed % 2**31))
    return ids.to(args.device)


def training_step(
    args: argparse.Namespace, model: nn.Module, dtype: str, shape: Shape, batch: int, length: int
) -> measure.Contestant:
    """Returns forward, backward and fused AdamW as stages. Routing changes: new tokens a round, new weights a step."""
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=3e-4, fused=True)
    state: dict[str, Tensor] = {}

    def prepare(number: int) -> None:
        state["ids"] = random_ids(args, shape, batch, length, number)

    def forward() -> None:
        with precision(args, dtype):
            state["loss"] = model(input_ids=state["ids"], labels=state["ids"]).loss

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad()

    stages = {"forward": forward, "backward": lambda: state["loss"].backward(), "optimizer": step}
    return measure.Contestant(stages, prepare)


def versions() -> list[str]:
    """Returns the versions of others' packages."""
    return [] if transformers is None else [f"transformers {transformers.__version__}"]


def report(
    args: argparse.Namespace,
    title: str,
    what: str,
    header: str,
    compare: Callable[[argparse.Namespace, str, str], tuple[list[list[str]], list[str]]],
    packages: Sequence[str] = (),
) -> None:
    """Writes the result file: for each model and dtype the rows that `compare` returns, and who was missing."""
    guard, rows, missing = measure.Guard(args.device), [], []
    for kind, dtype in itertools.product(args.models, args.dtype):
        more, absent = compare(args, kind, dtype)
        rows, missing = rows + more, missing + absent
        for row in more:
            measure.progress(" ".join(row))
    table = measure.table(header.split(" | "), rows)
    measure.report(args, title, what, guard, [table], missing, [*versions(), *packages])
