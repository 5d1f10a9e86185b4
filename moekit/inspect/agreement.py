"""Whether the choice of experts settles as a model is trained: the same text through the checkpoints of a run."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import matplotlib
import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from moekit import pictures
from moekit.config import MoEConfig
from moekit.formats.checkpoint import load
from moekit.inspect.result import Analysis, table
from moekit.inspect.text import Window, rows
from moekit.nn.model import Model

MOST = 12
"""Checkpoints that are compared, evenly spaced, the first and the last among them."""


def agreement(
    checkpoints: Sequence[Path], sample: Sequence[Window], device: str | torch.device = "cpu"
) -> Analysis | None:
    """Returns how much of the choice stays from checkpoint to checkpoint; None where there are fewer than two.

    The number of an expert means the same in all checkpoints of a run, so sets of numbers can be compared.
    """
    if len(checkpoints) < 2:
        return None
    places = np.unique(np.linspace(0, len(checkpoints) - 1, MOST).round().astype(int))
    folders = [checkpoints[place] for place in places]
    steps = [int(folder.name.removeprefix("step-")) for folder in folders]
    choices = []
    for folder in folders:
        model = load(folder, device, check_hashes=False)
        choices.append(chosen(model, sample))
    layers, ffn = list(model.config.moe_layers), model.config.ffn
    assert isinstance(ffn, MoEConfig)
    chance = ffn.num_experts_per_tok / ffn.n_routed_experts
    neighbours = np.stack([overlap(one, two) for one, two in pairwise(choices)])
    last = np.stack([overlap(one, choices[-1]) for one in choices])
    count = len(layers)
    each = table(
        step=np.repeat(steps, count),
        layer=np.tile(layers, len(steps)),
        with_previous=[None] * count + neighbours.ravel().tolist(),
        with_last=last.ravel(),
    )
    summary = table(
        step=steps,
        with_previous=[None, *neighbours.mean(1).tolist()],
        with_last=last.mean(1),
    )
    shown = {}
    with matplotlib.rc_context(pictures.STYLE):
        for caption, at, values in (
            ("Share of the experts chosen that the checkpoint before chose too", steps[1:], neighbours),
            ("Share that the last checkpoint chooses too", steps, last),
        ):
            axes = pictures.plot(x="step")
            axes.set_prop_cycle(color=pictures.layer_colours(count))
            axes.plot(at, values, "o-", markersize=3, linewidth=1.4)
            axes.axhline(chance, color=pictures.THEME["muted"], linewidth=0.8, linestyle="--")
            pictures.grid_lines(axes)
            axes.set_ylim(0, 1)
            shown[caption] = pictures.svg(axes, caption)
    reading = (
        f"A curve is a layer, the first yellow, the last blue. 1 is the same experts for every token, the dashed line, "
        f"{chance:.2f}, what chance gives. A router that settles climbs towards 1, as a rule early in the run and in "
        f"early layers first. {sum(len(window.tokens) for window in sample):,} tokens of the text."
    )
    found = (
        f"between steps {steps[-2]} and {steps[-1]} {neighbours[-1].mean():.0%} of the choices stayed, "
        f"where chance gives {chance:.0%}",
    )
    return Analysis(
        "agreement",
        "How the choice settled in training",
        reading,
        {"steps": summary, "layers": each},
        shown,
        found,
    )


@torch.inference_mode()
def chosen(model: Model, sample: Sequence[Window]) -> Int[Tensor, "layers tokens k"]:
    """Returns the experts of every token of the sample."""
    parts, device = [], model.embed_tokens.weight.device
    for batch in rows(sample, 1, model.config.vocab_size):
        out = model(batch.input_ids.to(device), return_routing=True, return_logits=False)
        parts.append(torch.stack([routing.expert_ids for routing in out.routing]).cpu())
    return torch.cat(parts, dim=1)


def overlap(one: Int[Tensor, "layers tokens k"], two: Int[Tensor, "layers tokens k"]) -> Float[np.ndarray, " layers"]:
    """Returns the share of the experts of `one` that are among those of `two`, token by token, in each layer."""
    same = (one.unsqueeze(-1) == two.unsqueeze(-2)).any(-1) & (one >= 0)
    return np.asarray((same.sum((1, 2)) / (one >= 0).sum((1, 2)).clamp(min=1)).double().numpy())
