"""What a layout is: a config.json of another library and its tensors' names, as one table that is read both ways."""

import math
from collections.abc import Callable, Mapping
from functools import reduce
from typing import Any, Literal, NamedTuple

from moekit.config import ModelConfig, MoEConfig, Strict, validate
from moekit.errors import CheckpointError, ConfigError, UnsupportedError, nearest

Values = dict[str, Any]
"""Fields of a config.json by name."""
Ours = dict[str, Any]
"""Settings of a ModelConfig by dotted key."""

REQUIRED = object()
"""Stands for the default of a field that has none, and is a whole number."""
LAYERS, LARGEST = 4096, 2**31
"""What no real config.json reaches: a larger number is an error, and not an endless loop."""


class Null(NamedTuple):
    """The default of a field that may be null: what it is of otherwise, and the default."""

    kind: type
    default: Any = None


HARMLESS = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _commit_hash _experts_implementation _name_or_path
    add_cross_attention architectures attn_implementation auto_map bad_words_ids begin_suppress_tokens bos_token_id
    chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample dtype
    early_stopping encoder_no_repeat_ngram_size eos_token_id ep_size exponential_decay_length_penalty finetuning_task
    forced_bos_token_id forced_eos_token_id id2label is_decoder is_encoder_decoder label2id length_penalty max_length
    min_length model_type no_repeat_ngram_size num_beam_groups num_beams num_labels num_return_sequences
    output_attentions output_hidden_states output_router_logits output_scores pad_token_id prefix pretraining_tp
    problem_type pruned_heads remove_invalid_values repetition_penalty return_dict return_dict_in_generate sep_token_id
    suppress_tokens task_specific_params temperature tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p
    torch_dtype torchscript transformers_version typical_p unsloth_fixed unsloth_version use_bfloat16 use_cache
    """.split()  # noqa: SIM905
)
"""What does not change what a model computes: run-time switches, token ids, generation settings, provenance."""

EXTRA, QUANTIZATION = "moekit", "quantization_config"
"""Fields with a meaning of their own: settings of ours that a layout has no field for, and codes."""

TRAINING = frozenset(
    """
    aux_loss_alpha bias_update_speed capacity_factor comm_aux_loss_alpha device_aux_loss_alpha drop_policy global_aux
    nominal_size seq_aux z_loss_alpha
    """.split()  # noqa: SIM905
)
"""Settings that training and accounting read, and no forward pass at evaluation."""


class Part(NamedTuple):
    """Some fields of a config.json, and what they say, both ways."""

    defaults: Values
    """Each field's default, whose type it must have: a value, Null, REQUIRED, or a function of the fields before it,
    a whole number, for which null stands too."""
    read: Callable[[Values], Ours]
    """From all fields, defaults filled in."""
    write: Callable[[ModelConfig], Values]


class Layout(NamedTuple):
    """One `model_type`."""

    model_type: str
    architecture: str
    attention: Literal["mha", "mla"]
    ffn: Literal["dense", "moe"]
    parts: tuple[Part, ...]
    renamed: Mapping[str, str] = {}
    """What tensors are called: part of a DeepSeek checkpoint's name -> what stands there instead."""
    aliases: Mapping[str, str] = {}
    """Other names of fields."""
    extra_layers: str | None = None
    """The field that counts the layers behind the last one, for multi-token prediction."""

    def values(self, content: Values) -> Values:
        """Returns the fields of a config.json, defaults filled in; an error names one that is missing or unknown."""
        given: Values = {}
        for key, value in content.items():
            name = self.aliases.get(key, key)
            if name in given and given[name] != value:
                raise CheckpointError(f"{key} is {value!r:.100} but {name}, the same field, is {given[name]!r:.100}")
            given[name] = value
        values: Values = {}
        for key, default in ((key, default) for part in self.parts for key, default in part.defaults.items()):
            value = given.get(key)
            if value is None and callable(default):
                value = default(values)
            elif key not in given:
                value = default.default if isinstance(default, Null) else default
            if value is REQUIRED:
                raise CheckpointError(f"{key} is missing, and model_type {self.model_type} has no default for it")
            values[key] = _typed(key, value, default)
        if values["num_hidden_layers"] > LAYERS:
            raise CheckpointError(f"num_hidden_layers is {values['num_hidden_layers']} but at most {LAYERS} are read")
        unknown = sorted(given.keys() - values.keys() - HARMLESS - {EXTRA, QUANTIZATION})
        if unknown:
            more = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
            raise UnsupportedError(
                f"{unknown[0]} is {given[unknown[0]]!r:.100}{more} and not known of model_type {self.model_type}"
                f"{nearest(unknown[0], values)}; it could change what is computed: remove it if it does not"
            )
        return values

    def read(self, content: Values) -> ModelConfig:
        """Returns the model that a config.json describes.

        Raises UnsupportedError for what moekit does not compute, CheckpointError for what is no such config.
        """
        plain = self._read(content)
        extra = content.get(EXTRA, {})
        known = flatten(plain.model_dump())
        kept = flatten(extra) if isinstance(extra, dict) else {EXTRA: extra}
        if alien := sorted(kept.keys() - known.keys()):
            raise CheckpointError(f"{EXTRA} has {alien[0]}, no setting of this model{nearest(alien[0], known)}")
        config = _checked(nest(known | kept))
        if changed := difference(plain, config):
            key, before, after = changed
            raise CheckpointError(f"{EXTRA} says {key} {after!r} but the fields of {self.model_type} say {before!r}")
        return config

    def _read(self, content: Values) -> ModelConfig:
        values = self.values(content)
        ours: Ours = {"attention.kind": self.attention, "ffn.kind": self.ffn}
        for part in self.parts:
            ours |= part.read(values)
        return _checked(nest(ours))

    def write(self, config: ModelConfig) -> Values:
        """Returns the config.json of a model, which reads as the same model again.

        What only training needs, and the layout has no field for, is kept under `moekit`. Raises UnsupportedError,
        with the reason, where the architecture computes something else.
        """
        for key, wanted in (("attention", self.attention), ("ffn", self.ffn)):
            if (found := getattr(config, key).kind) != wanted:
                raise UnsupportedError(f"layout {self.model_type} has {key}.kind {wanted}, this model {found}")
        content: Values = {"architectures": [self.architecture], "model_type": self.model_type}
        for part in self.parts:
            content |= part.write(config)
        try:
            back = self._read(content)
        except (CheckpointError, UnsupportedError) as error:
            raise UnsupportedError(f"layout {self.model_type} cannot hold this model: {error}") from error
        if changed := difference(config, back):
            key, ours, theirs = changed
            raise UnsupportedError(
                f"layout {self.model_type} cannot say {key} {ours!r}: there it would be {theirs!r}; use layout moekit"
            )
        read = flatten(back.model_dump())
        if extra := {key: value for key, value in flatten(config.model_dump()).items() if value != read[key]}:
            content[EXTRA] = nest(extra)
        return content


def get(config: Strict, key: str) -> Any:
    """Returns the setting under a dotted key."""
    return reduce(getattr, key.split("."), config)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Ours:
    """Returns the leaves of a tree by dotted key."""
    leaves: Ours = {}
    for key, value in tree.items():
        leaves |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return leaves


def nest(leaves: Ours) -> Values:
    """Returns the tree of dotted keys."""
    tree: Values = {}
    for key, value in leaves.items():
        *parents, leaf = key.split(".")
        reduce(lambda part, parent: part.setdefault(parent, {}), parents, tree)[leaf] = value
    return tree


def difference(a: ModelConfig, b: ModelConfig) -> tuple[str, Any, Any] | None:
    """Returns the first setting in which two models compute differently, with both values; None where none does."""
    ours, theirs = _computation(a), _computation(b)
    for key in [*ours, *(key for key in theirs if key not in ours)]:
        x, y = ours.get(key), theirs.get(key)
        close = isinstance(x, float) and isinstance(y, float) and math.isclose(x, y, rel_tol=1e-12)
        if x != y and not close:
            return key, x, y
    return None


def _computation(config: ModelConfig) -> Ours:
    """Returns what the function of a model depends on, each thing said in one way only."""
    said = {key: value for key, value in flatten(config.model_dump()).items() if key.split(".")[-1] not in TRAINING}
    ffn = config.ffn
    if config.attention.kind == "mla":
        said["attention.latent_norm_eps"] = config.attention.latent_norm_eps or config.rms_norm_eps
    if isinstance(ffn, MoEConfig):
        for key in ("first_k_dense_replace", "moe_layer_freq", "mlp_only_layers"):
            del said[f"ffn.{key}"]
        del said["ffn.n_shared_experts"], said["ffn.shared_expert_intermediate_size"]
        said = {"ffn.moe_layers": config.moe_layers, "ffn.shared_width": ffn.shared_width} | said
        if ffn.topk_group == ffn.n_group:  # nothing is limited
            said |= {"ffn.topk_group": 1, "ffn.n_group": 1}
            if ffn.topk_method == "group_limited_greedy":
                said["ffn.topk_method"] = "greedy"
    return said


def _typed(key: str, value: Any, default: Any) -> Any:
    """Returns a field's value, or raises CheckpointError where it is not of the type that its default has."""
    if isinstance(default, Null):
        kind, null = default.kind, True
    else:
        kind, null = (int, False) if default is REQUIRED or callable(default) else (type(default), False)
    fits = isinstance(value, (int, float) if kind is float else kind) and isinstance(value, bool) == (kind is bool)
    if not (fits or (null and value is None)) or (kind is int and fits and not 0 <= value < LARGEST):
        wanted = f"{kind.__name__}{' or null' if null else ''}"
        raise CheckpointError(f"{key} is {value!r:.100} but must be of type {wanted}")
    return value


def _checked(tree: Values) -> ModelConfig:
    try:
        return validate(ModelConfig, tree)
    except ConfigError as error:
        raise CheckpointError(str(error)) from error
