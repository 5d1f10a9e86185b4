"""The next token of prepared text."""

from pathlib import Path

from moekit.config import RunConfig
from moekit.nn.model import Model
from moekit.train.hardware import Hardware
from moekit.train.objectives.objective import Validation
from moekit.train.objectives.text import Text, of_domains
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
        return of_domains(scores, "bits_per_byte")
