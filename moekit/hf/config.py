"""config.json as transformers holds it, and the ModelConfig that it stands for."""

from typing import Any

from transformers import PreTrainedConfig

from moekit.config import ModelConfig, MoEConfig, validate
from moekit.formats.layouts import LAYOUTS
from moekit.formats.layouts.tensors import Disk, disk

SWITCHES = ("output_router_logits", "router_aux_loss_coef")
"""What trainers set on a configuration, and no file holds."""


class Config(PreTrainedConfig):
    """What the configurations share. `router_aux_loss_coef` multiplies balance terms that have their own factors."""

    keys_to_ignore_at_inference = ("past_key_values",)
    output_router_logits = True
    router_aux_loss_coef = 1.0

    def to_model_config(self) -> ModelConfig:
        """Returns our settings of the same model."""
        raise NotImplementedError

    def disk(self) -> Disk:
        """Returns what the tensors are called on disk."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        return {key: value for key, value in super().to_dict().items() if key not in SWITCHES}

    @property
    def num_experts(self) -> int:
        """The routed experts by the name that other libraries ask for."""
        ffn = self.to_model_config().ffn
        return ffn.n_routed_experts if isinstance(ffn, MoEConfig) else 0


class DeepseekConfig(Config):
    """`model_type: deepseek`, the layout of the released DeepSeekMoE 16B: its own fields."""

    model_type = "deepseek"

    @classmethod
    def of(cls, config: ModelConfig) -> "DeepseekConfig":
        """Returns the configuration of a model of ours; UnsupportedError where the layout cannot hold it."""
        return cls(**LAYOUTS[cls.model_type].write(config))

    def to_model_config(self) -> ModelConfig:
        return LAYOUTS[self.model_type].read(self.to_dict())

    def disk(self) -> Disk:
        return disk(LAYOUTS[self.model_type], self.to_dict())


class MoekitConfig(Config):
    """`model_type: moekit`: our settings whole, under the key `moekit`."""

    model_type = "moekit"
    vocab_size: int | None = None
    moekit: dict[str, Any] | None = None

    @classmethod
    def of(cls, config: ModelConfig) -> "MoekitConfig":
        """Returns the configuration of a model of ours."""
        return cls(vocab_size=config.vocab_size, moekit=config.model_dump(mode="json"))

    def to_model_config(self) -> ModelConfig:
        return validate(ModelConfig, self.moekit)

    def disk(self) -> Disk:
        return Disk()

    @property
    def hidden_size(self) -> int:
        return self.to_model_config().hidden_size

    @property
    def num_hidden_layers(self) -> int:
        return self.to_model_config().num_hidden_layers

    @property
    def num_attention_heads(self) -> int:
        return self.to_model_config().attention.num_attention_heads

    @property
    def max_position_embeddings(self) -> int:
        return self.to_model_config().max_position_embeddings

    @property
    def tie_word_embeddings(self) -> bool:
        return self.to_model_config().tie_word_embeddings

    @property
    def num_experts_per_tok(self) -> int:
        ffn = self.to_model_config().ffn
        return ffn.num_experts_per_tok if isinstance(ffn, MoEConfig) else 0
