"""Parameters, FLOPs and bytes of a model: arithmetic on its config, nothing is allocated.

The paper (arXiv 2401.06066) prints FLOPs without a rule. `rule="paper"` is the one that reproduces its figures:
s (24 L d^2 + 12 L d s + 48 d^2 L r + 6 V d) for s tokens, where r is the active FFN width in standard FFNs.
`rule="exact"` keeps its accounting (forward and backward, attention scores in full) and counts the real shapes.
"""

from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

from moekit.config.variants.meo import MEOConfig, paper_table
from moekit.config.variants.variant import Count, Variant
from moekit.errors import ConfigError, nearest

if TYPE_CHECKING:
    from moekit.config.model import AttentionConfig, ModelConfig

Rule = Literal["paper", "exact"]
Precision = Literal["float32", "bfloat16"]
Optimizer = Literal["adamw", "muon"]

PAPER_TOKENS, PAPER_CHOSEN = 128, (1, 2, 4, 8, 16, 32)
"""MEO's table in its paper: tokens of a sequence, and experts chosen."""

LOGIT_BYTES = 64 * 2**20
"""The loss is taken in chunks that hold at most this much of the logits."""


def parameters(config: "ModelConfig") -> dict[str, Count]:
    """Returns the parameters by role: embedding, attention, router, routed, shared, dense, norm, head.

    Every RMSNorm is `norm`, those inside attention included; attention's biases and the shared experts' gate are of
    those. A tied head counts as embedding. Buffers are no parameters: hash tables, and the selection bias, which no
    gradient trains (14,848 numbers at DeepSeek-V3).
    """
    d, layers = config.hidden_size, config.num_hidden_layers
    matrices, biases, norms = _attention(config.attention, d)
    vocabulary = config.vocab_size * d
    none = Count(0, 0)
    ffn = {"router": none, "routed": none, "shared": none, "dense": none} | _feed_forward(config)
    vectors, head = layers * (2 * d + norms) + d, 0 if config.tie_word_embeddings else vocabulary
    if (labels := config.num_labels) is not None:
        head = d * (d + labels) + d + labels
    return {
        "embedding": Count(vocabulary, vocabulary),
        "attention": Count(layers * (matrices + biases), layers * (matrices + biases)),
        **ffn,
        "norm": Count(vectors, vectors),
        "head": Count(head, head),
    }


def flops(config: "ModelConfig", sequence_length: int, rule: Rule = "exact") -> int:
    """Returns the training FLOPs, forward and backward, of one sequence: 6 per matrix weight and token, plus attention.

    No rule halves attention for causality. `paper` counts every layer as MoE, attention as full multi-head, each FFN at
    its nominal size (`nominal_size`, or else its real width over 8/3 hidden_size), and leaves the router out.
    """
    if rule not in (allowed := get_args(Rule)):
        raise ConfigError(f"rule is {rule!r}{nearest(rule, allowed)}; allowed: {', '.join(allowed)}")
    s, d, layers, ffn = sequence_length, config.hidden_size, config.num_hidden_layers, config.ffn
    if rule not in rules(config):
        what = f"ffn.kind {ffn.kind}" if isinstance(ffn, Variant) else "num_labels"
        raise ConfigError(f"rule is {rule!r} but that paper has no {what}; use exact")
    if rule == "paper":
        weights = layers * (4 * d * d + 8 * d * d * _active_standard_ffns(config)) + config.vocab_size * d
        return round(s * (6 * weights + 12 * layers * d * s))
    active = {role: count.active for role, count in parameters(config).items()}
    lookups = 0 if config.ties_head else active["embedding"]
    vectors = active["norm"] + layers * _attention(config.attention, d).biases
    attended = 6 * layers * sum(_head_widths(config.attention)) * s * s
    if (labels := config.num_labels) is not None:  # read once, by the mean of the sequence
        active["head"], attended = 0, attended + 6 * d * (d + labels)
    if isinstance(ffn, Variant):
        others = active["embedding"] - lookups + active["attention"] + active["norm"] + active["head"] - vectors
        return 6 * s * others + attended + 3 * layers * ffn.forward_flops(d, s)
    vectors += layers * _dense(config).biases
    return 6 * s * (sum(active.values()) - lookups - vectors) + attended


def rules(config: "ModelConfig") -> tuple[Rule, ...]:
    """Returns the rules that have a meaning for a model."""
    return ("exact",) if isinstance(config.ffn, Variant) or config.num_labels is not None else get_args(Rule)


def kv_cache_bytes_per_token(config: "ModelConfig", dtype_bytes: int = 2) -> int:
    """Returns the bytes that generation keeps for each token: keys and values, or MLA's latent and rotated key.

    An encoder generates nothing and keeps nothing.
    """
    attention = config.attention
    if not config.causal:
        return 0
    if attention.kind == "mla":
        width = attention.kv_lora_rank + attention.qk_rope_head_dim
    else:
        width = 2 * attention.num_key_value_heads * attention.head_dim
    return config.num_hidden_layers * width * dtype_bytes


def buffer_bytes(config: "ModelConfig") -> int:
    """Returns the bytes of buffers: a float32 selection bias, or an int64 hash table (vocab, k), per MoE layer.

    A variant's are its own.
    """
    ffn = config.ffn
    if isinstance(ffn, Variant):
        return config.num_hidden_layers * ffn.buffer_bytes()
    if ffn.kind != "moe":
        return 0
    bias = 4 * ffn.n_routed_experts if ffn.topk_method == "noaux_tc" else 0
    table = 8 * config.vocab_size * ffn.num_experts_per_tok if ffn.topk_method == "hash" else 0
    return len(config.moe_layers) * (bias + table)


def memory(
    config: "ModelConfig",
    batch: int,
    sequence_length: int,
    precision: Precision = "bfloat16",
    optimizer: Optimizer = "adamw",
    recompute: bool = False,
) -> dict[str, int]:
    """Returns bytes: `training_total` and its parts, then `generation_total` and its parts, for `batch` sequences.

    Training keeps float32 weights, gradients and optimiser states (AdamW two moments, Muon one momentum for the routed
    experts), with bfloat16 a half-size copy of the matrices, and what the backward pass needs. In float32 that is:
    - each norm: its input; bfloat16 leaves this residual stream in float32;
    - attention, fused (no matrix of scores): input, queries, keys, values and output; MLA: the latents too; norms of
      queries and keys: their inputs too;
    - dense and shared FFN: input, gate, up and silu(gate) * up; where a gate weighs it, its output;
    - router: logits and scores, always float32;
    - routed experts, per choice: input row, gate, up, output row, and 28 bytes of ids, order and weight (the
      `native` and `triton` back ends keep neither row, only each token once);
    - the loss: the last norm, the gradients of its output and of the head, one chunk of logits;
    - with `recompute`: the input of every block, and all of the above for one block.
    Where experts' weights are merged, `merged_weights` is what exists of merged matrices at once (none where our
    kernels run): the backward pass merges again instead of keeping them. Generation has as many while it reads prompts,
    and then keeps what each sequence's tokens go through: `generation_merged_weights` is the larger of the two.
    In bfloat16 every matrix keeps its own half-size copy of a float32 input. Not counted: the allocator's slack, the
    optimiser's temporaries, rows that grouped products add for alignment.
    """
    if optimizer == "muon" and config.ffn.kind != "moe":
        raise ConfigError("optimizer is muon but the model has no experts for it to train; use adamw")
    count = parameters(config)
    total, size = config.num_parameters, 2 if precision == "bfloat16" else 4
    matrices = total - sum(count[role].total for role in ("embedding", "norm", "router"))
    tokens, d = batch * sequence_length, config.hidden_size
    blocks = [_block_bytes(config, layer, sequence_length, size) for layer in range(config.num_hidden_layers)]
    kept = max(blocks) + len(blocks) * 4 * d if recompute else sum(blocks)
    head = size * config.vocab_size * d + min(4 * config.vocab_size * tokens, LOGIT_BYTES)
    if config.num_labels is not None:  # its input, mean, tanh and scores
        head = batch * 4 * (3 * d + config.num_labels)
    training = {
        "weights": 4 * total,
        "compute_copy": 2 * matrices if precision == "bfloat16" else 0,
        "gradients": 4 * total,
        "optimizer": 8 * total - (4 * count["routed"].total if optimizer == "muon" else 0),
        "activations": tokens * (kept + 4 * d + size * d) + head,
        "buffers": buffer_bytes(config),
    }
    generation = {
        "generation_weights": size * total + training["buffers"],
        "kv_cache": tokens * kv_cache_bytes_per_token(config, size),
    }
    if isinstance(config.ffn, Variant) and (merged := config.ffn.merged_bytes(d, sequence_length, batch, size)):
        cached = batch * config.num_hidden_layers * config.ffn.cached_bytes(d, sequence_length, size) * config.causal
        training["merged_weights"] = merged
        generation["generation_merged_weights"] = max(merged, cached)
    training["training_total"] = sum(training.values())
    generation["generation_total"] = sum(generation.values())
    return training | generation


def plan(
    config: "ModelConfig",
    sequence_length: int | None = None,
    batch: int = 1,
    precision: Precision = "bfloat16",
    optimizer: Optimizer = "adamw",
    recompute: bool = False,
) -> dict[str, Any]:
    """Returns all counts of a model as one JSON document; the length defaults to the context, at most 4096 tokens."""
    longest = config.max_position_embeddings
    length = sequence_length or min(longest, 4096)
    if length > longest:
        raise ConfigError(f"sequence_length is {length} but model.max_position_embeddings is {longest}")
    document = {
        "parameters": {
            "total": config.num_parameters,
            "active": config.num_active_parameters,
            "active_without_embedding": config.num_active_parameters_without_embedding,
            "by_role": {role: count._asdict() for role, count in parameters(config).items()},
        },
        "flops": {rule: flops(config, length, rule) for rule in rules(config)} | {"sequence_length": length},
        "kv_cache_bytes_per_token": kv_cache_bytes_per_token(config),
        "memory": memory(config, batch, length, precision, optimizer, recompute),
        "settings": {"batch": batch, "precision": precision, "optimizer": optimizer, "recompute": recompute},
    }
    if isinstance(ffn := config.ffn, MEOConfig):
        length, chosen = sequence_length or min(longest, PAPER_TOKENS), {*PAPER_CHOSEN, ffn.num_experts_per_tok}
        shape = config.num_hidden_layers, config.hidden_size, ffn.intermediate_size, config.vocab_size
        lines = [line._asdict() for line in paper_table(*shape, length, chosen)]
        document["meo_table"] = {"sequence_length": length, "lines": lines}
    return document


class _Attention(NamedTuple):
    """Parameters of one attention."""

    matrices: int
    biases: int
    norms: int


class _Dense(NamedTuple):
    """Parameters of one dense feed-forward network."""

    matrices: int
    biases: int


def _dense(config: "ModelConfig") -> _Dense:
    d, ffn = config.hidden_size, config.ffn
    if ffn.kind == "dense" and ffn.hidden_act == "gelu":
        return _Dense(2 * d * ffn.intermediate_size, ffn.intermediate_size + d)
    return _Dense(3 * d * (ffn.intermediate_size or 0), 0)


def _feed_forward(config: "ModelConfig") -> dict[str, Count]:
    """Returns the parameters of all feed-forward layers, by role."""
    d, layers, ffn = config.hidden_size, config.num_hidden_layers, config.ffn
    if isinstance(ffn, Variant):
        once, none = ffn.shared_parameters(config.vocab_size), Count(0, 0)
        return {
            role: Count(layers * total + once.get(role, none).total, layers * active + once.get(role, none).active)
            for role, (total, active) in ffn.parameters(d).items()
        }
    moe = len(config.moe_layers)
    dense = (layers - moe) * sum(_dense(config))
    if ffn.kind == "dense":
        return {"dense": Count(dense, dense)}
    router = moe * (0 if ffn.topk_method == "hash" else ffn.n_routed_experts * d)
    shared = moe * (3 * d * ffn.shared_width + (d if ffn.shared_expert_gate else 0))
    routed, active = (
        moe * n * 3 * d * ffn.moe_intermediate_size for n in (ffn.n_routed_experts, ffn.num_experts_per_tok)
    )
    return {
        "router": Count(router, router),
        "routed": Count(routed, active),
        "shared": Count(shared, shared),
        "dense": Count(dense, dense),
    }


def _attention(attention: "AttentionConfig", d: int) -> _Attention:
    heads = attention.num_attention_heads
    if attention.kind == "mha":
        queries, keys = heads * attention.head_dim, attention.num_key_value_heads * attention.head_dim
        biases = {"none": 0, "qkv": queries + 2 * keys, "all": queries + 2 * keys + d}[attention.attention_bias]
        norms = {"none": 0, "head": 2 * attention.head_dim, "full": queries + keys}[attention.qk_norm]
        return _Attention(2 * d * (queries + keys), biases, norms)
    nope, rope, value = attention.qk_nope_head_dim, attention.qk_rope_head_dim, attention.v_head_dim
    latent, rank = attention.kv_lora_rank, attention.q_lora_rank
    queries = d * heads * (nope + rope) if rank is None else rank * (d + heads * (nope + rope))
    keys_values = d * (latent + rope) + latent * heads * (nope + value)
    norms = latent + (rank or 0)
    biases = norms + rope + d if attention.attention_bias else 0
    return _Attention(queries + keys_values + heads * value * d, biases, norms)


def _head_widths(attention: "AttentionConfig") -> tuple[int, int]:
    """Returns the widths, over all heads, of queries and of attended values."""
    heads = attention.num_attention_heads
    if attention.kind == "mha":
        return heads * attention.head_dim, heads * attention.head_dim
    return heads * (attention.qk_nope_head_dim + attention.qk_rope_head_dim), heads * attention.v_head_dim


def _active_standard_ffns(config: "ModelConfig") -> float:
    """Returns r of the paper's rule: the active FFN width in standard FFNs."""
    ffn, standard = config.ffn, 8 / 3 * config.hidden_size  # a SwiGLU of 8 hidden_size^2 parameters
    if ffn.kind == "dense":
        return ffn.nominal_size or _dense(config).matrices / (8 * config.hidden_size**2)
    assert ffn.kind == "moe"
    if ffn.shared_expert_intermediate_size and not ffn.nominal_size:
        return (ffn.shared_width + ffn.num_experts_per_tok * ffn.moe_intermediate_size) / standard
    return (ffn.nominal_size or ffn.moe_intermediate_size / standard) * (ffn.n_shared_experts + ffn.num_experts_per_tok)


def _block_bytes(config: "ModelConfig", layer: int, length: int, size: int) -> int:
    """Returns the bytes per token that the backward pass of one block needs; see `memory`."""
    d, attention, ffn, half = config.hidden_size, config.attention, config.ffn, size == 2
    queries, values = _head_widths(attention)
    norms = 2 * 4 * d
    if attention.kind == "mha":
        keys_values = 2 * attention.num_key_value_heads * attention.head_dim
        kept = (3 if half else 1) * d
        if attention.qk_norm != "none":
            kept += queries + keys_values // 2  # the norms' inputs; what they give, turned, is kept as it is without
    else:
        ranks = attention.kv_lora_rank + (attention.q_lora_rank or 0)
        norms += 4 * ranks
        # values are a view of the up-projection's output, whose other half, the keys' unrotated part, is kept with them
        keys_values = queries + values + attention.num_attention_heads * attention.qk_nope_head_dim
        kept = (2 if half else 1) * d + ranks
    kept += queries + keys_values + values
    if isinstance(ffn, Variant):
        return norms + size * kept + ffn.kept_bytes(d, length, size) // length
    if ffn.kind == "dense" or not config.is_moe(layer):
        widths = 2 if ffn.kind == "dense" and ffn.hidden_act == "gelu" else 3
        return norms + size * (kept + (2 if half else 1) * d + widths * (ffn.intermediate_size or 0))
    width, k = ffn.moe_intermediate_size, ffn.num_experts_per_tok
    kept += d + 3 * ffn.shared_width + k * (2 * d + 2 * width) + (d if ffn.shared_expert_gate else 0)
    router = 0 if ffn.topk_method == "hash" else 8 * ffn.n_routed_experts + (4 * d if half else 0)
    return norms + size * kept + 28 * k + router
