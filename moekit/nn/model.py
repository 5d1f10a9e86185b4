"""The language model."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moekit.config import MEOConfig, MHAConfig, ModelConfig, MoEConfig
from moekit.errors import ConfigError, UnsupportedError
from moekit.nn.attention import Attention, Context
from moekit.nn.block import Block, add, at_once
from moekit.nn.cache import KVCache
from moekit.nn.experts import Experts
from moekit.nn.head import SentenceHead
from moekit.nn.linear import Linear, as_written, untouched
from moekit.nn.mla import MLA
from moekit.nn.moe import MoE
from moekit.nn.norm import RMSNorm
from moekit.nn.rope import rotation
from moekit.nn.router import HashRouter, Probe, Router, RouterContext
from moekit.nn.variants.layer import VariantLayer
from moekit.ops.attention import all_seen, as_documents, seen
from moekit.ops.balance import LoadSums, updated_bias
from moekit.ops.embedding import embedding
from moekit.ops.loss import IGNORED, TokenLoss, cross_entropy, linear_cross_entropy
from moekit.ops.quantize import Codes
from moekit.ops.routing import Routing, balanced_hash_table


class ModelOutput(NamedTuple):
    """What a forward pass gives. The objective is `loss` plus every term of `aux`."""

    logits: Float[Tensor, "batch length vocab"] | None
    """None while training on a loss: the loss is formed without ever holding them. None with `num_labels`."""
    loss: Float[Tensor, ""] | None
    """Mean over predicted tokens, nats, without the balance terms; 0 if no token is predicted."""
    aux: dict[str, Float[Tensor, ""]]
    """Balance terms by name, each times its factor and summed over layers."""
    routing: list[Routing] | None
    """One per MoE layer, if asked for; of a variant, one for each gate of each layer."""
    token_loss: TokenLoss | None
    """The loss as a sum and a count, for exact means over micro-batches and ranks."""
    hidden: Float[Tensor, "batch length dim"]
    """What the head reads, of all positions."""
    scores: Float[Tensor, "batch labels"] | None = None
    """Of each sequence, by a model with `num_labels`: logits of its classes, or a number."""


def _embedded(module: nn.Embedding, ids: Tensor) -> Tensor:
    """Returns the rows of ids, unless somebody has hooked, wrapped or replaced the embedding, or set its options."""
    if not untouched(nn.Embedding, module):
        return module(ids)  # type: ignore[no-any-return]
    set_ = module.padding_idx is not None or module.max_norm is not None or module.sparse or module.scale_grad_by_freq
    return module(ids) if set_ else embedding(ids, module.weight)


class Model(nn.Module):
    """A language model, a decoder or (`causal` false) an encoder. An ordinary module: any optimiser, any loop,
    `torch.autocast`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.recompute = False
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.experts_backend = "auto"
        self.quantization: Codes | None = None
        """What the matrices are kept in, where not in numbers: set by `nn.quantized.quantize_`."""
        self.mapped = False
        """The weights are in files: set by `formats.load`."""
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_task: nn.Embedding | None = None
        if isinstance(config.ffn, MEOConfig) and config.ffn.level == "task":
            self.embed_task = nn.Embedding(config.vocab_size, config.ffn.description_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if config.num_labels is not None:
            self.score = SentenceHead(config.hidden_size, config.num_labels)
        else:
            self.lm_head = Linear(config.hidden_size, config.vocab_size)
            self.tie()
        self.reset_parameters()

    def tie(self) -> None:
        """Makes the head's weight the embedding's, if that is what the settings ask for."""
        if self.config.ties_head:
            self.lm_head.weight = self.embed_tokens.weight

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws matrices from a normal of std `initializer_range` (DeepSeekMoE, section 4.1.3); norms 1, biases 0."""
        for module in self.modules():
            if isinstance(module, HashRouter):
                module.reset()
            elif isinstance(module, Router) and module.expert_bias is not None:
                module.expert_bias.zero_()
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, self.config.initializer_range)
            else:
                parameter.fill_(0 if name.endswith(".bias") else 1)
        for module in self.modules():
            if isinstance(module, VariantLayer):
                module.reset_parameters()

    def forward(
        self,
        input_ids: Int[Tensor, "batch length"],
        labels: Int[Tensor, "batch length"] | None = None,
        cache: KVCache | None = None,
        return_routing: bool = False,
        *,
        targets: Int[Tensor, "batch length"] | None = None,
        padding_mask: Bool[Tensor, "batch length"] | None = None,
        document_ids: Int[Tensor, "batch length"] | None = None,
        prior_load: Sequence[LoadSums] | None = None,
        return_logits: bool = True,
        logits_to_keep: int | Int[Tensor, " batch"] | None = None,
        probe: Probe | Sequence[Probe | None] | None = None,
        task_ids: Int[Tensor, "batch description"] | None = None,
    ) -> ModelOutput:
        """Returns logits, loss, balance terms and routing of a batch.

        `labels` are the input ids themselves, shifted here (transformers' convention); `targets` are what is predicted
        at each place: targets[t] follows input_ids[t], or in an encoder is what the mask at t hides. -100 is not
        predicted. `padding_mask` is true for real tokens; padding comes after them, and counts nowhere. `document_ids`
        keep attention inside a document. `prior_load` is one sum per MoE layer for `global_aux`. With a cache,
        input_ids continue each sequence at its own length. `return_logits` False spares the logits where only the loss
        is wanted; training on a loss never forms them. `logits_to_keep` is the number of last positions whose logits
        are formed (0: all, as in transformers), or one position per sequence. `probe` alters the routing of this pass,
        in all MoE layers or one by one; a cache remembers none, so each pass over it is given its own. `task_ids` are
        the token ids of each sequence's task description, -100 behind shorter ones, for layers that route by task.
        """
        if input_ids.dim() != 2:
            raise ConfigError(f"input_ids has shape {tuple(input_ids.shape)} but must be (batch, length)")
        if padding_mask is not None and (padding_mask.dtype != torch.bool or padding_mask.shape != input_ids.shape):
            found, wanted = f"{padding_mask.dtype} {tuple(padding_mask.shape)}", f"torch.bool {tuple(input_ids.shape)}"
            raise ConfigError(f"padding_mask is {found} but must be {wanted}, true for tokens")
        if padding_mask is not None and bool((padding_mask[:, 1:] & ~padding_mask[:, :-1]).any()):
            raise ConfigError("padding_mask has padding before real tokens; pad on the right")
        if labels is not None or cache is not None:
            self.config.check_decoder("a loss on `labels`, the next tokens," if cache is None else "a cache")
        if labels is not None:
            if targets is not None:
                raise ConfigError("labels and targets are both given; labels are shifted by the model, targets are not")
            if padding_mask is not None:  # before the shift: the last real token predicts no padding
                labels = labels.masked_fill(~padding_mask, IGNORED)
            targets = torch.cat((labels[:, 1:], torch.full_like(labels[:, :1], IGNORED)), dim=1)
        if targets is not None and self.config.num_labels is not None:
            raise ConfigError(
                "targets are given but the model has num_labels: it scores sequences and predicts no words"
            )
        if targets is not None and targets.shape != input_ids.shape:
            found = f"{tuple(targets.shape)} but input_ids {tuple(input_ids.shape)}"
            raise ConfigError(f"{'targets' if labels is None else 'labels'} are {found}; give one for each token")
        if targets is not None and padding_mask is not None:
            targets = targets.masked_fill(~padding_mask, IGNORED)
        if cache is not None:
            if document_ids is not None:
                raise ConfigError("document_ids cannot be used with a cache; generate one document per sequence")
            self._check_places(cache)
        if prior_load is not None and len(prior_load) < (layers := len(self.config.moe_layers)):
            raise ConfigError(f"prior_load has {len(prior_load)} entries but must have {layers}, one per MoE layer")
        context = self._context(input_ids, cache, document_ids, padding_mask)
        real = None if padding_mask is None else padding_mask.flatten()
        probes = self._probes(probe)
        plain = RouterContext(
            input_ids.flatten(), len(input_ids), real, cache=cache, task=self._task(task_ids, len(input_ids))
        )
        x, delta = _embedded(self.embed_tokens, input_ids), None
        routings: list[Routing] = []
        aux: dict[str, Tensor] = {}
        together = at_once(self.layers, x, context, plain) if probes is None else None
        if together is not None:
            x, delta, choices = together
        for number, block in enumerate(self.layers):
            units = plain if probes is None else plain._replace(probe=probes[min(len(routings), len(probes) - 1)])
            if together is not None:
                routed = choices[number]
            elif self.recompute and self.training and cache is None:
                x, delta, routed = checkpoint(block, x, delta, context, units, use_reentrant=False)
            else:
                x, delta, routed = block(x, delta, context, units)
            if targets is not None or self.training:
                losses: dict[str, Tensor] = {}
                if isinstance(block.mlp, MoE):
                    losses = block.mlp.balance_losses(
                        routed[0], None if prior_load is None else prior_load[len(routings)]
                    )
                elif isinstance(block.mlp, VariantLayer):
                    losses = block.mlp.balance_losses(routed)
                for name, loss in losses.items():
                    aux[name] = aux[name] + loss if name in aux else loss
            routings += routed
        if cache is not None:
            length = input_ids.shape[1]
            counts = torch.full_like(cache.lengths, length) if padding_mask is None else padding_mask.sum(1)
            cache.advance(counts, length)
        hidden = x = add(self.norm, x, delta, exact=True).exact
        token_loss = loss_mean = logits = scores = None
        if targets is not None:
            token_loss = self.token_loss(x.flatten(0, 1), targets.flatten())
            loss_mean = token_loss.total / token_loss.tokens.clamp(min=1)
        if self.config.num_labels is not None:
            scores = self.score(x, padding_mask)
        elif return_logits and (targets is None or not self.training):
            if isinstance(logits_to_keep, int):
                if logits_to_keep < 0:
                    raise ConfigError(f"logits_to_keep is {logits_to_keep} but must be 0 or more")
                x = x[:, -logits_to_keep:]
            elif logits_to_keep is not None:
                x = x[torch.arange(len(x), device=x.device), logits_to_keep].unsqueeze(1)
            logits = self.lm_head(x)
        return ModelOutput(logits, loss_mean, aux, routings if return_routing else None, token_loss, hidden, scores)

    def token_loss(self, x: Float[Tensor, "tokens dim"], targets: Int[Tensor, " tokens"]) -> TokenLoss:
        """Returns the loss without ever holding its logits, unless the head has a bias, or somebody has hooked, wrapped
        or replaced it."""
        if untouched(Linear, self.lm_head) and self.lm_head.bias is None:
            return linear_cross_entropy(x, self.lm_head.numbers(x.dtype), targets)
        return cross_entropy(self.lm_head(x), targets)

    def _context(
        self, input_ids: Tensor, cache: KVCache | None, document_ids: Tensor | None, padding_mask: Tensor | None
    ) -> Context:
        batch, length = input_ids.shape
        limit = self.config.max_position_embeddings
        reached = length + (cache.longest if cache is not None else 0)
        if reached > limit:
            raise ConfigError(f"the sequence has {reached} tokens but max_position_embeddings is {limit}")
        if cache is None:
            positions = torch.arange(length, device=input_ids.device).expand(batch, length)
        else:
            positions = cache.positions(batch, length)
        attention = self.config.attention
        width = attention.head_dim if isinstance(attention, MHAConfig) else attention.qk_rope_head_dim
        if document_ids is not None:
            document_ids = as_documents(document_ids, batch, length)
        causal = self.config.causal
        visible = seen(positions, reached, document_ids) if causal else all_seen(document_ids, padding_mask)
        return Context(rotation(attention.rope, width, positions), positions, visible, cache)

    def _check_places(self, cache: KVCache) -> None:
        """Raises ConfigError unless each block has a place of its own in the cache: blocks may have been copied."""
        places = [block.self_attn.layer for block in self.layers if isinstance(block.self_attn, Attention | MLA)]
        if len({*places}) < len(places) or any(place >= cache.layers for place in places):
            found = f"the blocks' self_attn.layer are {places} and the cache has {cache.layers} layers"
            raise ConfigError(f"{found}; number the blocks anew, and give config.num_hidden_layers their number")

    def _task(self, task_ids: Tensor | None, batch: int) -> tuple[Tensor, Tensor] | None:
        """Returns the embedded descriptions and what of them is no padding; None where there is none."""
        if self.embed_task is None:
            if task_ids is not None:
                raise ConfigError("task_ids are given but no layer routes by task: ffn.kind meo with level task does")
            return None
        if task_ids is None:
            assert isinstance(self.config.ffn, MEOConfig)
            ids = self.config.ffn.description_ids
            if not ids:
                return None
            task_ids = torch.tensor(ids, device=self.embed_task.weight.device).expand(batch, -1)
        real = task_ids != IGNORED
        return self.embed_task(task_ids.where(real, 0)), real

    def _probes(self, probe: Probe | Sequence[Probe | None] | None) -> Sequence[Probe | None] | None:
        """Returns a probe per MoE layer, or None; raises ConfigError where one would have no layer."""
        if probe is None:
            return None
        layers = len(self.config.moe_layers)
        if not layers:
            raise ConfigError("probe is given but the model has no MoE layer, so there is no routing to alter")
        probes = [probe] * layers if isinstance(probe, Probe) else probe
        if len(probes) != layers:
            found = f"probe has {len(probes)} entries but the model has {layers} MoE layers"
            raise ConfigError(f"{found}; give one, or one for each")
        return probes

    def train(self, mode: bool = True) -> "Model":
        """Sets training or evaluation mode; UnsupportedError when weights in codes are to be trained."""
        if mode and self.quantization is not None:
            raise UnsupportedError(f"{self.quantization} weights are for inference; train the model they were made of")
        if mode and self.mapped:
            raise UnsupportedError("the weights are in mapped files, which is for inference; load it without `mapped`")
        super().train(mode)
        return self

    @property
    def moe_layers(self) -> list[MoE]:
        """The MoE layers, in the order of `ModelOutput.routing`."""
        return [module for module in self.modules() if isinstance(module, MoE)]

    @property
    def variant_layers(self) -> list[VariantLayer]:
        """The feed-forward layers of another paper."""
        return [module for module in self.modules() if isinstance(module, VariantLayer)]

    def set_experts_backend(self, backend: str, dtype: torch.dtype | None = None) -> None:
        """Sets how the experts' products are computed; UnsupportedError when that cannot run where the weights are, in
        `dtype` or, by default, in float32 or bfloat16."""
        for module in self.modules():  # an adapter may stand in a layer's place of them
            if isinstance(module, Experts):
                module.set_backend(backend, dtype)
        self.experts_backend = backend

    @torch.no_grad()
    def update_expert_bias(self, tokens_per_expert: Sequence[Int[Tensor, " experts"]]) -> None:
        """Moves each selection bias by `bias_update_speed`, given each MoE layer's load over the whole global batch.

        Call it once after each optimiser step; layers without a bias are passed over.
        """
        for layer, load in zip(self.moe_layers, tokens_per_expert, strict=True):
            if isinstance(layer.router, Router) and layer.router.expert_bias is not None:
                bias = layer.router.expert_bias
                bias.copy_(updated_bias(bias, load.to(bias.device), layer.config.bias_update_speed))

    def begin_step(self, step: int) -> None:
        """Tells the layers which optimiser step comes, counted from 0; some are another network in the first ones."""
        for layer in self.variant_layers:
            layer.begin_step(step)

    def end_step(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Tells the layers that the step was taken. Call both around each step, as `train.loop` does."""
        for layer in self.variant_layers:
            layer.end_step([optimizer.state for optimizer in optimizers])

    @torch.no_grad()
    def balance_hash(self, token_counts: Int[Tensor, " vocab"]) -> None:
        """Fills the hash tables that are to be balanced by token frequency."""
        ffn, vocab = self.config.ffn, self.config.vocab_size
        if isinstance(ffn, MoEConfig) and ffn.hash_method == "balanced":
            if len(token_counts) != vocab:
                raise ConfigError(f"token_counts has {len(token_counts)} entries but vocab_size is {vocab}")
            table = balanced_hash_table(token_counts, ffn.n_routed_experts, ffn.num_experts_per_tok)
            for module in self.modules():
                if isinstance(module, HashRouter):
                    module.fill(table)


as_written()
