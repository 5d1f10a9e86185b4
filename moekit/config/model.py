"""What a model is: typed, frozen, strict. Leaf names are the DeepSeek checkpoints' own."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from moekit.config import counts
from moekit.config.strict import Strict
from moekit.config.variants import LoryConfig, MEOConfig, MuMoEConfig, Variant
from moekit.errors import UnsupportedError


class YarnConfig(Strict):
    """YaRN context extension (DeepSeek-V2, arXiv 2405.04434, section 3.1.4)."""

    factor: float = Field(gt=1.0, description="context extension: new length / original length")
    original_max_position_embeddings: int = Field(gt=0, description="tokens of context before the extension")
    beta_fast: float = Field(32.0, gt=0, description="rotations in the original context above which a frequency stays")
    beta_slow: float = Field(1.0, gt=0, description="rotations below which a frequency is interpolated")
    mscale: float = Field(1.0, ge=0, description="attention magnitude applied to cos and sin")
    mscale_all_dim: float = Field(0.0, ge=0, description="attention magnitude applied to the softmax scale")


class Llama3RopeConfig(Strict):
    """Llama 3.1's context extension (arXiv 2407.21783, section 3.4.2): slow frequencies divided, a ramp in between."""

    factor: float = Field(gt=1.0, description="what slow frequencies are divided by")
    original_max_position_embeddings: int = Field(gt=0, description="tokens of context before the extension")
    low_freq_factor: float = Field(1.0, gt=0, description="turns in the original context below which all is divided")
    high_freq_factor: float = Field(4.0, gt=0, description="turns above which a frequency stays")

    @model_validator(mode="after")
    def _check(self) -> "Llama3RopeConfig":
        if self.low_freq_factor >= self.high_freq_factor:
            found = f"low_freq_factor is {self.low_freq_factor} but high_freq_factor is {self.high_freq_factor}"
            raise ValueError(f"{found}; the low one is the smaller")
        return self


class RopeConfig(Strict):
    """Rotary position embedding."""

    theta: float = Field(10000.0, gt=0, description="base of the rotation frequencies")
    yarn: YarnConfig | None = Field(None, description="YaRN context extension, or null")
    llama3: Llama3RopeConfig | None = Field(None, description="Llama 3.1's context extension, or null")

    @model_validator(mode="after")
    def _check(self) -> "RopeConfig":
        if self.yarn is not None and self.llama3 is not None:
            raise ValueError("llama3 is given and so is yarn; a model has one context extension")
        return self


class MHAConfig(Strict):
    """Multi-head attention; grouped-query when there are fewer key-value heads."""

    kind: Literal["mha"] = Field("mha", description="multi-head or grouped-query attention")
    num_attention_heads: int = Field(gt=0, description="query heads")
    num_key_value_heads: int = Field(gt=0, description="key-value heads; divides num_attention_heads")
    head_dim: int = Field(gt=0, multiple_of=2, description="width of one head, even")
    attention_bias: Literal["none", "qkv", "all"] = Field(
        "none", description="biases of queries, keys and values (qkv: Qwen2), and of the output (all)"
    )
    qk_norm: Literal["none", "head", "full"] = Field(
        "none", description="RMSNorm of queries and keys: of each head (Qwen3), or of all heads as one (OLMoE)"
    )
    rope: RopeConfig = Field(RopeConfig(), description="rotary position embedding, half-split pairing")

    @model_validator(mode="after")
    def _check(self) -> "MHAConfig":
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if heads % kv_heads:
            raise ValueError(f"num_key_value_heads is {kv_heads} but must divide num_attention_heads, {heads}")
        return self


class MLAConfig(Strict):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, Eq. 9-19)."""

    kind: Literal["mla"] = Field("mla", description="multi-head latent attention")
    num_attention_heads: int = Field(gt=0, description="heads")
    kv_lora_rank: int = Field(gt=0, description="width of the compressed keys and values")
    q_lora_rank: int | None = Field(None, gt=0, description="width of the compressed queries, or null for full queries")
    qk_nope_head_dim: int = Field(gt=0, description="width of a query and key head without rotation")
    qk_rope_head_dim: int = Field(gt=0, multiple_of=2, description="width of the rotated part, even")
    v_head_dim: int = Field(gt=0, description="width of a value head")
    attention_bias: bool = Field(False, description="biases of the down-projections to latents and of the output")
    latent_norm_eps: float | None = Field(None, gt=0, description="epsilon of the latents' RMSNorm; null: rms_norm_eps")
    rope: RopeConfig = Field(RopeConfig(), description="rotary position embedding, interleaved pairing")


_NOMINAL = "in standard FFNs (8/3 hidden_size), for the paper's FLOPs rule; null: real width"


class DenseConfig(Strict):
    """A plain feed-forward network in every block."""

    kind: Literal["dense"] = Field("dense", description="one network per block")
    intermediate_size: int = Field(gt=0, description="intermediate width")
    hidden_act: Literal["silu", "gelu"] = Field(
        "silu", description="silu: SwiGLU, three matrices; gelu: two matrices with biases, as in BERT and GPT-2"
    )
    nominal_size: float | None = Field(None, gt=0, description=_NOMINAL)


class MoEConfig(Strict):
    """The DeepSeekMoE layer (arXiv 2401.06066, Eq. 9-11), of which Switch, GShard and Hash are special cases."""

    kind: Literal["moe"] = Field("moe", description="routed experts and shared experts")
    n_routed_experts: int = Field(gt=0, description="routed experts, N' = mN - K_s")
    n_shared_experts: int = Field(0, ge=0, description="experts that every token visits, K_s")
    num_experts_per_tok: int = Field(gt=0, description="routed experts chosen per token, K' = mK - K_s")
    moe_intermediate_size: int = Field(gt=0, description="intermediate width of one expert, d_ff / m")
    intermediate_size: int | None = Field(None, gt=0, description="width of the dense layers; needed if there are any")
    first_k_dense_replace: int = Field(0, ge=0, description="leading layers with a dense FFN")
    moe_layer_freq: int = Field(1, gt=0, description="among the rest, every n-th layer is MoE")
    mlp_only_layers: tuple[int, ...] = Field((), strict=False, description="more layers with a dense FFN, by index")
    nominal_size: float | None = Field(None, gt=0, description=f"one expert {_NOMINAL}")
    shared_expert_intermediate_size: int | None = Field(
        None, gt=0, description="width of one shared expert; null: moe_intermediate_size"
    )
    shared_expert_gate: bool = Field(False, description="the shared experts' output times sigmoid(x w) (Qwen2-MoE)")

    scoring_func: Literal["softmax", "sigmoid"] = Field("softmax", description="affinity of a token to the experts")
    topk_method: Literal["greedy", "group_limited_greedy", "noaux_tc", "hash"] = Field(
        "greedy",
        description="greedy; group_limited_greedy (V2: groups by best expert); noaux_tc (V3: selection bias, groups by "
        "their two best); hash (fixed table from token id to experts, weights 1/k)",
    )
    n_group: int = Field(1, gt=0, description="groups of experts; each is a device to the device-level loss")
    topk_group: int = Field(1, gt=0, description="groups that one token may use")
    norm_topk_prob: bool = Field(False, description="renormalise the chosen weights to sum to 1")
    routed_scaling_factor: float = Field(1.0, gt=0, description="constant on the routed weights")
    hash_method: Literal["random", "balanced"] = Field(
        "random", description="hash only: a random table, or one balanced by token frequency (needs counts)"
    )

    aux_loss_alpha: float = Field(0.0, ge=0, description="expert-level balance factor, alpha_1")
    seq_aux: bool = Field(True, description="expert-level balance per sequence; false: over the micro-batch")
    global_aux: bool = Field(False, description="with seq_aux false: load counted over the optimiser step so far")
    device_aux_loss_alpha: float = Field(0.0, ge=0, description="device-level balance factor, alpha_2")
    comm_aux_loss_alpha: float = Field(0.0, ge=0, description="communication balance factor, alpha_3")
    z_loss_alpha: float = Field(0.0, ge=0, description="factor of the squared log-sum-exp of router logits")
    bias_update_speed: float = Field(0.0, ge=0, description="noaux_tc: step of the selection bias, gamma")
    capacity_factor: float | None = Field(
        None, gt=0, description="training only: an expert takes at most factor * K T / N tokens; null: dropless"
    )
    drop_policy: Literal["position", "score"] = Field(
        "position", description="whom a full expert refuses: late tokens, or those of low affinity"
    )

    @model_validator(mode="after")
    def _check(self) -> "MoEConfig":
        method, experts, k, groups = self.topk_method, self.n_routed_experts, self.num_experts_per_tok, self.n_group
        used = self.topk_group
        dense_layers = self.first_k_dense_replace > 0 or self.moe_layer_freq > 1 or bool(self.mlp_only_layers)
        if k > experts:
            raise ValueError(f"num_experts_per_tok is {k} but n_routed_experts is {experts}; choose at most {experts}")
        if experts % groups:
            raise ValueError(f"n_group is {groups} but must divide n_routed_experts, {experts}")
        if used > groups:
            raise ValueError(f"topk_group is {used} but n_group is {groups}; choose at most {groups}")
        if used < groups and method in ("greedy", "hash"):
            raise ValueError(f"topk_group is {used} but topk_method {method} uses all of n_group, {groups}")
        if k > (most := experts // groups * used):
            raise ValueError(f"num_experts_per_tok is {k} but topk_group {used} leaves {most} of {experts} experts")
        if method == "noaux_tc" and 1 < groups == experts:
            raise ValueError(f"n_group is {groups} but noaux_tc needs groups of two: choose at most {experts // 2}")
        if dense_layers and self.intermediate_size is None:
            raise ValueError(
                "intermediate_size is missing: first_k_dense_replace, moe_layer_freq or mlp_only_layers asks"
            )

        of_router = ("aux_loss_alpha", "z_loss_alpha", "scoring_func", "norm_topk_prob", "n_group")
        alphas = (self.aux_loss_alpha, self.device_aux_loss_alpha, self.comm_aux_loss_alpha)
        effects = [  # a setting, whether anything but its default can take effect, and what it needs for that
            *((name, method != "hash", "a router, and topk_method hash has none") for name in of_router),
            ("bias_update_speed", method == "noaux_tc", "topk_method noaux_tc"),
            ("hash_method", method == "hash", "topk_method hash"),
            ("norm_topk_prob", k > 1 or experts == 1, "num_experts_per_tok above 1: else every weight is 1 for ever"),
            ("device_aux_loss_alpha", groups > 1, "n_group above 1: else it has no gradient"),
            ("comm_aux_loss_alpha", groups > 1, "n_group above 1: else it has no gradient"),
            ("global_aux", self.aux_loss_alpha and not self.seq_aux, "seq_aux false and aux_loss_alpha above 0"),
            ("seq_aux", any(alphas), "aux_loss_alpha, device_aux_loss_alpha or comm_aux_loss_alpha above 0"),
            ("drop_policy", self.capacity_factor is not None, "a capacity_factor, else nothing is dropped"),
            ("intermediate_size", dense_layers, "dense layers: first_k_dense_replace, moe_layer_freq, mlp_only_layers"),
            ("shared_expert_intermediate_size", self.n_shared_experts, "n_shared_experts above 0"),
            ("shared_expert_gate", self.n_shared_experts, "n_shared_experts above 0"),
        ]
        for name, effective, needed in effects:
            value = getattr(self, name)
            if not effective and value != type(self).model_fields[name].default:
                raise ValueError(f"{name} is {str(value).lower()} but takes effect only with {needed}")
        return self

    @property
    def shared_width(self) -> int:
        """Intermediate width of all shared experts together."""
        return self.n_shared_experts * (self.shared_expert_intermediate_size or self.moe_intermediate_size)


AttentionConfig = Annotated[MHAConfig | MLAConfig, Field(discriminator="kind")]
FFNConfig = Annotated[DenseConfig | MoEConfig | MEOConfig | LoryConfig | MuMoEConfig, Field(discriminator="kind")]


class ModelConfig(Strict):
    """A language model: embedding, pre-norm blocks of attention and feed-forward, norm, head."""

    default_kinds: ClassVar[dict[str, str]] = {"attention": "mha", "ffn": "moe"}

    vocab_size: int = Field(gt=0, description="rows of the embedding")
    hidden_size: int = Field(gt=0, description="width of the residual stream")
    num_hidden_layers: int = Field(gt=0, le=65_536, description="blocks")
    max_position_embeddings: int = Field(2048, gt=0, description="longest context, tokens")
    attention: AttentionConfig = Field(description="attention, told apart by kind: mha or mla")
    ffn: FFNConfig = Field(description="feed-forward, told apart by kind: dense, moe, meo, lory or mumoe")
    causal: bool = Field(True, description="tokens see earlier ones only; false: an encoder, which sees all")
    num_labels: int | None = Field(
        None,
        gt=0,
        description="classes of a whole sequence, or 1 for a number, in place of words; null: predicts words",
    )
    rms_norm_eps: float = Field(1e-6, gt=0, description="epsilon of RMSNorm")
    tie_word_embeddings: bool = Field(False, description="the head uses the embedding's weight")
    initializer_range: float = Field(0.006, gt=0, description="standard deviation of every initial weight matrix")

    @model_validator(mode="after")
    def _check(self) -> "ModelConfig":
        ffn, layers = self.ffn, self.num_hidden_layers
        if self.causal and isinstance(ffn, Variant) and (reason := ffn.sees_future()):
            raise ValueError(f"causal is true but {reason}")
        if not isinstance(ffn, MoEConfig):
            return self
        for layer in ffn.mlp_only_layers:
            otherwise = ffn.first_k_dense_replace <= layer < layers and layer % ffn.moe_layer_freq == 0
            if not otherwise or ffn.mlp_only_layers.count(layer) > 1:
                raise ValueError(f"ffn.mlp_only_layers has {layer} but takes effect only on a layer that else is MoE")
        if not self.moe_layers:
            raise ValueError(
                f"ffn.first_k_dense_replace is {ffn.first_k_dense_replace} and ffn.mlp_only_layers has "
                f"{len(ffn.mlp_only_layers)} more but num_hidden_layers is {layers}, "
                "so no layer is MoE; use ffn.kind dense"
            )
        return self

    def check_decoder(self, what: str) -> None:
        """Raises UnsupportedError for `what`, which needs a model that predicts the next token, if this does not."""
        needs = f"{what} needs a model that predicts the next token"
        if not self.causal:
            raise UnsupportedError(f"{needs}; this is an encoder, causal false")
        if self.num_labels is not None:
            raise UnsupportedError(f"{needs}; this one has num_labels in place of words")

    @property
    def ties_head(self) -> bool:
        """Whether the words' head, if there is one, has the embedding's weight."""
        return self.tie_word_embeddings and self.num_labels is None

    def is_moe(self, layer: int) -> bool:
        """Whether the block at index `layer` holds an MoE layer (the rules of the released DeepSeek and Qwen code)."""
        ffn = self.ffn
        if not isinstance(ffn, MoEConfig) or layer in ffn.mlp_only_layers:
            return False
        return layer >= ffn.first_k_dense_replace and layer % ffn.moe_layer_freq == 0

    @property
    def moe_layers(self) -> list[int]:
        """Indices of the blocks that hold an MoE layer."""
        return [layer for layer in range(self.num_hidden_layers) if self.is_moe(layer)]

    @property
    def gates(self) -> list[int]:
        """The block of each gate whose routing a forward pass returns, in its order."""
        if isinstance(self.ffn, Variant):
            return [layer for layer in range(self.num_hidden_layers) for _ in range(self.ffn.gates)]
        return self.moe_layers

    @property
    def looks_ahead(self) -> str | None:
        """In which way scores of this causal model may look ahead, where its paper allows it; None: they do not."""
        return self.ffn.leak() if self.causal and isinstance(self.ffn, Variant) else None

    @property
    def num_parameters(self) -> int:
        """All parameters; the selection bias and hash tables are buffers and not counted."""
        return sum(count.total for count in counts.parameters(self).values())

    @property
    def num_active_parameters(self) -> int:
        """Parameters used for one token, input embedding and head included (the paper's convention, 2.8B at 16B)."""
        return sum(count.active for count in counts.parameters(self).values())

    @property
    def num_active_parameters_without_embedding(self) -> int:
        """As above without the input embedding (DeepSeek-V2-Lite's 2.4B); a tied embedding is the head and counts."""
        embedding = 0 if self.ties_head else counts.parameters(self)["embedding"].active
        return self.num_active_parameters - embedding

    def flops(self, sequence_length: int, rule: counts.Rule = "exact") -> int:
        """Training FLOPs, forward and backward, of one sequence; see `counts.flops`."""
        return counts.flops(self, sequence_length, rule)

    def kv_cache_bytes_per_token(self, dtype_bytes: int = 2) -> int:
        """Bytes that generation keeps for each token of a sequence, all layers."""
        return counts.kv_cache_bytes_per_token(self, dtype_bytes)
