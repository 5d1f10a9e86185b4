"""The next token of prepared text."""

from pathlib import Path

from moekit.config import RunConfig
from moekit.nn.model import Model
from moekit.train.hardware import Hardware
from moekit.train.objectives.objective import Validation
from moekit.train.objectives.text import Text
from moekit.train.validation import validate


class NextToken(Text):
    """Each token is predicted from those before it."""

    def __init__(self, config: RunConfig, hardware: Hardware, weights: Path | None = None) -> None:
        super().__init__(config, hardware, weights)
        self.token_bytes = self.tokenizer.token_bytes()

    def validate(self, model: Model) -> Validation | None:
        if self.valid is None:
            return None
        config = self.config
        scores = validate(model, self.valid, self.token_bytes, self.hardware, config.data, config.eval_tokens)
        if not scores:
            return None
        record = {
            "loss": sum(s.loss for s in scores.values()) / len(scores),
            "bits_per_byte": sum(s.bits_per_byte for s in scores.values()) / len(scores),
            "domains": {name: s._asdict() for name, s in scores.items()},
        }
        return Validation(record, {n: {"loss": s.loss, "bits_per_byte": s.bits_per_byte} for n, s in scores.items()})
