"""Validation: loss and bits per byte of each domain, and which experts it uses."""

import math
from typing import NamedTuple

import numpy as np
import torch

from moekit.config import DataConfig
from moekit.data import TokenDataset, validation_windows
from moekit.nn.model import Model
from moekit.ops.loss import IGNORED
from moekit.train import health
from moekit.train.hardware import Hardware, forward


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
    model: Model, dataset: TokenDataset, token_bytes: np.ndarray, hardware: Hardware, data: DataConfig, max_tokens: int
) -> dict[str, DomainScore]:
    """Returns the score of every domain that has validation text, over its first `max_tokens` tokens.

    `data` says how long windows are and whether they are cut at documents. They do not overlap, so a token sees at most
    `data.sequence_length` - 1 tokens before it. Scores do not depend on the batch size: sums are exact and padding is
    not counted. Leaves the model in the mode it was in.
    """
    was_training = model.training
    model.eval()
    scores = {}
    size = data.micro_batch_size or data.batch_size
    for domain in dataset.domains:
        nats = bytes_seen = 0.0
        tokens = 0
        load = health.no_load(model.config, hardware.device)
        for batch in validation_windows(dataset, domain, data.sequence_length, max_tokens, size, data.packing):
            out = forward(model, batch, hardware, data.cross_document_attention, return_logits=False)
            health.add_routing(load, out.routing)
            nats += float(out.token_loss.total)
            tokens += int(out.token_loss.tokens)
            bytes_seen += float(token_bytes[batch.labels[batch.labels != IGNORED]].sum())
        if tokens:
            bits = nats / math.log(2) / max(bytes_seen, 1.0)  # end-of-text alone has no byte
            scores[domain] = DomainScore(nats / tokens, bits, tokens, load.tokens_per_expert.tolist())
    model.train(was_training)
    return scores
