"""A routing trace of one text: who computed which token, in every layer, as a file and as a page to look at."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors.numpy import save

from moekit import files, page
from moekit.config import MoEConfig
from moekit.errors import ConfigError, DataError
from moekit.inspect.vocabulary import shown
from moekit.nn.model import Model

TEMPLATES = page.templates(Path(__file__).parent)


class Trace(NamedTuple):
    """Routing as serving engines return it: one row a token, then MoE layers, then choices, best first."""

    token_ids: Int[np.ndarray, " tokens"]
    expert_ids: Int[np.ndarray, "tokens layers k"]
    """-1 where no expert computed the choice."""
    weights: Float[np.ndarray, "tokens layers k"]


@torch.inference_mode()
def trace(model: Model, token_ids: Sequence[int]) -> Trace:
    """Returns the trace of one sequence. ConfigError for a dense model and for more tokens than the model can read."""
    limit, ffn = model.config.max_position_embeddings, model.config.ffn
    if not isinstance(ffn, MoEConfig) or not model.moe_layers:
        raise ConfigError("the model is dense, it has no routed experts to trace; choose one with MoE layers")
    if not 0 < len(token_ids) <= limit:
        raise DataError(f"the text to trace has {len(token_ids)} tokens; allowed: 1 to {limit}")
    ids = torch.tensor([list(token_ids)], device=model.embed_tokens.weight.device)
    routings = model(ids, return_routing=True, return_logits=False).routing
    experts = torch.stack([routing.expert_ids for routing in routings], dim=1).cpu().numpy()
    weights = torch.stack([routing.weights.float() for routing in routings], dim=1).cpu().numpy()
    narrow = np.int16 if ffn.n_routed_experts < 2**15 else np.int32
    return Trace(np.array(token_ids, dtype=np.int32), experts.astype(narrow), weights)


def write_trace(path: str | Path, found: Trace) -> None:
    """Writes the three arrays by name, as .npz or .safetensors by the file's suffix, in one atomic step."""
    path, arrays = Path(path), found._asdict()
    if path.suffix == ".safetensors":
        files.write(path, save({name: np.ascontiguousarray(array) for name, array in arrays.items()}))
    elif path.suffix == ".npz":
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)
        files.write(path, buffer.getvalue())
    else:
        raise ConfigError(f"{path} has the suffix {path.suffix!r}; a trace is .npz or .safetensors")


def trace_page(found: Trace, texts: Sequence[str], layers: Sequence[int], experts: int, name: str) -> str:
    """Returns a self-contained page: a token under the pointer shows its experts and weights in every layer.

    `texts` are the tokens as text, `layers` the places of the MoE layers in the model.
    """
    data = {
        "tokens": [shown(text) for text in texts],
        "breaks": [place for place, text in enumerate(texts) if "\n" in text],
        "layers": list(layers),
        "experts": experts,
        "k": found.expert_ids.shape[2],
        "ids": found.expert_ids.ravel().tolist(),
        "weights": np.round(found.weights.ravel() * 10_000).astype(int).tolist(),
    }
    # a script element ends at the first </, whatever it is inside of
    packed = json.dumps(data, separators=(",", ":"), ensure_ascii=False).replace("</", "<\\/").replace("<!", "<\\u0021")
    template = TEMPLATES.get_template("trace.html")
    return page.allowed(template.render(name=name, data=packed, tokens=len(texts), layers=len(layers), experts=experts))
