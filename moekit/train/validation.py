"""Validation: loss and bits per byte of each domain, and which experts it uses."""

import math
from typing import NamedTuple

import numpy as np
import torch

from moekit.data import TokenDataset, validation_windows
from moekit.nn.model import Model
from moekit.ops.loss import IGNORED
from moekit.train.hardware import Hardware
from moekit.train.health import LoadWindow


class DomainScore(NamedTuple):
    """A domain's result."""

    loss: float
    """Nats per token, end-of-text tokens included."""
    bits_per_byte: float
    """The same sum in bits, per byte of the predicted text: comparable between tokenizers."""
    tokens: int
    tokens_per_expert: list[list[int]]
    """Choices of each expert of each MoE layer."""


@torch.no_grad()
def validate(
    model: Model,
    dataset: TokenDataset,
    token_bytes: np.ndarray,
    *,
    sequence_length: int,
    max_tokens: int,
    batch_size: int,
    hardware: Hardware,
    cross_document_attention: bool = True,
) -> dict[str, DomainScore]:
    """Returns the score of every domain that has validation text, over its first `max_tokens` tokens.

    Windows do not overlap, so a token sees at most `sequence_length` - 1 tokens before it. Scores do not depend on the
    batch size: sums are exact and padding is not counted. Leaves the model in the mode it was in.
    """
    was_training = model.training
    model.eval()
    scores = {}
    for domain in dataset.domains:
        nats = bytes_seen = 0.0
        tokens = 0
        load = _window(model)
        for batch in validation_windows(dataset, domain, sequence_length, max_tokens, batch_size):
            targets = torch.from_numpy(batch.labels).to(hardware.device)
            documents = None if cross_document_attention else torch.from_numpy(batch.document_ids).to(hardware.device)
            with torch.autocast(hardware.device.type, torch.bfloat16, enabled=hardware.autocast):
                out = model(
                    torch.from_numpy(batch.input_ids).to(hardware.device),
                    targets=targets,
                    padding_mask=targets != IGNORED,
                    document_ids=documents,
                    return_routing=True,
                    return_logits=False,
                )
            load.add(out.routing)
            nats += float(out.token_loss.total)
            tokens += int(out.token_loss.tokens)
            bytes_seen += float(token_bytes[batch.labels[batch.labels != IGNORED]].sum())
        if tokens:
            bits = nats / math.log(2) / max(bytes_seen, 1.0)  # end-of-text alone has no byte
            scores[domain] = DomainScore(nats / tokens, bits, tokens, load.tokens_per_expert.tolist())
    model.train(was_training)
    return scores


def _window(model: Model) -> LoadWindow:
    layers = model.moe_layers
    return LoadWindow(len(layers), layers[0].config.n_routed_experts if layers else 1)
