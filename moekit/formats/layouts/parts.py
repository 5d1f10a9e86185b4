"""What the tables of several architectures are made of."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

from moekit.config import ModelConfig
from moekit.errors import UnsupportedError
from moekit.formats.layouts.layout import Null, Ours, Part, Values, get

Said = Literal["always", "where unusual", "never"]


def same(prefix: str, **defaults: Any) -> Part:
    """Returns fields that are ours by name, below `prefix`."""
    return Part(
        defaults,
        lambda values: {prefix + key: values[key] for key in defaults},
        lambda config: {key: get(config, prefix + key) for key in defaults},
    )


def called(ours: str, theirs: str, default: Any) -> Part:
    """Returns one field that has another name."""
    return Part({theirs: default}, lambda values: {ours: values[theirs]}, lambda config: {theirs: get(config, ours)})


def choice(ours: str, theirs: str, default: Any, meaning: dict[Any, Any]) -> Part:
    """Returns one field with other words for the same: their value -> ours."""
    words = {value: word for word, value in meaning.items()}

    def read(values: Values) -> Ours:
        _allow(theirs, values[theirs], list(meaning))
        return {ours: meaning[values[theirs]]}

    return Part({theirs: default}, read, lambda config: {theirs: words.get(get(config, ours), default)})


def always(settings: Ours) -> Part:
    """Returns what an architecture is, whatever its config says."""
    return Part({}, lambda values: settings, lambda config: {})


def only(written: bool = True, **allowed: Sequence[Any]) -> Part:
    """Returns fields of which moekit computes some values only: the first is the default, and what is written."""

    def read(values: Values) -> Ours:
        for key, options in allowed.items():
            _allow(key, values[key], options)
        return {}

    first = {key: options[0] for key, options in allowed.items()}
    defaults = {key: Null(object) if value is None else value for key, value in first.items()}
    return Part(defaults, read, lambda config: first if written else {})


def derived(*keys: str) -> Part:
    """Returns fields that repeat what others say."""
    return Part(dict.fromkeys(keys, Null(object)), lambda values: {}, lambda config: {})


def heads(number: Any, kv_heads: Any = None, head_dim: Any = None, said: Said = "always") -> Part:
    """Returns the heads of multi-head attention.

    `kv_heads` None: as many as heads; `head_dim` None: hidden_size by heads. `said` is whether configs have a field for
    the width of a head: always, never, or only where it is not that quotient.
    """
    keys = Null(int, kv_heads) if kv_heads else lambda values: values["num_attention_heads"]
    defaults = {"num_attention_heads": number, "num_key_value_heads": keys}
    if said != "never":
        defaults["head_dim"] = head_dim or _quotient

    def read(values: Values) -> Ours:
        width = values["head_dim"] if said != "never" else _quotient(values)
        heads, keys = values["num_attention_heads"], values["num_key_value_heads"]
        ours = {"num_attention_heads": heads, "num_key_value_heads": heads if keys is None else keys, "head_dim": width}
        return {f"attention.{key}": value for key, value in ours.items()}

    def write(config: ModelConfig) -> Values:
        width = get(config, "attention.head_dim")
        content = {key: get(config, f"attention.{key}") for key in ("num_attention_heads", "num_key_value_heads")}
        quotient = _quotient({"hidden_size": config.hidden_size, **content})
        written = said == "always" or (said == "where unusual" and width != quotient)
        return content | ({"head_dim": width} if written else {})

    return Part(defaults, read, write)


def _quotient(values: Values) -> int:
    return int(values["hidden_size"] // max(values["num_attention_heads"], 1))  # no heads are refused later


def whole_heads() -> Part:
    """Returns the rule of classes that refuse a hidden_size which their heads do not divide."""

    def write(config: ModelConfig) -> Values:
        if config.hidden_size % config.attention.num_attention_heads:
            found = f"hidden_size is {config.hidden_size}, num_attention_heads {config.attention.num_attention_heads}"
            raise UnsupportedError(f"{found}, but readers of this layout want a multiple; use layout moekit")
        return {}

    return Part({}, lambda values: {}, write)


def window(slides: Callable[[Values, int], bool], **defaults: Any) -> Part:
    """Returns the fields of sliding-window attention, refused where it takes effect; `slides` tells layers that do."""

    def read(values: Values) -> Ours:
        types, size = values.get("layer_types"), values["sliding_window"]
        if types is None:
            sliding = [slides(values, layer) for layer in range(values["num_hidden_layers"])]
        else:
            sliding = [kind == "sliding_attention" for kind in types]
            full = sum(kind == "full_attention" for kind in types)
            if sum(sliding) + full != len(types) or len(types) != values["num_hidden_layers"]:
                raise UnsupportedError(f"layer_types is {types!r:.100} but moekit computes full_attention everywhere")
        if any(sliding) and size is not None and size < values["max_position_embeddings"]:
            raise UnsupportedError(f"sliding_window is {size} tokens but moekit's attention sees all that came before")
        return {}

    off = {"sliding_window": None} | ({"use_sliding_window": False} if "use_sliding_window" in defaults else {})
    return Part({"sliding_window": Null(int), **defaults}, read, lambda config: off)


def dense_layers(config: ModelConfig) -> list[int]:
    """Returns the indices of the blocks without experts."""
    return [layer for layer in range(config.num_hidden_layers) if not config.is_moe(layer)]


def placement(moe: Sequence[int], layers: int) -> Ours:
    """Returns the shortest of our ways to say which layers are MoE."""
    for frequency in (1, moe[1] - moe[0] if len(moe) > 1 else layers):
        first = moe[0] - frequency + 1 if moe and moe[0] else 0
        if first >= 0 and list(moe) == [n for n in range(layers) if n >= first and n % frequency == 0]:
            return {"ffn.first_k_dense_replace": first, "ffn.moe_layer_freq": frequency}
    return {"ffn.mlp_only_layers": tuple(sorted(set(range(layers)) - set(moe)))}


def pooled_balance(default: float, moe_layers: Callable[[Values], int]) -> Part:
    """Returns the coefficient of transformers' balance loss as ours, equal where the load is.

    There the loss is one number for all layers, K at perfect balance; ours is a sum over layers, of 1 each (arXiv
    2401.06066, Eq. 12). So alpha_1 = coefficient K / MoE layers. Differs from it: theirs pools tokens of all layers.
    """

    def read(values: Values) -> Ours:
        alpha = values["router_aux_loss_coef"] * values["num_experts_per_tok"] / max(moe_layers(values), 1)
        return {"ffn.aux_loss_alpha": float(alpha), "ffn.seq_aux": alpha == 0}

    def write(config: ModelConfig) -> Values:
        scale = len(config.moe_layers) / get(config, "ffn.num_experts_per_tok")
        return {"router_aux_loss_coef": get(config, "ffn.aux_loss_alpha") * scale}

    return Part({"router_aux_loss_coef": default}, read, write)


def _allow(key: str, value: Any, allowed: Sequence[Any]) -> None:
    if value not in allowed:
        raise UnsupportedError(f"{key} is {value!r} but moekit computes {' or '.join(map(repr, allowed))} only")
