"""A model of ours as a PreTrainedModel: read and written by our own strict code, trained by anybody's."""

import functools
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.integrations.peft import maybe_load_adapters
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.utils import GENERATION_CONFIG_NAME

from moekit import files, receipts
from moekit.errors import CheckpointError, ConfigError, UnsupportedError
from moekit.formats.checkpoint import load
from moekit.formats.directory import MANIFEST
from moekit.formats.weights import INDEX, held, split, tied, write
from moekit.hf.backbone import Backbone, plain
from moekit.hf.cache import Cache
from moekit.hf.config import Config, DeepseekConfig, MoekitConfig
from moekit.nn.model import Model

PREFIX = "model."
"""Our state dict stands under this in transformers'."""
HUB = ("revision", "cache_dir", "token", "local_files_only", "force_download")
REFUSED = ("quantization_config", "gguf_file", "key_mapping", "subfolder", "variant", "ignore_mismatched_sizes")
PATTERNS = ["*.json", "*.safetensors", "*.txt", "*.model"]


class MoekitForCausalLM(PreTrainedModel, GenerationMixin):
    """transformers' class of `model_type: moekit`.

    In training mode `loss` holds the balance terms, and `aux_loss` is their sum. The objective is what our own loop
    minimises, with the weights of gradient accumulation: a micro-batch's terms count as its share of the tokens.
    """

    config_class: type[Config] = MoekitConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _tied_weights_keys = {"model.lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012  transformers declares it
    _no_split_modules = {"Block"}  # noqa: RUF012
    _keep_in_fp32_modules_strict = {"expert_bias"}  # noqa: RUF012
    _supports_sdpa = True

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.gradient_checkpointing = False
        ours = config.to_model_config()
        ours.check_decoder(type(self).__name__)
        self.model = Backbone(ours)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Leaves the weights as our model has drawn them; loading leaves none to be drawn."""

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """Says that `generate` is not to make a cache: the first forward pass returns ours."""
        return False

    def get_input_embeddings(self) -> nn.Embedding:
        embedding: nn.Embedding = self.model.embed_tokens
        return embedding

    def get_output_embeddings(self) -> nn.Module:
        head: nn.Module = self.model.lm_head  # an adapter's, where it has one
        return head

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **others: Any) -> nn.Embedding:
        """Refuses another size: a vocabulary is part of our settings. Presets leave room behind the tokenizer's."""
        if new_num_tokens not in (None, self.config.vocab_size):
            found = f"the vocabulary has {self.config.vocab_size} entries and cannot be made {new_num_tokens}"
            raise UnsupportedError(f"{found}; use ids behind the tokenizer's, where the model has more")
        return self.get_input_embeddings()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **others: Any,
    ) -> MoeCausalLMOutputWithPast | tuple[Any, ...]:
        """Returns logits and, with labels (the input ids, -100 where nothing is predicted), the loss."""
        out = self.model(input_ids, attention_mask, position_ids, past_key_values, bool(use_cache), **others)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.model.lm_head(out.last_hidden_state[:, kept])
        loss, balance = None, out.balance
        if labels is not None:
            if attention_mask is not None:
                labels = labels.masked_fill(~attention_mask.bool(), -100)
            tokens = others.get("num_items_in_batch")
            loss = self.loss_function(logits, labels, vocab_size=logits.shape[-1], **others)
            if self.training and balance is not None:
                share = 1 if tokens is None else (labels[:, 1:] != -100).sum() / tokens
                loss = loss + self.config.router_aux_loss_coef * share * balance
        found = MoeCausalLMOutputWithPast(
            loss=loss, aux_loss=balance, logits=logits, past_key_values=out.past_key_values
        )
        return found if return_dict is not False else found.to_tuple()

    def __setattr__(self, name: str, value: Any) -> None:
        """Sets an attribute; TRL puts its own `forward` here, which is made to know our balance terms."""
        given: Any = _balanced(self, value) if name == "forward" else value
        super().__setattr__(name, given)

    def _set_gradient_checkpointing(self, enable: bool = True, *_: Any, every_n_layers: int = 1, **others: Any) -> None:
        if enable and every_n_layers != 1:
            raise UnsupportedError(f"every_n_layers is {every_n_layers} but moekit recomputes every layer or none")
        self.gradient_checkpointing = self.model.recompute = enable

    def to_moekit(self) -> Model:
        """Returns a moekit.Model of the same weights, not a copy."""
        return plain(self.model)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *model_args: Any,
        config: Any = None,
        output_loading_info: bool = False,
        adapter_kwargs: dict[str, Any] | None = None,
        **others: Any,
    ) -> Any:
        """Returns the model of a directory or a repository of the Hub, read as strictly as `moekit.load` does."""
        for name in REFUSED:
            if others.pop(name, None):
                raise UnsupportedError(f"{name} is not supported by moekit's models; leave it out")
        hub: Any = {name: others.pop(name) for name in HUB if name in others}
        adapter, source, adapter_kwargs = maybe_load_adapters(
            pretrained_model_name_or_path, hub, **adapter_kwargs or {}
        )
        folder = Path(source)
        if not folder.is_dir():
            folder = Path(snapshot_download(str(source), allow_patterns=PATTERNS, **hub))
        if not isinstance(config, PreTrainedConfig):
            config = cls.config_class.from_pretrained(config or folder)
        loaded = load(folder)
        if loaded.quantization is not None:
            raise UnsupportedError(
                f"{folder} holds {loaded.quantization} codes, which moekit.load reads; convert it first"
            )
        state = {PREFIX + name: tensor for name, tensor in loaded.state_dict().items() if not tied(loaded.config, name)}
        read: Any = super().from_pretrained(
            None, *model_args, config=config, state_dict=state, output_loading_info=True, **others
        )
        model, info = read
        for kind, keys in info.items():
            if keys:
                raise CheckpointError(f"{folder} does not fit the configuration that is given: {kind}: {min(keys)}")
        model.config.name_or_path = model.name_or_path = str(source)
        if "generation_config" not in others and (folder / GENERATION_CONFIG_NAME).is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
        if adapter is not None:
            model.load_adapter(adapter, adapter_kwargs=adapter_kwargs)
        return (model, info) if output_loading_info else model

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = "5GB",
        **others: Any,
    ) -> None:
        """Writes a model directory that `moekit.load` reads too, into one that may hold other files.

        A model that was there stays whole until the new one's weights are written. While they change places there is no
        manifest, so a save that was cut off then is no checkpoint.
        """
        if self._hf_peft_config_loaded:  # the adapter alone
            super().save_pretrained(save_directory, is_main_process, state_dict, push_to_hub, max_shard_size, **others)
            return
        if given := [name for name in ("variant", "distributed_checkpoint") if others.get(name)]:
            raise UnsupportedError(f"{given[0]} is not an option of save_pretrained here; leave it out")
        shard_bytes = _bytes(max_shard_size)
        if push_to_hub:
            raise UnsupportedError("push_to_hub is not an option of save_pretrained here; call model.push_to_hub(...)")
        if not is_main_process:
            return
        folder, model = Path(save_directory), self.to_moekit()
        folder.mkdir(parents=True, exist_ok=True)
        if state_dict is not None:
            model.load_state_dict({name.removeprefix(PREFIX): given for name, given in state_dict.items()}, assign=True)
        stored = [entry for name, weight in held(model).items() for entry in split(name, weight, self.config.disk())]
        with tempfile.TemporaryDirectory(prefix=".writing-", dir=folder) as beside:
            write(Path(beside), stored, (tensor for _, tensor in stored), shard_bytes)
            for old in [folder / MANIFEST, folder / INDEX, *folder.glob("model*.safetensors")]:
                old.unlink(missing_ok=True)
            for new in sorted(Path(beside).iterdir()):
                new.replace(folder / new.name)
        self.config.architectures, self.config.dtype = [type(self).__name__], self.dtype
        self.config.save_pretrained(folder)
        self.generation_config.save_pretrained(folder)
        settings = model.config.model_dump(mode="json")
        receipt = receipts.make("save", model.config, config=settings, device=str(self.device))
        listed = [folder / "config.json", folder / INDEX, *folder.glob("model*.safetensors")]
        hashed = files.hashes(folder, [file.name for file in listed if file.exists()])
        files.write_json(folder / receipts.FILE, {**receipt, "outputs": {**receipt["outputs"], **hashed}})
        files.write_json(folder / MANIFEST, {"format": 1, "files": hashed})

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Loads tensors named as in memory or as on disk, where one is often a part: trainers resume from files."""
        ours, disk = self.state_dict(), self.config.disk()
        parts = {
            piece.key: (name, piece.index)
            for name, tensor in ours.items()
            for piece in disk.pieces(name.removeprefix(PREFIX), tuple(tensor.shape))
        }
        state: dict[str, Any] = {}
        for key, tensor in state_dict.items():
            name, index = (key, ()) if key in ours else parts.get(key, (key, ()))
            if index:
                state.setdefault(name, ours[name].clone())[index] = tensor
            else:
                state[name] = tensor
        return super().load_state_dict(state, strict, assign)


class DeepseekForCausalLM(MoekitForCausalLM):
    """transformers' class of `model_type: deepseek`."""

    config_class = DeepseekConfig


def _bytes(size: int | str) -> int:
    """Returns a size such as "5GB" in bytes."""
    found = re.fullmatch(r"(\d+)\s*([KMGT]?)B?", str(size).strip(), re.IGNORECASE)
    if found is None or not int(found[1]):
        raise ConfigError(f"max_shard_size is {size!r} but must be bytes, or a number with KB, MB, GB or TB")
    return int(found[1]) * int(1000 ** " KMGT".index(found[2].upper() or " "))


def _balanced(model: MoekitForCausalLM, forward: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a forward whose fused outputs, TRL's own, carry our balance terms where it has Mixtral's or nothing.

    TRL calls the backbone itself, and its trainers add `aux_loss` times `router_aux_loss_coef` to their loss.
    """

    @functools.wraps(forward)
    def with_balance(*args: Any, **others: Any) -> Any:
        if not others.get("fused_lm_head"):
            return forward(*args, **others)
        terms: list[Tensor | None] = []
        hook = model.model.register_forward_hook(lambda _module, _inputs, out: terms.append(out.balance))
        try:
            out = forward(*args, **others)
        finally:
            hook.remove()
        out.aux_loss = out.loss.new_zeros(()) if terms[0] is None else terms[0]
        out.loss = out.loss + model.config.router_aux_loss_coef * out.aux_loss
        return out

    return with_balance
