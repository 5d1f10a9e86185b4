"""Masked tokens of prepared text, from those on both sides (BERT, arXiv 1810.04805, section 3.1)."""

from pathlib import Path
from typing import NamedTuple

import torch

from moekit.config import MaskedObjective, RunConfig
from moekit.data import Batch, validation_windows
from moekit.data.masking import TRAINING, VALIDATION, masked
from moekit.errors import ConfigError
from moekit.nn.model import Model
from moekit.ops.loss import IGNORED
from moekit.train import health
from moekit.train.hardware import Hardware
from moekit.train.objectives.objective import Validation
from moekit.train.objectives.text import Text, of_domains


class MaskedScore(NamedTuple):
    """A domain's result."""

    loss: float
    """Nats per masked token."""
    accuracy: float
    """Share of the masked tokens that are the likeliest one in their place."""
    tokens: int
    tokens_per_expert: list[list[int]]


class Masked(Text):
    """Text with holes. What is hidden is drawn by row: by the run's seed in training, alike for all in validation."""

    def __init__(self, config: RunConfig, hardware: Hardware, weights: Path | None = None) -> None:
        super().__init__(config, hardware, weights)
        assert isinstance(config.objective, MaskedObjective)
        self.objective, vocabulary = config.objective, self.dataset.vocab_size
        self.mask_id = vocabulary if config.objective.mask_token_id is None else config.objective.mask_token_id
        if self.mask_id >= config.model.vocab_size:
            which = "the mask token behind them" if self.mask_id == vocabulary else f"mask_token_id {self.mask_id}"
            raise ConfigError(
                f"model.vocab_size is {config.model.vocab_size} but the tokenizer of {config.data.path} has "
                f"{vocabulary} entries and {which} needs one more; use --model.vocab_size {self.mask_id + 1}"
            )

    def batch(self, step: int) -> Batch:
        size, seed = self.config.data.batch_size, self.config.seed
        rows = [(seed, place) for place in range(step * size, (step + 1) * size)]
        return self._masked(self.sampler.batch(step), rows, TRAINING)

    def _masked(self, batch: Batch, keys: list[tuple[int, int]], stream: int) -> Batch:
        vocabulary, kept = self.dataset.vocab_size, (self.tokenizer.eos_id,)
        return masked(batch, keys, stream, self.objective, self.mask_id, vocabulary, kept)

    def validate(self, model: Model) -> Validation | None:
        if self.valid is None:
            return None
        found = {name: score for name in self.valid.domains if (score := self._score(model, name))}
        return of_domains(found, "accuracy")

    @torch.no_grad()
    def _score(self, model: Model, domain: str) -> MaskedScore | None:
        """Returns a domain's score over its first `eval_tokens` tokens, or None where none of them is masked."""
        assert self.valid is not None
        data, number = self.config.data, self.valid.domains.index(domain)
        size, was_training = data.micro_batch_size or data.batch_size, model.training
        nats, right, tokens, row = 0.0, 0, 0, 0
        load = health.no_load(model.config, self.hardware.device)
        model.eval()
        for plain in validation_windows(
            self.valid, domain, data.sequence_length, self.config.eval_tokens, size, data.packing
        ):
            rows = range(row, row := row + len(plain.input_ids))
            batch = self._masked(plain, [(number, one) for one in rows], VALIDATION)
            out = self.forward(model, batch, return_logits=False)
            health.add_routing(load, out.routing or [])
            targets = torch.from_numpy(batch.labels).to(self.hardware.device)
            hidden, wanted = out.hidden[targets != IGNORED].float(), targets[targets != IGNORED]
            right += int((model.lm_head(hidden).argmax(-1) == wanted).sum())
            assert out.token_loss is not None
            nats, tokens = nats + float(out.token_loss.total), tokens + int(out.token_loss.tokens)
        model.train(was_training)
        return MaskedScore(nats / tokens, right / tokens, tokens, load.tokens_per_expert.tolist()) if tokens else None
